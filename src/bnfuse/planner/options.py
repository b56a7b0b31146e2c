"""What the caller may ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        return Options(_strings(keep), _strings(also), None if layers is None else tuple(layers), dict(handlers or {}))


def _strings(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)
