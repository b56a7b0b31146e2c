"""How long fusing takes: its stages, against one forward pass, a deep copy and ``torch.fx``.

All in one process, warm, on inputs of batch 1, and copying the model; medians of interleaved rounds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

import bnfuse
from bench.networks import NETWORKS, QUICK, Network, forward, selected
from bench.rivals import attempt, count_norms, fx_fused, is_right
from bench.section import Section, Settings, Target, progress
from bench.stages import STAGES, median_stages, stages, with_stages
from bench.timing import Clock, Effort, Rounds, Weighted, geometric_mean, measured, tidied
from bnfuse.printing.tables import Column, Table
from bnfuse.tools.timing import Measure, threads

FX_LIMIT = 1.0
VERIFIED_LIMIT = 1.3
BARE_WORK = {"forward": 1.0, "deepcopy": 1.0}
"""What a fuse must at least do: run the model and copy it."""
VERIFIED_WORK = {"forward": 2.0, "deepcopy": 1.0}
"""What a verified fuse must at least do: run the model before and after, and copy it."""

WAYS = BARE, VERIFIED, FX = "fuse, verify=False", "fuse", "torch.fx"


@dataclass(frozen=True)
class Finding:
    """What was measured of one network.

    Attributes:
        rounds: the times of everything that works.
        stages: the median seconds of each stage of a verified fuse.
        norms: how many the network holds.
        left: how many each way of fusing leaves, for those that work.
        problems: "fails" or "wrong" for each that does not.
        errors: what those that fail say.
    """

    network: str
    rounds: Rounds
    stages: dict[str, float]
    norms: int
    left: dict[str, int]
    problems: dict[str, str]
    errors: dict[str, str]

    @property
    def comparable(self) -> bool:
        """Whether both remove norms and give the right outputs."""
        return all(self.left.get(way, self.norms) < self.norms for way in (VERIFIED, FX))

    def to_dict(self) -> dict[str, Any]:
        return {
            "network": self.network,
            "seconds": self.rounds.to_dict(),
            "stages": self.stages,
            "norms": self.norms,
            "left": self.left,
            "problems": self.problems,
            "errors": self.errors,
        }


def run(settings: Settings) -> Section:
    """Measure every network."""
    networks = selected(settings.networks, QUICK if settings.quick else NETWORKS)
    findings = []
    with threads(settings.threads):
        for number, network in enumerate(networks, 1):
            progress(f"fusing [{number}/{len(networks)}] {network.name}")
            findings.append(examine(network, settings.effort(seconds=8, least=7, most=15), settings.clock))
    return report(findings)


def examine(network: Network, effort: Effort, clock: Clock) -> Finding:
    """Measure one network."""
    model, x = network.build(), network.inputs()
    expected = forward(model, x)
    ways: dict[str, Callable[[], nn.Module]] = {
        BARE: lambda: bnfuse.fuse(model, x, verify=False),
        VERIFIED: lambda: bnfuse.fuse(model, x),
        FX: lambda: fx_fused(model),
    }
    left, problems, errors = {}, {}, {}
    for way, make in ways.items():
        fused, error = attempt(make)
        if fused is None:
            problems[way], errors[way] = "fails", error
        elif not is_right(expected, forward(fused, x)):
            problems[way] = "wrong"
        else:
            left[way] = count_norms(fused)
    measures: dict[str, Measure] = {
        "forward": tidied(partial(forward, model, x), clock),
        "deepcopy": tidied(lambda: copy.deepcopy(model), clock),
    }
    history: list[dict[str, float]] = []
    with stages(clock) as clocks:
        for way in left:
            measure = tidied(ways[way], clock)
            measures[way] = with_stages(measure, clocks, history) if way == VERIFIED else measure
        rounds = measured(measures, effort)
    medians = median_stages(history[-rounds.count :])
    return Finding(network.name, rounds, medians, count_norms(model), left, problems, errors)


def report(findings: list[Finding]) -> Section:
    """Tables, targets and data of what was measured."""
    both = [finding for finding in findings if finding.comparable]
    targets = (
        _geometric(
            "fuse(verify=False) / torch.fx fuse",
            FX_LIMIT,
            {finding.network: finding.rounds.ratio(BARE, FX).median for finding in both},
        ),
        _geometric(
            "fuse / (2 forward passes + deepcopy)",
            VERIFIED_LIMIT,
            {finding.network: finding.rounds.ratio(VERIFIED, VERIFIED_WORK).median for finding in both},
        ),
    )
    tables = (_stage_table(findings), _total_table(findings), _ratio_table(findings)) if findings else ()
    return Section(tables, targets, {"networks": [finding.to_dict() for finding in findings]})


def _geometric(what: str, limit: float, ratios: dict[str, float]) -> Target:
    text = f"{what} at most {limit:g}, geometric mean over the networks that both can do"
    if not ratios:
        return Target(text, None)
    mean = geometric_mean(ratios.values())
    worst = max(ratios, key=ratios.__getitem__)
    return Target(f"{text}: {mean:.2f} over {len(ratios)}, worst {worst} {ratios[worst]:.2f}", mean <= limit)


def _stage_table(findings: list[Finding]) -> Table:
    columns = (Column("network"), *(Column(name, True) for name in ("forward", "deepcopy", *STAGES, "fuse")))
    rows = tuple(
        (
            finding.network,
            *(_milliseconds(finding.rounds, name) for name in ("forward", "deepcopy")),
            *(f"{1000 * finding.stages[stage]:.1f}" if finding.stages else "" for stage in STAGES),
            _milliseconds(finding.rounds, VERIFIED),
        )
        for finding in findings
    )
    return Table("Stages of bnfuse.fuse(model, x), ms (medians)", columns, rows)


def _total_table(findings: list[Finding]) -> Table:
    heads = (BARE, VERIFIED, FX, "norms", "left", "left by fx", "rounds")
    rows = tuple(
        (
            finding.network,
            *(finding.problems[way] if way in finding.problems else _milliseconds(finding.rounds, way) for way in WAYS),
            *map(str, (finding.norms, finding.left.get(VERIFIED, ""), finding.left.get(FX, ""), finding.rounds.count)),
        )
        for finding in findings
    )
    columns = (Column("network"), *(Column(head, True) for head in heads))
    return Table("Fusing a copy, batch 1, ms (medians)", columns, rows)


def _ratio_table(findings: list[Finding]) -> Table:
    ratios: dict[str, tuple[Weighted, Weighted]] = {
        "fuse, verify=False / fx": (BARE, FX),
        "(forward + deepcopy) / fx": (BARE_WORK, FX),
        "fuse / (2 forward + deepcopy)": (VERIFIED, VERIFIED_WORK),
    }
    columns = [Column("network")]
    for head in ratios:
        columns += [Column(head, True), Column("quartiles", True)]
    rows = []
    for finding in findings:
        cells = [finding.network]
        for above, below in ratios.values():
            known = finding.rounds.has(above) and finding.rounds.has(below)
            spread = finding.rounds.ratio(above, below) if known else None
            cells += ["", ""] if spread is None else [f"{spread.median:.2f}", f"{spread.low:.2f}-{spread.high:.2f}"]
        rows.append(tuple(cells))
    return Table("Fusing a copy: medians of the ratios within a round", tuple(columns), tuple(rows))


def _milliseconds(rounds: Rounds, name: str) -> str:
    return f"{rounds.milliseconds(name):.1f}" if name in rounds.seconds else "-"
