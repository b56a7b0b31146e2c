"""Calls that a model surely takes too, though nobody has named them: known methods, flags, optional arguments."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bnfuse.capture.unseen import Guess, Unseen
from bnfuse.model.calls import Call
from bnfuse.operators import is_dense

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
"""So many names of keywords or keys are tried."""


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


@dataclass(frozen=True)
class Variation:
    """One argument of a call, and other values for it.

    Attributes:
        what: the argument, in words.
        calls: the call with these values.
        all_of_them: whether each value may lead somewhere else; else the first that does is enough.
        otherwise: further values that may, each for itself, unless the very first led somewhere else.
        exists: whether the model surely has such an argument.
    """

    what: str
    calls: list[Call]
    all_of_them: bool = False
    otherwise: Sequence[Call] = ()
    exists: bool = True


def variations(model: nn.Module, call: Call) -> Iterator[Variation]:
    """Other values of every argument that is no tensor, given or left at its default.

    A flag is flipped, a number is counted up and down. What is None, or may be there and is not, becomes a tensor or an
    object of which nothing is known, or a flag.
    """
    method = getattr(type(model), call.method, None) if call.method not in model.__dict__ else None
    parameters = _parameters(method)[1:] if method is not None else []
    words = _words(model)
    for place, value in enumerate(call.args):
        yield from _of_value(
            f"argument {place}", value, _guesses(call), words,
            functools.partial(_at, call, place),
        )  # fmt: skip
    for name, value in call.kwargs.items():
        yield from _of_value(name, value, _guesses(call), words, functools.partial(_with, call, name))
    for place, parameter in enumerate(parameters):
        if parameter.kind is parameter.VAR_POSITIONAL:
            more = [call.with_inputs((*call.args, value), call.kwargs) for value in (*_guesses(call), True)]
            yield Variation("one more argument", more, exists=False)
            if len(call.args) > max(place, 1):
                fewer = call.with_inputs(call.args[:-1], call.kwargs)
                again = call.with_inputs((*call.args, call.args[-1]), call.kwargs)
                yield Variation("another number of arguments", [fewer, again], all_of_them=True, exists=False)
        elif parameter.kind is parameter.VAR_KEYWORD:
            known = {parameter.name for parameter in parameters} | set(call.kwargs)
            for name in ["unknown", *(word for word in words if word not in known)][:_MOST]:
                yield Variation(name, [_with(call, name, value) for value in (*_guesses(call), True)], exists=False)
        elif place >= len(call.args) and parameter.name not in call.kwargs and parameter.default is not parameter.empty:
            if parameter.kind is parameter.POSITIONAL_ONLY:
                continue
            flag = parameter.default is None and _says_bool(parameter.annotation)
            yield from _of_value(
                parameter.name, False if flag else parameter.default, _guesses(call), words,
                functools.partial(_with, call, parameter.name),
            )  # fmt: skip


def _at(call: Call, place: int, value: Any) -> Call:
    return call.with_inputs((*call.args[:place], value, *call.args[place + 1 :]), call.kwargs)


def _with(call: Call, name: str, value: Any) -> Call:
    return call.with_inputs(call.args, {**call.kwargs, name: value})


def _guesses(call: Call) -> list[Any]:
    """What an argument could be of which nothing is known."""
    guesses: list[Any] = [Unseen()]
    for like in call.tensors[:1]:
        if is_dense(like) and like.dim():
            mask = like[:, :1] if like.dim() > 2 else like[:, 0] if like.dim() == 2 else like
            one = like.new_ones([1] * like.dim())  # it is broadcast to any other
            guesses += [Guess(one.bool()), Guess(one), Guess(torch.ones_like(mask, dtype=torch.bool))]
            guesses += [Guess(torch.ones_like(like))]
    return guesses


def _of_value(
    what: str, value: Any, guesses: list[Any], words: list[str], changed: Callable[[Any], Call]
) -> Iterator[Variation]:
    if isinstance(value, bool):
        yield Variation(f"{what}={not value}", [changed(not value)])
    elif isinstance(value, int):
        near = dict.fromkeys((value + 1, value - 1, value + 2, 0, 1, 2, 3))
        yield Variation(what, [changed(other) for other in near if other != value], all_of_them=True)
    elif value is None:
        yield Variation(what, list(map(changed, guesses)), otherwise=list(map(changed, (True, 0, 1, 2, 3))))
    elif isinstance(value, float):
        numbers = [changed(other) for other in (0.0, 1.0, value + 1, -value) if other != value]
        yield Variation(what, [changed(guesses[0])], otherwise=numbers)
    elif isinstance(value, str):
        yield Variation(what, [])
    elif type(value) is dict:
        for word in [word for word in words if word not in value][:_MOST]:
            calls = [changed({**value, word: guess}) for guess in (*guesses, True)]
            yield Variation(f"{what}[{word!r}]", calls, exists=False)


_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _parameters(method: Any) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(method).parameters.values())
    except (TypeError, ValueError):
        return []


def _words(model: nn.Module) -> list[str]:
    """The strings in the code of a model that could be names of arguments or keys."""
    codes = [function.__code__ for function in vars(type(model)).values() if inspect.isfunction(function)]
    found: dict[str, None] = {}
    while codes:
        for constant in codes.pop().co_consts:
            if isinstance(constant, types.CodeType):
                codes.append(constant)
            elif isinstance(constant, str) and constant.isidentifier():
                found[constant] = None
    return list(found)


def _says_bool(annotation: Any) -> bool:
    """True for ``bool`` and ``Optional[bool]``, also as text."""
    if isinstance(annotation, str):
        return annotation.replace(" ", "") in ("bool", "Optional[bool]", "bool|None", "None|bool")
    return annotation is bool or bool in typing.get_args(annotation)


def is_complete(call: Call) -> bool:
    """True if the call can be made: nothing in it is unseen."""
    values = [*call.args, *call.kwargs.values()]
    values += [item for value in values if type(value) is dict for item in value.values()]
    return not any(isinstance(value, (Unseen, Guess)) for value in values)


def forward_of(call: Call, method: str) -> Call:
    """Another method with the same arguments."""
    return Call(*call.args, method=method, **call.kwargs)
