"""Carrying a plan out on a module tree: a transaction, all edits or none."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bnfuse.errors import FusionError
from bnfuse.plan import Edit, Handler, Plan, Replacement
from bnfuse.units import Unit

_CHUNK = 1 << 20
"""Elements of a weight that are edited at a time, which bounds the float64 memory."""


def rewrite(plan: Plan, model: nn.Module) -> Callable[[], None]:
    """Apply every edit and replacement of the plan to ``model`` itself.

    Edited parameters keep their identity, class, dtype, device, memory format and ``requires_grad``; every number is
    computed in float64 and rounded once.

    Returns:
        A function that puts everything back, bit by bit.

    Raises:
        FusionError: the model lacks a module or parameter of the plan, or an edit overflows its dtype. The model is
            then as it was.
    """
    undo: list[Callable[[], None]] = []

    def roll_back() -> None:
        while undo:
            undo.pop()()

    try:
        with torch.inference_mode(False), torch.no_grad():  # new parameters are trainable, whatever the caller's mode
            for edit in plan.edits:
                _apply_edit(model, edit, undo)
            for name in plan.out_of_place:
                _switch_off(model.get_submodule(name), undo)
            for replacement in plan.replacements:
                _replace(model, replacement, undo)
    except BaseException:
        roll_back()
        raise
    return roll_back


def _apply_edit(model: nn.Module, edit: Edit, undo: list[Callable[[], None]]) -> None:
    if edit.handler is not None:
        _handle(model, edit, edit.handler, undo)
        return
    owners = [_owner(model, name) for name in edit.names]
    if edit.created:
        _create(owners, edit, undo)
        return
    owner, place = owners[0]
    tensor = getattr(owner, place, None)
    if not isinstance(tensor, Tensor) or tuple(tensor.shape) != edit.shape:
        got = "nothing" if not isinstance(tensor, Tensor) else f"shape {tuple(tensor.shape)}"
        raise FusionError(
            f"The plan does not fit the model at {edit.names[0]}:\n  got:      {got}\n"
            f"  expected: shape {edit.shape}\nMake a new plan for this model."
        )
    before = tensor.detach().clone(memory_format=torch.preserve_format)
    undo.append(lambda: _write(tensor, before))
    data = tensor.data
    for part, factors in _chunks(data, edit.factors):
        new = part.to("cpu", torch.float64)
        for unit in factors:
            new = _edited(new, unit)
        rounded = new.to(data.dtype)
        if not bool((torch.isfinite(rounded) | ~torch.isfinite(part.cpu())).all()):
            raise FusionError(
                f"{edit.names[0]} would leave the range of {data.dtype}. Convert the model to float32 first "
                f"(model.float()), or keep the norm that it takes up (keep=...)."
            )
        part.copy_(rounded)


def _write(tensor: Tensor, contents: Tensor) -> None:
    tensor.data.copy_(contents)


def _edited(tensor: Tensor, unit: Unit) -> Tensor:
    if unit.scale is not None:
        tensor = tensor * unit.scale
    return tensor if unit.shift is None else tensor + unit.shift


def _chunks(tensor: Tensor, factors: tuple[Unit, ...]) -> Any:
    """Views of the tensor, of bounded size, each with the factors that belong to it."""
    if tensor.numel() <= _CHUNK or tensor.dim() == 0:
        yield tensor, factors
        return
    rows = max(1, _CHUNK * tensor.shape[0] // tensor.numel())
    for start in range(0, tensor.shape[0], rows):
        size = min(rows, tensor.shape[0] - start)

        def cut(part: Tensor, start: int = start, size: int = size) -> Tensor:
            return part.narrow(0, start, size) if part.shape[0] > 1 else part

        yield tensor.narrow(0, start, size), tuple(unit.map(cut) for unit in factors)


def _handle(model: nn.Module, edit: Edit, handler: Handler, undo: list[Callable[[], None]]) -> None:
    """Let the caller's handler fold units into its layer."""
    layer = model.get_submodule(edit.names[0])
    undo.extend(_restorer(module) for module in layer.modules())
    for unit in edit.factors:
        scale = torch.ones(edit.shape, dtype=torch.float64) if unit.scale is None else unit.scale
        shift = torch.zeros(edit.shape, dtype=torch.float64) if unit.shift is None else unit.shift
        try:
            with torch.no_grad():
                handler(layer, scale.clone(), shift.clone())
        except Exception as error:
            raise FusionError(f"The handler of {edit.names[0]} failed: {type(error).__name__}: {error}") from error


def _restorer(module: nn.Module) -> Callable[[], None]:
    """A function that puts back the module's attributes, registries and the contents of its tensors."""
    state = {name: dict(value) if isinstance(value, dict) else value for name, value in module.__dict__.items()}
    held = [*module._parameters.values(), *module._buffers.values()]
    contents = [(tensor, tensor.detach().clone()) for tensor in held if tensor is not None]

    def restore() -> None:
        module.__dict__.clear()
        module.__dict__.update(state)
        for tensor, before in contents:
            tensor.data.copy_(before)

    return restore


def _create(owners: list[tuple[nn.Module, str]], edit: Edit, undo: list[Callable[[], None]]) -> None:
    owner, place = owners[0]
    if place not in owner._parameters or owner._parameters[place] is not None:
        raise FusionError(f"The plan does not fit the model: {edit.names[0]} should be an empty place for a parameter.")
    like = next(itertools.chain(owner.parameters(recurse=False), owner.parameters(), owner.buffers()))
    contents = torch.full(edit.shape, 1.0 if place == "weight" else 0.0, dtype=torch.float64)
    for unit in edit.factors:
        contents = _edited(contents, unit)
    data = contents.expand(edit.shape).to(device=like.device, dtype=like.dtype).contiguous()
    if not bool(torch.isfinite(data).all()):
        raise FusionError(f"{edit.names[0]} would leave the range of {like.dtype}. Convert the model to float32 first.")
    owner._parameters[place] = nn.Parameter(data, requires_grad=like.requires_grad)
    undo.append(lambda: owner._parameters.__setitem__(place, None))


def _replace(model: nn.Module, replacement: Replacement, undo: list[Callable[[], None]]) -> None:
    parent, place = _owner(model, replacement.names[0])
    norm = parent._modules.get(place)
    if norm is None:
        raise FusionError(f"The plan does not fit the model: it holds no module {replacement.names[0]}.")
    kept = [norm.get_submodule(name) for name in replacement.keep]
    new = nn.Identity() if not kept else kept[0] if len(kept) == 1 else nn.Sequential(*kept)
    if not kept:
        new.training = norm.training
    for name in replacement.names:
        parent, place = _owner(model, name)
        undo.append(lambda parent=parent, place=place: parent._modules.__setitem__(place, norm))  # type: ignore[misc]
        parent._modules[place] = new


def _switch_off(module: nn.Module, undo: list[Callable[[], None]]) -> None:
    undo.append(lambda: setattr(module, "inplace", True))
    setattr(module, "inplace", False)  # noqa: B010


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, place = name.rpartition(".")
    try:
        return model.get_submodule(path), place
    except AttributeError:
        raise FusionError(f"The plan does not fit the model: it holds no module {path}.") from None
