"""Changing the structure of a model: other modules in old places, and parameters of their own for modules.

Nothing here decides or computes anything: a `bnfuse.changes.Step` says what to put where and what it holds. What is
made anew is a layer of PyTorch's, so that a model that is pickled as a whole can be loaded without this library.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from bnfuse.changes import LAYERS, Former, ModuleSpec, NewLayer, OwnTensor, Placement, Row, Source, Step
from bnfuse.errors import FusionError
from bnfuse.model import tree
from bnfuse.model.clip import Clip
from bnfuse.model.describe import one_line
from bnfuse.model.marks import mark_own, mark_placed
from bnfuse.model.nothing import Nothing
from bnfuse.model.pretrained import add_guard, is_guarded, lenient_places

_REGISTRIES = (
    "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_state_dict_hooks", "_load_state_dict_pre_hooks", "_flat_weights",
)  # fmt: skip
"""Attributes that hold what a module consists of, and that change with it."""


def carry_out(step: Step, model: nn.Module, undo: list[Callable[[], None]]) -> None:
    """Make one step in the model itself.

    Args:
        undo: functions that take it back are added; they are to be called from the last to the first.

    Raises:
        FusionError: the model lacks what the step names, or what it is to hold does not fit.
    """
    modules = dict(tree.named_modules(model))
    with torch.inference_mode(False), torch.no_grad():
        made = [(placement, _built(modules, placement)) for placement in step.placements]
        owned = [(tensor, _own(modules, tensor)) for tensor in step.tensors]
        _give(modules, owned, undo)
        places = lenient_places(modules)
        for placement, module in made:
            if is_guarded(placement.names, places):
                undo.append(add_guard(module, modules[placement.names[0]]))
            _put(modules, placement, module, undo)


def names_of(steps: Iterable[Step]) -> Iterator[str]:
    """The names of the places and tensors that change."""
    for step in steps:
        for placement in step.placements:
            yield from placement.names
        for tensor in step.tensors:
            yield from tensor.names


# Modules --------------------------------------------------------------------------------------------------------------


def _built(modules: Mapping[str, nn.Module], placement: Placement) -> nn.Module:
    former = _module(modules, placement.names[0])
    if any(modules.get(name) is not former for name in placement.names):
        raise FusionError(f"The plan does not fit the model: {' and '.join(placement.names)} are not one module.")
    return _module_of(modules, former, placement.module)


def _module_of(modules: Mapping[str, nn.Module], former: nn.Module, spec: ModuleSpec) -> nn.Module:
    if isinstance(spec, Former):
        try:
            return former.get_submodule(spec.path)
        except AttributeError as error:
            raise FusionError(f"The plan does not fit the model: {one_line(error)}.") from error
    made: nn.Module
    if isinstance(spec, NewLayer):
        made = _layer(modules, former, spec)
    else:
        parts = OrderedDict((name, _module_of(modules, former, part)) for name, part in spec.parts)
        if len(parts) < len(spec.parts) or any("." in name or not name for name in parts):
            raise FusionError(f"A row cannot be made of {', '.join(repr(name) for name, _ in spec.parts)}.")
        made = nn.Sequential(parts)
    made.training = former.training
    return made


def _layer(modules: Mapping[str, nn.Module], former: nn.Module, spec: NewLayer) -> nn.Module:
    layer = _empty(spec)
    for place, parameter in list(layer._parameters.items()):
        if parameter is not None:
            source = spec.sources.get(place)
            like = _like(modules, former, source)
            layer._parameters[place] = _parameter(tuple(parameter.shape), source, like, f"{spec.kind}.{place}")
    unknown = spec.sources.keys() - layer._parameters.keys()
    if unknown:
        raise FusionError(f"{spec.kind} has no parameter {', '.join(sorted(unknown))}.")
    return layer


def _empty(spec: NewLayer) -> nn.Module:
    """A layer whose parameters have no contents."""
    if spec.kind not in LAYERS:
        raise FusionError(f"{spec.kind} is no layer that is made anew.")
    kind: Any = {"Nothing": Nothing, "Clip": Clip}.get(spec.kind) or getattr(nn, spec.kind)
    where = {"device": "meta"} if spec.kind.startswith(("Conv", "Linear", "Clip")) else {}
    try:
        return kind(**spec.settings, **where)  # type: ignore[no-any-return]
    except Exception as error:  # (whatever a constructor raises on what it does not take)
        raise FusionError(f"{spec.kind} cannot be made: {one_line(error)}.") from error


def size_of(spec: ModuleSpec) -> int:
    """How many parameters the new layers in a module have.

    >>> size_of(NewLayer("Linear", {"in_features": 4, "out_features": 2}))
    10

    Raises:
        FusionError: a layer cannot be made of its settings.
    """
    if isinstance(spec, Row):
        return sum(size_of(part) for _, part in spec.parts)
    return 0 if isinstance(spec, Former) else sum(it.numel() for it in _empty(spec).parameters())


def _put(
    modules: Mapping[str, nn.Module], placement: Placement, module: nn.Module, undo: list[Callable[[], None]]
) -> None:
    former = modules[placement.names[0]]
    undo.append(mark_placed(module, former, placement.module))
    for name in placement.names:
        parent, place = _owner(modules, name)
        undo.append(lambda parent=parent, place=place: parent._modules.__setitem__(place, former))  # type: ignore[misc]
        parent._modules[place] = module


# Tensors --------------------------------------------------------------------------------------------------------------


def _own(modules: Mapping[str, nn.Module], tensor: OwnTensor) -> nn.Parameter:
    owner, _ = _owner(modules, tensor.names[0])
    if any(_owner(modules, name)[0] is not owner for name in tensor.names):
        raise FusionError(f"The plan does not fit the model: {' and '.join(tensor.names)} are not one tensor.")
    like = _like(modules, owner, tensor.source)
    return _parameter(tensor.shape, tensor.source, like, tensor.names[0])


def _parameter(shape: tuple[int, ...], source: Source | None, like: Tensor, name: str) -> nn.Parameter:
    contents = None if source is None else like if source.exact is None else source.exact
    if contents is None:
        data = torch.zeros(shape, dtype=like.dtype, device=like.device)
    elif tuple(contents.shape) != shape:
        raise FusionError(f"The plan does not fit the model at {name}: shape {tuple(contents.shape)} for {shape}.")
    else:
        data = _in_format_of(like, contents.detach().to(like.device, like.dtype, copy=True))
        if contents is not like and math.isfinite(float(contents.sum())) and not math.isfinite(float(data.sum())):
            raise FusionError(f"{name} would leave the range of {like.dtype}. Convert the model to float32 first.")
    return nn.Parameter(data, requires_grad=like.requires_grad)


def _in_format_of(like: Tensor, data: Tensor) -> Tensor:
    """The contents in the memory format of a tensor."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    wanted = formats.get(like.dim())
    if (
        wanted is None
        or data.dim() != like.dim()
        or like.is_contiguous()
        or not like.is_contiguous(memory_format=wanted)
    ):
        return data.contiguous()
    return data.contiguous(memory_format=wanted)


