"""How hard each rule was tried: how often units that change something crossed an operator in an accepted removal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bnfuse.solve import search
from bnfuse.solve.propagation import Trial


@contextmanager
def counted() -> Iterator[tuple[Counter[str], Counter[str]]]:
    """Two counters by operator: crossings in accepted removals, and operators that refused a removal."""
    crossed: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    accept, stay = Trial.accept, search._stay

    def counting_accept(tried: Trial) -> None:
        nodes = {
            node
            for value, unit in tried.units.items()
            if not unit.is_identity
            for node in (value.producer, *value.consumers)
            if node is not None and node not in tried.targets and node not in tried.network.removed
        }
        crossed.update(node.operator for node in nodes)
        accept(tried)

    def counting_stay(norm: Any, reasons: Any) -> Any:
        refused.update(reason.operator for reason in reasons if reason.operator)
        return stay(norm, reasons)

    Trial.accept, search._stay = counting_accept, counting_stay  # type: ignore[method-assign, assignment]
    try:
        yield crossed, refused
    finally:
        Trial.accept, search._stay = accept, stay  # type: ignore[method-assign]
