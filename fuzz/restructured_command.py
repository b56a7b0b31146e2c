"""``python -m fuzz --restructure``: networks whose structure may change, and what became of each kind."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, field

from bnfuse.restructuring.kinds import KINDS as STEPS
from fuzz.by_kind import Outcome, Tally, in_processes, is_wanted, report_failure, tally
from fuzz.check_calls import runs
from fuzz.check_restructured import RestructuredOutcome, check
from fuzz.restructured import RestructuredProgram, draw
from fuzz.restructured_kinds import KINDS
from fuzz.shrink import shrink

HEADINGS = ("networks", "norms", "plainly", "removed", *STEPS, "calls", "wrong", "crashed", "rounding", "refused")


@dataclass
class RestructuredTally(Tally):
    """What came of many networks of one kind, or of all.

    Attributes:
        plainly: how many norms go without restructuring.
        corrected: in how many networks verification took something out of the plan.
        refused: in how many verification fails with and without restructuring.
    """

    plainly: int = 0
    corrected: int = 0
    refused: int = 0
    steps: Counter[str] = field(default_factory=Counter)
    unchanged: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: RestructuredOutcome) -> None:
        super().add(outcome)
        self.plainly += outcome.plainly
        self.corrected += outcome.corrected
        self.refused += outcome.refused
        self.steps += outcome.steps
        self.unchanged += outcome.unchanged

    def numbers(self) -> tuple[int, ...]:
        return (
            self.networks, self.norms, self.plainly, self.removed, *(self.steps[kind] for kind in STEPS), self.calls,
            self.wrong, self.crashed, self.skipped, self.refused,
        )  # fmt: skip


def shrunk(program: RestructuredProgram, failure: str, seconds: float) -> RestructuredProgram:
    """The failing network made small."""
    return shrink(program, lambda candidate: runs(candidate) and check(candidate).failure == failure, seconds)


def _job(seed: int, kind: str | None = None) -> tuple[int, RestructuredOutcome | None, bool]:
    """Seed and outcome; each network has to be right."""
    return seed, check(draw(seed)) if is_wanted(seed, list(KINDS), kind) else None, True


def try_restructuring(
    seeds: range,
    jobs: int = 1,
    seconds: float = float("inf"),
    shrinking: float = 20.0,
    failures: int = 3,
    kind: str | None = None,
) -> int:
    """Try many networks and print failures and a table; returns the exit status."""

    def small(seed: int, failure: str) -> tuple[RestructuredProgram, str]:
        program = shrunk(draw(seed), failure, shrinking)
        return program, check(program).detail

    def report(seed: int, outcome: Outcome) -> None:
        report_failure(seed, outcome, functools.partial(small, seed, outcome.failure) if shrinking else None)

    found = in_processes(functools.partial(_job, kind=kind), seeds, jobs)
    tallies = tally(found, KINDS, RestructuredTally, report, seconds, failures)
    every = tallies.every
    print(f"\n{every.networks / tallies.seconds:.1f} networks/s; {every.corrected} plans corrected by verification")
    tallies.show(HEADINGS)
    for reason, count in every.unchanged.most_common(25):
        print(f"  {count:6d}  no {reason}")
    tallies.show_failures()
    return tallies.status


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
