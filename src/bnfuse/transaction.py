"""Making changes to a model or to a copy of it, as a transaction: all changes or none.

Every new number is computed in float64 and rounded once. A copy is made with the new weights already in it, so that
every weight is read once and written once. In place, everything that can fail is done or tried before the first weight
is written.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bnfuse.changes import Changes, Edit, Handler, Replacement
from bnfuse.errors import FusionError
from bnfuse.model import own_steps, placing, tree
from bnfuse.model.ceiling import Ceiling
from bnfuse.model.copying import copy_model, held_tensors, shared_memory
from bnfuse.model.describe import one_line
from bnfuse.model.marks import mark_created, mark_norm, mark_out_of_place
from bnfuse.model.pretrained import add_guard, describe, is_guarded, lenient_places
from bnfuse.units import PIECE, Entries, Unit, add, multiply, row_ranges, scaled

_SMALL_SCALE = 2.0**-10
"""Smaller scales make subnormal numbers of contents that are far from it."""

_Modules = Mapping[str, nn.Module]
"""The modules of a model by name."""


def fused_copy(changes: Changes, model: nn.Module) -> nn.Module:
    """Copy a model and make the changes in the copy.

    Raises:
        FusionError, InputError: as for `rewrite` and `bnfuse.model.copying.copy_model`.
    """
    if changes.steps:
        copied = copy_model(model)
        rewrite(changes, copied, undoable=False)
        return copied
    modules = dict(tree.named_modules(model))
    held = held_tensors(model)
    shared = shared_memory(held)
    stand_ins: dict[int, Any] = {}
    new_weights: dict[Edit, nn.Parameter] = {}
    with torch.inference_mode(False), torch.no_grad():
        scratch = _scratch()
        for edit in changes.edits:
            old = None if edit.created or edit.handler else _weight(modules, edit)
            if type(old) is nn.Parameter and id(old) not in shared:
                new = torch.empty_like(old)
                for write in _writes(old, new, edit):
                    write.make(write.target, scratch)
                new_weights[edit] = stand_ins[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad)
        places = lenient_places(modules)
        for replacement in changes.replacements:
            norm = _norm(modules, replacement)
            if not replacement.keep and not norm._forward_hooks:  # hooks are copied with the model
                stand_ins[id(norm)] = identity = _identity(norm)
                if is_guarded(replacement.names, places):
                    add_guard(identity, norm)
    copied = copy_model(model, stand_ins, held)
    # A class with a __deepcopy__ of its own may not use the stand-ins: what they do not cover is written afterwards.
    modules = dict(tree.named_modules(copied))
    rest = replace(
        changes,
        edits=tuple(
            edit for edit in changes.edits if edit not in new_weights or not _holds(modules, edit, new_weights)
        ),
        replacements=tuple(
            replacement for replacement in changes.replacements if type(_norm(modules, replacement)) is not nn.Identity
        ),
    )
    rewrite(rest, copied)
    own_steps.hide(modules, _unknown_to_steps(changes))
    return copied


def _holds(modules: _Modules, edit: Edit, new_weights: dict[Edit, nn.Parameter]) -> bool:
    """Whether the new parameter of an edit is found under each of its names."""
    return all(getattr(*_owner(modules, name), None) is new_weights[edit] for name in edit.names)


def rewrite(changes: Changes, model: nn.Module, undoable: bool = True) -> Callable[[], None]:
    """Make the changes in ``model`` itself.

    Edited parameters keep their identity, class, dtype, device, memory format and ``requires_grad``.

    Args:
        undoable: keep copies of the weights that change. Without them an interrupt (Ctrl-C) takes effect only when all
            weights are written.

    Returns:
        A function that restores the model exactly; without effect if not ``undoable``.

    Raises:
        FusionError: the model lacks a module or parameter that is to change, an edit overflows its dtype, or a handler
            fails. The model is then as it was.
    """
    undo: list[Callable[[], None]] = []

    def roll_back() -> None:
        while undo:
            undo.pop()()
        torch.clear_autocast_cache()

    try:
        with torch.inference_mode(False), torch.no_grad():  # parameters made in inference mode could not be trained
            for step in changes.steps:
                placing.carry_out(step, model, undo)
            modules = dict(tree.named_modules(model))
            weights = [
                (edit, _weight(modules, edit)) for edit in changes.edits if not edit.created and not edit.handler
            ]
            for edit in changes.edits:
                if edit.handler is not None:
                    _handle(modules[edit.names[0]], edit, edit.handler, undo)
                elif edit.created:
                    _create(modules, edit, undo)
            for name in changes.out_of_place:
                _work_out_of_place(modules[name], undo)
            keeping = any(replacement.keep for replacement in changes.replacements)
            holders = _holders(modules) if keeping else {}
            places = lenient_places(modules)
            for replacement in changes.replacements:
                _replace(modules, replacement, holders, places, undo)
            undo += own_steps.hide(modules, _unknown_to_steps(changes))
            if places:
                undo.append(describe(model))
            if undoable:
                scratch = _scratch()
                for edit, tensor in weights:
                    undo.append(_restorer_of_tensor(tensor))
                    for write in _writes(tensor, tensor, edit):
                        write.make(write.target, scratch)
            else:
                for edit, tensor in weights:
                    _check_range(tensor, edit)
                _carry_through([write for edit, tensor in weights for write in _writes(tensor, tensor, edit)], undo)
    except BaseException:
        roll_back()
        raise
    torch.clear_autocast_cache()  # which holds casts of the old weights, if this runs under autocast
    return roll_back


def _weight(modules: _Modules, edit: Edit) -> Tensor:
    """The parameter that an edit changes; raises FusionError if it is missing or of another shape."""
    owner, place = _owner(modules, edit.names[0])
    tensor = getattr(owner, place, None)
    if not isinstance(tensor, Tensor) or tuple(tensor.shape) != edit.shape:
        got = "nothing" if not isinstance(tensor, Tensor) else f"shape {tuple(tensor.shape)}"
        raise FusionError(
            f"The plan does not fit the model at {edit.names[0]}:\n  got:      {got}\n"
            f"  expected: shape {edit.shape}\nMake a new plan for this model."
        )
    return tensor


def _restorer_of_tensor(tensor: Tensor) -> Callable[[], None]:
    """A function that puts back the contents of a tensor."""
    before = tensor.detach().clone(memory_format=torch.preserve_format)

    def restore() -> None:
        tensor.data.copy_(before)

    return restore


class InPlace:
    """Changes made to a model itself, which can be undone and made again."""

    def __init__(self, changes: Changes, model: nn.Module) -> None:
        self._changes, self._model = changes, model
        self._undo: Callable[[], None] | None = None
        self.redo()

    def redo(self) -> None:
        """Make the changes, unless they are made."""
        if self._undo is None:
            self._undo = rewrite(self._changes, self._model, undoable=True)

    def undo(self) -> None:
        """Undo the changes, unless they are undone."""
        if self._undo is not None:
            self._undo()
            self._undo = None

    def separate(self) -> nn.Module:
        """Undo the changes, and return a changed copy."""
        changed = copy_model(self._model)
        self.undo()
        return changed


# Weights ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Write:
    """New contents for a part of a weight, which fits into bounded memory.

    Attributes:
        name: the name of the weight, for messages.
        source: the part before.
        target: where the new contents go; may be the source.
        unit: the scale and shift of this part.
        shrinks: whether some element may become so small that it is subnormal.
    """

    name: str
    source: Tensor
    target: Tensor
    unit: Unit
    shrinks: bool

    def make(self, out: Tensor, scratch: Tensor) -> Tensor:
        """Write the new contents into ``out``.

        Args:
            out: the target or another tensor like it.
            scratch: memory for `bnfuse.units.PIECE` float64 numbers, since allocating takes longer than the arithmetic.

        Raises:
            FusionError: the new contents leave the range of the dtype of ``out``.
        """
        size = self.source.numel()
        wide = scratch[:size].view(self.source.shape) if size <= PIECE else scratch.new_empty(self.source.shape)
        values = _edited(wide.copy_(self.source), self.unit)
        if self.shrinks:
            values = _without_subnormals(values, out.dtype)
        out.copy_(values)
        if not math.isfinite(_sum(out)) and bool((torch.isfinite(values) & ~torch.isfinite(out.cpu())).any()):
            raise FusionError(
                f"{self.name} would leave the range of {out.dtype}. Convert the model to float32 first "
                f"(model.float()), or keep the norm that it takes up (keep=...)."
            )
        return out


def _sum(tensor: Tensor) -> float:
    """The sum of all elements, which is not finite if one of them is not: faster than ``isfinite``."""
    return float(tensor.sum(dtype=torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype))


def _scratch() -> Tensor:
    return torch.empty(PIECE, dtype=torch.float64, device="cpu")


def _writes(source: Tensor, target: Tensor, edit: Edit) -> Iterator[_Write]:
    """The writes of an edit: one for each part of the weight of at most `bnfuse.units.PIECE` elements, or one row."""
    unit = _composed(edit.factors)
    source, target = source.data, target.data
    shrinks = unit.scale is not None and bool(((unit.scale != 0) & (unit.scale.abs() < _SMALL_SCALE)).any())
    if not source.dim() or source.numel() <= PIECE:
        yield _Write(edit.names[0], source, target, unit, shrinks)
        return
    for place in row_ranges(source):
        yield _Write(edit.names[0], source.narrow(0, *place), target.narrow(0, *place), unit.rows(*place), shrinks)


def _composed(factors: tuple[Unit, ...]) -> Unit:
    """One unit that does the same as all factors, one after the other."""
    scale: Tensor | None = None
    shift: Tensor | None = None
    entries: Entries | None = None
    for unit in factors:
        scale, shift = multiply(scale, unit.scale), add(scaled(shift, unit.scale), unit.shift)
        entries = None if entries is None else entries.scaled(unit.scale)
        if unit.entries is not None:
            entries = unit.entries if entries is None else entries.joined(unit.entries)
    return Unit(scale, shift, entries=entries)


def _edited(tensor: Tensor, unit: Unit) -> Tensor:
    """Change a float64 tensor by a unit, in its own memory."""
    if unit.scale is not None:
        tensor = tensor.mul_(unit.scale)
    if unit.shift is not None:
        tensor = tensor.add_(unit.shift)
    return tensor if unit.entries is None else unit.entries.add_to(tensor)


def _without_subnormals(values: Tensor, dtype: torch.dtype) -> Tensor:
    """New contents with 0 for what the dtype has as subnormal numbers, on which processors are a hundred times slower.

    So it is only where the largest of the contents is that far above them that its rounding hides them twice over.
    """
    limits = torch.finfo(dtype)
    magnitude = values.abs()
    if values.numel() and float(magnitude.amax()) >= limits.tiny / limits.eps**2:
        values.masked_fill_(magnitude < limits.tiny, 0.0)
    return values


def _check_range(tensor: Tensor, edit: Edit) -> None:
    """Raise FusionError if the new contents would overflow. They are computed only if a bound does not exclude it."""
    unit = _composed(edit.factors)
    scale, shift = (0.0 if part is None else float(part.abs().amax()) for part in (unit.scale, unit.shift))
    added = 0.0 if unit.entries is None else float(unit.entries.values.abs().sum())
    largest = float(tensor.abs().amax()) if tensor.numel() else 0.0
    if not largest * max(scale, 1.0) + shift + added < torch.finfo(tensor.dtype).max:
        for write in _writes(tensor, tensor, edit):
            write.make(torch.empty_like(write.target), _scratch())


def _carry_through(writes: list[_Write], undo: list[Callable[[], None]]) -> None:
    """Make all writes, and raise an interrupt only afterwards: a model with half of its weights changed is useless."""
    interrupt: KeyboardInterrupt | None = None
    place = 0
    made: tuple[int, Tensor] | None = None
    scratch = _scratch()
    while place < len(writes):
        try:
            undo.clear()  # a write has no copy to restore from
            if made is None or made[0] != place:
                made = (place, writes[place].make(torch.empty_like(writes[place].target), scratch))
            writes[place].target.copy_(made[1])
            place += 1
        except KeyboardInterrupt as raised:
            interrupt = raised
    if interrupt is not None:
        raise interrupt


# Modules ------------------------------------------------------------------------------------------------------------


def _handle(layer: nn.Module, edit: Edit, handler: Handler, undo: list[Callable[[], None]]) -> None:
    """Let the caller's handler fold scale and shift into its layer."""
    undo.extend(_restorer_of_module(module) for module in layer.modules())
    held = next(itertools.chain(layer.parameters(), layer.buffers()), None)
    device = torch.device("cpu") if held is None or held.is_mps else held.device  # MPS knows no float64
    for unit in edit.factors:
        scale = torch.ones(edit.shape, dtype=torch.float64, device="cpu") if unit.scale is None else unit.scale
        shift = torch.zeros(edit.shape, dtype=torch.float64, device="cpu") if unit.shift is None else unit.shift
        shapes = _shapes(layer)
        try:
            with torch.no_grad():
                handler(layer, scale.to(device, copy=True), shift.to(device, copy=True))
        except Exception as error:
            raise _handler_error(layer, edit, f"failed: {one_line(error)}") from error
        after = _shapes(layer)
        for name in after.keys() - shapes.keys():
            path, _, place = name.rpartition(".")
            undo.append(mark_created(layer.get_submodule(path), place))
        other = [name for name, shape in shapes.items() if after.get(name, shape) != shape]
        if other:
            raise _handler_error(layer, edit, f"left {other[0]} with shape {after[other[0]]}, not {shapes[other[0]]}")


