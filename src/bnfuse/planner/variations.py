"""Other values for the arguments of a call that are no tensors, and tensors that need not be given."""

from __future__ import annotations

import copy
import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bnfuse.capture.unseen import Guess, Unseen
from bnfuse.model import pytree
from bnfuse.model.calls import Call
from bnfuse.model.other_state import is_plain_object
from bnfuse.operators import is_dense
from bnfuse.planner.model_code import MOST, VARIABLE, ModelCode, parameters_of

_DEEPEST = 2
"""So deep is data looked into, in which a value may be another."""

_TOGETHER = 5
"""So many arguments are varied two at a time."""


@dataclass(frozen=True)
class Variation:
    """One argument of a call, and other values for it, which are made when they are asked for.

    Attributes:
        what: the argument, in words.
        changed: the call with a value in the place of the argument.
        values: gives the values.
        all_of_them: whether each value may lead somewhere else; else the first that does is enough.
        further_values: gives values that may lead somewhere else, each for itself, unless the very first did.
        is_flag: whether it is a flag.
        may_fail: whether nobody need be told if the model takes none of the values.
        is_text: whether it is given text, of which more may be known to the code.
    """

    what: str
    changed: Callable[[Any], Call]
    values: Callable[[], Iterable[Any]]
    all_of_them: bool = False
    further_values: Callable[[], Iterable[Any]] = tuple
    is_flag: bool = False
    is_text: bool = False
    may_fail: bool = False

    @functools.cached_property
    def calls(self) -> list[Call]:
        """The call with each of the values."""
        return list(map(self.changed, self.values()))

    @property
    def otherwise(self) -> Iterator[Call]:
        """The call with each of the further values."""
        return map(self.changed, self.further_values())


class _Known:
    """What values are made of: the code of the model, and guesses at what an argument of a call could be."""

    def __init__(self, code: ModelCode, call: Call) -> None:
        self.code, self._call = code, call

    @functools.cached_property
    def guesses(self) -> list[Any]:
        return _guesses(self._call)

    def guesses_or_true(self) -> list[Any]:
        return [*self.guesses, True]


def variations(code: ModelCode, call: Call) -> Iterator[Variation]:
    """Other values of every argument that is no tensor, given or left at its default.

    A flag is flipped, a number is counted up and down. What is None, or may be there and is not, becomes a tensor or an
    object of which nothing is known, or a flag.
    """
    model = code.model
    method = getattr(type(model), call.method, None) if call.method not in model.__dict__ else None
    parameters = parameters_of(method)[1:] if method is not None else []
    known = _Known(code, call)
    for place, value in enumerate(call.args):
        yield from _of_value(f"argument {place}", value, known, functools.partial(_at, call, place))
    for name, value in call.kwargs.items():
        yield from _of_value(name, value, known, functools.partial(_with, call, name))
    yield from _left_out(call, parameters)
    for place, parameter in enumerate(parameters):
        if parameter.kind is parameter.VAR_POSITIONAL:
            changed = functools.partial(_at, call, len(call.args))
            yield Variation("one more argument", changed, known.guesses_or_true, may_fail=True)
            if place < len(call.args) and isinstance(call.args[-1], Tensor):  # a list of tensors, as it were
                yield _exactly("one tensor fewer", call.with_inputs(call.args[:-1], call.kwargs))
                yield _exactly("one tensor more", changed(call.args[-1].clone()))
        elif parameter.kind is parameter.VAR_KEYWORD:
            taken = {parameter.name for parameter in parameters} | set(call.kwargs)
            for name in ["unknown", *code.words_but(taken)][:MOST]:
                changed = functools.partial(_with, call, name)
                yield Variation(name, changed, known.guesses_or_true, may_fail=True)
        elif place >= len(call.args) and parameter.name not in call.kwargs and parameter.default is not parameter.empty:
            if parameter.kind is parameter.POSITIONAL_ONLY:
                continue
            flag = parameter.default is None and _says_bool(parameter.annotation)
            changed = functools.partial(_with, call, parameter.name)
            yield from _of_value(parameter.name, False if flag else parameter.default, known, changed)


