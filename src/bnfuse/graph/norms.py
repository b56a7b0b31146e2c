"""A batch norm and the places where it is applied, as data."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from bnfuse.graph.graph import Node, Value
from bnfuse.reasons import Reason


@dataclass(frozen=True, eq=False)
class Site:
    """One place where a norm is applied: the operators, in turn, that make ``y = a*x + c``.

    Some of them may rearrange elements, if all come back to their places.
    """

    nodes: tuple[Node, ...]

    @functools.cached_property
    def x(self) -> Value:
        x = self.nodes[0].data
        assert x is not None
        return x

    @property
    def y(self) -> Value:
        return self.nodes[-1].outputs[0]


@dataclass(frozen=True, eq=False)
class Norm:
    """One batch norm.

    Attributes:
        names: all names of the module, empty for a norm that is no module.
        label: what messages call it.
        sites: where it is applied, one for each call; empty if an obstacle keeps it from being looked at.
        keep: names of its child modules that stay in its place (a built-in activation).
        obstacle: why it cannot be replaced whatever the algebra says, None if it can.
    """

    names: tuple[str, ...]
    label: str
    kind: str
    channels: int
    sites: tuple[Site, ...]
    keep: tuple[str, ...] = ()
    obstacle: Reason | None = None

    @property
    def elements(self) -> int:
        """Size of the largest activation that it works on."""
        return max((site.y.elements for site in self.sites), default=0)