def _shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(tensor.shape) for name, tensor in itertools.chain(layer.named_parameters(), layer.named_buffers())
    }


def _handler_error(layer: nn.Module, edit: Edit, what: str) -> FusionError:
    return FusionError(
        f"The handler of {type(layer).__name__} at {edit.names[0]!r} {what}.\n"
        f"A handler(layer, scale, shift) changes its layer in place so that it gives scale*y + shift instead of y, and "
        f"keeps the shape of every parameter that stays; scale and shift are float64 of shape {edit.shape}."
    )


def _restorer_of_module(module: nn.Module) -> Callable[[], None]:
    """A function that puts back the module's attributes, registries and the contents of its tensors."""
    state = {name: dict(value) if isinstance(value, dict) else value for name, value in module.__dict__.items()}
    held = [*module._parameters.values(), *module._buffers.values()]
    contents = [(tensor, tensor.data, tensor.detach().clone()) for tensor in held if tensor is not None]

    def restore() -> None:
        module.__dict__.clear()
        module.__dict__.update(state)
        for tensor, memory, before in contents:
            if tensor.shape != memory.shape or tensor.data_ptr() != memory.data_ptr():
                tensor.data = memory  # a handler assigned other contents to ``data``
            memory.copy_(before)

    return restore


def _create(modules: _Modules, edit: Edit, undo: list[Callable[[], None]]) -> None:
    """Create the bias or gain that a layer does not have yet."""
    owners = [_owner(modules, name) for name in edit.names]  # raises if the model lacks any of them
    owner, place = owners[0]
    if place not in owner._parameters or owner._parameters[place] is not None:
        raise FusionError(f"The plan does not fit the model: {edit.names[0]} should be an empty place for a parameter.")
    like = next(itertools.chain(owner.parameters(recurse=False), owner.parameters(), owner.buffers()))
    unit = _composed(edit.factors)
    contents = unit.shift  # a new bias is the shift alone, since the scale of zeros is zero
    if place == "weight" or contents is None or unit.entries is not None:
        fill = 1.0 if place == "weight" else 0.0
        contents = _edited(torch.full(edit.shape, fill, dtype=torch.float64, device="cpu"), unit)
    contents = _without_subnormals(contents.clone(), like.dtype)
    data = contents.expand(edit.shape).to(dtype=like.dtype, copy=True).contiguous()
    if not math.isfinite(_sum(data)) and not bool(torch.isfinite(data).all()):
        raise FusionError(f"{edit.names[0]} would leave the range of {like.dtype}. Convert the model to float32 first.")
    owner._parameters[place] = nn.Parameter(data.to(like.device), requires_grad=like.requires_grad)
    undo.append(lambda: owner._parameters.__setitem__(place, None))
    undo.append(mark_created(owner, place))


