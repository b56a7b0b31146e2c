"""An argument that nobody has given yet: a mask, a scale, labels, of which neither shape nor contents are known.

It takes part in a run in place of the argument. Whatever it meets is seen by something unknown, and has to stay as it
is: every tensor that an operator reads together with it is pinned, and so is the result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnfuse.capture.values import Values
from bnfuse.model import pytree
from bnfuse.reasons import MEETS_UNSEEN_ARGUMENT


@dataclass(frozen=True)
class Guess:
    """A tensor in place of an unseen argument, for code that takes nothing but tensors. It pins what it meets, too."""

    tensor: Tensor


class UnseenError(Exception):
    """The code asks for something of an unseen argument that cannot be told."""


_values: list[Values] = []
"""Those of the run that goes on. An `Unseen` itself holds nothing, since nested data is searched for tensors."""


@contextlib.contextmanager
def pinning(values: Values) -> Iterator[None]:
    """A run during which unseen arguments pin what they meet."""
    _values.append(values)
    try:
        yield
    finally:
        _values.pop()


def _result(args: Any, kwargs: Any) -> Any:
    """What a function gives for arguments of which one is unseen."""
    found = [tensor for _, tensor in pytree.tensors((args, kwargs))]
    values = _values[-1]
    depending = []
    for tensor in found:
        value = values.of(tensor)
        value.pin(MEETS_UNSEEN_ARGUMENT)
        if not value.independent:
            depending.append(tensor)
    if not depending:
        return Unseen()
    made = max(depending, key=lambda tensor: (tensor.is_floating_point(), tensor.numel())).clone()
    values.of(made).pin(MEETS_UNSEEN_ARGUMENT)
    return made


class Unseen:
    """An argument that nobody has given yet."""

    __slots__ = ()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _result(args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Unseen()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _result(args, kwargs)

    def __getitem__(self, place: Any) -> Unseen:
        return Unseen()

    def __setitem__(self, place: Any, value: Any) -> None:
        _result((value,), {})

    def __setattr__(self, name: str, value: Any) -> None:
        _result((value,), {})

    def __bool__(self) -> bool:
        raise UnseenError("whether it is true")

    def __iter__(self) -> Iterator[Any]:
        raise UnseenError("how many parts it has")

    def __len__(self) -> int:
        raise UnseenError("how many parts it has")

    def __index__(self) -> int:
        raise UnseenError("which number it is")

    def __float__(self) -> float:
        raise UnseenError("which number it is")

    def __eq__(self, other: object) -> Any:
        return _result((other,), {})

    def __ne__(self, other: object) -> Any:
        return _result((other,), {})

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return "..."


def _operation(self: Unseen, *others: Any) -> Any:
    return _result(others, {})


for _name in (
    "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "rfloordiv", "mod", "rmod",
    "pow", "rpow", "matmul", "rmatmul", "and", "rand", "or", "ror", "xor", "rxor", "neg", "pos", "abs", "invert",
    "lt", "le", "gt", "ge",
):  # fmt: skip
    setattr(Unseen, f"__{_name}__", _operation)

assert torch.overrides.is_tensor_like(Unseen())
assert not isinstance(Unseen(), Tensor)
