"""The census: rows that say what happened, whatever happens; files that outlive an interruption; the page."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnfuse.analysis.norms import is_norm
from bnfuse.errors import BnFuseError, InputError, VerificationError
from bnfuse.reasons import CAUSES
from bnfuse.restructuring.kinds import KINDS
from bnfuse.tools import zoo
from bnfuse.tools.census import page, rivals, run, worker
from bnfuse.tools.census.ledger import (
    FAILURES,
    FUSED,
    OUTCOMES,
    Kept,
    KeptReason,
    Ledger,
    Restructured,
    Rival,
    Row,
    read,
)
from bnfuse.tools.census.sweep import Sweep
from bnfuse.tools.census.worker import Job, Settings, visit
from bnfuse.tools.cli import main, parse_count
from bnfuse.tools.zoo import inputs as zoo_inputs
from bnfuse.verify.equivalence import NOISE_FACTOR

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ROWS = sorted((DOCS / "census").glob("*.jsonl*"))
RESTRUCTURED_ROWS = sorted((DOCS / "census" / "restructured").glob("*.jsonl*"))

NETWORKS = '''
import os, time
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4, act=nn.ReLU):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), act()
        self.last = nn.BatchNorm2d(width)

    def forward(self, x):
        return self.last(self.act(self.norm(self.conv(x)))).mean((2, 3))

class Odd(nn.Module):
    """Does something odd from its second run on: the first one finds the inputs."""
    def __init__(self, odd):
        super().__init__()
        self.conv, self.norm, self.odd, self.path = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), odd, str(id(self))

    def forward(self, x):
        os.environ[self.path] = os.environ.get(self.path, "") + "."
        if len(os.environ[self.path]) > 1:
            self.odd()
        return self.norm(self.conv(x))

def greedy():
    return [torch.zeros(2**26) for _ in range(200)]

class Shared(nn.Module):
    """One convolution, and a norm of its own behind each of its uses."""
    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.first(self.conv(x)).relu().mean() + self.second(self.conv(-x)).relu()

def shared(): return Shared()
def net(): return Net()
def twin(): return Net()
def wide(): return Net(8)
def bare(): return nn.Conv2d(3, 4, 3)
def hangs(): return Odd(lambda: time.sleep(1000))
def aborts(): return Odd(os.abort)
def eats(): return Odd(greedy)
def leaves(): return Odd(lambda: os._exit(3))
def like_lost(): return Odd(lambda: os._exit(255))
def broken(): raise RuntimeError("no such file")
def lost(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(7, 2), nn.BatchNorm1d(2))
def slow(): time.sleep(1000)
'''


@pytest.fixture
def networks(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "networks.py").write_text(NETWORKS)
    yield str(tmp_path / "networks.py")
    sys.modules.pop("networks", None)


# One model ------------------------------------------------------------------------------------------------------------


def test_a_row(networks: str) -> None:
    row = visit(Job(f"{networks}:net", "own"), Settings(rivals=True))
    assert (row.model, row.family, row.outcome, row.error) == ("net", "own", FUSED, None)
    assert (row.parameters, row.norms, row.executed, row.removed) == (4 * 27 + 4 + 16, 2, 2, 1)
    assert (row.input, row.other) == ("2x3x96x96", "3x3x128x128")
    [kept] = row.kept
    assert (kept.count, kept.norm) == (1, "last")
    refused = kept.reasons[0]  # the seed follows the path, so that all of the few scales may be positive
    assert (refused.direction, refused.operator) == ("backward", "relu")
    assert refused.code in ("no-negative-scale", "no-shift")
    assert kept.full.startswith(f"backward: relu in act (ReLU): {CAUSES[refused.code].text}")
    assert row.error64 is not None
    assert row.error64 < worker.EXACT
    assert row.own32
    assert row.error32
    assert row.error32 < 10 * row.own32
    assert (row.calibrated, row.alive, row.widened) == (True, True, False)
    assert set(row.seconds) == {"build", "run", "fuse", "verify", "check", "forward", "rivals", "total"}
    assert row.rivals["torch.fx"].removed == 1
    assert Row.of(json.loads(json.dumps(row.to_dict()))) == row


@pytest.mark.parametrize(
    ("factory", "outcome", "phase", "error"),
    [
        ("bare", "no norms", None, None),
        ("wide", "too large", None, None),
        ("broken", "cannot be built", "build", "no such file"),
        ("lost", "does not run", "run", "mat1 and mat2 shapes cannot be multiplied"),
    ],
)
def test_what_is_no_failure_of_ours(
    networks: str, factory: str, outcome: str, phase: str | None, error: str | None
) -> None:
    row = visit(Job(f"{networks}:{factory}", "own"), Settings(max_parameters=200))
    assert (row.outcome, row.phase) == (outcome, phase)
    assert (error or "") in (row.error or "")
    assert outcome not in FAILURES


def test_a_model_that_is_known(networks: str) -> None:
    rows = [visit(Job(f"{networks}:{name}", "own"), known=lambda _: "net") for name in ("net", "twin", "wide")]
    assert [(row.outcome, row.same_as) for row in rows] == [("same as", "net")] * 3
    assert rows[0].fingerprint == rows[1].fingerprint != rows[2].fingerprint


def test_a_row_of_a_restructured_network(networks: str) -> None:
    plain = visit(Job(f"{networks}:shared", "own"))
    assert (plain.removed, plain.restructured) == (1, None)
    row = visit(Job(f"{networks}:shared", "own"), Settings(restructure=True, infer_calls=False))
    assert (row.outcome, row.executed, row.removed, row.error) == (FUSED, 2, 2, None)
    assert row.restructured == Restructured(KINDS, 1, {"untie": 1}, {"untie": 1}, 112)
    assert row.error64 is not None
    assert row.error64 < worker.EXACT
    assert Row.of(json.loads(json.dumps(row.to_dict()))) == row


def test_a_wrong_step_is_found_on_other_inputs(networks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite = worker.rewrite

    def slightly_wrong(plan: Any, model: Any) -> Any:
        undo = rewrite(plan, model)
        with torch.no_grad():
            model.second.layer.bias += 1e-6
        return undo

    monkeypatch.setattr(worker, "rewrite", slightly_wrong)
    row = visit(Job(f"{networks}:shared", "own"), Settings(restructure=True))
    assert (row.outcome, row.phase) == ("wrong", "check")


def test_which_models_are_visited_once_more() -> None:
    stays = (Kept(1, (), "n", ""),)
    plain = {
        row.model: row
        for row in (
            Row("a", "f", FUSED, 1, executed=2, removed=2),
            Row("a2", "f", FUSED, 2, executed=2, removed=2),
            Row("b", "f", FUSED, 1, executed=2, removed=2),
            Row("c", "g", FUSED, 3, executed=2, removed=2),
            Row("d", "g", FUSED, 4, executed=2, removed=1, kept=stays),
            Row("e", "g", "crashed", 4),
        )
    }
    found = Row("a", "f", FUSED, 1, executed=2, removed=2, restructured=Restructured(KINDS, 2, {"merge": 1}))
    without = replace(found, restructured=Restructured(KINDS, 2))
    assert run.promising(plain, {"a": found}) == ["a", "a2", "d"]
    assert run.promising(plain, {"a": without}) == ["d"]
    assert not run._is_due(found, ())
    assert run._is_due(found, (FUSED,))
    assert run._is_due(None, ())
    assert run._is_due(replace(found, restructured=Restructured(("bake",), 2)), ())


def test_a_wrong_plan_is_found_on_other_inputs(networks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite = worker.rewrite

    def slightly_wrong(plan: Any, model: Any) -> Any:
        undo = rewrite(plan, model)
        with torch.no_grad():
            model.conv.bias += 1e-6
        return undo

    monkeypatch.setattr(worker, "rewrite", slightly_wrong)
    row = visit(Job(f"{networks}:net", "own"))
    assert (row.outcome, row.phase) == ("wrong", "check")
    assert "in float64, on 3x3x128x128: a relative error of" in (row.error or "")


@pytest.mark.parametrize(("mistake", "outcome"), [(0.0, FUSED), (1e-12, "wrong")])
def test_an_error_is_held_against_the_rounding_of_the_model(
    networks: str, monkeypatch: pytest.MonkeyPatch, mistake: float, outcome: str
) -> None:
    """Were 1e-17 the limit, every model would multiply its rounding beyond it; a mistake is still none of rounding."""
    rewrite = worker.rewrite

    def wrong(plan: Any, model: Any) -> Any:
        undo = rewrite(plan, model)
        with torch.no_grad():
            model.conv.bias += mistake
        return undo

    monkeypatch.setattr(worker, "rewrite", wrong)
    monkeypatch.setattr(worker, "EXACT", 1e-17)
    monkeypatch.chdir(Path(networks).parent)  # the seed follows the name
    row = visit(Job("networks.py:net", "own"))
    assert row.outcome == outcome
    assert row.noise64 is not None
    assert 1e-17 < row.noise64 < 1e-14


@pytest.mark.parametrize(
    ("error", "outcome"), [(VerificationError("not equal"), "wrong"), (IndexError("out of range"), "crashed")]
)
def test_failures_of_ours(networks: str, monkeypatch: pytest.MonkeyPatch, error: Exception, outcome: str) -> None:
    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(worker, "carry_out", fails)
    row = visit(Job(f"{networks}:net", "own"))
    assert (row.outcome, row.phase) == (outcome, "verify")
    assert row.error == f"{type(error).__name__}: {error}"
    assert row.outcome in FAILURES


class Flip(nn.Module):
    """Adds what float64 alone can see."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x.float() * (1 + self.size)


