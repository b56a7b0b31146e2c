"""``python -m fuzz --restructure``: networks whose structure may change, and what became of each kind."""

from __future__ import annotations

import functools
import multiprocessing
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from bnfuse.restructuring.kinds import KINDS as STEPS
from fuzz.check_calls import runs
from fuzz.check_restructured import RestructuredOutcome, check
from fuzz.restructured import RestructuredProgram, draw
from fuzz.restructured_kinds import KINDS
from fuzz.shrink import shrink

HEADINGS = ("networks", "norms", "plainly", "removed", *STEPS, "calls", "wrong", "crashed", "rounding", "refused")


@dataclass
class Tally:
    """What came of many networks of one kind, or of all.

    Attributes:
        plainly: how many norms go without restructuring.
        corrected: in how many networks verification took something out of the plan.
        refused: in how many verification fails with and without restructuring.
    """

    networks: int = 0
    norms: int = 0
    plainly: int = 0
    removed: int = 0
    calls: int = 0
    wrong: int = 0
    crashed: int = 0
    skipped: int = 0
    corrected: int = 0
    refused: int = 0
    steps: Counter[str] = field(default_factory=Counter)
    unchanged: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: RestructuredOutcome) -> None:
        self.networks += 1
        for name in ("norms", "plainly", "removed", "calls", "skipped", "corrected", "refused"):
            setattr(self, name, getattr(self, name) + getattr(outcome, name))
        self.steps += outcome.steps
        self.unchanged += outcome.unchanged
        if outcome.failure:
            crashed = outcome.failure.startswith("crash")
            self.crashed += crashed
            self.wrong += not crashed
            self.failures[outcome.failure] += 1

    def row(self, name: str) -> str:
        numbers = (
            self.networks, self.norms, self.plainly, self.removed, *(self.steps[kind] for kind in STEPS), self.calls,
            self.wrong, self.crashed, self.skipped, self.refused,
        )  # fmt: skip
        return f"{name:22s}" + "".join(f"{number:>10d}" for number in numbers)


def shrunk(program: RestructuredProgram, failure: str, seconds: float) -> RestructuredProgram:
    """The failing network made small."""
    small = shrink(program, lambda candidate: runs(candidate) and check(candidate).failure == failure, seconds)
    assert isinstance(small, RestructuredProgram)
    return small


def _job(seed: int, kind: str | None = None) -> tuple[int, RestructuredOutcome | None]:
    if kind and not re.search(kind, list(KINDS)[seed % len(KINDS)]):
        return seed, None
    return seed, check(draw(seed))


def _start() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def outcomes(seeds: range, jobs: int, kind: str | None = None) -> Iterator[tuple[int, RestructuredOutcome | None]]:
    """Seed and outcome of each network, None for one of another kind."""
    job = functools.partial(_job, kind=kind)
    if jobs < 2:
        yield from map(job, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, _start, maxtasksperchild=1000) as pool:
        yield from pool.imap_unordered(job, seeds, chunksize=8)


def try_restructuring(
    seeds: range,
    jobs: int = 1,
    seconds: float = float("inf"),
    shrinking: float = 20.0,
    failures: int = 3,
    kind: str | None = None,
) -> int:
    """Try many networks and print failures and a table; returns the exit status."""
    kinds: dict[str, Tally] = {name: Tally() for name in KINDS}
    every, begun, told = Tally(), time.monotonic(), time.monotonic()
    for seed, outcome in outcomes(seeds, jobs, kind):
        now = time.monotonic()
        if now - begun > seconds:
            break
        if outcome is None:
            continue
        kinds[outcome.kind].add(outcome)
        every.add(outcome)
        if outcome.failure and every.failures[outcome.failure] <= failures:
            _report(seed, outcome, shrinking)
        if now - told > 10:
            told = now
            told_of = f"... {every.networks} networks, {every.wrong} wrong, {every.crashed} crashed"
            print(told_of, file=sys.stderr, flush=True)
    seconds = time.monotonic() - begun
    print(f"\n{every.networks / seconds:.1f} networks/s; {every.corrected} plans corrected by verification")
    print(f"{'kind':22s}" + "".join(f"{heading:>10s}" for heading in HEADINGS))
    for name, tally in kinds.items():
        if tally.networks:
            print(tally.row(name))
    print(every.row("all"), flush=True)
    for reason, count in every.unchanged.most_common(25):
        print(f"  {count:6d}  no {reason}")
    for failure, count in every.failures.most_common():
        print(f"{count} x {failure}")
    return 1 if every.wrong or every.crashed else 0


def _report(seed: int, outcome: RestructuredOutcome, seconds: float) -> None:
    if not seconds:
        print(f"\n=== seed {seed}, {outcome.kind}: {outcome.failure}\n--- {outcome.detail}\n", flush=True)
        return
    small = shrunk(draw(seed), outcome.failure, seconds)
    detail = check(small).detail or outcome.detail
    print(f"\n=== seed {seed}, {outcome.kind}: {outcome.failure}\n{small}\n--- {detail}\n", flush=True)


def show_restructuring(seed: int) -> int:
    """Print the network of a seed, with its calls, and what became of it; returns the exit status."""
    program = draw(seed)
    outcome = check(program)
    steps = ", ".join(f"{count} x {kind}" for kind, count in outcome.steps.items()) or "no step"
    print(
        f"{program}\n{outcome.kind}: {outcome.removed} of {outcome.norms} norms removed, {outcome.plainly} plainly; {steps}"
    )
    print(f"{outcome.failure or 'right'}\n{outcome.detail}")
    return 1 if outcome.failure else 0
