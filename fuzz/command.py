"""``python -m fuzz --count 20000 --seed 0``: make networks, fuse them, compare. With ``--calls``, on several calls each."""

from __future__ import annotations

import argparse
import contextlib
import functools
import multiprocessing
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TextIO

import torch

from bnfuse.restructuring.kinds import KINDS
from fuzz import files
from fuzz.calls_command import show_calls, try_calls
from fuzz.check import Outcome, bare_algebra, check
from fuzz.generate import draw
from fuzz.program import Program
from fuzz.restructured_command import show_restructuring, try_restructuring
from fuzz.shrink import shrink

THOROUGH_EVERY = 8
"""One network in so many is also fused with verification, in place and by ``Plan.apply``."""

SAMPLED_EVERY = 20
"""For so many networks, the command also tries one with several calls."""


@dataclass
class Tally:
    """What came of many networks."""

    networks: int = 0
    norms: int = 0
    removed: int = 0
    wrong: int = 0
    crashed: int = 0
    skipped: int = 0
    sizes: int = 0
    steps: int = 0
    changes: int = 0
    restructured: int = 0
    partly: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    failures: dict[str, list[tuple[int, str, str]]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, seed: int, outcome: Outcome, steps: int) -> None:
        self.networks += 1
        self.norms += outcome.norms
        self.removed += outcome.removed
        self.partly += outcome.removed > 0
        self.sizes += outcome.sizes
        self.steps += steps
        self.changes += outcome.steps
        self.restructured += outcome.steps > 0
        self.skipped += outcome.skipped
        self.reasons += outcome.reasons
        if outcome.failure:
            if outcome.failure.startswith("crash"):
                self.crashed += 1
            else:
                self.wrong += 1
            self.counts[outcome.failure] += 1

    def __str__(self) -> str:
        return (
            f"{self.networks} networks, {self.norms} norms, {self.removed} removed: "
            f"{self.wrong} wrong, {self.crashed} crashed, {self.skipped} ill-conditioned"
        )


def shrunk(program: Program, failure: str, thorough: bool, seconds: float, restructure: Sequence[str] = ()) -> Program:
    """The failing network made small."""
    return shrink(program, lambda candidate: _fails(candidate, failure, thorough, restructure), seconds)


def _fails(candidate: Program, failure: str, thorough: bool, restructure: Sequence[str]) -> bool:
    net = candidate.build()
    with torch.no_grad():
        net(*candidate.arguments(0))
    return check(candidate, thorough, restructure).failure == failure


def _job(
    seed: int, without: str | None = None, bare: bool = False, restructure: Sequence[str] = ()
) -> tuple[int, int, Outcome | None]:
    program = draw(seed, bool(restructure), "merge" in restructure)
    if without and re.search(without, program.source):
        return seed, 0, None
    with bare_algebra() if bare else contextlib.nullcontext():
        return seed, len(program.steps), check(program, seed % THOROUGH_EVERY == 0, restructure)


