"""How the time of fusing grows with the number of norms: chains, residual and refused streams, and dense blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

import bnfuse
from bench.networks import GROWTH_SHAPE, DenseBlock, Network, chain, forward, matches, refused_stream, residual_stream
from bench.rivals import count_norms
from bench.section import Section, Settings, Target, progress
from bench.stages import STAGES, median_stages, stages, with_stages
from bench.timing import Clock, Rounds, Spread, tidied
from bnfuse.printing.tables import Column, Table
from bnfuse.tools.timing import Measure, interleaved, threads

SECONDS_LIMIT = 15.0
GROWTH_LIMIT = 1.5
GROWTH_FACTOR = 10
"""The time per norm of the largest network is compared with that of one so many times smaller."""

PATIENCE = 60.0
"""Seconds; what is expected to take longer is given up."""


@dataclass(frozen=True)
class Family:
    """Networks of one make.

    Attributes:
        make: from a size to a network.
        sizes: from small to large.
        unit: what the size counts.
    """

    name: str
    make: Callable[[int], nn.Module]
    sizes: tuple[int, ...]
    unit: str = "norms"


FAMILIES = (
    Family("chain", chain, (10, 100, 500, 1000, 5000)),
    Family("residual stream", residual_stream, (10, 100, 500, 1000, 5000)),
    Family("refused stream", refused_stream, (10, 100, 500, 1000)),
    Family("dense block", DenseBlock, (10, 20, 50, 100, 200), "layers"),
)
QUICK = (
    Family("chain", chain, (5, 50)),
    Family("residual stream", residual_stream, (5, 50)),
    Family("refused stream", refused_stream, (5, 50)),
    Family("dense block", DenseBlock, (2, 20), "layers"),
)


@dataclass(frozen=True)
class Finding:
    """What was measured of one family.

    Attributes:
        norms: how many the network of each size holds.
        left: how many fusing leaves.
        rounds: seconds by size, and by size and "forward".
        stages: median seconds of each stage, by size.
    """

    family: Family
    norms: dict[int, int]
    left: dict[int, int]
    rounds: Rounds
    stages: dict[int, dict[str, float]]

    @property
    def sizes(self) -> list[int]:
        """Those that were measured."""
        return list(self.norms)

    @property
    def smaller(self) -> int:
        """The size with which the largest is compared: a tenth of it, or the nearest below, or the smallest."""
        return max((size for size in self.sizes if size * GROWTH_FACTOR <= self.sizes[-1]), default=self.sizes[0])

    def per_norm(self, size: int) -> float:
        return self.rounds.median(str(size)) / self.norms[size]

    def growth(self) -> Spread:
        """Time per norm of the largest over that of the smaller network, within rounds."""
        large, small = self.sizes[-1], self.smaller
        share = self.norms[small] / self.norms[large]
        return self.rounds.ratio(str(large), {str(small): 1 / share})

    def to_dict(self) -> dict[str, Any]:
        return {
            "family": self.family.name,
            "unit": self.family.unit,
            "norms": self.norms,
            "left": self.left,
            "seconds": self.rounds.to_dict(),
            "stages": self.stages,
        }


def run(settings: Settings) -> Section:
    """Measure every family, or those that ``--networks`` names."""
    families = QUICK if settings.quick else FAMILIES
    chosen = [family for family in families if matches(settings.networks, family.name)]
    with threads(settings.threads):
        rounds = settings.repeat or (2 if settings.quick else 3)
        return report([examine(family, rounds, settings.clock) for family in chosen])


def examine(family: Family, rounds: int, clock: Clock, patience: float = PATIENCE) -> Finding:
    """Measure one family; every round takes every size once.

    Args:
        patience: seconds; sizes are left out from the first that is expected to take longer.
    """
    norms: dict[int, int] = {}
    left: dict[int, int] = {}
    history: dict[int, list[dict[str, float]]] = {}
    measures: dict[str, Measure] = {}
    taken: list[tuple[int, float]] = []
    with stages(clock) as clocks:
        for size in family.sizes:
            if expected(taken, size) > patience:
                progress(f"growth: {family.name} of {size} {family.unit} and more would take too long")
                break
            progress(f"growth: {family.name} of {size} {family.unit}")
            network = Network(family.name, partial(family.make, size), GROWTH_SHAPE)
            model, x = network.build(), network.inputs()
            norms[size], left[size] = count_norms(model), count_norms(bnfuse.fuse(model, x))
            del model
            history[size] = []
            measures[str(size)] = with_stages(_on_a_new(network, bnfuse.fuse, clock), clocks, history[size])
            measures[f"{size} forward"] = _on_a_new(network, forward, clock)
            taken.append((size, measures[str(size)]()))
        progress(f"growth: {family.name}, {rounds} rounds of all sizes")
        found = Rounds(interleaved(measures, rounds))
    medians = {size: median_stages(stages[-rounds:]) for size, stages in history.items()}
    return Finding(family, norms, left, found, medians)


def _on_a_new(network: Network, work: Callable[[nn.Module, Tensor], object], clock: Clock) -> Measure:
    """A measure of work on a network that is built for it: the garbage collector looks at every network that lives."""

    def measure() -> float:
        return tidied(partial(work, network.build(), network.inputs()), clock)()

    return measure


def expected(taken: Sequence[tuple[int, float]], size: int) -> float:
    """The seconds that a size will take if the time goes on growing as it did between the last two sizes."""
    if len(taken) < 2:
        return 0.0
    (smaller, before), (larger, after) = taken[-2:]
    power = math.log(after / before) / math.log(larger / smaller)
    return float(after * (size / larger) ** power)


def report(findings: list[Finding]) -> Section:
    """Tables, targets and data of what was measured."""
    targets = [target for finding in findings for target in _targets(finding)]
    return Section([_table(finding) for finding in findings], targets, {"families": [f.to_dict() for f in findings]})


def _targets(finding: Finding) -> Iterator[Target]:
    family = finding.family
    promised, largest = family.sizes[-1], finding.sizes[-1]
    seconds, growth = finding.rounds.median(str(largest)), finding.growth()
    reached = largest == promised
    measured = f"{seconds:.1f} s" if reached else f"given up, {largest} took {seconds:.1f} s"
    yield Target(
        f"{family.name} of {promised} {family.unit} in under {SECONDS_LIMIT:g} s: {measured}",
        reached and seconds < SECONDS_LIMIT,
    )
    yield Target(
        f"{family.name}: time per norm at {promised} {family.unit} at most {GROWTH_LIMIT:g} times that at "
        f"{promised // GROWTH_FACTOR}: {growth.median:.2f} ({growth.range})"
        + ("" if reached else f" at {largest} against {finding.smaller}"),
        reached and growth.median <= GROWTH_LIMIT,
    )


def _table(finding: Finding) -> Table:
    unit = finding.family.unit
    heads = (*(() if unit == "norms" else (unit,)), "norms", "left", "fuse, s", "ms per norm",
             *(f"{stage}" for stage in STAGES), "forward")  # fmt: skip
    rows = []
    for size in finding.sizes:
        norms = finding.norms[size]
        times = {**finding.stages[size], "forward": finding.rounds.median(f"{size} forward")}
        rows.append(
            (
                *(() if unit == "norms" else (str(size),)),
                str(norms),
                str(finding.left[size]),
                f"{finding.rounds.median(str(size)):.3f}",
                f"{1000 * finding.per_norm(size):.3f}",
                *(f"{1000 * seconds / norms:.3f}" for seconds in times.values()),
            )
        )
    rounds = finding.rounds.count
    title = f"Growth: {finding.family.name}; stages and forward pass in ms per norm (medians of {rounds} rounds)"
    return Table(title, tuple(Column(head, True) for head in heads), tuple(rows))