def _replace(
    modules: _Modules,
    replacement: Replacement,
    holders: Mapping[int, int],
    places: tuple[str, ...],
    undo: list[Callable[[], None]],
) -> None:
    """Put the children that stay, or an identity, in the place of a norm.

    Args:
        holders: how many modules have a module as their child, by its ``id``.
        places: what the names of norms begin with that take a guard.
    """
    norm = _norm(modules, replacement)
    kept = [norm.get_submodule(name) for name in replacement.keep]
    # A mark on a module held twice would be about two places, and a hook on what is kept about that alone.
    alone = len(kept) == 1 and holders[id(kept[0])] == 1 and not norm._forward_hooks
    new: nn.Module
    if replacement.ceiling:
        ceiling = _ceiling(modules, replacement.ceiling)
        new = nn.Sequential(ceiling, *kept) if kept else ceiling
    else:
        new = _identity(norm) if not kept else kept[0] if alone else nn.Sequential(*kept)
    undo.append(mark_norm(new, type(norm).__name__, replacement.keep, replacement.ceiling))
    for registry in _HOOKS if norm._forward_hooks else ():
        new.__dict__[registry] = norm.__dict__[registry]  # whoever registered one can still remove it
    if is_guarded(replacement.names, places):
        undo.append(add_guard(new, norm))
    for name in replacement.names:
        parent, place = _owner(modules, name)
        undo.append(lambda parent=parent, place=place: parent._modules.__setitem__(place, norm))  # type: ignore[misc]
        parent._modules[place] = new


