"""What a report says, as data: tables of words, which the other files of this room draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bnfuse.changes import Decision

_LAYERS_NAMED = 3


@dataclass(frozen=True)
class Column:
    """A column: its heading, and whether it holds numbers, which stand at the right."""

    heading: str
    number: bool = False


@dataclass(frozen=True)
class Table:
    """A table of words.

    Attributes:
        title: one line above it.
        columns: the headings, from left to right.
        rows: one string for each column.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]


def decisions_table(model: str, decisions: Sequence[Decision]) -> Table:
    """One row for each norm: what it is fused into, or why it stays; no rows for a model without norms.

    Args:
        model: the class of the model.
        decisions: one for each norm.
    """
    rows = tuple((decision.norm, decision.kind, str(decision.channels), _verdict(decision)) for decision in decisions)
    columns = (Column("norm"), Column("kind"), Column("channels", number=True), Column("decision"))
    count, fused = len(decisions), sum(decision.fused for decision in decisions)
    norms = "batch norm" if count == 1 else "batch norms"
    title = f"{model}: {count} {norms}, {fused} fused, {count - fused} kept" if count else f"{model}: no batch norm"
    return Table(title, columns, rows)


def _verdict(decision: Decision) -> str:
    if not decision.fused:
        return "kept: " + "; ".join(map(str, decision.reasons))
    layers = ", ".join(decision.into[:_LAYERS_NAMED])
    if len(decision.into) > _LAYERS_NAMED:
        layers += f" and {len(decision.into) - _LAYERS_NAMED} more"
    way = {"forward": "forward into", "beside": "beside into"}.get(decision.direction or "", "into")
    return f"fused {way} {layers}"
