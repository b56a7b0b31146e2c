"""One call of a model: a method, positional and keyword arguments."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bnfuse.errors import InputError
from bnfuse.model import pytree
from bnfuse.model.inputs import normalise

FORWARD = "forward"


@dataclass(frozen=True, init=False)
class Call:
    """A call that a model takes: ``Call(x, mask=m)``, ``Call(x, method="forward_features")``.

    Attributes:
        args: the positional arguments.
        kwargs: the keyword arguments.
        method: the name of the method that is called; "forward" is the model itself, with its hooks.

    >>> Call(1, flag=True, method="encode")
    Call(1, flag=True, method='encode')
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    method: str

    def __init__(self, *args: Any, method: str = FORWARD, **kwargs: Any) -> None:
        object.__setattr__(self, "args", args)
        object.__setattr__(self, "kwargs", kwargs)
        object.__setattr__(self, "method", method)

    @staticmethod
    def of(example_inputs: Any) -> Call:
        """What a caller passes as example inputs, or a call, as a call.

        Raises:
            InputError: it is neither.
        """
        if isinstance(example_inputs, Call):
            return example_inputs
        args, kwargs = normalise(example_inputs)
        return Call(*args, **kwargs)

    @property
    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs)"""
        return self.args, self.kwargs

    def with_inputs(self, args: Iterable[Any], kwargs: dict[str, Any]) -> Call:
        """The same method with other arguments."""
        return Call(*args, method=self.method, **kwargs)

    def map(self, function: pytree.Function) -> Call:
        """The same call with every tensor among the arguments replaced by ``function(tensor)``."""
        args, kwargs = pytree.map_tensors(self.inputs, function)
        return self.with_inputs(args, kwargs)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return [tensor for _, tensor in pytree.tensors(self.inputs)]

    def run(self, model: nn.Module) -> Any:
        """Make the call."""
        if self.method == FORWARD:
            return model(*self.args, **self.kwargs)
        return getattr(model, self.method)(*self.args, **self.kwargs)

    def __repr__(self) -> str:
        given = [*map(_short, self.args), *(f"{name}={_short(value)}" for name, value in self.kwargs.items())]
        if self.method != FORWARD:
            given.append(f"method={self.method!r}")
        return f"Call({', '.join(given)})"


class PipedCall(Call):
    """A call, and another method that is given what it returned.

    >>> PipedCall(Call(1, method="forward_features"), "forward_head", pre_logits=True).method
    'forward_features | forward_head(pre_logits=True)'
    """

    def __init__(self, first: Call, then: str, **options: Any) -> None:
        """
        Args:
            first: the call.
            then: the name of the method that takes what it returned.
            options: the keyword arguments of that method.
        """
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        super().__init__(*first.args, method=f"{first.method} | {then}({given})", **first.kwargs)
        object.__setattr__(self, "_parts", (first.with_inputs((), {}), then, options))

    def with_inputs(self, args: Iterable[Any], kwargs: dict[str, Any]) -> Call:
        first, then, options = self._parts
        return PipedCall(first.with_inputs(args, kwargs), then, **options)

    def run(self, model: nn.Module) -> Any:
        first, then, options = self._parts
        return getattr(model, then)(first.with_inputs(self.args, self.kwargs).run(model), **options)

    @property
    def first(self) -> str:
        """The name of the method that is called first."""
        return self._parts[0].method

    def second(self, given: Any) -> Call:
        """The call of the second method alone, with what the first returned."""
        _, then, options = self._parts
        return Call(given, method=then, **options)

    _parts: tuple[Call, str, dict[str, Any]]


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value)


def checked_calls(calls: Any, model: nn.Module) -> tuple[Call, ...]:
    """The further calls that a caller has named.

    Raises:
        InputError: one of them is no call, or names a method that the model does not have.
    """
    if isinstance(calls, Call) or not isinstance(calls, Iterable) or isinstance(calls, (str, Tensor)):
        raise InputError(
            f"calls= takes a list of calls.\n  got:      {type(calls).__name__}\n"
            f"  expected: [bnfuse.Call(x, mask=m), bnfuse.Call(x, method='forward_features')]"
        )
    found = tuple(calls)
    for call in found:
        if not isinstance(call, Call):
            raise InputError(
                f"calls= takes calls.\n  got:      {type(call).__name__}\n  expected: bnfuse.Call(x, mask=m)"
            )
        if not callable(getattr(model, call.method, None)):
            near = difflib.get_close_matches(call.method, dir(model), 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise InputError(f"{call!r}: {type(model).__name__} has no method {call.method!r}.{hint}")
    return found
