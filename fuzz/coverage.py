"""How hard each rule was tried: how often units that change something crossed an operator in an accepted removal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bnfuse import solve


@contextmanager
def counted() -> Iterator[tuple[Counter[str], Counter[str]]]:
    """Two counters by operator: crossings in accepted removals, and operators that refused a removal."""
    crossed: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    accept, stay = solve.Network.accept, solve._stay

    def counting_accept(network: solve.Network, trial: solve.Trial) -> None:
        nodes = {
            node
            for value, unit in trial.units.items()
            if not unit.is_identity
            for node in (value.producer, *value.consumers)
            if node is not None and node not in trial.targets and node not in network.removed
        }
        crossed.update(node.operator for node in nodes)
        accept(network, trial)

    def counting_stay(norm: Any, reasons: Any) -> Any:
        refused.update(reason.operator for reason in reasons if reason.operator)
        return stay(norm, reasons)

    solve.Network.accept, solve._stay = counting_accept, counting_stay  # type: ignore[method-assign]
    try:
        yield crossed, refused
    finally:
        solve.Network.accept, solve._stay = accept, stay  # type: ignore[method-assign]
