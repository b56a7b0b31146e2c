"""What a report says, as data: tables of words, which the other files of this room draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bnfuse.changes import Decision
from bnfuse.printing.alike import alike, shortened

_LAYERS_NAMED = 3
_NORMS_NAMED = 6
_NEXT = "\n"  # stands in no reason


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


@dataclass(frozen=True)
class Kept:
    """Norms that stay for the same reasons.

    Attributes:
        norms: their names.
        reasons: one for each way that was tried, in words; ``*`` stands for numbers that differ from norm to norm.
    """

    norms: tuple[str, ...]
    reasons: tuple[str, ...]

    @property
    def heading(self) -> str:
        """The norms, a long list cut with the count of the rest.

        >>> Kept(("a",), ()).heading, Kept(("a", "b"), ()).heading
        ('kept: a', 'kept, 2 norms: a, b')
        """
        count = f", {len(self.norms)} norms" if len(self.norms) > 1 else ""
        return f"kept{count}: {shortened(self.norms, _NORMS_NAMED)}"


def counts(model: str, decisions: Sequence[Decision]) -> str:
    """How many norms there are, go and stay, in one line.

    Args:
        model: the class of the model.
        decisions: one for each norm.
    """
    count, fused = len(decisions), sum(decision.fused for decision in decisions)
    norms = "batch norm" if count == 1 else "batch norms"
    return f"{model}: {count} {norms}, {fused} fused, {count - fused} kept" if count else f"{model}: no batch norm"


def fused_table(model: str, decisions: Sequence[Decision]) -> Table:
    """One row for each norm that goes; the title has the counts of all.

    Args:
        model: the class of the model.
        decisions: one for each norm.
    """
    columns = (Column("norm"), Column("kind"), Column("channels", number=True), Column("fused into"))
    rows = tuple(
        (decision.norm, decision.kind, str(decision.channels), _layers(decision))
        for decision in decisions
        if decision.fused
    )
    return Table(counts(model, decisions), columns, rows)


def kept_groups(decisions: Sequence[Decision]) -> list[Kept]:
    """The norms that stay, grouped by why.

    Args:
        decisions: one for each norm.
    """
    kept = [decision for decision in decisions if not decision.fused]
    texts = [_NEXT.join(map(str, decision.reasons)) for decision in kept]
    return [
        Kept(tuple(kept[place].norm for place in places), tuple(text.split(_NEXT))) for text, places in alike(texts)
    ]


def decisions_table(model: str, decisions: Sequence[Decision]) -> Table:
    """One row for each norm: what it is fused into, or why it stays; no rows for a model without norms.

    Args:
        model: the class of the model.
        decisions: one for each norm.
    """
    rows = tuple((decision.norm, decision.kind, str(decision.channels), _verdict(decision)) for decision in decisions)
    columns = (Column("norm"), Column("kind"), Column("channels", number=True), Column("decision"))
    return Table(counts(model, decisions), columns, rows)


def _verdict(decision: Decision) -> str:
    if not decision.fused:
        return "kept: " + "; ".join(map(str, decision.reasons))
    way = {"forward": "forward into", "beside": "beside into"}.get(decision.direction or "", "into")
    return f"fused {way} {shortened(decision.into, _LAYERS_NAMED)}"


def _layers(decision: Decision) -> str:
    way = {"forward": "forward: ", "beside": "beside: "}.get(decision.direction or "", "")
    return way + shortened(decision.into, _LAYERS_NAMED)
