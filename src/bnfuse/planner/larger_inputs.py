"""Inputs of other sizes and values that a model takes, and what it runs on them.

Most runs are without arithmetic, see :mod:`bnfuse.capture.shapes_only`. Where a tensor that depends on the input does
not fit a parameter (a table of positions, a linear layer over all pixels) at a larger size, no others are tried along
these axes: a larger input makes a tensor that is as large or larger, and fits no better.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bnfuse.capture.run import Capture, capture, capture_shapes
from bnfuse.capture.shapes_only import FixedSizeError, NeedsContentsError
from bnfuse.errors import InputError
from bnfuse.graph.graph import Graph
from bnfuse.model import pytree
from bnfuse.rules import RULES

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""

_ALIGNMENT = 32
"""Networks halve images up to five times, so a size that divides by 32 is enlarged by 32."""


class OtherSizes:
    """What a model does with larger inputs; each of them is run when it is asked for, and once."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """
        Args:
            model: any module.
            args, kwargs: inputs that it takes.
        """
        self.model, self.call = model, (args, kwargs)
        self._known: list[tuple[Call, Capture | None]] = []
        self._next = self._runs()

    def __iter__(self) -> Iterator[tuple[Call, Capture | None]]:
        """Inputs on which the model runs without arithmetic, and the record; None where it looks at contents."""
        place = 0
        while True:
            if place == len(self._known):
                run = next(self._next, None)
                if run is None:
                    return
                self._known.append(run)
            yield self._known[place]
            place += 1

    def release(self) -> None:
        """Free what was recorded."""
        self._next = iter(())
        for _, record in self._known:
            if record is not None:
                record.graph.release()

    def _runs(self) -> Iterator[tuple[Call, Capture | None]]:
        todo = _choices(self.call)
        while todo:
            axes, step = todo.pop(0)
            call = _larger(self.call, axes, step)
            try:
                yield call, capture_shapes(self.model, *call, known=RULES)
            except NeedsContentsError:
                yield call, None
            except FixedSizeError:
                todo = [choice for choice in todo if not axes <= choice[0]]
                todo.sort(key=lambda choice: choice[0] != {0})  # most often it is not the batch that is fixed
            except Exception:  # noqa: BLE001 (a size that the model does not take, or what unwritten numbers lead to)
                continue

    @functools.cached_property
    def runs_without_arithmetic(self) -> bool:
        """True if a run without arithmetic works on the model's own inputs; else a failure tells nothing of a size."""
        try:
            capture_shapes(self.model, *self.call)
        except (NeedsContentsError, Exception):  # noqa: BLE001 (whatever the unwritten numbers lead to)
            return False
        return True

    def inputs(self) -> Iterator[Call]:
        """Those that the model may take."""
        return (call for call, _ in self._candidates())

    def graphs(self) -> Iterator[Graph]:
        """What it runs on those that it takes."""
        for call, record in self._candidates():
            if record is not None:
                yield record.graph
            else:
                with contextlib.suppress(InputError):
                    yield capture(self.model, *call, known=RULES).graph

    def _candidates(self) -> Iterator[tuple[Call, Capture | None]]:
        yield from self
        if not self._known and not self.runs_without_arithmetic:
            yield from ((_larger(self.call, *choice), None) for choice in _choices(self.call))


def _choices(call: Call) -> list[tuple[set[int], str]]:
    """The axes that grow, and by how much: first all of them, then one at a time, by one and by a round number.

    They grow by two also, so that what is odd or even stays so.
    """
    rank = max((tensor.dim() for _, tensor in pytree.tensors(call)), default=0)
    trailing = set(range(2, rank))
    # The first axis need not be the batch, so the others also grow alone.
    both = {0, *trailing}
    together = [(both, "one"), (both, "round"), (both, "two"), (trailing, "one"), (trailing, "double")]
    single = [({axis}, step) for axis in range(1, rank) for step in ("one", "round")]
    return [*(together if trailing else []), ({0}, "one"), *single]


def _larger(call: Call, axes: set[int], step: str) -> Call:
    """The inputs with other values, and larger: every tensor that has the axis grows. The batch grows by one only."""

    def grow(tensor: Tensor) -> Tensor:
        for axis in axes:
            if axis < tensor.dim():
                size = tensor.shape[axis]
                round_size = _ALIGNMENT if size % _ALIGNMENT == 0 and step == "round" else size
                more = 1 if axis == 0 or step == "one" else min(2 if step == "two" else round_size, size)
                tensor = torch.cat([tensor, tensor.narrow(axis, 0, more)], axis)
        if tensor.is_floating_point() and tensor.dim():
            tensor = (0.75 if step == "one" else -0.75) * tensor.roll(1, min(1, tensor.dim() - 1))
        return tensor

    args, kwargs = pytree.map_tensors(call, grow)
    return args, kwargs
