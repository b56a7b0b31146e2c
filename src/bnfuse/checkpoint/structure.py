"""The structure of a fused model as data: what a freshly built model of its class must become to take its weights.

It is read from the marks that fusing leaves (:mod:`bnfuse.model.marks`), and does not depend on any weight. A model is
rebuilt from it by the same code that fuses (:func:`bnfuse.transaction.rewrite`), with edits that change no number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn

from bnfuse.changes import (
    LAYERS,
    Changes,
    Edit,
    Former,
    ModuleSpec,
    NewLayer,
    OwnTensor,
    Placement,
    Replacement,
    Row,
    Step,
)
from bnfuse.checkpoint.architecture import architecture
from bnfuse.errors import CheckpointError, FusionError
from bnfuse.model import tree
from bnfuse.model.describe import dtype_name, first_few, one_line
from bnfuse.model.marks import FORMAT, FORMAT_WITH_PLACES, marked, spec_data
from bnfuse.model.placing import size_of
from bnfuse.model.wrappers import unwrap
from bnfuse.transaction import rewrite


@dataclass(frozen=True)
class RemovedNorm:
    """A norm that is gone, or an activation that has got bounds (:func:`bnfuse.equalise`).

    Attributes:
        names: its names.
        kind: its class.
        keep: the names, within it, of the children that stayed in its place; "" is the module itself.
        ceiling: the shape of the bounds that stand there, empty where there are none.
    """

    names: tuple[str, ...]
    kind: str
    keep: tuple[str, ...] = ()
    ceiling: tuple[int, ...] = ()


@dataclass(frozen=True)
class CreatedParameter:
    """A bias or gain that a layer was made without.

    Attributes:
        names: its names.
        shape: its shape.
        dtype: such as "float32".
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class PlacedModule:
    """A module that stands in the place of another (``restructure=`` of :func:`bnfuse.fuse`).

    Attributes:
        names: the names of the place.
        kind: the class of what stood there.
        module: what it is made of: ``{"layer": class, "settings": {...}}``, ``{"former": name}`` (what stood there, or
            a module inside of it), or ``{"row": [[name, module], ...]}``.
    """

    names: tuple[str, ...]
    kind: str
    module: Mapping[str, Any]