@pytest.mark.parametrize("size", [0.0, 1e-6])
def test_casts_in_the_code_are_widened(size: float) -> None:
    """A cast to float32 hides an error of 1e-6 no more than it makes one up."""
    x = (torch.linspace(0.1, 0.9, 50, dtype=torch.float64),)
    exact, error, widened = worker._in_float64(nn.Sequential(Flip(0.0)), nn.Sequential(Flip(size)), x)
    assert exact.dtype == torch.float64 or not widened
    assert error is not None
    assert (error <= worker.EXACT) == (size == 0)


# Many models ----------------------------------------------------------------------------------------------------------


def test_crashes_and_hangs_are_rows(networks: str, tmp_path: Path) -> None:
    names = ("net", "twin", "hangs", "aborts", "eats", "leaves", "like_lost", "broken", "slow")
    ledger = Ledger(tmp_path / "rows.jsonl", {"census": "own"})
    seen: list[str] = []
    settings = Settings(seconds=20, memory=6 * 2**30)
    sweep = Sweep("pytorchcv", ledger, settings, 1, lambda row: seen.append(row.model))
    sweep.run(
        [
            Job(f"{networks}:{name}", "own")
            for name in ("net", "twin", "aborts", "eats", "leaves", "like_lost", "broken")
        ]
    )
    sweep.settings = Settings(seconds=4)
    sweep.run([Job(f"{networks}:{name}", "own") for name in ("hangs", "slow")])
    ledger.close(names)
    _, rows, _ = read(tmp_path / "rows.jsonl")
    assert list(rows) == list(names)
    assert sorted(seen) == sorted(names)
    found = {name: (row.outcome, row.phase, row.error) for name, row in rows.items()}
    assert found["net"] == (FUSED, None, None)
    assert (rows["twin"].outcome, rows["twin"].same_as) == ("same as", "net")
    assert found["hangs"] == ("crashed", "fuse", "it took more than 4 s")
    assert found["aborts"] == ("crashed", "fuse", "it was ended by SIGABRT")
    assert found["leaves"] == ("crashed", "fuse", "it ended with status 3")
    assert found["like_lost"] == ("crashed", "fuse", "it ended with status 255")  # after three attempts
    assert found["eats"][:2] == ("crashed", "fuse")
    assert "can't allocate memory" in (found["eats"][2] or "")
    assert found["slow"] == ("cannot be built", "build", "it took more than 4 s")
    assert found["broken"][0] == "cannot be built"


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A part of a zoo, then the rest of the part, then the sample."""
    output = tmp_path / "rows.jsonl.gz"
    command = ["census", "pytorchcv", "--jobs", "1", "--max-params", "6M", "--output", str(output)]
    assert main([*command, "--match", "resnet10"]) == 0
    first = capsys.readouterr()
    assert first.out == f"1 of 1 models: 1 fused; {output}\n"
    assert first.err.startswith("1/1, 0 min left: resnet10: fused, 12 of 12 norms removed, ")
    assert main([*command, "--match", "resnet1[08]"]) == 0
    second = capsys.readouterr()
    assert second.out == f"2 of 2 models: 1 fused, 1 too large; {output}\n"
    assert "resnet10" not in second.err
    assert main([*command, "--match", "resnet1[08]", "--sample"]) == 0
    headings, rows, clean = read(output)
    assert clean
    assert [heading["census"] for heading in headings] == ["pytorchcv"]
    assert rows["resnet10"].rivals["torch.fx"].removed == 12
    capsys.readouterr()
    assert main([*command, "--match", "resnet1[08]", "--sample"]) == 0
    assert capsys.readouterr().err == ""


def test_command_of_restructuring(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.jsonl.gz"
    command = ["census", "pytorchcv", "--jobs", "1", "--match", "preresnet20_cifar10", "--output", str(output)]
    assert main([*command, "--restructure"]) == 2
    assert f"there is no {output}" in " ".join(capsys.readouterr().err.split())
    ledger = Ledger(output, {"census": "pytorchcv"})
    ledger.add(Row("preresnet20_cifar10", "preresnet_cifar", FUSED, 3, executed=19, removed=12))
    ledger.close()
    before = output.read_bytes()
    assert main([*command, "--restructure"]) == 0
    assert output.read_bytes() == before
    headings, rows, clean = read(tmp_path / "restructured" / "rows.jsonl.gz")
    assert clean
    assert headings[0]["kinds"] == list(KINDS)
    [row] = rows.values()
    assert row.restructured is not None
    assert (row.executed, row.restructured.plain) == (19, 12)
    assert (row.removed or 0) >= 12
    capsys.readouterr()
    assert main([*command, "--restructure"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--match", "resnet_1*"], "no model of timm matches 'resnet_1*'; they are named like "),
        (["--match", "resnet18", "--jobs", "0"], "--jobs takes a number from 1 up; got 0"),
    ],
)
def test_commands_that_make_no_sense(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["census", "timm", "--output", str(tmp_path / "rows.jsonl"), *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "rows.jsonl").exists()


def test_counts() -> None:
    assert [parse_count(text) for text in ("7", "20k", "150M", "1G")] == [7, 20_000, 150_000_000, 10**9]
    for text in ("", "M", "0", "1.5M", "150 M", "150m"):
        with pytest.raises(InputError) as caught:
            parse_count(text)
        assert str(caught.value) == f"{text!r} is no count: write a whole number, such as 150M or 150000000"


# Files ----------------------------------------------------------------------------------------------------------------

FULL = Row(
    "a", "f", FUSED, 3, "1x3x8x8", "2x3x8x8", 2, 2, 0,
    (Kept(2, (KeptReason("backward", "relu", "no-negative-scale"),), "n", "backward: relu in n"),),
    1e-12, True, 1e-6, 2e-6, {"total": 1.5}, "abc", None, False, False, None, None,
    {"torch.fx": Rival(1, None, "")},
)  # fmt: skip


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    ledger = Ledger(path, {"census": "own", "torch": "1"})
    for row in (Row("b", "f", "crashed"), FULL, Row("b", "f", "no norms")):
        ledger.add(row)
        assert read(path)[1][row.model] == row  # before the file is closed
    assert not read(path)[2]
    ledger.close(["a", "b"])
    assert read(path) == ([{"census": "own", "torch": "1"}], {"a": FULL, "b": Row("b", "f", "no norms")}, True)
    assert list(read(path)[1]) == ["a", "b"]
    before = path.read_bytes()
    Ledger(path, {"census": "own", "torch": "1"}).close()
    assert path.read_bytes() == before
    Ledger(path, {"census": "own", "torch": "2"}).close()
    assert read(path)[0] == [{"census": "own", "torch": "1"}, {"census": "own", "torch": "2"}]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize("cut", [1, 5, 30])
def test_torn_line(name: str, cut: int, tmp_path: Path) -> None:
    path = tmp_path / name
    ledger = Ledger(path, {"census": "own"})
    ledger.add(FULL)
    ledger.add(Row("b", "f", "crashed", error="a long error, of which a part may be missing"))
    ledger.file.close()
    path.write_bytes(path.read_bytes()[:-cut])
    ledger = Ledger(path, {"census": "own"})
    assert ledger.rows["a"] == FULL
    ledger.add(Row("c", "f", "no norms"))
    assert [row.model for row in read(path)[1].values()][0 :: 2 if "b" in ledger.rows else 1] == ["a", "c"]
    ledger.close()
    assert read(path)[2]


@pytest.mark.parametrize("content", ["no rows\n{}\n", '{"other": 1}\n', '[1]\n{"model": "a"}\n'])
def test_what_is_no_file_of_rows(content: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(BnFuseError, match="is no file of a census: line 1 is n"):
        read(tmp_path / "rows.jsonl")


# Other tools ----------------------------------------------------------------------------------------------------------


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) if x.mean() < 100 else x


class OtherAxis(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


@pytest.mark.parametrize(
    ("model", "shape", "verdict", "removed"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)), (1, 3, 5, 5), "right", 1),
        (OtherAxis(), (2, 4, 4), "wrong", 1),
        (Branch(), (1, 3, 5, 5), "failed", None),
    ],
)
def test_torch_fx(model: nn.Module, shape: tuple[int, ...], verdict: str, removed: int | None) -> None:
    zoo.randomise_(model.double()).eval()
    x = torch.randn(shape, dtype=torch.float64)
    [(name, rival)] = rivals.run_all(model, (x,), model(x), False).items()
    row = Row("a", "f", FUSED, rivals={name: rival})
    assert (name, page._verdict(row), rival.removed) == ("torch.fx", verdict, removed)


# Reasons and the page -------------------------------------------------------------------------------------------------


HEADING = {"census": "own", "bnfuse": "1", "max_parameters": 10**6, "seconds": 3, "memory": 2**30}


def test_a_reason_that_nobody_knows(tmp_path: Path) -> None:
    (tmp_path / "census").mkdir()
    odd = Kept(1, (KeptReason("backward", None, "it-is-tuesday"),), "n", "it is Tuesday")
    ledger = Ledger(tmp_path / "census" / "own.jsonl", HEADING)
    ledger.add(Row("a", "f", FUSED, 3, norms=1, executed=1, removed=0, kept=(odd,)))
    ledger.close()
    with pytest.raises(BnFuseError, match="no cause has the code 'it-is-tuesday'"):
        page.page(tmp_path)


ROWS_OF_A_PAGE = (
    FULL,
    Row("b", "f", "same as", same_as="a"),
    Row("c", "g", "crashed", phase="fuse", error="it took | more than 3 s"),
    Row("d", "g", "too large", 10**9),
    Row("e", "g", FUSED, 5, executed=3, removed=3, rivals={"torch.fx": Rival(4, 1e-12)}),
)


RESTRUCTURED_ROWS_OF_A_PAGE = (
    replace(
        FULL, removed=1, error64=2e-12, own32=None, restructured=Restructured(KINDS, 0, {"untie": 2}, {"untie": 1}, 6)
    ),
    Row("e", "g", FUSED, 5, executed=3, removed=3, restructured=Restructured(KINDS, 3, {"merge": 3}, {}, -1)),
    Row("c", "g", "wrong", phase="check", error="off", restructured=Restructured(KINDS, 0)),
    Row("d", "g", FUSED, 9, executed=30, removed=30, restructured=Restructured(("of", "before"), 0, {"of": 1})),
)


def test_a_page(tmp_path: Path) -> None:
    (tmp_path / "census").mkdir()
    with pytest.raises(BnFuseError, match="run bnfuse census ZOO"):
        page.page(tmp_path)
    ledger = Ledger(tmp_path / "census" / "own.jsonl", HEADING)
    for row in ROWS_OF_A_PAGE:
        ledger.add(row)
    ledger.close()
    (tmp_path / "census" / "derivations.md").write_text("## By hand\n\nNothing.\n")
    (tmp_path / "census" / "restructured").mkdir()
    ledger = Ledger(tmp_path / "census" / "restructured" / "own.jsonl", {**HEADING, "kinds": list(KINDS)})
    for row in RESTRUCTURED_ROWS_OF_A_PAGE:
        ledger.add(row)
    ledger.close()
    assert page.main([str(tmp_path)]) == 0
    text = (tmp_path / "census.md").read_text()
    assert "5 names; 3 of the 5 batch norms that ran are gone\n(60.0%); bnfuse failed on 1." in text
    assert "| own | 5 | 2 | 0 | 1 | 1 | 0 | 0 | 0 | 1 |" in text
    assert "| own | 2 | 5 | 3 | 4 | 1 | 0 | 1 |" in text  # torch.fx: one wrong, one with a norm more
    assert "| 2 | 1 | `relu`: no negative scale passes through it |  |  | `own:a`, `n` |" in text
    assert "`relu(-x)` is not `-relu(x)`" in text
    assert "| `c` | crashed | fuse | it took \\| more than 3 s |" in text
    assert "1 models: `d`." in text
    assert "## By hand" in text
    assert "These were 1 of the 1 models in which norms stay, and 2 others." in text
    assert "| own | 3 | 2 | 5 | 2 | 1 | 1 | 0 | 2e-12 |  |" in text
    assert "| `untie` | 1 | 2 | 1 |\n| `merge` | 1 | 3 | 0 |" in text
    assert "Mistakes of bnfuse: `own:c` (check: off)." in text
    steps = " | ".join("2" if kind == "untie" else "" for kind in KINDS)
    assert f"| own | f | 1 | 2 | 2 | 1 | {steps} | +200.0% | `a` |" in text
    assert "| f | 2 | 1 | 1 | 0 | 0 | 2 | 0 | 2 | 1 | 1e-12 |" in text


@pytest.mark.skipif(not ROWS, reason="no census has been made")
def test_the_page_is_that_of_the_rows() -> None:
    assert (DOCS / "census.md").read_text() == page.page(DOCS), (
        "run make census, or python -m bnfuse.tools.census.page docs"
    )


@pytest.mark.skipif(not ROWS, reason="no census has been made")
@pytest.mark.parametrize("path", ROWS, ids=lambda path: path.name.partition(".")[0])
def test_rows_of_the_census(path: Path) -> None:
    headings, rows, clean = read(path)
    assert clean
    names = set(zoo.names(headings[-1]["census"]))
    for row in rows.values():
        assert row.model in names
        assert row.outcome in OUTCOMES
        if row.outcome == FUSED:
            assert row.error64 is not None
            assert row.error64 <= max(worker.EXACT, NOISE_FACTOR * (row.noise64 or 0.0))
            assert (row.removed or 0) + sum(kept.count for kept in row.kept) == row.executed
            for rival in row.rivals.values():
                right = rival.error is not None and rival.error <= page.RIVAL_EXACT
                assert not right or (rival.removed or 0) <= (row.removed or 0), row.model
        if row.outcome == "same as":
            assert rows[row.same_as or ""].outcome == FUSED


@pytest.mark.parametrize("path", RESTRUCTURED_ROWS, ids=lambda path: path.name.partition(".")[0])
def test_restructured_rows_of_the_census(path: Path) -> None:
    """They belong to the plain ones, are right, and no step costs a norm."""
    headings, rows, clean = read(path)
    assert clean
    assert all(kind in KINDS for kind in headings[-1]["kinds"])
    _, plain, _ = read(path.parents[1] / path.name)
    for row in rows.values():
        assert row.outcome == FUSED, f"{row.model}: {row.error}"
        assert row.executed == plain[row.model].executed
        assert row.restructured is not None
        assert (row.removed or 0) >= row.restructured.plain >= (plain[row.model].removed or 0)
        assert row.error64 is not None
        assert row.error64 <= max(worker.EXACT, NOISE_FACTOR * (row.noise64 or 0.0))


# The sample -----------------------------------------------------------------------------------------------------------

SECONDS = 45.0
"""What the models of the sample took in the census; a slower machine takes longer. BNFUSE_CENSUS=sample takes all."""


def stratified() -> list[tuple[str, Row]]:
    """The smallest model of each family, the quickest families first, as far as the time goes."""
    found = []
    for path in ROWS:
        headings, rows, _ = read(path)
        found += [(headings[-1]["census"], row) for row in run.sampled(rows).values()]
    found.sort(key=lambda item: (item[1].seconds["total"] - item[1].seconds.get("rivals", 0.0), item[1].model))
    if os.environ.get("BNFUSE_CENSUS") == "sample":
        return found
    spent = 0.0
    chosen = []
    for name, row in found:
        spent += row.seconds["total"]
        if spent > SECONDS:
            break
        chosen.append((name, row))
    return chosen


@pytest.mark.parametrize(("name", "expected"), stratified(), ids=lambda item: getattr(item, "model", item))
def test_sample(name: str, expected: Row) -> None:
    """At least as many norms go as when the census was made, of the recorded call alone, and nothing else changes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the zoos
        row = visit(Job(f"{name}:{expected.model}", expected.family), Settings(infer_calls=False))
    assert (row.outcome, row.error) == (FUSED, None)
    assert (row.norms, row.executed) == (expected.norms, expected.executed)
    assert (row.removed or 0) >= (expected.removed or 0)


