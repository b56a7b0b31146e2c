"""All that a report says of one model, as one object of plain data that goes to JSON as it is."""

from __future__ import annotations

import itertools
import math
import platform
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from bnfuse.fusion_plan import Plan
from bnfuse.model import pytree
from bnfuse.model.calls import FORWARD, Call
from bnfuse.model.describe import dtype_name, installed_version, shape_text
from bnfuse.operators import shape_of
from bnfuse.planner.nothing_fused import nothing_fused
from bnfuse.planner.planner import Planner
from bnfuse.planner.problem import Problem
from bnfuse.printing.sizes import Holding
from bnfuse.reporting.activations import Measured
from bnfuse.reporting.cost import latencies
from bnfuse.reporting.drawn import Drawn
from bnfuse.reporting.leaving_out import left_out
from bnfuse.verify.comparison import Comparison

SECONDS = 2.0
"""So long latencies are measured."""


class Facts:
    """Collects what a report says: an observer of ``fuse`` or ``plan``, which then holds the facts.

    Attributes:
        data: what was found; empty as long as nothing was fused or planned.
        call: the first call.
    """

    def __init__(self, spec: str | None = None, measure: bool = True) -> None:
        """
        Args:
            spec: what the command line calls the model.
            measure: run the models to measure latency, errors and ranges.
        """
        self._spec, self._measure = spec, measure
        self.data: dict[str, Any] = {}
        self.call = Call()

    def __call__(self, planner: Planner, plan: Plan, original: nn.Module, fused: nn.Module | None) -> None:
        problem = planner.original
        self.call = problem.main.call
        drawn: Drawn | None = None
        with left_out("what the network looks like"):
            drawn = Drawn(planner, plan)
        found: Measured | None = None
        if self._measure and drawn is not None:
            with left_out("which numbers occur"):
                found = drawn.measured(original, fused)
        rounding = None if found is None else found.rounding
        self.data = {
            "bnfuse": installed_version(),
            "kind": "plan" if fused is None else "fuse",
            "model": plan.model,
            "spec": self._spec,
            "inputs": _inputs(problem.main.call),
            "calls": _calls(problem),
            "machine": _machine(),
            "summary": {
                "norms": len(plan.decisions),
                "removed": len(plan.fused),
                "rows": self._rows(planner, plan, drawn, original, fused),
                "difference": None,
                "rounding": rounding,
                "assumed": _assumed(planner, plan),
                "unseen": list(plan.unseen),
                "warning": nothing_fused(plan, original) or None,
            },
            **({} if drawn is None else drawn.pictures()),
            "steps": [
                {"kind": step.kind, "subject": step.subject, "what": step.what, "parameters": step.parameters}
                for step in plan.steps
            ],
            "unchanged": [
                {"kind": one.kind, "subject": one.subject, "reason": str(one.reason)} for one in plan.unchanged
            ],
            "errors": [] if found is None else found.errors(),
            "ranges": [] if found is None else found.ranges(),
            "left_out": 0 if found is None or drawn is None else drawn.left_out(found),
        }

    def _rows(
        self, planner: Planner, plan: Plan, drawn: Drawn | None, original: nn.Module, fused: nn.Module | None
    ) -> list[dict[str, Any]]:
        before = Holding.of(original, len(plan.decisions))
        after = _after(plan, planner.problem.model) if fused is None else Holding.of(fused, len(plan.kept))
        multiply_adds: tuple[int | None, int | None] = (None, None)
        if drawn is not None:
            with left_out("how many multiply-adds it takes"):
                multiply_adds = drawn.multiply_adds()
        rows = [
            _row("batch norms", before.norms, after.norms, ""),
            _row("parameters", before.parameters, after.parameters, ""),
            _row("buffers", before.buffers, after.buffers, ""),
            _row("parameters and buffers", before.size, after.size, "bytes"),
            _row("multiply-adds", multiply_adds[0], multiply_adds[1], "multiply-adds"),
        ]
        main = planner.original.main
        if self._measure and fused is not None and not (main.stateful or main.gradients):
            with left_out("how long a call takes"):
                one, other = latencies(original, fused, main.call, SECONDS)
                quartiles = {"before": one.quartiles, "after": other.quartiles}
                rows.append(_row("latency", one.median, other.median, "s") | {"quartiles": quartiles})
        return rows

    def add_comparison(self, comparison: Comparison) -> None:
        """Say how far the outputs of a verified model lie from those of the original."""
        summary = self.data["summary"]
        rounding, worst = summary["rounding"], comparison.worst
        summary["difference"] = {
            "largest": 0.0 if worst is None else max(output.max_abs for output in comparison.outputs),
            "relative": 0.0 if worst is None else worst.relative_l2,
            "rounding": rounding,
            "equal": True,
            "text": str(comparison),
        }

    def add_files(self, files: Sequence[tuple[str, int | None, int | None]]) -> None:
        """Add sizes of files.

        Args:
            files: their names and their sizes in bytes before and after, None where there is none.
        """
        self.data["summary"]["rows"] += [_row(name, before, after, "bytes") for name, before, after in files]

    def finished(self) -> dict[str, Any]:
        """The facts, with None in place of numbers that JSON does not know."""
        summary = {name: value for name, value in self.data["summary"].items() if name != "rounding"}
        plain: dict[str, Any] = _plain({**self.data, "summary": summary})
        return plain


