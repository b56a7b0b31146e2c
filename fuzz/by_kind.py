"""What the commands that try networks of several kinds share: processes, progress, failures and the table."""

from __future__ import annotations

import multiprocessing
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch

TELL_EVERY = 10.0
"""Seconds."""


class Outcome(Protocol):
    """What came of one network; `failure` is empty if all is well."""

    kind: str
    norms: int
    removed: int
    calls: int
    failure: str
    detail: str
    skipped: bool


@dataclass
class Tally:
    """What came of many networks of one kind, or of all."""

    networks: int = 0
    norms: int = 0
    removed: int = 0
    calls: int = 0
    wrong: int = 0
    crashed: int = 0
    skipped: int = 0
    failures: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Any) -> None:
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

    def numbers(self) -> tuple[int, ...]:
        """Those of a row of the table."""
        return (self.networks, self.norms, self.removed, self.calls, self.wrong, self.crashed, self.skipped)


AnyTally = TypeVar("AnyTally", bound=Tally)


@dataclass
class Tallies(Generic[AnyTally]):
    """What came of all networks.

    Attributes:
        kinds: by kind.
        every: of all that have to be right.
        others: of those that need not.
        seconds: how long it took.
    """

    kinds: dict[str, AnyTally]
    every: AnyTally
    others: AnyTally
    seconds: float = 0.0

    @property
    def status(self) -> int:
        """The exit status."""
        return 1 if self.every.wrong or self.every.crashed else 0

    def show(self, headings: Sequence[str], others: str = "") -> None:
        """Print a row for each kind and for all.

        Args:
            others: the name of the row of those that need not be right; "" for no such row.
        """
        rows = [(name, tally) for name, tally in self.kinds.items() if tally.networks]
        rows += [("all", self.every), *([(others, self.others)] if others else [])]
        print(f"{'kind':28s}" + "".join(f"{heading:>11s}" for heading in headings))
        for name, tally in rows:
            print(f"{name:28s}" + "".join(f"{number:>11d}" for number in tally.numbers()))
        sys.stdout.flush()

    def show_failures(self) -> None:
        for failure, count in self.every.failures.most_common():
            print(f"{count} x {failure}")


def is_wanted(seed: int, kinds: Sequence[str], wanted: str | None) -> bool:
    """Whether the network of a seed is of a kind whose name matches; None for all."""
    return not wanted or re.search(wanted, kinds[seed % len(kinds)]) is not None


def in_processes(job: Callable[[int], Any], seeds: range, jobs: int) -> Iterator[Any]:
    """What a job gives for each seed, in any order."""
    if jobs < 2:
        yield from map(job, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, _start, maxtasksperchild=2000) as pool:
        yield from pool.imap_unordered(job, seeds, chunksize=16)


def _start() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def tally(
    found: Iterable[tuple[int, Outcome | None, bool]],
    kinds: Iterable[str],
    make: Callable[[], AnyTally],
    report: Callable[[int, Outcome], None],
    seconds: float,
    failures: int,
) -> Tallies[AnyTally]:
    """Count what is found, tell how far it is, and report failures.

    Args:
        found: seed and outcome of each network, None for one of another kind, and whether it has to be right.
        report: is given the first failures of each class and kind.
        seconds: stop after this time.
        failures: how many of them.
    """
    tallies = Tallies({name: make() for name in kinds}, make(), make())
    begun = told = time.monotonic()
    for seed, outcome, counts in found:
        now = time.monotonic()
        if now - begun > seconds:
            break
        if outcome is None:
            continue
        mine = tallies.kinds[outcome.kind]
        mine.add(outcome)
        (tallies.every if counts else tallies.others).add(outcome)
        if outcome.failure and counts and mine.failures[outcome.failure] <= failures:
            report(seed, outcome)
        if now - told > TELL_EVERY:
            told, every = now, tallies.every
            print(
                f"... {every.networks} networks, {every.wrong} wrong, {every.crashed} crashed",
                file=sys.stderr,
                flush=True,
            )
    tallies.seconds = time.monotonic() - begun
    return tallies


def report_failure(seed: int, outcome: Outcome, small: Callable[[], tuple[Any, str]] | None) -> None:
    """Print a failure.

    Args:
        small: gives the network made small and what fails of it; None where there is no time for that.
    """
    if small is None:
        print(f"\n=== seed {seed}, {outcome.kind}: {outcome.failure}\n--- {outcome.detail}\n", flush=True)
        return
    program, detail = small()
    print(
        f"\n=== seed {seed}, {outcome.kind}: {outcome.failure}\n{program}\n--- {detail or outcome.detail}\n", flush=True
    )
