"""How fast a fused network runs: against the original, the other ways to fuse, and the limit.

The limit is the network with the same norms deleted and nothing else changed. What a norm adds must go somewhere,
though: where the layer has no bias yet, fusing gives it one. So there is a second, fairer limit, in which the layers
that get a bias from fusing have one too; how much slower that one is than the other is what the biases cost.

Every network runs in both memory formats (as far as it takes images or videos) and at two batch sizes, in a process of
its own, since ``torch.jit`` never frees what it has optimised. Numbers so small that arithmetic with them is slow are
flushed to zero, since a network without its norms makes them more easily.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import bnfuse
from bench.child import child
from bench.networks import NETWORKS, QUICK, Network, forward, selected
from bench.rivals import attempt, fx_fused, is_right, jit_optimised, without_norms
from bench.section import Section, Settings, at_most, progress
from bench.timing import Clock, Effort, Rounds, Spread, geometric_mean, measured
from bnfuse.printing.tables import Column, Table
from bnfuse.tools.timing import threads, timed

LIMIT = 1.02
BATCHES = (1, 8)
ORIGINAL, FUSED, DELETED, BIASED = "original", "fused", "deleted", "deleted, with biases"
FX, JIT = "torch.fx", "torch.jit"
CANDIDATES = (ORIGINAL, FUSED, DELETED, BIASED, FX, JIT)
_WRONG_ON_PURPOSE = (DELETED, BIASED)
_CALLS = 10_000
_LEAST = 0.05
"""Seconds of calls that are measured in a row."""

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Finding:
    """What was measured of one network, in one memory format, at one batch size.

    Attributes:
        rounds: the times of everything that works.
        norms: how many there are, and how many of them fusing leaves.
        identities: seconds that the calls of what stands in place of the others take.
        problems: "fails" or "wrong" for each candidate that does not work.
        errors: what those that fail say.
    """

    network: str
    batch: int
    channels_last: bool
    norms: tuple[int, int]
    identities: float
    rounds: Rounds
    problems: dict[str, str]
    errors: dict[str, str]

    @property
    def label(self) -> str:
        return f"{self.network} batch {self.batch}{' channels_last' if self.channels_last else ''}"

    @property
    def share_of_identities(self) -> float | None:
        """How much of the fused network's time the calls of ``nn.Identity`` take, in percent."""
        return 100 * self.identities / self.rounds.median(FUSED) if self.rounds.has(FUSED) else None

    def ratio(self, limit: str) -> Spread | None:
        known = self.rounds.has(FUSED) and self.rounds.has(limit)
        return self.rounds.ratio(FUSED, limit) if known else None

    def to_dict(self) -> dict[str, Any]:
        ratios = {limit: ratio.to_dict() for limit in (ORIGINAL, DELETED, BIASED) if (ratio := self.ratio(limit))}
        return {
            "network": self.network,
            "batch": self.batch,
            "channels_last": self.channels_last,
            "norms": self.norms[0],
            "left": self.norms[1],
            "identities": float(f"{self.identities:.3g}"),
            "seconds": self.rounds.to_dict(),
            "fused over": ratios,
            "problems": self.problems,
            "errors": self.errors,
        }

    @staticmethod
    def from_dict(found: dict[str, Any]) -> Finding:
        return Finding(
            network=found["network"],
            batch=found["batch"],
            channels_last=found["channels_last"],
            norms=(found["norms"], found["left"]),
            identities=found["identities"],
            rounds=Rounds(found["seconds"]),
            problems=found["problems"],
            errors=found["errors"],
        )


def run(settings: Settings) -> Section:
    """Measure every network."""
    networks = selected(settings.networks, QUICK if settings.quick else NETWORKS)
    findings = []
    for number, network in enumerate(networks, 1):
        for finding in in_own_process(network, settings):
            ratio = finding.ratio(DELETED) or "not measured"
            progress(f"latency [{number}/{len(networks)}] {finding.label}: fused / {DELETED} {ratio}")
            findings.append(finding)
    return report(findings)


