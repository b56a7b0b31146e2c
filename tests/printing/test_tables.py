"""Tables: what they say, as data, and how they are drawn."""

import io
import re
import sys

import pytest
from rich.console import Console

from bnfuse.changes import Decision
from bnfuse.fusion_plan import Plan
from bnfuse.printing.tables import Column, Table, decisions_table, fused_table, kept_groups
from bnfuse.printing.terminal import rich_table, show, show_plan
from bnfuse.printing.text import cells, message_text, plan_text, table_text, wrapped
from bnfuse.reasons import Reason

PLAN = Plan(
    model="Net",
    decisions=(
        Decision("stem.1", "BatchNorm2d", 64, True, "backward", ("stem.0",)),
        Decision("blocks[0].norm", "BatchNormAct2d", 1024, True, "forward", ("a", "b", "c", "d", "e")),
        Decision(
            "last",
            "BatchNorm1d",
            8,
            False,
            reasons=(
                Reason("unknown", "nothing is known of this operator", "aten.sin", "middle", "backward"),
                Reason("is-output", "it is an output of the model", direction="forward"),
            ),
        ),
    ),
)

PLAN_TEXT = """\
Net: 3 batch norms, 2 fused, 1 kept
norm            kind            channels  fused into
--------------  --------------  --------  ----------
stem.1          BatchNorm2d           64  stem.0
blocks[0].norm  BatchNormAct2d      1024  forward: a, b, c and 2 more
kept: last
  backward: aten.sin in middle: nothing is known of this operator
  forward: it is an output of the model"""

ALL_TEXT = """\
Net: 3 batch norms, 2 fused, 1 kept
norm            kind            channels  decision
--------------  --------------  --------  --------
stem.1          BatchNorm2d           64  fused into stem.0
blocks[0].norm  BatchNormAct2d      1024  fused forward into a, b, c and 2 more
last            BatchNorm1d            8  kept: backward: aten.sin in middle: nothing is known of this \
operator; forward: it is an output of the model"""

SMALL = Table("a title", (Column("name"), Column("number", number=True)), (("[red]x", "1"), ("y", "10,000")))


def kept(norm: str, *reasons: Reason) -> Decision:
    return Decision(norm, "BatchNorm2d", 4, False, reasons=reasons)


def test_a_plan_as_text() -> None:
    assert plan_text(PLAN.model, PLAN.decisions) == PLAN_TEXT
    assert str(PLAN) == PLAN_TEXT
    assert PLAN.table() == ALL_TEXT


def test_a_plan_without_norms_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_text("Net", ()) == "Net: no batch norm"
    show_plan("Net", ())
    assert capsys.readouterr().out == "Net: no batch norm\n\n"


def test_norms_that_stay_for_the_same_reason_stand_together() -> None:
    pool = Reason("negative", "no negative scale passes", "max_pool2d", "stem.pool (MaxPool2d)", "backward")
    decisions = [
        kept(
            f"stages.{place}.norm1",
            pool,
            Reason("negative", "no negative scale passes", "relu", f"stages.{place}.act (ReLU)", "forward"),
        )
        for place in range(9)
    ]
    decisions.insert(3, kept("head", Reason("is-output", "it is an output of the model")))
    assert plan_text("Net", decisions) == (
        "Net: 10 batch norms, 0 fused, 10 kept\n"
        "kept, 9 norms: stages.0.norm1, stages.1.norm1, stages.2.norm1, stages.3.norm1,\n"
        "    stages.4.norm1, stages.5.norm1 and 3 more\n"
        "  backward: max_pool2d in stem.pool (MaxPool2d): no negative scale passes\n"
        "  forward: relu in stages.*.act (ReLU): no negative scale passes\n"
        "kept: head\n"
        "  it is an output of the model"
    )
    [first, second] = kept_groups(decisions)
    assert (len(first.norms), second.norms) == (9, ("head",))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("conv2d in a", "conv1d in a"),
        ("BatchNorm2d in a", "BatchNorm3d in a"),
        ("it holds int32", "it holds int64"),
        ("relu in a.0", "silu in a.0"),
    ],
)
def test_what_differs_in_more_than_the_place_stays_apart(one: str, other: str) -> None:
    decisions = [kept("x", Reason("code", one)), kept("y", Reason("code", other))]
    assert [group.reasons for group in kept_groups(decisions)] == [(one,), (other,)]


def test_long_names_and_long_reasons_fit_the_width() -> None:
    long = "backbone." * 12 + "norm"
    decisions = (
        Decision(long, "BatchNormAct2d", 64, True, "backward", (long + "_layer", "x" * 100)),
        kept(long, Reason("code", "y" * 200, "relu", long)),
    )
    for width in (80, 60):
        text = plan_text("Net" * 40, decisions, ("z " * 60 + long,), width)
        assert max(map(len, text.splitlines())) <= width
        squeezed = "".join(text.split())
        for whole in (*("y" * 200, "z" * 60, f"not seen: {'z' * 60}{long}".replace(" ", "")),):
            assert whole in squeezed
    for line in plan_text("Net", decisions[:1]).splitlines()[3:]:
        assert len(line.split()[0]) <= 40


def test_a_folded_cell_is_whole() -> None:
    names = ["backbone.stages.10.blocks.20.convolution.norm", "layer " * 10 + "end"]
    drawn = table_text(
        Table("t", (Column("name"), Column("n", True), Column("layers")), ((names[0], "7", names[1]),)), 50
    )
    lines = drawn.splitlines()
    assert max(map(len, lines)) <= 50
    room = len(lines[2].split()[0])
    assert "".join(line[:room].strip() for line in lines[3:]) == names[0]
    assert all(line[:room].rstrip().endswith(".") for line in lines[3:-1] if line[:room].strip()[-4:] != "norm")
    assert drawn.count("layer") == 11  # the heading too


