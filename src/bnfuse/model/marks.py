"""What fusing leaves at each place that it changed: a mark, from which the structure of a fused model is read.

A mark is text in one plain attribute of the module that it is about, so it takes part in copying, pickling and slicing
the model, and whoever loads such a pickle needs no bnfuse:

* what stands in the place of a norm: its class, and which of the norm's children stayed,
* a layer that was given a bias or a gain: the name of that parameter,
* an activation that no longer works in place,
* a module that was put in the place of another: what it is made of, and what stood there,
* a module that was given a parameter of its own for what it computed, or had in common with others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor, nn

from bnfuse.changes import Former, ModuleSpec, NewLayer, Row
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
        placed: what the module is made of, where it was put in the place of another; see `spec_data`.
        place_of: the class of what stood there.
        own: the tensors that it was given as parameters of its own, with their shapes.
    """

    instead_of: str = ""
    kept: tuple[str, ...] = ()
    ceiling: tuple[int, ...] = ()
    created: tuple[str, ...] = ()
    out_of_place: bool = False
    placed: Mapping[str, Any] | None = None
    place_of: str = ""
    own: Mapping[str, Any] | None = None


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


def mark_placed(module: nn.Module, former: nn.Module, spec: NewLayer | Row) -> Callable[[], None]:
    """Mark a module that is put in the place of another; returns a function that takes the mark back.

    Where that was put there before, the mark says what to make of what stood there first.
    """
    before = mark_of(former)
    data = spec_data(spec)
    if before.placed is not None:
        data = _within(data, before.placed)
    kind = before.place_of or type(former).__name__
    undo = [_write(former, replace(before, placed=None, place_of=""))] if before.placed is not None else []
    undo.append(_write(module, replace(mark_of(module), placed=data, place_of=kind)))

    def take_back() -> None:
        while undo:
            undo.pop()()

    return take_back


def mark_own(module: nn.Module, name: str, tensor: Tensor) -> Callable[[], None]:
    """Mark a module that was given a parameter of its own; returns a function that takes the mark back."""
    mark = mark_of(module)
    return _write(module, replace(mark, own={**(mark.own or {}), name: list(tensor.shape)}))


def spec_data(spec: ModuleSpec) -> dict[str, Any]:
    """A module as JSON has it, without the contents of its parameters.

    >>> spec_data(Row((("layer", NewLayer("ReLU")), ("norm", Former()))))
    {'row': [['layer', {'layer': 'ReLU', 'settings': {}}], ['norm', {'former': ''}]]}
    """
    if isinstance(spec, Former):
        return {"former": spec.path}
    if isinstance(spec, NewLayer):
        return {"layer": spec.kind, "settings": dict(spec.settings)}
    return {"row": [[name, spec_data(part)] for name, part in spec.parts]}


def _within(data: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """What is made of what stood in a place first, if ``data`` says what is made of ``before``, which was made of
    that."""
    if "row" in data:
        return {"row": [[name, _within(part, before)] for name, part in data["row"]]}
    if "former" not in data:
        return dict(data)
    found, path = before, [part for part in data["former"].split(".") if part]
    while path and "row" in found:
        found, *_ = (part for name, part in found["row"] if name == path[0])
        path.pop(0)
    if not path:
        return dict(found)
    return {"former": ".".join(filter(None, [found["former"], *path]))}


def _write(module: nn.Module, mark: Mark) -> Callable[[], None]:
    before = module.__dict__.get(ATTRIBUTE)
    said = {name: value for name, value in vars(mark).items() if value != _SILENT[name]}
    if said:
        module.__dict__[ATTRIBUTE] = json.dumps(said)
    else:
        module.__dict__.pop(ATTRIBUTE, None)

    def take_back() -> None:
        if before is None:
            module.__dict__.pop(ATTRIBUTE, None)
        else:
            module.__dict__[ATTRIBUTE] = before

    return take_back


# The marks of a whole model -------------------------------------------------------------------------------------------

FORMAT = 1
"""Raised when a structure of an earlier release would be misread."""

FORMAT_WITH_PLACES = 2
"""The format of a structure in which modules stand in the places of others; an earlier release does not read it."""


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
    placed: list[dict[str, Any]] = []
    own: list[dict[str, Any]] = []
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
            out_of_place.append(_name_before(places[0], known, names))
        if mark.placed is not None:
            before = [_name_before(name, known, names) for name in places]
            placed.append({"names": before, "kind": mark.place_of, "module": dict(mark.placed)})
        for place, shape in (mark.own or {}).items():
            full = [f"{name}.{place}" if name else place for name in places]
            own.append({"names": full, "shape": list(shape)})
    # A norm inside the place of another one went with it.
    gone = tuple(f"{name}." for norm in removed for name in norm["names"])
    restructured = {"placed": placed, "own": own} if placed or own else {}
    return {
        "format": FORMAT_WITH_PLACES if restructured else FORMAT,
        "model": type(model).__name__,
        "removed": [norm for norm in removed if not norm["names"][0].startswith(gone)],
        "created": created,
        "out_of_place": out_of_place,
        **restructured,
        "modules": {},
        "bnfuse": _version(),
    }


def _name_before(name: str, known: Mapping[int, nn.Module], names: Mapping[int, list[str]]) -> str:
    """The name, in the model before its norms went, of a module that may have stayed of one of them."""
    for key, module in known.items():
        mark = mark_of(module)
        place = next((each for each in names[key] if name == each or name.startswith(f"{each}.")), None)
        if not mark.instead_of or not mark.kept or place is None:
            continue
        inside = name[len(place) :].lstrip(".")
        kept = mark.kept[0]
        if type(module) is nn.Sequential:  # of what stayed, behind bounds if there are any
            first, _, inside = inside.partition(".")
            kept = mark.kept[int(first) - bool(mark.ceiling)]
        return ".".join(filter(None, (place, kept, inside)))
    return name


def _version() -> str:
    try:
        return version("bnfuse")
    except PackageNotFoundError:
        return ""
