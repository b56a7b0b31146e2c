"""What somebody outside of the model still holds after a run: a list of the caller's, a global, a closure, a cache.

A tensor of the run that is still alive is seen by whoever holds it, so it must stay as it is. And a run keeps nothing:
what is held is exchanged for an ordinary tensor, which can be trained with, since tensors of inference mode cannot.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bnfuse.capture.shapes_only import NeedsContentsError
from bnfuse.capture.values import Values
from bnfuse.model import pytree
from bnfuse.model.sandbox import SavedState
from bnfuse.reasons import IS_HELD


def take_care(values: Values, outputs: Sequence[Any], state: SavedState, shapes_only: bool) -> bool:
    """Pin what is still held outside of the model, and exchange it.

    Args:
        outputs: what the calls returned.
        state: knows what they stored in the model, which is put back.
        shapes_only: whether tensors that depend on the input have no contents.

    Returns:
        True if something that depends on the input is held.

    Raises:
        NeedsContentsError: a tensor without contents is held.
    """
    alive = _held(values, outputs, state)
    if alive:
        del alive
        gc.collect(1)  # not held, but part of a circle that nobody refers to
        alive = _held(values, outputs, state)
    depend = []
    for tensor in alive:
        value = values.of(tensor)
        if not value.independent:
            value.pin(IS_HELD)
            values.exposed.append(value.index)
            depend.append(tensor)
    values.remove_tags()
    if shapes_only and depend:
        for tensor in depend:
            tensor.zero_()
        raise NeedsContentsError("a tensor that is held outside of the model")
    for tensor in alive:
        _exchange(tensor)
    return bool(depend)


def _held(values: Values, outputs: Sequence[Any], state: SavedState) -> list[Tensor]:
    """The tensors that are alive and neither returned nor stored in the model."""
    alive = values.alive()
    if not alive:
        return []
    held = [tensor for _, tensor in pytree.tensors(outputs)]
    for _, stored in state.stored():
        held += [tensor for _, tensor in pytree.tensors(stored)]
    known = {id(tensor) for tensor in held} | {id(tensor._base) for tensor in held}  # a view holds what it is part of
    return [tensor for tensor in alive if id(tensor) not in known and id(tensor) not in values.leaves]


def _exchange(tensor: Tensor) -> None:
    """Make a tensor of inference mode an ordinary one, if nobody else watches it."""
    if not tensor.is_inference():
        return
    with torch.inference_mode(False), torch.no_grad(), contextlib.suppress(RuntimeError):
        torch.utils.swap_tensors(tensor, tensor.clone())
