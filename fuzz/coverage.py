"""How hard each rule was tried: how often units that change something crossed an operator in an accepted removal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bnfuse.solve import propagation as trial
from bnfuse.solve import search as solve


@contextmanager
def counted() -> Iterator[tuple[Counter[str], Counter[str]]]:
    """Two counters by operator: crossings in accepted removals, and operators that refused a removal."""
    crossed: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    accept, stay = trial.Network.accept, solve._stay

    def counting_accept(network: trial.Network, tried: trial.Trial) -> None:
        nodes = {
            node
            for value, unit in tried.units.items()
            if not unit.is_identity
            for node in (value.producer, *value.consumers)
            if node is not None and node not in tried.targets and node not in network.removed
        }
        crossed.update(node.operator for node in nodes)
        accept(network, tried)

    def counting_stay(norm: Any, reasons: Any) -> Any:
        refused.update(reason.operator for reason in reasons if reason.operator)
        return stay(norm, reasons)

    trial.Network.accept, solve._stay = counting_accept, counting_stay  # type: ignore[method-assign]
    try:
        yield crossed, refused
    finally:
        trial.Network.accept, solve._stay = accept, stay  # type: ignore[method-assign]
