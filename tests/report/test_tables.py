"""Tables: what they say, as data, and how they are drawn."""

import io
import sys

import pytest
from rich.console import Console

from bnfuse.changes import Decision
from bnfuse.fusion_plan import Plan
from bnfuse.reasons import Reason
from bnfuse.report.tables import Column, Table, decisions_table
from bnfuse.report.terminal import rich_table, show
from bnfuse.report.text import decisions_text, table_text

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
norm            kind            channels  decision
--------------  --------------  --------  --------
stem.1          BatchNorm2d           64  fused into stem.0
blocks[0].norm  BatchNormAct2d      1024  fused forward into a, b, c and 2 more
last            BatchNorm1d            8  kept: backward: aten.sin in middle: nothing is known of this \
operator; forward: it is an output of the model"""

SMALL = Table("a title", (Column("name"), Column("number", number=True)), (("[red]x", "1"), ("y", "10,000")))


def test_a_plan_as_text() -> None:
    assert decisions_text(PLAN.model, PLAN.decisions) == PLAN_TEXT
    assert str(PLAN) == PLAN_TEXT


def test_a_plan_without_norms_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert decisions_text("Net", ()) == "Net: no batch norm"
    show(decisions_table("Net", ()))
    assert capsys.readouterr().out == "Net: no batch norm\n\n"


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
    console.print(rich_table(decisions_table(PLAN.model, PLAN.decisions)), rich_table(SMALL))
    drawn = console.file.getvalue()
    assert "blocks[0].norm" in drawn
    assert "[red]x" in drawn
    assert max(map(len, drawn.splitlines())) <= 70


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
    assert captured.err == ("bnfuse: rich is not installed, so tables are plain text; run pip install 'bnfuse[cli]'\n")