def _like(modules: Mapping[str, nn.Module], former: nn.Module, source: Source | None) -> Tensor:
    """The tensor that gives dtype and device."""
    if source is None:
        held = itertools.chain(former.parameters(), former.buffers(), modules[""].parameters())
        return next(tensor for tensor in held if tensor.is_floating_point())
    owner, place = _owner(modules, source.like)
    found: Tensor | None = owner._parameters.get(place)
    found = owner._buffers.get(place) if found is None else found
    if found is None:
        raise FusionError(f"The plan does not fit the model: it holds no tensor {source.like}.")
    return found


def _give(
    modules: Mapping[str, nn.Module],
    owned: Iterable[tuple[OwnTensor, nn.Parameter]],
    undo: list[Callable[[], None]],
) -> None:
    """Let modules hold parameters that they computed so far, or had in common with others."""
    by_module: dict[int, tuple[nn.Module, dict[str, nn.Parameter]]] = {}
    for tensor, parameter in owned:
        module, place = _owner(modules, tensor.names[0])
        by_module.setdefault(id(module), (module, {}))[1][place] = parameter
    for module, parameters in by_module.values():
        undo.append(_copied_state(module))
        _stop_computing(module, parameters)
        for place, parameter in parameters.items():
            setattr(module, place, parameter)
            mark_own(module, place, parameter)  # taken back with the attributes


