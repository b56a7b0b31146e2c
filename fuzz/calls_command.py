"""``python -m fuzz --calls``: networks that go by more than the recorded call, and what became of each kind."""

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

from fuzz.calls import draw
from fuzz.check_calls import CallsOutcome, check, runs, unseen
from fuzz.kinds import KINDS
from fuzz.protocol import CalledProgram
from fuzz.shrink import shrink

NOT_PROMISED = {"grad_mode": "gradients are tracked", "layout": "lie in memory"}
"""Kinds of code of which a plan says that not everything was seen, each with words of that."""


@dataclass
class KindTally:
    """What came of many networks of one kind, or of all."""

    networks: int = 0
    norms: int = 0
    removed: int = 0
    calls: int = 0
    wrong: int = 0
    crashed: int = 0
    skipped: int = 0
    failures: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: CallsOutcome) -> None:
        self.networks += 1
        self.norms += outcome.norms
        self.removed += outcome.removed
        self.calls += outcome.calls
        self.skipped += outcome.skipped
        if outcome.failure:
            crashed = outcome.failure.startswith("crash")
            self.crashed += crashed
            self.wrong += not crashed
            self.failures[outcome.failure] += 1

    def row(self, name: str) -> str:
        numbers = (self.networks, self.norms, self.removed, self.calls, self.wrong, self.crashed, self.skipped)
        return f"{name:28s}" + "".join(f"{number:>11d}" for number in numbers)


HEADINGS = ("networks", "norms", "removed", "calls", "wrong", "crashed", "rounding")


def promised(outcome: CallsOutcome, program: CalledProgram) -> bool:
    """Whether a network of any kind has to be right: unless the plan says that it did not see what the kind is about."""
    words = NOT_PROMISED.get(outcome.kind)
    return words is None or (bool(outcome.failure) and words not in unseen(program))


def shrunk(program: CalledProgram, failure: str, seconds: float) -> CalledProgram:
    """The failing network made small."""
    small = shrink(program, lambda candidate: runs(candidate) and check(candidate).failure == failure, seconds)
    assert isinstance(small, CalledProgram)
    return small


def _job(seed: int, kind: str | None = None) -> tuple[int, CallsOutcome | None, bool]:
    """Seed, outcome, and whether the network has to be right."""
    if kind and not re.search(kind, list(KINDS)[seed % len(KINDS)]):
        return seed, None, True
    program = draw(seed)
    outcome = check(program)
    return seed, outcome, promised(outcome, program)


def _start() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def outcomes(seeds: range, jobs: int, kind: str | None = None) -> Iterator[tuple[int, CallsOutcome | None, bool]]:
    """Seed and outcome of each network, None for one of another kind, and whether it has to be right."""
    job = functools.partial(_job, kind=kind)
    if jobs < 2:
        yield from map(job, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, _start, maxtasksperchild=2000) as pool:
        yield from pool.imap_unordered(job, seeds, chunksize=16)


def try_calls(
    seeds: range,
    jobs: int = 1,
    seconds: float = float("inf"),
    shrinking: float = 20.0,
    failures: int = 3,
    kind: str | None = None,
) -> int:
    """Try many networks and print failures and a table; returns the exit status."""
    kinds: dict[str, KindTally] = {name: KindTally() for name in KINDS}
    every, unpromised, begun, told = KindTally(), KindTally(), time.monotonic(), time.monotonic()
    for seed, outcome, counts in outcomes(seeds, jobs, kind):
        now = time.monotonic()
        if now - begun > seconds:
            break
        if outcome is None:
            continue
        tally = kinds[outcome.kind]
        tally.add(outcome)
        (every if counts else unpromised).add(outcome)
        if outcome.failure and counts and tally.failures[outcome.failure] <= failures:
            _report(seed, outcome, shrinking)
        if now - told > 10:
            told = now
            print(
                f"... {every.networks} networks, {every.wrong} wrong, {every.crashed} crashed",
                file=sys.stderr,
                flush=True,
            )
    seconds = time.monotonic() - begun
    print(
        f"\n{every.networks / seconds:.1f} networks/s with {every.calls / max(every.networks, 1):.1f} further calls each"
    )
    print(f"{'kind':28s}" + "".join(f"{heading:>11s}" for heading in HEADINGS))
    for name, tally in kinds.items():
        if tally.networks:
            print(tally.row(name))
    print(every.row("all"))
    print(unpromised.row("not-promised"), flush=True)
    for failure, count in every.failures.most_common():
        print(f"{count} x {failure}")
    return 1 if every.wrong or every.crashed else 0


def _report(seed: int, outcome: CallsOutcome, seconds: float) -> None:
    if not seconds:
        print(f"\n=== seed {seed}, {outcome.kind}: {outcome.failure}\n--- {outcome.detail}\n", flush=True)
        return
    small = shrunk(draw(seed), outcome.failure, seconds)
    print(
        f"\n=== seed {seed}, {outcome.kind}: {outcome.failure}\n{small}\n--- {check(small).detail or outcome.detail}\n",
        flush=True,
    )


def show_calls(seed: int) -> int:
    """Print the network of a seed, with its calls, and what became of it; returns the exit status."""
    program = draw(seed)
    outcome = check(program)
    print(
        f"{program}\n{outcome.kind}: {outcome.removed} of {outcome.norms} norms removed, {outcome.calls} further calls"
    )
    print(f"{outcome.failure or 'right'}\n{outcome.detail}")
    return 1 if outcome.failure else 0