def _start() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def outcomes(
    seeds: range, jobs: int, without: str | None = None, bare: bool = False, restructure: Sequence[str] = ()
) -> Iterator[tuple[int, int, Outcome | None]]:
    """Seed, number of steps and outcome of each network, None for one that is left out."""
    job = functools.partial(_job, without=without, bare=bare, restructure=restructure)
    if jobs < 2:
        yield from map(job, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, _start, maxtasksperchild=2000) as pool:
        yield from pool.imap_unordered(job, seeds, chunksize=16)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser("python -m fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="how many networks")
    parser.add_argument("--seed", type=int, default=0, help="of the first network; the others follow")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time (s)")
    parser.add_argument("--show", action="store_true", help="print the network of --seed and its plan, and stop")
    parser.add_argument("--shrink", type=float, default=20.0, help="time for making a failure small (s)")
    parser.add_argument("--without", help="leave out networks whose program matches this expression")
    parser.add_argument("--bare", action="store_true", help="do not let plans be tried on other inputs")
    parser.add_argument("--restructure", action="store_true", help="networks whose structure may change")
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        choices=KINDS,
        help="fuse ordinary networks with this restructuring, too",
    )
    parser.add_argument("--coverage", action="store_true", help="count what crossed which rule (one process)")
    parser.add_argument("--calls", action="store_true", help="networks that go by more than the recorded call")
    parser.add_argument("--files", action="store_true", help="damaged files of fused models instead of networks")
    parser.add_argument("--kind", help="with --calls or --restructure, only kinds whose names match")
    parser.add_argument("--failures", type=int, default=3, help="how many failures of one class to print")
    options = parser.parse_args(arguments)
    _start()
    if options.files:
        return files.main(options.count, options.seed)
    if options.calls:
        return show_calls(options.seed) if options.show else _try_calls(options, options.count)
    if options.restructure:
        if options.show:
            return show_restructuring(options.seed)
        return try_restructuring(_seeds(options, options.count), *_limits(options))
    if options.show:
        return _show(options.seed, options.allow)
    if options.coverage:
        return _coverage(range(options.seed, options.seed + options.count))
    tally, begun, told = Tally(), time.monotonic(), time.monotonic()
    seeds = range(options.seed, options.seed + options.count)
    for seed, steps, outcome in outcomes(seeds, options.jobs, options.without, options.bare, options.allow):
        now = time.monotonic()
        if now - begun > options.seconds:
            break
        if outcome is None:
            continue
        tally.add(seed, outcome, steps)
        if outcome.failure and tally.counts[outcome.failure] <= options.failures:
            with bare_algebra() if options.bare else contextlib.nullcontext():
                _report(seed, outcome, options.shrink, options.allow)
        if now - told > 10:
            told = now
            _say(f"... {tally} ({tally.networks / (now - begun):.0f}/s)", sys.stderr)
    _summary(tally, time.monotonic() - begun)
    failed = _try_calls(options, options.count // SAMPLED_EVERY)
    return 1 if tally.wrong or tally.crashed or failed else 0


def _try_calls(options: argparse.Namespace, count: int) -> int:
    return try_calls(_seeds(options, count), *_limits(options))


def _seeds(options: argparse.Namespace, count: int) -> range:
    return range(options.seed, options.seed + count)


def _limits(options: argparse.Namespace) -> tuple[int, float, float, int, str | None]:
    return options.jobs, options.seconds, options.shrink, options.failures, options.kind


def _report(seed: int, outcome: Outcome, seconds: float, restructure: Sequence[str]) -> None:
    thorough = seed % THOROUGH_EVERY == 0
    small = shrunk(
        draw(seed, bool(restructure), "merge" in restructure), outcome.failure, thorough, seconds, restructure
    )
    again = check(small, thorough, restructure)
    _say(f"\n=== seed {seed}: {outcome.failure}\n{small}\n--- {again.detail or outcome.detail}\n")


def _summary(tally: Tally, seconds: float) -> None:
    networks, norms = max(tally.networks, 1), max(tally.norms, 1)
    _say(
        f"{tally.networks / seconds:.1f} networks/s, {tally.steps / networks:.1f} steps and {norms / networks:.1f} norms each"
    )
    _say(
        f"a norm goes in {100 * tally.partly / networks:.0f} % of the networks; {tally.sizes / networks:.1f} sizes compared for each"
    )
    if tally.changes:
        _say(f"{tally.changes} changes of the structure, in {tally.restructured} networks")
    _say(f"kept: {norms - tally.removed} norms, by reason:")
    for reason, count in tally.reasons.most_common(25):
        _say(f"  {count:6d}  {reason}")
    for failure, count in tally.counts.most_common():
        _say(f"{count} x {failure}")
    _say(str(tally))


def _show(seed: int, restructure: Sequence[str]) -> int:
    import bnfuse

    program = draw(seed, bool(restructure), "merge" in restructure)
    _say(str(program))
    _say(str(bnfuse.plan(program.build(), program.arguments(0), restructure=restructure)))
    outcome = check(program, thorough=True, restructure=restructure)
    _say(f"{outcome.failure or 'right'}\n{outcome.detail}")
    return 1 if outcome.failure else 0


def _coverage(seeds: range) -> int:
    from bnfuse.rules.registry import RULES
    from fuzz.coverage import counted

    with counted() as (crossed, refused):
        tally = Tally()
        for seed in seeds:
            program = draw(seed)
            tally.add(seed, check(program), len(program.steps))
    _say("operator: crossed in accepted removals, refused")
    for operator in sorted({*RULES, *crossed, *refused}, key=lambda name: (crossed[name], refused[name])):
        _say(f"  {operator}: {crossed[operator]}, {refused[operator]}")
    _say(str(tally))
    return 1 if tally.wrong or tally.crashed else 0


def _say(text: str, stream: TextIO | None = None) -> None:
    print(text, file=stream or sys.stdout, flush=True)