def _copied_state(module: nn.Module) -> Callable[[], None]:
    """Let a module work on copies of its registries; returns a function that gives it the former ones back."""
    kind, before = type(module), dict(module.__dict__)

    def take_back() -> None:
        module.__class__ = kind
        module.__dict__.clear()
        module.__dict__.update(before)

    for name in _REGISTRIES:
        if name in before:
            module.__dict__[name] = before[name].copy()
    return take_back


def _stop_computing(module: nn.Module, places: Iterable[str]) -> None:
    """Take away what computes some tensors: parametrisations, or hooks of PyTorch's."""
    if parametrize.is_parametrized(module):
        parametrized = set(module.parametrizations)  # type: ignore[arg-type]
        if parametrized <= set(places):
            kind = parametrize.type_before_parametrizations(module)
            del module._modules["parametrizations"]
            module.__class__ = kind
            _drop(module._load_state_dict_pre_hooks, _reads_older_files)
        elif parametrized & set(places):
            raise FusionError(f"{type(module).__name__} computes other tensors too: {', '.join(sorted(parametrized))}.")
    for key, hook in list(module._forward_pre_hooks.items()):
        place = _name_of(hook)
        if place is None or place not in places:
            continue
        del module._forward_pre_hooks[key]
        for suffix in ("_g", "_v", "_u", "_orig", "_mask"):
            module._parameters.pop(place + suffix, None)
            module._buffers.pop(place + suffix, None)
        for registry in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
            _drop(registry, lambda other, hook=hook: getattr(_inner(other), "fn", None) is hook)  # type: ignore[misc]
    for place in places:
        module.__dict__.pop(place, None)


def _drop(registry: dict[int, Any], chosen: Callable[[Any], bool]) -> None:
    for number, hook in list(registry.items()):
        if chosen(hook):
            del registry[number]


def _inner(hook: Any) -> Any:
    """The function that PyTorch has wrapped to register it."""
    return getattr(hook, "hook", hook)


def _reads_older_files(hook: Any) -> bool:
    """Whether a hook renames what an older release has saved of a parametrised tensor."""
    return getattr(_inner(hook), "__module__", "") == "torch.nn.utils.parametrizations"


def _name_of(hook: Any) -> str | None:
    """The tensor that a hook of PyTorch's computes before each call, None for any other hook."""
    if isinstance(hook, (WeightNorm, SpectralNorm)):
        return hook.name
    return hook._tensor_name if isinstance(hook, prune.BasePruningMethod) else None


def computed_tensors(module: nn.Module) -> list[str]:
    """The names of the tensors that a module computes by parametrisations, or by hooks of PyTorch's."""
    found = list(module.parametrizations) if parametrize.is_parametrized(module) else []  # type: ignore[arg-type]
    return [*found, *filter(None, map(_name_of, module._forward_pre_hooks.values()))]


# Names ----------------------------------------------------------------------------------------------------------------


def _module(modules: Mapping[str, nn.Module], name: str) -> nn.Module:
    found = modules.get(name)
    if found is None or not name:
        raise FusionError(f"The plan does not fit the model: it holds no module {name} that can be replaced.")
    return found


def _owner(modules: Mapping[str, nn.Module], name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter or module of this name, and the last part of the name."""
    path, _, place = name.rpartition(".")
    owner = modules.get(path)
    if owner is None:
        raise FusionError(f"The plan does not fit the model: it holds no module {path}.")
    return owner, place