def in_own_process(network: Network, settings: Settings) -> Iterator[Finding]:
    """Measure one of the networks that this module knows."""
    with child("bench.latency", network.name, json.dumps(vars(settings))) as process:
        while found := json.loads(process.ask()):
            yield Finding.from_dict(found)


def main(arguments: list[str]) -> None:
    """In a process of its own: print every finding as a line of JSON, and an empty one at the end."""
    name, asked = arguments
    settings = Settings(**json.loads(asked))
    network = next(network for network in (*NETWORKS, *QUICK) if network.name == name)
    effort = settings.effort(seconds=10, least=15, most=75)
    with threads(settings.threads), flushed_denormals():
        for finding in examine(network, effort, settings.clock):
            print(json.dumps(finding.to_dict()), flush=True)
    print({}, flush=True)


@contextmanager
def flushed_denormals() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def examine(network: Network, effort: Effort, clock: Clock) -> Iterator[Finding]:
    """Measure one network, in every memory format and at every batch size."""
    per_identity = _seconds_of_identity(clock)
    formats = [torch.contiguous_format, _CHANNELS_LAST.get(len(network.shape) + 1)]
    for memory_format in formats:
        if memory_format is None:
            continue
        model = network.build().to(memory_format=memory_format)
        samples = [network.inputs(batch).to(memory_format=memory_format) for batch in BATCHES]
        plan = bnfuse.plan(model, samples[0])
        networks: dict[str, nn.Module] = {
            ORIGINAL: model,
            FUSED: plan.apply(model),
            DELETED: without_norms(model, plan),
            BIASED: without_norms(model, plan, biases=True),
        }
        fx, fx_error = attempt(partial(fx_fused, model))
        for x in samples:
            candidates: dict[str, Callable[[Tensor], Any]] = dict(networks)
            errors = {}
            if fx is None:
                errors[FX] = fx_error
            else:
                candidates[FX] = fx
            jit, jit_error = attempt(partial(jit_optimised, model, x))
            if jit is None:
                errors[JIT] = jit_error
            else:
                candidates[JIT] = jit
            rounds, problems, more = compare(candidates, x, effort, clock)
            yield Finding(
                network=network.name,
                batch=x.shape[0],
                channels_last=memory_format is not torch.contiguous_format,
                norms=(len(plan.decisions), len(plan.kept)),
                identities=len(plan.fused) * per_identity,
                rounds=rounds,
                problems=dict.fromkeys(errors, "fails") | problems,
                errors=errors | more,
            )


def _seconds_of_identity(clock: Clock) -> float:
    """How long a call of what stands in place of a norm takes."""
    identity, x = nn.Identity(), torch.zeros(1)

    def calls() -> None:
        for _ in range(_CALLS):
            identity(x)

    with torch.inference_mode():
        return measured({"calls": timed(calls, clock)}, Effort.exactly(9)).median("calls") / _CALLS


def compare(
    candidates: dict[str, Callable[[Tensor], Any]], x: Tensor, effort: Effort, clock: Clock
) -> tuple[Rounds, dict[str, str], dict[str, str]]:
    """Measure those that run and give what the original gives, but the ones that are wrong on purpose in any case.

    A small network is called several times in a row, since the first call finds the weights of the others in the cache.

    Returns:
        The times of one call, what is the matter with each other candidate, and what those that fail say.
    """
    expected = forward(candidates[ORIGINAL], x)
    problems, errors = {}, {}
    for name, candidate in candidates.items():
        output, error = attempt(partial(forward, candidate, x))
        if output is None:
            problems[name], errors[name] = "fails", error
        elif name not in _WRONG_ON_PURPOSE and not is_right(expected, output):
            problems[name] = "wrong"
    with torch.inference_mode():
        calls = max(1, math.ceil(_LEAST / max(timed(partial(candidates[ORIGINAL], x), clock)(), 1e-9)))
        measures = {
            name: timed(partial(_several, candidate, x, calls), clock)
            for name, candidate in candidates.items()
            if name not in problems
        }
        found = measured(measures, effort, warm_up=4)
    each = {name: [second / calls for second in seconds] for name, seconds in found.seconds.items()}
    return Rounds(each), problems, errors


def _several(candidate: Callable[[Tensor], Any], x: Tensor, calls: int) -> None:
    for _ in range(calls):
        candidate(x)


