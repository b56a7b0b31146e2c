"""What the steps of a restructuring mean for a plan that is made on the model behind them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bnfuse.changes import Edit, Former, ModuleSpec, NewLayer, Placement, Row, Source, Step
from bnfuse.solve.network import edited
from bnfuse.units import Unit


def sources(steps: Sequence[Step]) -> dict[str, Source]:
    """What the tensors that steps make hold, by each of their names."""
    found: dict[str, Source] = {}
    for step in steps:
        for placement in step.placements:
            for name in placement.names:
                found.update(_in_module(name, placement.module))
        for tensor in step.tensors:
            if tensor.source is not None:
                found.update(dict.fromkeys(tensor.names, tensor.source))
    return found


def _in_module(name: str, spec: ModuleSpec) -> Iterator[tuple[str, Source]]:
    if isinstance(spec, NewLayer):
        yield from ((f"{name}.{place}", source) for place, source in spec.sources.items())
    elif not isinstance(spec, Former):
        for place, part in spec.parts:
            yield from _in_module(f"{name}.{place}", part)


def exact_contents(steps: Sequence[Step]) -> dict[str, Tensor]:
    """The float64 contents of the tensors that are computed and not copied, by each of their names."""
    return {name: source.exact for name, source in sources(steps).items() if source.exact is not None}


def former_name(name: str, steps: Sequence[Step]) -> str:
    """The name that a module had before the steps."""
    for step in reversed(steps):
        for placement in step.placements:
            for place in placement.names:
                if name == place or name.startswith(f"{place}."):
                    former = _former(name[len(place) :].lstrip("."), placement.module)
                    if former is not None:
                        name = ".".join(filter(None, [place, former]))
    return name


def _former(path: str, spec: ModuleSpec) -> str | None:
    """The path, in what stood in a place before, of a module in what stands there; None if it is new."""
    if isinstance(spec, Former):
        return ".".join(filter(None, [spec.path, path]))
    if isinstance(spec, NewLayer):
        return None
    first, _, rest = path.partition(".")
    return next((_former(rest, part) for name, part in spec.parts if name == first), None)


def rounded_once(edit: Edit, exact: Mapping[str, Tensor]) -> Edit:
    """An edit of a tensor that a step computes, from its float64 contents on."""
    contents = exact.get(edit.names[0])
    if contents is None:
        return edit
    start = Unit(torch.zeros((1,) * contents.dim(), dtype=torch.float64, device="cpu"), contents)
    return replace(edit, factors=(start, *edit.factors))


# Clips ----------------------------------------------------------------------------------------------------------------


def settled(steps: Sequence[Step], edits: Iterable[Edit]) -> tuple[tuple[Step, ...], tuple[Edit, ...]]:
    """The steps with clips as they are in the end, in order and without what bounds or adds nothing; and the edits of
    everything else.

    Where a scale is negative, the bounds of a clip change places, which no edit does. So its contents become those
    that the edits make of them.
    """
    edits = tuple(edits)
    waiting = {name: edit for edit in edits for name in edit.names}
    made = tuple(_settled(step, waiting) for step in steps)
    made = tuple(
        replace(after, parameters=after.parameters - _clip_numbers(before) + _clip_numbers(after))
        for before, after in zip(steps, made, strict=True)
    )
    clips = {name for step in steps for name, _ in _clips(step)}
    return made, tuple(edit for edit in edits if edit.names[0].rpartition(".")[0] not in clips)


def clipped_norms(steps: Sequence[Step]) -> set[str]:
    """The norms that clips are there for, by their names before all steps."""
    return {
        former_name(norm, steps[:place]) for place, step in enumerate(steps) if any(_clips(step)) for norm in step.norms
    }


def is_idle(step: Step, after: Step) -> bool:
    """True if all that a step does is to put clips somewhere, and these do what stood there before.

    Args:
        after: the step as it is in the end.
    """
    before = [clip for _, clip in _clips(_settled(step, {}))]
    pairs = zip(before, (clip for _, clip in _clips(after)), strict=True)
    return bool(before) and all(
        one.sources.keys() == other.sources.keys()
        and all(torch.equal(_exact(source), _exact(other.sources[place])) for place, source in one.sources.items())
        for one, other in pairs
    )


def clips_for_long(step: Step) -> bool:
    """True if a clip has two bounds and adds something: three operators in place of a norm and an activation."""
    return any(len(clip.sources) > 2 for _, clip in _clips(step))


def _exact(source: Source) -> Tensor:
    assert source.exact is not None
    return source.exact


def _settled(step: Step, edits: Mapping[str, Edit]) -> Step:
    if not any(_clips(step)):
        return step
    placements = []
    for placement in step.placements:
        module = _settled_in(placement.names[0], placement.module, edits)
        assert isinstance(module, (NewLayer, Row))
        placements.append(Placement(placement.names, module))
    return replace(step, placements=tuple(placements))


def _settled_in(name: str, spec: ModuleSpec, edits: Mapping[str, Edit]) -> ModuleSpec:
    if isinstance(spec, Row):
        return Row(tuple((place, _settled_in(f"{name}.{place}", part, edits)) for place, part in spec.parts))
    if not isinstance(spec, NewLayer) or spec.kind != "Clip":
        return spec
    held: dict[str, Tensor] = {}
    for place, source in spec.sources.items():
        edit = edits.get(f"{name}.{place}")
        held[place] = _exact(source)
        for unit in () if edit is None else edit.factors:
            held[place] = edited(held[place], unit)
    if held.keys() >= {"lower", "upper"}:
        low, high = held["lower"], held["upper"]
        held |= {"lower": torch.minimum(low, high), "upper": torch.maximum(low, high)}
    idle = {"lower": -torch.inf, "upper": torch.inf, "bias": 0.0}
    held = {place: contents for place, contents in held.items() if bool((contents != idle[place]).any())}
    settings = {**spec.settings, **{place: place in held for place in idle}}
    return NewLayer(spec.kind, settings, {place: Source(spec.sources[place].like, held[place]) for place in held})


def _clips(step: Step) -> Iterator[tuple[str, NewLayer]]:
    """The clips that a step puts somewhere, by each of their names."""
    for placement in step.placements:
        for name in placement.names:
            yield from _clips_in(name, placement.module)


def _clips_in(name: str, spec: ModuleSpec) -> Iterator[tuple[str, NewLayer]]:
    if isinstance(spec, Row):
        for place, part in spec.parts:
            yield from _clips_in(f"{name}.{place}", part)
    elif isinstance(spec, NewLayer) and spec.kind == "Clip":
        yield name, spec


def _clip_numbers(step: Step) -> int:
    """How many parameters the clips have."""
    distinct = {id(clip): clip for _, clip in _clips(step)}
    return sum(_exact(source).numel() for clip in distinct.values() for source in clip.sources.values())
