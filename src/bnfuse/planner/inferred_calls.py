"""Calls that a model surely takes too, though nobody has named them: known methods, flags, optional arguments."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from typing import Any

from torch import nn

from bnfuse.capture.unseen import Unseen
from bnfuse.model.calls import Call

METHODS = (
    "forward_features",
    "forward_intermediates",
    "forward_feature",
    "extract_features",
    "extract_feature",
    "extract_endpoints",
    "get_intermediate_layers",
    "forward_dummy",
)
"""Methods that take what forward takes, by the conventions of model zoos (timm, efficientnet_pytorch, DINO)."""

RESETS = ("reset", "reset_state", "reset_states", "reset_hidden", "reset_memory", "clear", "clear_cache")
"""Methods by which models forget."""

_MOST = 8
"""So many optional arguments are tried."""


def methods(model: nn.Module) -> list[str]:
    """The known methods that the model has."""
    return [name for name in METHODS if inspect.ismethod(getattr(model, name, None))]


def resets(model: nn.Module) -> list[str]:
    """The methods without required arguments by which the model forgets."""
    found = []
    for name in RESETS:
        method = getattr(type(model), name, None)
        if callable(method) and name not in model._modules:
            required = [p for p in _parameters(method)[1:] if p.default is p.empty and p.kind not in _VARIABLE]
            if not required:
                found.append(name)
    return found


def optional_arguments(model: nn.Module, call: Call) -> Iterator[tuple[str, Any, bool]]:
    """The arguments that a call leaves at their defaults: the name, the default, and whether it is a flag."""
    method = getattr(type(model), call.method, None) if call.method not in model.__dict__ else None
    if method is None:
        return
    parameters = _parameters(method)[1:]
    for place, parameter in enumerate(parameters):
        given = place < len(call.args) or parameter.name in call.kwargs
        if parameter.default is parameter.empty or parameter.kind in _VARIABLE or given:
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY:
            continue
        yield parameter.name, parameter.default, isinstance(parameter.default, bool) or _says_bool(parameter.annotation)


_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _parameters(method: Any) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(method).parameters.values())
    except (TypeError, ValueError):
        return []


def _says_bool(annotation: Any) -> bool:
    """True for ``bool`` and ``Optional[bool]``, also as text."""
    if isinstance(annotation, str):
        return annotation.replace(" ", "") in ("bool", "Optional[bool]", "bool|None", "None|bool")
    return annotation is bool or bool in typing.get_args(annotation)


def with_argument(call: Call, name: str, value: Any) -> Call:
    return call.with_inputs(call.args, {**call.kwargs, name: value})


def varied(model: nn.Module, call: Call) -> Iterator[tuple[str, str, list[Call]]]:
    """The call with every optional argument given: the name, what that is, and calls to be tried in turn.

    A flag is flipped. Any other is a tensor or number of which nothing is known, or a flag after all.
    """
    method = getattr(type(model), call.method, None)
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in _parameters(method)):
        more = [call.with_inputs((*call.args, value), call.kwargs) for value in (Unseen(), True)]
        yield "*args", "one more argument", more
    for count, (name, default, is_flag) in enumerate(optional_arguments(model, call)):
        if count == _MOST:
            return
        if is_flag:
            yield name, f"{name}={not default}", [with_argument(call, name, not default)]
        elif default is None or isinstance(default, float):
            calls = [with_argument(call, name, value) for value in (Unseen(), True)]
            yield name, f"{name}=...", calls if default is None else calls[:1]


def is_complete(call: Call) -> bool:
    """True if the call can be made: nothing in it is unseen."""
    return not any(isinstance(value, Unseen) for value in (*call.args, *call.kwargs.values()))


def forward_of(call: Call, method: str) -> Call:
    """Another method with the same arguments."""
    return Call(*call.args, method=method, **call.kwargs)
