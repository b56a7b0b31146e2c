"""The steps by which models fuse themselves, once there is nothing left for them to fuse.

Many zoos give their modules a method that folds norms, or merges branches and their norms, into new layers. It reads
the statistics of norms that it takes for granted, so it fails on a norm that is gone; or, worse, it builds a new layer
from the weight and the norm alone, and loses a bias that the layer did not have when the method was written.

So where a norm has gone, or a layer has got a bias, every module around it has such methods hidden by an attribute of
the same name that does nothing and returns the module itself. That is what all callers expect of a module in which
nothing is left to do: ``model.child = model.child.fuse()`` as well as ``child.reparameterize()``. A step that asks
``is_fused()`` first is told so instead, and finds by itself that it has nothing to do.

What hides a method is made of Python's and PyTorch's own parts only, so that a fused model that is pickled as a whole
can be loaded where this library is not installed. Copies hide the method by returning themselves.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from bnfuse.model import tree

STEPS = frozenset(
    {
        "fuse", "fuse_model", "fuse_convs", "fuse_bn", "fuse_conv_bn", "fuse_repvgg_block", "fuse_kernel",
        "reparameterize", "reparametrize", "switch_to_deploy", "convert_to_deploy", "structural_reparam",
        "merge_kernel", "merge_bn", "fold_bn", "partial_fusion", "full_fusion", "fuse_block_residual_branches",
    }
)  # fmt: skip
"""Methods by which modules fuse themselves, by the conventions of model zoos (timm, torchvision, ultralytics, RepVGG,
RepLKNet, super-gradients)."""

_ASKS = "is_fused"
"""The method by which steps ask whether they have anything to do."""


def hide(modules: Mapping[str, nn.Module], changed: Iterable[str]) -> list[Callable[[], None]]:
    """Hide the steps of all modules around some names.

    Args:
        modules: the modules of a model by name.
        changed: names of norms that are gone, and of parameters or layers that a step would not know of.

    Returns:
        Functions that show the hidden methods again.
    """
    undo: list[Callable[[], None]] = []
    for module in _around(modules, changed):
        for name, answer in _hidden(module):
            module.__dict__[name] = answer
            undo.append(functools.partial(module.__dict__.pop, name, None))
    return undo


def show(model: nn.Module) -> None:
    """Show the hidden methods of a model again, all of them."""
    for module in tree.modules(model):
        for name in [name for name, value in module.__dict__.items() if _hides(name, value, module)]:
            del module.__dict__[name]


def _around(modules: Mapping[str, nn.Module], changed: Iterable[str]) -> list[nn.Module]:
    """Every module that holds one of the names."""
    names: set[str] = set()
    for name in changed:
        while name and name not in names:
            names.add(name)
            name = name.rpartition(".")[0]
    found = [modules[name] for name in ("", *names) if name in modules] if names else []
    return list({id(module): module for module in found}.values())


def _hidden(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The attributes that hide the steps of one module."""
    kind: Any = type(module)
    asks = _is_step(kind, _ASKS)
    for name in _steps(kind):
        hidden_by = _ASKS if asks and _ASKS in getattr(kind, name).__code__.co_names else name
        if any(hidden_by in held for held in (module.__dict__, module._modules, module._parameters, module._buffers)):
            continue  # by an earlier fuse, or by the caller
        if hidden_by == _ASKS:
            yield _ASKS, functools.partial(bool, True)
        else:  # the function behind ``nn.Identity()(module)``, which makes no use of the identity
            yield name, functools.partial(nn.Identity.forward, None, module)  # type: ignore[arg-type]


def _hides(name: str, value: Any, module: nn.Module) -> bool:
    """Whether an attribute of a module is one that hides a method."""
    if not isinstance(value, functools.partial):
        return False
    if name == _ASKS:
        return value.func is bool
    return name in STEPS and value.func is nn.Identity.forward and value.args[1:] == (module,)


@functools.cache
def _steps(kind: type[nn.Module]) -> tuple[str, ...]:
    """The steps that a class has, but for those that its forward calls, which are something else."""
    found = {name for name in STEPS if _is_step(kind, name)}
    for name in dir(kind) if found else ():
        function = inspect.getattr_static(kind, name, None)
        if name.startswith("forward") and isinstance(function, types.FunctionType):
            found.difference_update(function.__code__.co_names)
    return tuple(sorted(found))


def _is_step(kind: type[nn.Module], name: str) -> bool:
    """Whether a class has a method of this name that can be called without arguments, and takes no tensors."""
    method = inspect.getattr_static(kind, name, None)
    if not isinstance(method, types.FunctionType):
        return False
    _, *parameters = inspect.signature(method).parameters.values()
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(
        (parameter.default is not parameter.empty or parameter.kind in variable)
        and "Tensor" not in str(parameter.annotation)
        for parameter in parameters
    )
