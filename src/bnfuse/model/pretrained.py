"""Models of libraries that keep them in folders: ``save_pretrained`` and ``from_pretrained``.

Those of transformers and of ``huggingface_hub.PyTorchModelHubMixin`` load a file whose names do not fit with a mere
warning, or without one, and start the rest at random. What a fused model is saved with has to tell them:

* a *guard*: what stands in the place of a norm has a buffer of one element, under the name of a tensor of the norm and
  in a shape that no norm has. Every loader refuses another shape, also those that are lenient about names.
* the structure of the fused model, in the configuration that the library saves. Such a configuration is data of the
  model, so it takes part in copies, pickles and uploads. It says how the model is built; whether a file is one of a
  fused model is said by its guards.

Neither library is imported: their classes are recognised by name.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bnfuse.model import tree
from bnfuse.model.marks import marked

METHOD = "bnfuse"
"""What a configuration of transformers names as the method by which the model was made."""

CONFIG_KEY = "_bnfuse"
"""Where a configuration of PyTorchModelHubMixin has the structure."""

GUARD_SHAPE = (1,) * 6
"""Of no tensor of a norm. Not empty: empty tensors pass for tied ones, since all have the same address."""


def lenient_places(modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """What the names of all modules begin with that a library keeps in folders, and may load from what does not fit."""
    kinds = {kind for kind in set(map(type, modules.values())) if _is_lenient(kind)}
    return tuple(f"{name}." if name else "" for name, module in modules.items() if type(module) in kinds)


def _is_lenient(kind: type) -> bool:
    return all(callable(getattr(kind, name, None)) for name in ("save_pretrained", "from_pretrained"))


def is_guarded(names: Iterable[str], places: tuple[str, ...]) -> bool:
    """Whether the norm of these names takes a guard."""
    return any(name.startswith(places) for name in names)


def add_guard(place: nn.Module, norm: nn.Module) -> Callable[[], None]:
    """Give what stands in the place of a norm a guard; returns a function that takes it away.

    >>> place = nn.Identity()
    >>> undo = add_guard(place, nn.BatchNorm2d(3))
    >>> place.running_var.shape
    torch.Size([1, 1, 1, 1, 1, 1])
    """
    named: list[tuple[str, Tensor | None]] = [*norm._buffers.items(), *norm._parameters.items()]
    held = {name: it for name, it in named if it is not None and name not in norm._non_persistent_buffers_set}
    free = [
        name for name in ("running_var", "running_mean", "weight", "bias") if name in held and not hasattr(place, name)
    ]
    if not free:
        return lambda: None
    like, name = held[free[0]], free[0]
    dtype = like.dtype if like.is_floating_point() else torch.float32
    place.register_buffer(name, torch.zeros(GUARD_SHAPE, dtype=dtype, device=like.device))

    def take_away() -> None:
        place._buffers.pop(name, None)

    return take_away


# Configurations -------------------------------------------------------------------------------------------------------


def is_transformers(kind: type) -> bool:
    """Whether a class is one of transformers' models."""
    return any((base.__name__, base.__module__[:13]) == ("PreTrainedModel", "transformers.") for base in kind.__mro__)


def is_hub_mixin(kind: type) -> bool:
    """Whether a class uses PyTorchModelHubMixin."""
    return any(
        (base.__name__, base.__module__[:16]) == ("PyTorchModelHubMixin", "huggingface_hub.") for base in kind.__mro__
    )


def describe(model: nn.Module) -> Callable[[], None]:
    """Let the configurations in a model say how it is fused; returns a function that takes this back.

    A configuration that others may hold as well stays as it is: the model gets another one.
    """
    undo: list[Callable[[], None]] = []
    covered: set[int] = set()
    for module in tree.modules(model):  # the outermost that holds a configuration comes first: its names count
        kind = type(module)
        if is_transformers(kind):
            config = module.__dict__.get("config")
            if config is not None and id(module) not in covered:
                holders = [each for each in tree.modules(module) if each.__dict__.get("config") is config]
                covered.update(map(id, holders))
                new = _described(config, module)
                if new is not config:
                    undo += [_put(each, "config", new) for each in holders]
        elif is_hub_mixin(kind):
            before = getattr(module, "_hub_mixin_config", None)
            after = _described_mixin(before or {}, module)
            if after != (before or {}):
                undo.append(_put(module, "_hub_mixin_config", after))

    def take_back() -> None:
        while undo:
            undo.pop()()

    return take_back


def method_of(config: Any) -> Any:
    """The method that a configuration of transformers names, None if it names none."""
    said = getattr(config, "quantization_config", None)
    return said.get("quant_method") if isinstance(said, dict) else getattr(said, "quant_method", None)


def without_structure(config: Any) -> Any:
    """A configuration of transformers that says nothing of fusing."""
    if method_of(config) != METHOD:
        return config
    new = copy.copy(config)
    del new.quantization_config
    return new


def _described(config: Any, model: nn.Module) -> Any:
    said = _structure(model)
    if method_of(config) not in (None, METHOD):
        return config  # one thing can stand there; the guards are left
    if not said:
        return without_structure(config)
    entry = {"quant_method": METHOD, "structure": said}
    if getattr(config, "quantization_config", None) == entry:
        return config
    new = copy.copy(config)
    new.quantization_config = entry
    return new


def _described_mixin(config: Any, model: nn.Module) -> Any:
    """A configuration of PyTorchModelHubMixin that says how a model is fused.

    Where a class takes any keyword, those that stand in the configuration reach its loader too, and it is told to be
    strict: the classes of segmentation-models-pytorch leave out what has another shape otherwise.
    """
    if not isinstance(config, dict):
        return config  # a dataclass has no place for it
    said = _structure(model)
    strict = {}
    if any(it.kind is it.VAR_KEYWORD for it in inspect.signature(type(model).__init__).parameters.values()):
        strict = {"strict": True}
    dropped = {CONFIG_KEY, *strict} if CONFIG_KEY in config else {CONFIG_KEY}
    kept = {key: value for key, value in config.items() if key not in dropped}
    return strict | kept | {CONFIG_KEY: said} if said else kept


def _structure(model: nn.Module) -> str:
    """The structure of a fused model on one line, empty for one that is not fused."""
    said = marked(model)
    changed = any(said.get(what) for what in ("removed", "created", "out_of_place", "placed", "own"))
    return json.dumps(said, separators=(",", ":")) if changed else ""


def _put(module: nn.Module, name: str, value: Any) -> Callable[[], None]:
    own = module.__dict__
    before = {name: own[name]} if name in own else {}
    own[name] = value

    def take_back() -> None:
        own.pop(name, None)
        own.update(before)

    return take_back