def report(findings: list[Finding]) -> Section:
    """Tables, targets and data of what was measured."""
    if not findings:
        return Section(())
    targets = [
        at_most(
            f"fused / {limit} of a network, over all its rounds,",
            LIMIT,
            {network: spread.median for network, spread in _by_network(findings, FUSED, limit).items()},
            form=".3f",
        )
        for limit in (DELETED, BIASED)
    ]
    targets += [
        at_most(
            f"fused / {limit}",
            LIMIT,
            {finding.label: ratio.median for finding in findings if (ratio := finding.ratio(limit))},
            form=".3f",
        )
        for limit in (DELETED, BIASED)
    ]
    missing = [finding.label for finding in findings if finding.ratio(DELETED) is None]
    if missing:
        targets = [
            replace(target, text=f"{target.text}; without {', '.join(missing)}", met=False) for target in targets
        ]
    tables = (_time_table(findings), _ratio_table(findings), _network_table(findings))
    return Section(tables, targets, {"measurements": [finding.to_dict() for finding in findings]})


def _time_table(findings: list[Finding]) -> Table:
    rows = tuple(
        (
            *_place(finding),
            *(
                f"{finding.rounds.milliseconds(name):.2f}" if finding.rounds.has(name) else finding.problems[name]
                for name in CANDIDATES
            ),
            *map(str, finding.norms),
            str(finding.rounds.count),
        )
        for finding in findings
    )
    columns = (*_PLACE, *(Column(head, True) for head in (*CANDIDATES, "norms", "left", "rounds")))
    return Table("Latency, ms (medians)", columns, rows)


def _ratio_table(findings: list[Finding]) -> Table:
    below = (ORIGINAL, DELETED, BIASED, FX, JIT)
    columns = [*_PLACE, Column("Identity calls, %", True)]
    for name in below:
        columns += [Column(f"/ {name}", True), Column("quartiles", True)]
    rows = []
    for finding in findings:
        share = finding.share_of_identities
        cells = [*_place(finding), "" if share is None else f"{share:.1f}"]
        for name in below:
            ratio = finding.ratio(name)
            cells += ["", ""] if ratio is None else [f"{ratio.median:.3f}", ratio.range]
        rows.append(tuple(cells))
    return Table("Latency of the fused network: medians of the ratios within a round", tuple(columns), tuple(rows))


def _by_network(findings: list[Finding], above: str, below: str) -> dict[str, Spread]:
    """The spread of the ratios of all rounds of each network, in every format and at every batch size."""
    ratios: dict[str, list[float]] = {}
    for finding in findings:
        if finding.rounds.has(above) and finding.rounds.has(below):
            ratios.setdefault(finding.network, []).extend(finding.rounds.ratios(above, below))
    return {network: Spread.of(found) for network, found in ratios.items()}


def _network_table(findings: list[Finding]) -> Table:
    columns, spreads = [Column("network")], {}
    for above, below in ((FUSED, ORIGINAL), (FUSED, DELETED), (FUSED, BIASED), (BIASED, DELETED)):
        head = f"/ {below}" if above == FUSED else f"{above} / {below}"
        columns += [Column(head, True), Column("quartiles", True)]
        spreads[head] = _by_network(findings, above, below)
    rows = []
    for network in dict.fromkeys(finding.network for finding in findings):
        cells = [network]
        for found in spreads.values():
            cells += [str(found[network]), found[network].range] if network in found else ["", ""]
        rows.append(tuple(cells))
    means = (
        geometric_mean(spread.median for spread in found.values()) if found else None for found in spreads.values()
    )
    rows.append(("geometric mean", *(cell for mean in means for cell in ("" if mean is None else f"{mean:.3f}", ""))))
    return Table("Latency of the fused network: medians over all rounds of a network", tuple(columns), tuple(rows))


_PLACE = (Column("network"), Column("batch", True), Column("format"))


def _place(finding: Finding) -> tuple[str, str, str]:
    return finding.network, str(finding.batch), "channels_last" if finding.channels_last else "contiguous"


if __name__ == "__main__":
    main(sys.argv[1:])
