"""Every way by which a model comes to bnfuse and goes on from it, tried on several networks.

python -m bnfuse.tools.ways

prints for each way and network how far the outputs lie from those of the original, in float64; ``--page FILE`` puts the
table into a page between its marks.
"""

from __future__ import annotations

import argparse
import copy
import json
import pickle
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import bnfuse
from bnfuse.model.describe import first_line
from bnfuse.printing.tables import Column, Table
from bnfuse.printing.text import table_text
from bnfuse.tools import zoo
from bnfuse.verify.measure import compare_outputs

NETWORKS = (
    "torchvision:resnet18",
    "torchvision:densenet121",
    "timm:mobilenetv3_small_050",
    "timm:ghostnet_050",
)
SIZE = 64
"""Height and width of the images (pixels)."""

_AS_RECORDED = bnfuse.Options(infer_calls=False)

_BEGIN, _END = "<!-- made by `python -m bnfuse.tools.ways --page`: do not edit -->", "<!-- end -->"


@dataclass(frozen=True)
class Case:
    """One network that is taken along every way.

    Attributes:
        build: makes it afresh, with other random weights.
        original: the network before, in float64 and evaluation mode.
        fused: what ``bnfuse.fuse`` made of it.
        x: its input.
        folder: where files go.
    """

    build: Callable[[], nn.Module]
    original: nn.Module
    fused: nn.Module
    x: Tensor
    folder: Path


Runnable = Callable[[Tensor], Any]


def _saved(case: Case) -> Runnable:
    bnfuse.save(case.fused, case.folder / "fused.safetensors")
    return bnfuse.load(case.build(), case.folder / "fused.safetensors")


def _saved_for_meta(case: Case) -> Runnable:
    bnfuse.save(case.fused, case.folder / "fused.safetensors")
    with torch.device("meta"):
        empty = case.build()
    return bnfuse.load(empty, case.folder / "fused.safetensors")


def _state_dict(case: Case) -> Runnable:
    said = json.dumps(bnfuse.structure(case.fused).to_dict())
    fresh = bnfuse.restructure(case.build(), json.loads(said)).double().eval()
    fresh.load_state_dict(case.fused.state_dict())
    return fresh


def _whole(case: Case) -> Runnable:
    torch.save(case.fused, case.folder / "fused.pt")
    loaded: nn.Module = torch.load(case.folder / "fused.pt", weights_only=False)
    return loaded


def _exported(case: Case) -> Runnable:
    program = torch.export.export(case.fused, (case.x,))
    torch.export.save(program, case.folder / "fused.pt2")
    return torch.export.load(case.folder / "fused.pt2").module()


def _traced(case: Case) -> Runnable:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and remarks on sizes that it takes for constants
        traced: nn.Module = torch.jit.trace(case.fused, (case.x,), check_trace=False)
    return traced


def _compiled(case: Case) -> Runnable:
    torch._dynamo.reset()
    compiled: Runnable = torch.compile(case.fused, backend="aot_eager")
    return compiled


def _averaged(case: Case) -> Runnable:
    averaged = torch.optim.swa_utils.AveragedModel(case.fused)
    averaged.update_parameters(case.fused)
    return averaged.module


def _unfused(case: Case) -> Runnable:
    kept = bnfuse.fuse(case.original, case.x, options=replace(_AS_RECORDED, reversible=True))
    return bnfuse.unfuse(kept)


def _in_place(case: Case) -> Runnable:
    return bnfuse.fuse(copy.deepcopy(case.original), case.x, inplace=True, options=_AS_RECORDED)


def _traced_by_fx(case: Case) -> Runnable:
    return bnfuse.fuse(torch.fx.symbolic_trace(case.original), case.x, options=_AS_RECORDED)


def _program(case: Case) -> Runnable:
    """A program of torch.export, whose norms are calls in a graph."""
    return _module(torch.export.export(case.original, (case.x,)))


def _decomposed(case: Case) -> Runnable:
    return _module(torch.export.export(case.original, (case.x,)).run_decompositions())


def _module(program: torch.export.ExportedProgram) -> nn.Module:
    made: nn.Module = bnfuse.fuse(program, options=_AS_RECORDED).module()
    return made


WAYS: Mapping[str, Callable[[Case], Runnable]] = {
    "in: a module": lambda case: case.fused,
    "in: a module, in place": _in_place,
    "in: a graph of torch.fx": _traced_by_fx,
    "in: a program of torch.export": _program,
    "in: a decomposed program of torch.export": _decomposed,
    "out: bnfuse.save, bnfuse.load": _saved,
    "out: bnfuse.save, bnfuse.load on the meta device": _saved_for_meta,
    "out: state dict, bnfuse.structure as JSON": _state_dict,
    "out: torch.save of the whole": _whole,
    "out: pickle": lambda case: pickle.loads(pickle.dumps(case.fused)),
    "out: copy.deepcopy": lambda case: copy.deepcopy(case.fused),
    "out: average of weights (AveragedModel)": _averaged,
    "out: torch.export, saved and loaded": _exported,
    "out: torch.jit.trace": _traced,
    "out: torch.compile (aot_eager)": _compiled,
    "back: bnfuse.unfuse": _unfused,
}
"""Each way by its name; it gives what is run in the end."""


def case_of(spec: str, folder: Path) -> Case:
    """A network with random norms, and the fused one."""
    original = zoo.randomise_(zoo.build(spec)).double().eval()
    x = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Case(lambda: zoo.build(spec), original, bnfuse.fuse(original, x, options=_AS_RECORDED), x, folder)


def error(case: Case, way: Callable[[Case], Runnable]) -> float:
    """The relative L2 difference of the outputs from those of the original, the largest of all outputs."""
    with torch.no_grad():
        expected, got = case.original(case.x), way(case)(case.x)
    return max(output.relative_l2 for output in compare_outputs(expected, got).outputs)


def table(specs: Sequence[str]) -> Table:
    """One row for each way, one column for each network; where a way fails, the error stands there."""
    cells: dict[str, list[str]] = {name: [] for name in WAYS}
    for spec in specs:
        with TemporaryDirectory() as folder:
            case = case_of(spec, Path(folder))
            for name, way in WAYS.items():
                try:
                    cells[name].append(f"{error(case, way):.1e}")
                except Exception as failure:  # noqa: BLE001 (that is what the table shows)
                    cells[name].append(first_line(failure))
    columns = (Column("way"), *(Column(spec.partition(":")[2], number=True) for spec in specs))
    rows = tuple((name, *row) for name, row in cells.items())
    return Table("Relative L2 difference of the outputs from those of the original, in float64", columns, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, or put it into a page."""
    parser = argparse.ArgumentParser(prog="python -m bnfuse.tools.ways", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--page", type=Path, help="a page that holds the marks of the table")
    parser.add_argument("--network", action="append", help="a SPEC; repeat it for more (default: four networks)")
    options = parser.parse_args(arguments)
    text = table_text(table(options.network or NETWORKS))
    if options.page is None:
        print(text)
        return 0
    page = options.page.read_text()
    before, _, rest = page.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    options.page.write_text(f"{before}{_BEGIN}\n\n```\n{text}\n```\n\n{_END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