def test_one_row_for_each_norm() -> None:
    table = decisions_table(PLAN.model, PLAN.decisions)
    assert [row[0] for row in table.rows] == [decision.norm for decision in PLAN.decisions]
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_text_is_aligned_numbers_to_the_right() -> None:
    assert table_text(SMALL) == (
        "a title\n"
        "name    number\n"
        "------  ------\n"
        "[red]x       1\n"
        "y       10,000"
    )  # fmt: skip


def test_rich_draws_every_cell_and_reads_no_markup() -> None:
    console = Console(file=io.StringIO(), width=70)
    long = (Decision("backbone." * 12 + "norm", "BatchNormAct2d", 64, True, "backward", ("stem." * 20,)),)
    tables = (decisions_table(PLAN.model, PLAN.decisions), fused_table("Net", long), SMALL)
    console.print(*(rich_table(table, 70) for table in tables))
    drawn = console.file.getvalue()
    assert "blocks[0].norm" in drawn
    names = [line.split()[0] for line in drawn.splitlines() if line.strip().startswith("backbone.")]
    assert all(name.endswith((".", "norm")) for name in names)  # broken behind a point, as in plain text
    assert "[red]x" in drawn
    assert max(map(len, drawn.splitlines())) <= 70


def test_a_terminal_says_what_a_pipe_says(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    unseen = ("mode was never given another value " * 4,)
    show_plan(PLAN.model, PLAN.decisions, unseen)
    plain = capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show_plan(PLAN.model, PLAN.decisions, unseen)
    drawn = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    words = [text for text in plain.split() if set(text) != {"-"}]
    assert [text for text in drawn.split() if set(text) != {"─"}] == words
    assert max(map(len, (plain + drawn).splitlines())) <= 80


def test_a_pipe_gets_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    show(SMALL)
    assert capsys.readouterr().out == table_text(SMALL) + "\n\n"


def test_a_terminal_gets_rich_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show(SMALL)
    drawn = capsys.readouterr().out
    assert "[red]x" in drawn
    assert drawn != table_text(SMALL) + "\n\n"


def test_a_terminal_without_rich_gets_plain_text_and_a_hint(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for module in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "rich", None)
    show(SMALL)
    captured = capsys.readouterr()
    assert captured.out == table_text(SMALL) + "\n\n"
    assert captured.err == (
        "bnfuse: rich is not installed, so tables are plain text; run\n    pip install 'bnfuse[cli]'\n"
    )


# Messages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("too long for a line of twenty", ["too long for a line", "    of twenty"]),
        ("it is 'one quoted text of words' here", ["it is", "    'one quoted text of words'", "    here"]),
        ("the model's own and the file's own", ["the model's own and", "    the file's own"]),
        ("say bnfuse.fuse(model, (x, y), inplace=True) now", ["say", "    bnfuse.fuse(model, (x, y), inplace=True)", "    now"]),
        ("write a few more: --input 1x3x8x8.", ["write a few more:", "    --input 1x3x8x8."]),
        ("as --call 'encode flag=true' says", ["as", "    --call 'encode flag=true'", "    says"]),
        ("to read it run pip install 'bnfuse[cli]' more", ["to read it run", "    pip install 'bnfuse[cli]' more"]),
        ("no file /a/path/that/is/longer/than/a/line/is", ["no file", "    /a/path/that/is/longer/than/a/line/is"]),
        ("/a/path/that/is/longer/than/a/line/is is not there", ["/a/path/that/is/longer/than/a/line/is", "    is not there"]),
        ("", [""]),
    ],
)  # fmt: skip
def test_messages_are_wrapped_and_what_is_to_be_copied_is_not(text: str, lines: list[str]) -> None:
    assert message_text(text, 20).split("\n") == lines
    assert message_text(text, 200) == text
    assert re.sub("\n    ", " ", message_text(text, 20)) == text


def test_indented_lines_are_wrapped_behind_their_labels() -> None:
    text = """first line
  got:      a value that is long
  expected: quite another one
  f(x, g(h(i(1, 2), 3), 4), 5)
  as long as it goes on and on"""
    lines = """first line
  got:      a value that
            is long
  expected: quite
            another one
  f(x, g(h(i(1, 2), 3), 4), 5)
  as long as it goes on
    and on"""
    assert message_text(text, 24) == lines
    assert message_text(text, 80) == text


def test_wide_characters_take_two_columns() -> None:
    assert [cells("ab"), cells("卷积"), cells("e\u0301")] == [2, 4, 1]
    for width in (13, 20, 80):
        lines = wrapped("卷积" * 60 + " 层" * 60, width).splitlines()
        assert max(map(cells, lines)) <= width
        assert sum(line.count("卷") for line in lines) == 60
        assert sum(line.count("层") for line in lines) == 60
    rows = (("卷积" * 30 + ".bn", "1"), ("y", "10,000"))
    drawn = table_text(Table("t", (Column("name"), Column("number", number=True)), rows), 40).splitlines()
    assert max(map(cells, drawn)) <= 40
    assert {cells(line) for line in drawn if line[-1].isdigit()} == {40}


@pytest.mark.parametrize("width", [0, 1, 12, 13, 30])
def test_a_width_that_is_hardly_one_loses_nothing(width: int) -> None:
    text = "one " + "x" * 100 + " two " + "y" * 30
    lines = wrapped(text, width, indent=2).splitlines()
    assert "".join("".join(lines).split()) == text.replace(" ", "")
    assert max(map(len, lines)) <= max(width, 12)