@dataclass(frozen=True)
class OwnParameter:
    """A parameter that a module computed, or had in common with another, before.

    Attributes:
        names: its names.
        shape: its shape.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Structure:
    """What fusing has changed in a model, but for the values of weights.

    Attributes:
        model: the class of the model.
        removed: the norms that are gone.
        created: the parameters that layers were given.
        out_of_place: the names of activations that no longer work in place.
        modules: the class of every other module and a hash of its settings and shapes, by its name. Empty, they are
            not checked.
        bnfuse: the release that it was made by.
        placed: the modules that stand in the places of others.
        own: the parameters that modules computed, or had in common with others.
    """

    model: str
    removed: tuple[RemovedNorm, ...] = ()
    created: tuple[CreatedParameter, ...] = ()
    out_of_place: tuple[str, ...] = ()
    modules: Mapping[str, str] | None = None
    bnfuse: str = ""
    placed: tuple[PlacedModule, ...] = ()
    own: tuple[OwnParameter, ...] = ()

    @property
    def is_fused(self) -> bool:
        """Whether there is anything that a fresh model lacks."""
        return bool(self.removed or self.created or self.out_of_place or self.placed or self.own)

    @property
    def changes(self) -> tuple[object, ...]:
        """What is done to a fresh model, in a form that can be compared with that of another structure."""
        removed = frozenset((frozenset(norm.names), norm.keep, norm.ceiling) for norm in self.removed)
        created = frozenset((frozenset(made.names), made.shape) for made in self.created)
        placed = frozenset((frozenset(it.names), json.dumps(it.module, sort_keys=True)) for it in self.placed)
        own = frozenset((frozenset(it.names), it.shape) for it in self.own)
        return removed, created, frozenset(self.out_of_place), placed, own

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        said = {"format": FORMAT, **asdict(self), "modules": dict(self.modules or {})}
        if self.placed or self.own:
            return said | {"format": FORMAT_WITH_PLACES}
        return {name: value for name, value in said.items() if name not in ("placed", "own")}

    @staticmethod
    def from_dict(data: object) -> Structure:
        """Read what `to_dict` gave, as it is or from JSON.

        >>> made = Structure("Net", (RemovedNorm(("bn",), "BatchNorm2d"),))
        >>> Structure.from_dict(made.to_dict()).removed
        (RemovedNorm(names=('bn',), kind='BatchNorm2d', keep=(), ceiling=()),)

        Raises:
            CheckpointError: it is something else, or of a later release.
        """
        whole = _dict(data, "the structure")
        made_by = whole.get("format")
        newer = type(made_by) is int and made_by > FORMAT_WITH_PLACES
        if type(made_by) is not int or made_by not in (FORMAT, FORMAT_WITH_PLACES):
            raise CheckpointError(
                f"The structure has format {made_by!r:.40}, and this release of bnfuse reads {FORMAT} and "
                f"{FORMAT_WITH_PLACES}: {'install a newer bnfuse' if newer else 'the file is damaged'}."
            )
        modules = _dict(whole.get("modules"), "modules")
        return Structure(
            _text(whole.get("model"), "model"),
            tuple(
                RemovedNorm(
                    _texts(norm.get("names"), "names", least=1), _text(norm.get("kind"), "kind"),
                    _texts(norm.get("keep"), "keep"), _shape(norm.get("ceiling", [])),
                )
                for norm in _dicts(whole.get("removed"), "removed")
            ),
            tuple(
                CreatedParameter(
                    _texts(made.get("names"), "names", least=1), _shape(made.get("shape")),
                    dtype_name(_dtype(made.get("dtype"))),
                )
                for made in _dicts(whole.get("created"), "created")
            ),
            _texts(whole.get("out_of_place"), "out_of_place"),
            {_text(name, "modules"): _text(kind, "modules") for name, kind in modules.items()},
            _text(whole.get("bnfuse"), "bnfuse"),
            tuple(
                PlacedModule(
                    _texts(it.get("names"), "names", least=1), _text(it.get("kind"), "kind"),
                    spec_data(_spec(it.get("module"))),
                )
                for it in _dicts(whole.get("placed", []), "placed")
            ),
            tuple(
                OwnParameter(_texts(it.get("names"), "names", least=1), _shape(it.get("shape")))
                for it in _dicts(whole.get("own", []), "own")
            ),
        )  # fmt: skip


def structure(model: nn.Module) -> Structure:
    """Read from a fused model what a freshly built one must become to take its weights.

    >>> import bnfuse
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    >>> structure(bnfuse.fuse(net)).removed
    (RemovedNorm(names=('1',), kind='BatchNorm2d', keep=(), ceiling=()),)

    Args:
        model: a model that :func:`bnfuse.fuse` gave, or a copy, part or composition of such.

    Returns:
        The structure; ``structure(model).to_dict()`` can be written as JSON. Of a model that was not fused it is empty.
    """
    inner, _ = unwrap(model)
    read = Structure.from_dict(marked(inner))
    return replace(read, modules=architecture(inner, _other_modules(read), _created_places(read)))


def restructure(model: nn.Module, structure: Structure | Mapping[str, Any]) -> nn.Module:
    """Give a freshly built model the structure of a fused one, in place, so that it takes the fused state dict.

    >>> import bnfuse
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    >>> fused = bnfuse.fuse(net)
    >>> fresh = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    >>> restructure(fresh, bnfuse.structure(fused).to_dict()).load_state_dict(fused.state_dict())
    <All keys matched successfully>

    Args:
        model: a model of the same class and settings as the one that was fused, also on the meta device. One that has
            the structure already is left as it is.
        structure: what :func:`bnfuse.structure` gave, or its ``to_dict()``.

    Returns:
        The same model. The norms that are gone hold no numbers any more; created biases are 0 and gains 1.

    Raises:
        CheckpointError: the structure is damaged, or of another model; the model is as it was.
    """
    restructured(model, structure)
    return model


def restructured(model: nn.Module, given: Structure | Mapping[str, Any]) -> Callable[[], None]:
    """As `restructure`; returns a function that gives the model its former structure back."""
    wanted = given if isinstance(given, Structure) else Structure.from_dict(given)
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"A structure is given to a torch.nn.Module; got {type(model).__name__}.")
    inner, _ = unwrap(model)
    own = structure(inner)
    if own.is_fused:
        if own.changes != wanted.changes:
            raise CheckpointError(
                f"{type(inner).__name__} is fused already, with another structure: give a freshly built model."
            )
        return lambda: None
    _check_architecture(inner, wanted)
    undo: list[Callable[[], None]] = []

    def take_back() -> None:
        while undo:
            undo.pop()()

    try:
        for step in _steps(inner, wanted):
            undo.append(rewrite(Changes(steps=(step,)), inner))
        undo.append(rewrite(_changes(inner, wanted), inner))
    except BaseException as error:
        take_back()
        if isinstance(error, (FusionError, AttributeError)):
            raise CheckpointError(f"The structure is that of another model: {one_line(error)}") from error
        raise
    return take_back


def _check_architecture(model: nn.Module, wanted: Structure) -> None:
    """Raise CheckpointError if the model is built in another way."""
    if not wanted.modules:
        return
    found = architecture(model, _other_modules(wanted), _created_places(wanted))
    if found == wanted.modules:
        return
    kinds = [{name: kind.partition(" ")[0] for name, kind in each.items()} for each in (found, wanted.modules)]
    problems = {
        "of another class": [
            f"{name or 'the model itself'} ({kinds[1][name]} in the structure, {kind} in the model)"
            for name, kind in kinds[0].items()
            if kinds[1].get(name, kind) != kind
        ],
        "not in the model": [f"{name} ({kinds[1][name]})" for name in kinds[1] if name not in kinds[0]],
        "not in the structure": [f"{name} ({kinds[0][name]})" for name in kinds[0] if name not in kinds[1]],
        "with other settings or shapes": [
            f"{name or 'the model itself'} ({kinds[0][name]})"
            for name, line in found.items()
            if name in kinds[1] and kinds[1][name] == kinds[0][name] and wanted.modules[name] != line
        ],
    }
    listed = [f"  {len(names)} {problem}: {first_few(names)}" for problem, names in problems.items() if names]
    raise CheckpointError(
        "\n".join(
            [
                f"The structure is that of another model than this {type(model).__name__}:",
                *listed,
                "Build the model as it was built before fusing.",
            ]
        )
    )


def _other_modules(structure: Structure) -> set[str]:
    """The names of modules that are others than in a freshly built model."""
    places = {name for removed in structure.removed for name in removed.names}
    places |= {name for placed in structure.placed for name in placed.names}
    return places | {name.rpartition(".")[0] for it in structure.own for name in it.names}


def _created_places(structure: Structure) -> dict[str, list[str]]:
    """The parameters that fusing creates, by the name of their module."""
    created: dict[str, list[str]] = {}
    for made in structure.created:
        for name in made.names:
            path, _, place = name.rpartition(".")
            created.setdefault(path, []).append(place)
    return created


_ROOM = 64
"""So many times the parameters of the model may all that is put into it have: no file makes us allocate at will."""


def _steps(model: nn.Module, wanted: Structure) -> list[Step]:
    """The modules that stand in the places of others, from the outside to the inside, and the tensors made parameters.

    Raises:
        CheckpointError: the structure is damaged.
    """
    steps = []
    room = _ROOM * sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    for it in sorted(wanted.placed, key=lambda it: min(name.count(".") for name in it.names)):
        spec = _spec(it.module)
        if isinstance(spec, Former):
            raise CheckpointError(f"The structure is damaged: nothing stands in the place of {it.names[0]}.")
        room -= size_of(spec)
        steps.append(Step(kind="", subject="", what="", placements=(Placement(it.names, spec),)))
    tensors = tuple(OwnTensor(it.names, it.shape) for it in wanted.own)
    room -= sum(math.prod(tensor.shape) for tensor in tensors)
    if room < 0:
        raise CheckpointError("The structure is damaged: it has many more parameters than the model.")
    return [*steps, Step(kind="", subject="", what="", tensors=tensors)] if tensors else steps


def _changes(model: nn.Module, wanted: Structure) -> Changes:
    """The rest of the structure as changes that write no number."""
    modules = dict(tree.named_modules(model))
    whole = sum(parameter.numel() for parameter in model.parameters())
    for norm in wanted.removed:
        if any(modules.get(name) is not modules.get(norm.names[0]) for name in norm.names):
            raise CheckpointError(f"The structure is that of another model: {' and '.join(norm.names)} are not one.")
    if any(norm.ceiling and not 0 < math.prod(norm.ceiling) <= whole for norm in wanted.removed):
        raise CheckpointError("The structure is damaged: it has more bounds than the model has parameters.")
    for made in wanted.created:
        owner = modules.get(made.names[0].rpartition(".")[0])
        room = 0 if owner is None else sum(tensor.numel() for tensor in (*owner.parameters(), *owner.buffers()))
        if owner is not None and not 0 < math.prod(made.shape) <= room:  # no file makes us allocate at will
            raise CheckpointError(
                f"The structure is damaged: {made.names[0]} of shape {made.shape} fits no such layer."
            )
    for name in wanted.out_of_place:
        if not isinstance(getattr(modules.get(name), "inplace", None), bool):
            raise CheckpointError(f"The structure is that of another model: {name} has no setting inplace.")
    return Changes(
        edits=tuple(Edit(made.names, made.shape, (), created=True) for made in wanted.created),
        replacements=tuple(Replacement(norm.names, norm.keep, norm.ceiling) for norm in wanted.removed),
        out_of_place=wanted.out_of_place,
    )


# Reading data that may be damaged or hostile --------------------------------------------------------------------------

_Kind = TypeVar("_Kind")


def _read(value: object, what: str, kind: type[_Kind]) -> _Kind:
    if not isinstance(value, kind):
        raise CheckpointError(f"The structure is damaged: {what} is a {type(value).__name__}, not a {kind.__name__}.")
    return value


def _text(value: object, what: str) -> str:
    return _read(value, what, str)


def _list(value: object, what: str) -> list[object]:
    return list(value) if isinstance(value, tuple) else _read(value, what, list)


def _texts(value: object, what: str, least: int = 0) -> tuple[str, ...]:
    texts = tuple(_text(item, what) for item in _list(value, what))
    if len(texts) < least:
        raise CheckpointError(f"The structure is damaged: {what} is empty.")
    return texts


def _dict(value: object, what: str) -> Mapping[str, object]:
    return dict(value) if isinstance(value, Mapping) else _read(value, what, dict)


def _dicts(value: object, what: str) -> Iterator[Mapping[str, object]]:
    for item in _list(value, what):
        yield _dict(item, what)


def _spec(value: object, depth: int = 0) -> ModuleSpec:
    """A module as data."""
    said = _dict(value, "a module")
    if "former" in said:
        return Former(_text(said["former"], "former"))
    if "layer" in said:
        kind = _text(said["layer"], "layer")
        if kind not in LAYERS:
            raise CheckpointError(f"The structure is damaged: {kind!r:.60} is no layer that is made anew.")
        settings = _dict(said.get("settings"), "settings")
        return NewLayer(kind, {_text(name, "settings"): _setting(setting) for name, setting in settings.items()})
    parts = [_list(part, "row") for part in _list(said.get("row"), "row")]
    if depth > _DEEPEST or any(len(part) != 2 for part in parts):
        raise CheckpointError("The structure is damaged: a row is no list of names and modules.")
    return Row(tuple((_text(name, "row"), _spec(part, depth + 1)) for name, part in parts))


def _setting(value: object) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    return tuple(map(_setting, _list(value, "a setting")))


_DEEPEST = 8
"""So many rows may stand inside one another."""


def _shape(value: object) -> tuple[int, ...]:
    sizes = _list(value, "shape")
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise CheckpointError(f"The structure is damaged: {sizes!r:.60} is no shape.")
    return tuple(sizes)  # type: ignore[arg-type]


def _dtype(value: object) -> torch.dtype:
    found = getattr(torch, _text(value, "dtype"), None)
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"The structure is damaged: {value!r:.60} is no dtype.")
    return found
