"""What the caller may ask for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from bnfuse.changes import Handler
from bnfuse.errors import InputError


@dataclass(frozen=True)
class Options:
    """What the caller asks for; see :func:`bnfuse.fuse`."""

    keep: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    layers: tuple[type[nn.Module], ...] | None = None
    handlers: Mapping[type[nn.Module], Handler] = field(default_factory=dict)

    @staticmethod
    def of(
        keep: str | Sequence[str] = (),
        also: str | Sequence[str] = (),
        layers: Sequence[type[nn.Module]] | None = None,
        handlers: Mapping[type[nn.Module], Handler] | None = None,
    ) -> Options:
        for kind in layers or ():
            if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
                raise InputError(
                    f"layers= takes classes of modules, such as (nn.Conv2d, nn.Linear).\n"
                    f"  got:      {kind!r}\n  expected: a subclass of torch.nn.Module"
                )
        for kind, handler in (handlers or {}).items():
            if not (isinstance(kind, type) and issubclass(kind, nn.Module) and callable(handler)):
                raise InputError(
                    f"handlers= takes a dict from classes of modules to functions handler(layer, scale, shift).\n"
                    f"  got:      {kind!r}: {handler!r}\n  expected: a subclass of torch.nn.Module: a function"
                )
        return Options(
            _patterns("keep", keep),
            _patterns("also", also),
            None if layers is None else tuple(layers),
            dict(handlers or {}),
        )


def _patterns(argument: str, given: str | Sequence[str]) -> tuple[str, ...]:
    """The names or glob patterns as a tuple; raise InputError if they are something else."""
    if isinstance(given, str):
        return (given,)
    patterns = tuple(given) if isinstance(given, Iterable) else None
    if patterns is None or not all(isinstance(pattern, str) for pattern in patterns):
        raise InputError(
            f"{argument}= takes a name or a sequence of names.\n"
            f"  got:      {given!r}\n  expected: a string, or a list or tuple of strings"
        )
    return patterns
