"""What the caller may ask for, checked when it is made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from bnfuse.changes import Handler
from bnfuse.errors import InputError


@dataclass(frozen=True)
class Options:
    """What few callers need; see :func:`bnfuse.fuse`.

    Attributes:
        also: class names or glob patterns, whatever their case (``"layerscale*"``), of other modules to fold: those
            that do nothing but multiply and add per channel.
        layers: the only classes of layers whose parameters may change, such as ``(nn.Conv2d, nn.Linear)``; None for
            all.
        handlers: for a layer class of your own, a function ``handler(layer, scale, shift)`` that changes the layer so
            that it gives ``scale*y + shift`` instead of y; both are float64 of shape (channels,), for axis 1 of y.
        budget: the relative L2 error of the outputs that folding may cost in the model's own precision, None for any.
            Where it costs more, norms are kept, those whose folding costs most first, as few as suffice.
        infer_calls: whether calls that nobody has named count too: other sizes, flags flipped, optional arguments,
            ``forward_features`` and the like. With False only the example inputs and ``calls`` count.
        hooks: "keep" for norms that stay where a forward hook of the caller's reads what would change, or stands on the
            norm itself; "ignore" for hooks that may see other numbers: what the model returns stays the same. A hook
            on a norm that goes is on what stands in its place then.
        reversible: keep in the fused model what :func:`bnfuse.unfuse` needs, which is about as large as the weights
            that change.

    Raises:
        InputError: a field holds something else.

    >>> Options(also="layerscale", layers=[nn.Linear]).layers
    (<class 'torch.nn.modules.linear.Linear'>,)
    """

    also: str | Sequence[str] = ()
    layers: Iterable[type[nn.Module]] | None = None
    handlers: Mapping[type[nn.Module], Handler] | None = None
    budget: float | None = None
    infer_calls: bool = True
    hooks: str = "keep"
    reversible: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "also", patterns("also", self.also))
        object.__setattr__(self, "layers", None if self.layers is None else _classes(self.layers))
        object.__setattr__(self, "handlers", _handlers({} if self.handlers is None else self.handlers))
        number = isinstance(self.budget, (int, float)) and not isinstance(self.budget, bool)
        if self.budget is not None and not (number and self.budget >= 0):
            raise _wrong("budget= is a relative error of the outputs", self.budget, "a number of at least 0, or None")
        if not isinstance(self.infer_calls, bool):
            raise _wrong("infer_calls= says whether calls count that nobody named", self.infer_calls, "True or False")
        if self.hooks not in ("keep", "ignore"):
            raise _wrong("hooks= says whether norms stay for forward hooks", self.hooks, "'keep' or 'ignore'")
        if not isinstance(self.reversible, bool):
            raise _wrong("reversible= says whether fusing can be undone later", self.reversible, "True or False")


def checked_options(options: Any) -> Options:
    """The options of a call, the default ones for None.

    Raises:
        InputError: they are something else.
    """
    if options is None:
        return Options()
    if not isinstance(options, Options):
        raise _wrong("options= takes bnfuse.Options", options, "bnfuse.Options(also=..., layers=..., ...), or None")
    return options


def patterns(argument: str, given: str | Iterable[str]) -> tuple[str, ...]:
    """Names or glob patterns as a tuple.

    Raises:
        InputError: they are something else.
    """
    found = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else None
    if found is None or not all(isinstance(pattern, str) for pattern in found):
        raise _wrong(f"{argument}= takes a name or a sequence of names", given, "a string, or a list of strings")
    return found


def _classes(given: Any) -> tuple[type[nn.Module], ...]:
    found = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)
    for kind in found:
        if not _is_module_class(kind):
            what = "layers= takes classes of modules, such as (nn.Conv2d, nn.Linear)"
            raise _wrong(what, kind, "a subclass of torch.nn.Module")
    return found


def _handlers(given: Any) -> dict[type[nn.Module], Handler]:
    what = "handlers= takes a dict from classes of modules to functions handler(layer, scale, shift)"
    if not isinstance(given, Mapping):
        raise _wrong(what, given, "{MyLayer: my_function}")
    for kind, handler in given.items():
        if not (_is_module_class(kind) and callable(handler)):
            raise _wrong(what, f"{kind!r}: {handler!r}", "a subclass of torch.nn.Module: a function", as_it_is=True)
    return dict(given)


def _is_module_class(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, nn.Module)


def _wrong(what: str, got: Any, expected: str, as_it_is: bool = False) -> InputError:
    return InputError(f"{what}.\n  got:      {got if as_it_is else repr(got)}\n  expected: {expected}")
