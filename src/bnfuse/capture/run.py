"""Running a model once, for real, and recording every operator that the dispatcher sees.

The parts, each in a file of its own: operators (:mod:`bnfuse.capture.recorder`), the values that tensors hold
(:mod:`bnfuse.capture.values`), module calls (:mod:`bnfuse.capture.module_calls`) and contents that leave PyTorch
(:mod:`bnfuse.capture.escapes`). The run leaves no trace on the model: see :mod:`bnfuse.model.sandbox`.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from torch import nn

from bnfuse import reasons
from bnfuse.capture.escapes import EscapeWatch
from bnfuse.capture.module_calls import ModuleCalls
from bnfuse.capture.recorder import Recorder
from bnfuse.capture.values import Values
from bnfuse.errors import InputError
from bnfuse.graph.graph import Graph
from bnfuse.model import pytree, tree
from bnfuse.model.sandbox import SavedState, leave_no_trace


@dataclass(frozen=True)
class Capture:
    """The record of a run, and what the run returned.

    Attributes:
        output: what the model returned, None for a run without arithmetic.
        looks: True if the code looked at a size or an element of a tensor that depends on the input.
        stateful: True if the run left something behind in the model that depends on the input, or a number.
        traces: True if it left anything behind in the model.
    """

    graph: Graph
    output: Any
    looks: bool
    stateful: bool
    traces: bool


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    known: Container[str] | None = None,
) -> Capture:
    """Run ``model(*args, **kwargs)`` in evaluation mode and record it.

    The tensors among the arguments are cloned first, since a model may write to its input.

    Args:
        known: names of the operators that are recorded as they are. Any other is recorded as the operators that it
            is made of, where PyTorch knows them (``hstack`` is ``cat``). None records all of them as they are.

    Raises:
        InputError: the model does not run on these inputs.
    """
    return _capture(model, args, kwargs, known, shapes_only=False)


def capture_shapes(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], known: Container[str] | None = None
) -> Capture:
    """The same without the arithmetic, and without an output: see :mod:`bnfuse.capture.shapes_only`.

    Raises:
        NeedsContentsError: the model looks at contents.
        Exception: whatever else it raised.
    """
    return _capture(model, args, kwargs, known, shapes_only=True)


def _capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    known: Container[str] | None,
    shapes_only: bool,
) -> Capture:
    own_args, own_kwargs = pytree.map_tensors((args, kwargs), lambda tensor: tensor.detach().clone())
    named = tree.named_modules(model)
    with leave_no_trace(tree.distinct(named), watch_writes=False) as state:  # the recorder sees them anyway
        values = Values(named, state.held)
        calls = ModuleCalls(named, values)
        recorder = Recorder(values, calls, state, known, shapes_only)
        escapes = EscapeWatch(values, calls, state, shapes_only)
        graph = Graph(recorder.nodes, calls.ended, values.names, values.exposed)
        for _, tensor in pytree.tensors((own_args, own_kwargs)):
            values.add_input(tensor)
        try:
            with calls.recorded(escapes.pause, escapes.resume), recorder, escapes:
                output = model(*own_args, **own_kwargs)
        except Exception as error:
            graph.release()
            if shapes_only:
                raise
            raise InputError(_does_not_run(model, args, kwargs, error)) from error
        values.expose(output, reasons.IS_OUTPUT)
        stateful, traces = _expose_stored(values, state)
        values.remove_tags()
    looks = escapes.looks or recorder.squeezes
    return Capture(graph, None if shapes_only else output, looks, stateful, traces)


def _expose_stored(values: Values, state: SavedState) -> tuple[bool, bool]:
    """Pin what the run stored in the model; returns whether the model is then stateful, and whether it has traces."""
    stateful = bool(state.contents or state.memory)
    traces = False
    for where, stored in state.stored():
        found = pytree.tensors(stored)
        traces = True
        stateful |= not found
        for _, tensor in found:
            value = values.known(tensor)
            if value is not None and not value.independent:
                value.pin(reasons.IS_STORED, place=where)
                values.exposed.append(value.index)
                stateful = True
    for leaf in state.replaced():
        value = values.known(leaf)
        if value is not None:
            value.pin(reasons.IS_REPLACED)
            stateful = True
    return stateful, traces or stateful


def _does_not_run(model: nn.Module, args: Any, kwargs: Any, error: Exception) -> str:
    given = ", ".join(
        f"{'x'.join(map(str, tensor.shape)) or 'scalar'} {str(tensor.dtype).removeprefix('torch.')}"
        for _, tensor in pytree.tensors((args, kwargs))
    )
    first_line = str(error).strip().split("\n")[0]
    return (
        f"{type(model).__name__} does not run on the inputs ({given or 'no tensors'}): "
        f"{type(error).__name__}: {first_line}. Pass inputs that it accepts."
    )
