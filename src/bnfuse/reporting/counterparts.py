"""Which operator of the original an operator of the restructured model is.

Steps leave most operators as they are, and change the names of some. An operator is found again by the module that ran
it, as it was called before, and its place among the operators of one kind there; where a module ran more or fewer of a
kind than before, none of them is taken for another. What a step has computed anew (a merged layer, a baked one that had
code of its own) has no counterpart: it does the work of several operators.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bnfuse.changes import Former, ModuleSpec, NewLayer, Step
from bnfuse.graph.graph import Node

_Key = tuple[str | None, str]


def counterparts(original: Iterable[Node], restructured: Iterable[Node], steps: Sequence[Step]) -> dict[Node, Node]:
    """The operators of the original by those of the restructured model.

    Args:
        original, restructured: the operators of the same call, in the order of the run.
        steps: what was done to the original, in their order.
    """
    before: dict[_Key, list[Node]] = {}
    for node in original:
        before.setdefault((node.call.path, node.operator), []).append(node)
    after: dict[_Key, list[Node]] = {}
    for node in restructured:
        path = node.call.path and former_place(node.call.path, steps)
        if path is not None or node.call.path is None:
            after.setdefault((path, node.operator), []).append(node)
    found: dict[Node, Node] = {}
    for key, nodes in after.items():
        if len(nodes) == len(before.get(key, ())):
            found.update(zip(nodes, before[key], strict=True))
    return found


def former_place(path: str, steps: Sequence[Step]) -> str | None:
    """The name that a module had before the steps, or that of which it is a copy; None for one that is new.

    >>> former_place("conv", [])
    'conv'
    """
    for step in reversed(steps):
        for placement in step.placements:
            place = next((name for name in placement.names if path == name or path.startswith(f"{name}.")), None)
            if place is not None:
                former = _former(place, path[len(place) :].lstrip("."), placement.module)
                if former is None:
                    return None
                path = former
                break
    return path


def _former(place: str, path: str, spec: ModuleSpec) -> str | None:
    """The name before of a module in what stands in a place; None if it is new."""
    if isinstance(spec, Former):
        return ".".join(filter(None, [place, spec.path, path]))
    if isinstance(spec, NewLayer):
        copied = {source.like.rpartition(".")[0] for source in spec.sources.values() if source.exact is None}
        whole = len(copied) == 1 and all(source.exact is None for source in spec.sources.values())
        return copied.pop() if whole and not path else None
    first, _, rest = path.partition(".")
    if not first:
        return None
    return next((_former(place, rest, part) for name, part in spec.parts if name == first), None)
