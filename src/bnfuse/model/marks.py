"""What fusing leaves at each place that it changed: a mark, from which the structure of a fused model is read.

A mark is text in one plain attribute of the module that it is about, so it takes part in copying, pickling and slicing
the model, and whoever loads such a pickle needs no bnfuse:

* what stands in the place of a norm: its class, and which of the norm's children stayed,
* a layer that was given a bias or a gain: the name of that parameter,
* an activation that no longer works in place.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn

from bnfuse.model import tree
from bnfuse.model.describe import dtype_name

ATTRIBUTE = "_bnfuse"


@dataclass(frozen=True)
class Mark:
    """What fusing has changed at one module.

    Attributes:
        instead_of: the class of the norm (or activation) in whose place the module stands, "" if it stands in none.
        kept: the names, within that norm, of the children that stayed; "" is the module itself.
        ceiling: the shape of the bounds, where a `bnfuse.model.ceiling.Ceiling` stands there (first).
        created: the names of the parameters that the module was given.
        out_of_place: whether it worked in place before.
    """

    instead_of: str = ""
    kept: tuple[str, ...] = ()
    ceiling: tuple[int, ...] = ()
    created: tuple[str, ...] = ()
    out_of_place: bool = False


_SILENT = vars(Mark())


def mark_of(module: nn.Module) -> Mark:
    """The mark of a module; one that says nothing if the module has none."""
    text = module.__dict__.get(ATTRIBUTE)
    if not isinstance(text, str):
        return Mark()
    said: dict[str, Any] = json.loads(text)
    read: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}
    return Mark(**read)


def mark_norm(module: nn.Module, kind: str, kept: tuple[str, ...], ceiling: tuple[int, ...] = ()) -> Callable[[], None]:
    """Mark what stands in the place of a norm; returns a function that takes the mark back.

    >>> place = nn.Identity()
    >>> undo = mark_norm(place, "BatchNorm2d", ())
    >>> mark_of(place).instead_of
    'BatchNorm2d'
    """
    return _write(module, replace(mark_of(module), instead_of=kind, kept=kept, ceiling=ceiling))


def mark_created(module: nn.Module, name: str) -> Callable[[], None]:
    """Mark a module that was given a parameter; returns a function that takes the mark back."""
    mark = mark_of(module)
    return _write(module, replace(mark, created=tuple(sorted({*mark.created, name}))))


def mark_out_of_place(module: nn.Module) -> Callable[[], None]:
    """Mark a module that no longer works in place; returns a function that takes the mark back."""
    return _write(module, replace(mark_of(module), out_of_place=True))


def _write(module: nn.Module, mark: Mark) -> Callable[[], None]:
    before = module.__dict__.get(ATTRIBUTE)
    said = {name: value for name, value in vars(mark).items() if value != _SILENT[name]}
    module.__dict__[ATTRIBUTE] = json.dumps(said)

    def take_back() -> None:
        if before is None:
            module.__dict__.pop(ATTRIBUTE, None)
        else:
            module.__dict__[ATTRIBUTE] = before

    return take_back


# The marks of a whole model -------------------------------------------------------------------------------------------

FORMAT = 1
"""Raised when a structure of an earlier release would be misread."""


def marked(model: nn.Module) -> dict[str, Any]:
    """What the marks of a model say, in the form of :meth:`bnfuse.Structure.to_dict`, without a word on other modules.

    >>> net = nn.Sequential(nn.Identity())
    >>> undo = mark_norm(net[0], "BatchNorm2d", ())
    >>> marked(net)["removed"]
    [{'names': ['0'], 'kind': 'BatchNorm2d', 'keep': [], 'ceiling': []}]
    """
    names: dict[int, list[str]] = {}
    known: dict[int, nn.Module] = {}
    for name, module in tree.named_modules(model):
        names.setdefault(id(module), []).append(name)
        known[id(module)] = module
    removed: list[dict[str, Any]] = []
    created: list[dict[str, Any]] = []
    out_of_place = []
    for key, module in known.items():
        mark, places = mark_of(module), names[key]
        if mark.instead_of:
            kept, ceiling = list(mark.kept), list(mark.ceiling)
            removed.append({"names": places, "kind": mark.instead_of, "keep": kept, "ceiling": ceiling})
        for place in mark.created:
            parameter = module._parameters.get(place)
            if parameter is not None:
                full = [f"{name}.{place}" if name else place for name in places]
                created.append({"names": full, "shape": list(parameter.shape), "dtype": dtype_name(parameter.dtype)})
        if mark.out_of_place:
            out_of_place.append(places[0])
    # A norm inside the place of another one went with it.
    gone = tuple(f"{name}." for norm in removed for name in norm["names"])
    return {
        "format": FORMAT,
        "model": type(model).__name__,
        "removed": [norm for norm in removed if not norm["names"][0].startswith(gone)],
        "created": created,
        "out_of_place": out_of_place,
        "modules": {},
        "bnfuse": _version(),
    }


def _version() -> str:
    try:
        return version("bnfuse")
    except PackageNotFoundError:
        return ""