def _left_out(call: Call, parameters: Sequence[inspect.Parameter]) -> Iterator[Variation]:
    """The call without a tensor that need not be given: left out, or its default in its place."""
    by_name = {parameter.name: parameter for parameter in parameters}
    for place, value in enumerate(call.args):
        parameter = parameters[place] if place < len(parameters) else None
        if parameter is not None and parameter.kind in VARIABLE:
            return
        if parameter is None or parameter.default is parameter.empty or not pytree.tensors(value):
            continue
        yield _exactly(f"{parameter.name} left out", _at(call, place, parameter.default))
    for name, value in call.kwargs.items():
        parameter = by_name.get(name)
        needed = parameter is not None and parameter.default is parameter.empty
        if not needed and pytree.tensors(value):
            without = {other: given for other, given in call.kwargs.items() if other != name}
            yield _exactly(f"{name} left out", call.with_inputs(call.args, without))


def _exactly(what: str, call: Call) -> Variation:
    """A variation that is this call, and that the model need not take."""
    return Variation(what, lambda value: call, lambda: (None,), may_fail=True)


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
            torn = torch.arange(mask.numel(), device=mask.device).reshape(mask.shape) % 2 == 0
            guesses += [Guess(torn), Guess(torn.to(like.dtype)), Guess(torch.zeros_like(torn))]
            guesses += [Guess(one.bool().reshape(())), Guess(one.reshape(()))]  # which adds no axes
    return guesses


def _of_value(
    what: str, value: Any, known: _Known, changed: Callable[[Any], Call], depth: int = 0
) -> Iterator[Variation]:
    code = known.code
    if isinstance(value, bool):
        yield Variation(f"{what}={not value}", changed, lambda: (not value,), is_flag=True)
        if code.compares_with_flags:  # it asks ``scale is True`` and not ``if scale``
            yield Variation(f"{what}=0.5", changed, lambda: (0.5,), may_fail=True)
    elif isinstance(value, int):
        yield Variation(what, changed, functools.partial(_numbers_near, value, code), all_of_them=True)
    elif value is None:
        yield Variation(
            what, changed, lambda: known.guesses, further_values=lambda: (True, 0, 1, 2, 3, *code.words[:MOST])
        )
    elif isinstance(value, float):
        near = [other for other in (value + 1, value - 1, value / 2, 0.0, 1.0) if other != value]
        yield Variation(what, changed, lambda: (known.guesses[0], *near), all_of_them=True)
    elif isinstance(value, str):
        yield Variation(what, changed, lambda: code.words_but({value})[:MOST], all_of_them=True, is_text=True)
    elif type(value) in (list, tuple) and all(type(item) in (int, float, str) for item in value):
        yield Variation(what, changed, functools.partial(_sequences_near, value), all_of_them=True)
    elif type(value) is dict:
        for word in code.words_but(value)[:MOST]:
            put_in = _then(functools.partial(_with_item, value, word), changed)
            yield Variation(f"{what}[{word!r}]", put_in, known.guesses_or_true, may_fail=True)
        held = [item for item in value.values() if isinstance(item, Tensor)]
        if held:
            yield _exactly(f"one more of {what}", changed({**value, "unknown": held[-1].clone()}))
        yield from _of_members(what, value, known, changed, depth)
    elif not isinstance(value, Tensor):
        members = list(_members(value))
        if members and depth < _DEEPEST:
            yield from _of_members(what, value, known, changed, depth)
        elif not pytree.tensors(value):
            yield Variation(what, changed, tuple)


def _numbers_near(value: int, code: ModelCode) -> list[int]:
    beyond = [number + more for number in code.thresholds for more in (0, 1)]
    near = dict.fromkeys((value + 1, value - 1, value + 2, 0, 1, 2, 3, *beyond))
    return [other for other in near if other != value]


