"""``python -m fuzz --calls``: networks that go by more than the recorded call, and what became of each kind."""

from __future__ import annotations

import functools

from fuzz.by_kind import Outcome, Tally, in_processes, is_wanted, report_failure, tally
from fuzz.calls import draw
from fuzz.check_calls import CallsOutcome, check, runs, unseen
from fuzz.kinds import KINDS
from fuzz.protocol import CalledProgram
from fuzz.shrink import shrink

NOT_PROMISED = {"grad_mode": "gradients are tracked", "layout": "lie in memory"}
"""Kinds of code of which a plan says that not everything was seen, each with words of that."""


HEADINGS = ("networks", "norms", "removed", "calls", "wrong", "crashed", "rounding")


def promised(outcome: CallsOutcome, program: CalledProgram) -> bool:
    """Whether a network of any kind has to be right: unless the plan says that it did not see what the kind is about."""
    words = NOT_PROMISED.get(outcome.kind)
    return words is None or (bool(outcome.failure) and words not in unseen(program))


def shrunk(program: CalledProgram, failure: str, seconds: float) -> CalledProgram:
    """The failing network made small."""
    return shrink(program, lambda candidate: runs(candidate) and check(candidate).failure == failure, seconds)


def _job(seed: int, kind: str | None = None) -> tuple[int, CallsOutcome | None, bool]:
    """Seed, outcome, and whether the network has to be right."""
    if not is_wanted(seed, list(KINDS), kind):
        return seed, None, True
    program = draw(seed)
    outcome = check(program)
    return seed, outcome, promised(outcome, program)


def try_calls(
    seeds: range,
    jobs: int = 1,
    seconds: float = float("inf"),
    shrinking: float = 20.0,
    failures: int = 3,
    kind: str | None = None,
) -> int:
    """Try many networks and print failures and a table; returns the exit status."""

    def small(seed: int, failure: str) -> tuple[CalledProgram, str]:
        program = shrunk(draw(seed), failure, shrinking)
        return program, check(program).detail

    def report(seed: int, outcome: Outcome) -> None:
        report_failure(seed, outcome, functools.partial(small, seed, outcome.failure) if shrinking else None)

    found = in_processes(functools.partial(_job, kind=kind), seeds, jobs)
    tallies = tally(found, KINDS, Tally, report, seconds, failures)
    networks, calls = tallies.every.networks, tallies.every.calls
    print(f"\n{networks / tallies.seconds:.1f} networks/s with {calls / max(networks, 1):.1f} further calls each")
    tallies.show(HEADINGS, "not-promised")
    tallies.show_failures()
    return tallies.status


def show_calls(seed: int) -> int:
    """Print the network of a seed, with its calls, and what became of it; returns the exit status."""
    program = draw(seed)
    outcome = check(program)
    print(
        f"{program}\n{outcome.kind}: {outcome.removed} of {outcome.norms} norms removed, {outcome.calls} further calls"
    )
    print(f"{outcome.failure or 'right'}\n{outcome.detail}")
    return 1 if outcome.failure else 0
