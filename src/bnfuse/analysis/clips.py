"""Clips whose bounds are still to be found: both bounds are one operator, which passes negative scales.

With a negative scale the bounds change places. So this is only for clips whose contents are put in order afterwards, as
restructuring does with those that it puts in the places of activations.
"""

from __future__ import annotations

from collections.abc import Container

from bnfuse.graph.graph import Graph, Node


def open_clips(graph: Graph, places: Container[str | None]) -> None:
    """Let the bounds of each clip be one operator.

    Args:
        places: the names of the clips.
    """
    for call in graph.calls:
        if call.path in places:
            first, second, *rest = call.nodes
            if (first.operator, second.operator) == ("maximum", "clamp_max"):
                _join(first, second, adds=bool(rest))


def _join(first: Node, second: Node, adds: bool) -> None:
    x, lower = first.bound["self"], first.bound["other"]
    (between,) = first.outputs
    for value in (x, lower):
        value.consumers[value.consumers.index(first)] = second
    between.consumers.remove(second)
    second.operator, second.written = "open_clip", []
    second.inputs = [x, lower, second.bound["max"]]
    second.bound = dict(zip(("input", "lower", "upper"), second.inputs, strict=True)) | {"adds": adds}
    first.operator, first.bound, first.inputs, first.outputs = "inside", {}, [], []