def _sequences_near(value: Any) -> list[Any]:
    kind = type(value)
    sets: list[Any] = [(), (0,), (1,), (2,), (0, 1, 2, 3), (-1,)]
    if value:
        sets += [value[:-1], (*value, value[-1])]
        if all(type(item) is int for item in value):
            sets += [tuple(item + 1 for item in value)]
    return [kind(other) for other in sets if kind(other) != value]


def _of_members(
    what: str, value: Any, known: _Known, changed: Callable[[Any], Call], depth: int
) -> Iterator[Variation]:
    """Other values of what stands in a container or data object, and tensors that may not be there."""
    for name, item, put in list(_members(value))[:MOST]:
        inside = _then(put, changed)
        if not isinstance(item, Tensor):
            yield from _of_value(f"{what}{name}", item, known, inside, depth + 1)
        elif type(value) is dict:
            without = {key: other for key, other in value.items() if other is not item}
            yield _exactly(f"{what} without {name}", changed(without))
        else:
            yield _exactly(f"{what}{name} is None", inside(None))


def _then(first: Callable[[Any], Any], second: Callable[[Any], Call]) -> Callable[[Any], Call]:
    return lambda value: second(first(value))


def _members(value: Any) -> Iterator[tuple[str, Any, Callable[[Any], Any]]]:
    """What stands in data: the name, the value, and what gives a copy with another value in its place."""
    if type(value) is dict:
        for key, item in value.items():
            yield f"[{key!r}]", item, functools.partial(_with_item, value, key)
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for name in value._fields:
            yield f".{name}", getattr(value, name), functools.partial(_with_field, value, name)
    elif type(value) in (list, tuple):
        for place, item in enumerate(value):
            yield f"[{place}]", item, functools.partial(_with_place, value, place)
    elif is_plain_object(value) and hasattr(value, "__dict__") and not callable(value):
        for name, item in vars(value).items():
            yield f".{name}", item, functools.partial(_with_attribute, value, name)


def _with_item(held: dict[Any, Any], key: Any, value: Any) -> dict[Any, Any]:
    return {**held, key: value}


def _with_field(held: Any, name: str, value: Any) -> Any:
    return held._replace(**{name: value})


def _with_place(held: Any, place: int, value: Any) -> Any:
    return type(held)((*held[:place], value, *held[place + 1 :]))


def _with_attribute(held: Any, name: str, value: Any) -> Any:
    other = copy.copy(held)
    vars(other)[name] = value
    return other


def together(code: ModelCode, varied: Sequence[Variation]) -> Iterator[Variation]:
    """Two flags flipped at a time, and a flag beside an argument that may be there."""
    flags = [variation for variation in varied if variation.is_flag or variation.calls][:_TOGETHER]
    for place, variation in enumerate(flags):
        if not variation.is_flag:
            continue
        names = {other.what for number, other in enumerate(flags) if other.is_flag <= (number > place)} - {
            variation.what
        }
        for other in variations(code, variation.calls[0]):
            if other.what in names and other.calls:
                yield replace(other, what=f"{variation.what}, {other.what}")


def _says_bool(annotation: Any) -> bool:
    """True for ``bool`` and ``Optional[bool]``, also as text."""
    if isinstance(annotation, str):
        return annotation.replace(" ", "") in ("bool", "Optional[bool]", "bool|None", "None|bool")
    return annotation is bool or bool in typing.get_args(annotation)


def is_complete(call: Call) -> bool:
    """True if the call can be made: nothing in it is unseen."""
    return not any(map(_is_unseen, (*call.args, *call.kwargs.values())))


def is_no_tensor(call: Call) -> bool:
    """True if something of which nothing is known stands in the call, which is no tensor for code that asks."""
    return any(isinstance(value, Unseen) for value in (*call.args, *call.kwargs.values()))


def _is_unseen(value: Any, depth: int = 0) -> bool:
    if isinstance(value, (Unseen, Guess)):
        return True
    if isinstance(value, Tensor) or depth > _DEEPEST:
        return False
    return any(_is_unseen(item, depth + 1) for _, item, _ in _members(value))