# Inputs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", zoo_inputs.TABLE)
def test_table_of_inputs(place: str) -> None:
    form = zoo_inputs.TABLE[place]
    sample = next(zoo_inputs.samples(nn.Identity(), form))
    assert zoo_inputs.shapes(sample.args)
    assert zoo_inputs.shapes(list(sample.others(1))[-1]) == sample.shapes
    assert not torch.equal(*(first_tensor(args) for args in (sample.args, list(sample.others(1))[-1])))


def first_tensor(args: Any) -> Tensor:
    return args if isinstance(args, Tensor) else first_tensor(args[0])


def test_images() -> None:
    conv = nn.Sequential(nn.Conv2d(3, 4, 3))
    conv.in_size = (480, 320)
    sizes = [sample.shapes for sample in zoo_inputs.samples(conv, None)]
    assert sizes[:2] == ["2x3x144x96", "1x3x480x320"]
    others = [zoo_inputs.shapes(args) for args in next(zoo_inputs.samples(conv, None)).others(1)]
    assert others == ["3x3x176x128", "2x3x176x128", "3x3x144x96", "2x3x144x96"]
    odd = [sample.shapes for sample in zoo_inputs.samples(nn.Conv2d(6, 4, 3), None)]
    assert odd[:2] == ["2x6x96x96", "2x3x96x96"]  # a first layer that is given two pieces of the image
    conv.default_cfg = {"input_size": (3, 256, 256), "fixed_input_size": True}
    assert next(zoo_inputs.samples(conv, None)).shapes == "1x3x256x256"


