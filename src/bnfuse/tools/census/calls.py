"""What it costs to hold for calls that nobody named, and whether it does: ``python -m bnfuse.tools.census.calls docs``.

The smallest model of each family of timm, of those in the census, is fused twice: as always, and for the recorded call
alone. Then the model that was fused as always is compared with the original in float64 by every method that it has of
those that bnfuse infers, on another batch, and on another size where the model takes one. A line for each model goes
into ``census/calls/timm.jsonl``; models that have one are not visited again.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bnfuse.api import fuse_with_plan
from bnfuse.model.calls import FORWARD, Call
from bnfuse.model.describe import one_line
from bnfuse.planner.known_methods import methods
from bnfuse.planner.options import Options
from bnfuse.tools import zoo
from bnfuse.tools.census.ledger import read
from bnfuse.tools.census.run import sampled
from bnfuse.tools.zoo import inputs as zoo_inputs
from bnfuse.verify.compare import compare

ZOO = "timm"
EXACT = 1e-9


@dataclass(frozen=True)
class Calls:
    """What became of one model.

    Attributes:
        norms: that it holds.
        removed: as always.
        alone: for the recorded call alone.
        errors: relative L2 error in float64 by method, the largest over the inputs.
        passes: the time of fusing as always, in forward passes.
        failure: why there are no numbers.
    """

    model: str
    family: str
    norms: int = 0
    removed: int = 0
    alone: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    passes: float = 0.0
    failure: str = ""

    @property
    def wrong(self) -> list[str]:
        """The methods that give something else."""
        return [name for name, error in self.errors.items() if not error <= EXACT]


def visit(model_name: str, family: str) -> Calls:
    """Fuse and check one model."""
    try:
        return _visited(model_name, family)
    except Exception as error:  # noqa: BLE001 (a visit ends with a line, whatever happens)
        return Calls(model_name, family, failure=one_line(error)[:300])


def _visited(name: str, family: str) -> Calls:
    form = zoo_inputs.form(ZOO, family)
    model = zoo.build(f"{ZOO}:{name}", options=form.options if form is not None else {}).eval()
    zoo.wake_(zoo.randomise_(model, 0, dead=0.0), 0)
    model = model.double()
    sample, first = _running(model, form)
    _, alone = fuse_with_plan(model, first.args, verify=False, options=Options(infer_calls=False))
    begun = time.process_time()
    fused, plan = fuse_with_plan(model, first.args)
    spent = time.process_time() - begun
    with torch.no_grad():
        start = time.process_time()
        model(*first.args)
        forward = time.process_time() - start
    calls = [first, *(_double(others) for others in sample.others(1))][:3]
    errors = {
        method: max(found)
        for method in (FORWARD, *methods(model))
        if (found := [error for call in calls if (error := _error(model, fused, call, method)) is not None])
    }
    return Calls(name, family, len(plan.decisions), len(plan.fused), len(alone.fused), errors, spent / forward)


def _running(model: nn.Module, form: zoo_inputs.Form | None) -> tuple[zoo_inputs.Sample, Call]:
    for sample in zoo_inputs.samples(model, form, 0):
        call = _double(sample.args)
        try:
            with torch.no_grad():
                call.run(model)
        except Exception:  # noqa: BLE001 (a size that the model does not take)
            continue
        return sample, call
    raise ValueError("it runs on no inputs")


def _double(args: tuple[Any, ...]) -> Call:
    return Call(*args).map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def _error(model: nn.Module, fused: nn.Module, call: Call, method: str) -> float | None:
    """None if the original does not take the call."""
    other = Call(*call.args, method=method)
    try:
        with torch.no_grad():
            other.run(model)
    except Exception:  # noqa: BLE001 (a size, or a method, that does not fit)
        return None
    outputs = compare(model, fused, other).outputs
    return max((float("inf") if output.problem else output.relative_l2 for output in outputs), default=0.0)


def lines(path: Path) -> list[Calls]:
    """What the file holds; nothing if there is none."""
    return [Calls(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def main(arguments: Sequence[str]) -> int:
    """Visit the models that have no line yet.

    Returns:
        The exit status: 1 if a fused model gives something else.
    """
    docs = Path(arguments[0] if arguments else "docs")
    output = docs / "census" / "calls" / "timm.jsonl"
    _, rows, _ = read(docs / "census" / f"{ZOO}.jsonl.gz")
    known = {line.model for line in lines(output)}
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    due = [row for row in sampled(rows).values() if row.model not in known]
    for row in sorted(due, key=lambda row: row.parameters or 0):
        found = visit(row.model, row.family)
        with output.open("a") as file:
            file.write(json.dumps(asdict(found)) + "\n")
        sys.stderr.write(f"{found}\n")
    return int(any(line.wrong for line in lines(output)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