def _row(name: str, before: float | None, after: float | None, unit: str) -> dict[str, Any]:
    return {"name": name, "before": before, "after": after, "unit": unit}


def _after(plan: Plan, model: nn.Module) -> Holding:
    """What a model, on which the steps are carried out, would hold if the rest of the plan were."""
    gone = {name for replacement in plan.replacements for name in replacement.names}
    staying = tuple(f"{name}.{child}." for r in plan.replacements for name in r.names for child in r.keep if child)

    def left(named: Any) -> list[torch.Tensor]:
        return list({id(tensor): tensor for name, tensor in named if not _is_of(name, gone, staying)}.values())

    parameters = left(model.named_parameters(remove_duplicate=False))
    buffers = left(model.named_buffers(remove_duplicate=False))
    created = [edit for edit in plan.edits if edit.created]
    held = sum(tensor.numel() * tensor.element_size() for tensor in (*parameters, *buffers))
    return Holding(
        len(plan.kept),
        sum(tensor.numel() for tensor in parameters) + sum(math.prod(edit.shape) for edit in created),
        sum(tensor.numel() for tensor in buffers),
        held + sum(math.prod(edit.shape) * _width(model, edit.names[0]) for edit in created),
    )


def _width(model: nn.Module, name: str) -> int:
    """The bytes of each number of a parameter that is created: as of what else its layer holds."""
    layer = model.get_submodule(name.rpartition(".")[0])
    return next(itertools.chain(layer.parameters(), layer.buffers())).element_size()


def _is_of(name: str, gone: set[str], staying: tuple[str, ...]) -> bool:
    """True if a tensor belongs to one of the modules that go, and not to a child that stays."""
    parts = name.split(".")
    inside = any(".".join(parts[:end]) in gone for end in range(1, len(parts)))
    return inside and not name.startswith(staying)


def _inputs(call: Call) -> list[str]:
    """The tensors that are given, those by name with it."""
    given = [("", value) for value in call.args] + [(f"{name}: ", value) for name, value in call.kwargs.items()]
    return [
        f"{name}{dtype_name(tensor.dtype)} {shape_text(shape_of(tensor))}"
        for name, value in given
        for _, tensor in pytree.tensors(value)
    ]


def _calls(problem: Problem) -> list[str]:
    """The calls that do something else than those before them, and those that the caller has named, in words."""
    calls = [run.call for run in problem.recording.runs]
    calls += [call for further in problem.further if further.given for call in further.calls]
    return list(dict.fromkeys(map(_call, calls)))


def _call(call: Call) -> str:
    """A call in words: its method and what is given."""

    def word(value: Any) -> str:
        found = pytree.tensors(value)
        if found:
            return ", ".join(f"{dtype_name(t.dtype)} {shape_text(shape_of(t))}" for _, t in found)
        text = repr(value)
        return text if len(text) <= 40 else type(value).__name__

    given = [*map(word, call.args), *(f"{name}={word(value)}" for name, value in call.kwargs.items())]
    return f"{call.method or FORWARD}({', '.join(given)})"


def _machine() -> str:
    words = [f"torch {torch.__version__}", f"{torch.get_num_threads()} threads", platform.machine()]
    return ", ".join(words)


_ONE_CALL = {
    False: "it is called as in the one call that was recorded",
    True: "it is called as in the one call that was recorded, or with other sizes and contents of which the same "
    "operators are made: others were tried where its code asks for them, and made no other",
}


def _assumed(planner: Planner, plan: Plan) -> list[str]:
    """What the plan takes for granted, in words."""
    problem = planner.original
    calls = len(problem.recording.runs)
    found = ["the model runs in evaluation mode, with the statistics that its norms hold now"]
    found.append(
        _ONE_CALL[problem.options.infer_calls]
        if calls == 1
        else f"it is called as in one of the {calls} calls that were recorded, which differ in what they do"
    )
    if problem.options.handlers and any(edit.handler is not None for edit in plan.edits):
        found.append("the handlers for layers of your own do what they promise")
    if plan.out_of_place:
        names = ", ".join(plan.out_of_place)
        found.append(f"these work in place no longer, and whoever calls them uses what they return: {names}")
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