def test_networks_come_alive() -> None:
    """Every norm of a network is far from the identity, and its activations stay as large as in training."""
    model = nn.Sequential(*(layer for _ in range(20) for layer in (nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))))
    zoo.wake_(zoo.randomise_(model, dead=0.0)).eval()
    with torch.no_grad():
        for conv in model[::2]:
            conv.weight *= 4
    x = torch.randn(2, 4, 8, 8)
    assert model(x).std() > 10
    flags = [(norm.momentum, norm.training) for norm in model.modules() if is_norm(norm)]
    zoo.calibrate_(model, x)
    assert 0.3 < model(x).std() < 3
    assert flags == [(norm.momentum, norm.training) for norm in model.modules() if is_norm(norm)]


def test_an_interrupted_census_continues(tmp_path: Path) -> None:
    """SIGTERM, as Ctrl-C, ends it between two rows; nothing that was done is done again."""
    output = tmp_path / "rows.jsonl"
    command = [
        "-c",
        "import sys; from bnfuse.tools.cli import main; sys.exit(main(sys.argv[1:]))",
        "census",
        "pytorchcv",
    ]
    options = ["--jobs", "1", "--match", "resnet20_*", "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, *command, *options], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stderr is not None
    first = process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert first.startswith("1/3, ")
    assert "interrupted: the same command continues\n" in errors
    before = read(output)[1]
    assert "resnet20_cifar10" in before
    assert len(before) < 3
    assert main(["census", "pytorchcv", *options]) == 0
    after = read(output)[1]
    assert list(after) == ["resnet20_cifar10", "resnet20_cifar100", "resnet20_svhn"]
    assert after["resnet20_cifar10"] == before["resnet20_cifar10"]


@pytest.mark.skipif(not ROWS, reason="no census has been made")
def test_the_thirty_derivations_are_those_drawn() -> None:
    text = (DOCS / "census" / "derivations.md").read_text()
    table, rest = text.split("Most norms that stay belong")
    derived = re.findall(r"^\| `(\w+:\S+)`, `(\S+)` \|", table, re.MULTILINE)
    _, could_go = rest.split("### Norms that could go instead")
    families = re.findall(r"\(`(\w+)`\)", could_go)
    lots = page.drawn(page.zoos_in(DOCS), 40)
    others = [(f"{name}:{row.model}", kept.norm) for name, row, kept in lots if row.family not in families]
    assert derived == others[:30]


@pytest.mark.skipif(not ROWS, reason="no census has been made")
def test_a_row_that_is_gone_changes_no_other_lot() -> None:
    zoos = page.zoos_in(DOCS)
    lots = page.drawn(zoos, 10)
    name, row, _ = lots[0]
    fewer = [replace(zoo, rows=[other for other in zoo.rows if zoo.name != name or other is not row]) for zoo in zoos]
    left = [lot for lot in lots if lot[1] is not row]
    assert page.drawn(fewer, len(left)) == left
    assert page.drawn(zoos, 10, seed=1) != lots


@pytest.mark.skipif(not ROWS, reason="no census has been made")
def test_every_norm_of_the_derivations_stays() -> None:
    text = (DOCS / "census" / "derivations.md").read_text()
    derived = re.findall(r"^\| `(\w+):(\S+)`, `(\S+)` \|", text, re.MULTILINE)
    assert len(derived) == len(set(derived)) == 39
    rows = {headings[-1]["census"]: found for headings, found, _ in map(read, ROWS)}
    gone = [item for item in derived if item[2] not in {kept.norm for kept in rows[item[0]][item[1]].kept}]
    assert not gone, f"these norms have gone, so their derivations are wrong: {gone}"
