"""What the steps of a restructuring mean for a plan that is made on the model behind them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bnfuse.changes import Edit, Former, ModuleSpec, NewLayer, Source, Step
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
