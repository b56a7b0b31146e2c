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
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

ATTRIBUTE = "_bnfuse"


@dataclass(frozen=True)
class Mark:
    """What fusing has changed at one module.

    Attributes:
        instead_of: the class of the norm in whose place the module stands, "" if it stands in no norm's place.
        kept: the names, within that norm, of the children that stayed.
        created: the names of the parameters that the module was given.
        out_of_place: whether it worked in place before.
    """

    instead_of: str = ""
    kept: tuple[str, ...] = ()
    created: tuple[str, ...] = ()
    out_of_place: bool = False


def mark_of(module: nn.Module) -> Mark:
    """The mark of a module; one that says nothing if the module has none."""
    text = module.__dict__.get(ATTRIBUTE)
    if not isinstance(text, str):
        return Mark()
    said: dict[str, Any] = json.loads(text)
    read: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}
    return Mark(**read)


def mark_norm(module: nn.Module, kind: str, kept: tuple[str, ...]) -> Callable[[], None]:
    """Mark what stands in the place of a norm; returns a function that takes the mark back.

    >>> place = nn.Identity()
    >>> undo = mark_norm(place, "BatchNorm2d", ())
    >>> mark_of(place).instead_of
    'BatchNorm2d'
    """
    return _write(module, replace(mark_of(module), instead_of=kind, kept=kept))


def mark_created(module: nn.Module, name: str) -> Callable[[], None]:
    """Mark a module that was given a parameter; returns a function that takes the mark back."""
    mark = mark_of(module)
    return _write(module, replace(mark, created=tuple(sorted({*mark.created, name}))))


def mark_out_of_place(module: nn.Module) -> Callable[[], None]:
    """Mark a module that no longer works in place; returns a function that takes the mark back."""
    return _write(module, replace(mark_of(module), out_of_place=True))


def _write(module: nn.Module, mark: Mark) -> Callable[[], None]:
    before = module.__dict__.get(ATTRIBUTE)
    silent = asdict(Mark())
    module.__dict__[ATTRIBUTE] = json.dumps(
        {name: value for name, value in asdict(mark).items() if value != silent[name]}
    )

    def take_back() -> None:
        if before is None:
            module.__dict__.pop(ATTRIBUTE, None)
        else:
            module.__dict__[ATTRIBUTE] = before

    return take_back