_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
"""The hooks on the output of a module, which are on what stands in its place then."""


def _ceiling(modules: _Modules, shape: tuple[int, ...]) -> Ceiling:
    """Bounds that bound nothing yet."""
    like = next(parameter for parameter in modules[""].parameters() if parameter.is_floating_point())
    return Ceiling(torch.full(shape, math.inf, dtype=like.dtype, device=like.device))


def _holders(modules: _Modules) -> Mapping[int, int]:
    distinct = tree.distinct(modules.items())
    return Counter(id(child) for module in distinct for child in module._modules.values())


def _unknown_to_steps(changes: Changes) -> Iterator[str]:
    """The names of what a step by which a model fuses itself would not find or not take into account."""
    yield from placing.names_of(changes.steps)
    for replacement in changes.replacements:
        yield from replacement.names
    for edit in changes.edits:
        if edit.created or edit.handler is not None:
            yield from edit.names


def _norm(modules: _Modules, replacement: Replacement) -> nn.Module:
    """The norm that goes; raises FusionError if the model has no module of this name."""
    parent, place = _owner(modules, replacement.names[0])
    norm = parent._modules.get(place)
    if norm is None:
        raise FusionError(f"The plan does not fit the model: it holds no module {replacement.names[0]}.")
    return norm


def _identity(norm: nn.Module) -> nn.Identity:
    identity = nn.Identity()
    identity.training = norm.training
    mark_norm(identity, type(norm).__name__, ())
    return identity


def _work_out_of_place(module: nn.Module, undo: list[Callable[[], None]]) -> None:
    """Let an activation return a new tensor instead of writing to its input."""
    undo.append(lambda: setattr(module, "inplace", True))
    setattr(module, "inplace", False)  # noqa: B010
    undo.append(mark_out_of_place(module))


def _owner(modules: _Modules, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter or module of this name, and the last part of the name."""
    path, _, place = name.rpartition(".")
    owner = modules.get(path)
    if owner is None:
        raise FusionError(f"The plan does not fit the model: it holds no module {path}.")
    return owner, place
