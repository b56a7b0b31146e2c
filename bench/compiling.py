"""``torch.compile`` of the original and of the fused network: how long the first call takes, and how long the next.

Each in a fresh process with an empty cache; both stay alive afterwards, so that their further calls can take turns.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import bnfuse
from bench.child import Child, child
from bench.networks import QUICK as SMALL
from bench.networks import Network, forward, selected, zoo
from bench.rivals import is_right
from bench.section import Section, Settings, progress
from bench.timing import Effort, Rounds, measured
from bnfuse.printing.tables import Column, Table
from bnfuse.tools.timing import Measure, timed

NETWORKS = (zoo("torchvision:mobilenet_v2"), zoo("torchvision:resnet50"))
QUICK = tuple(selected("own:small_mlp", SMALL))
VARIANTS = ORIGINAL, FUSED = "original", "fused"


@dataclass(frozen=True)
class Finding:
    """What was measured of one network.

    Attributes:
        cold: seconds of the first call of each variant, in every pair of processes.
        warm: seconds of the next calls.
        problem: why a variant could not be measured, or "".
    """

    network: str
    cold: Rounds
    warm: Rounds
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {
            "network": self.network,
            "cold seconds": self.cold.to_dict(),
            "warm seconds": self.warm.to_dict(),
            "problem": self.problem,
        }


def run(settings: Settings) -> Section:
    """Measure every network."""
    networks = selected(settings.networks, QUICK if settings.quick else NETWORKS)
    pairs = settings.repeat or (1 if settings.quick else 2)
    effort = settings.effort(seconds=15, least=15, most=100)
    return report([examine(network, pairs, effort, settings.threads) for network in networks])


def examine(network: Network, pairs: int, effort: Effort, threads: int) -> Finding:
    """Measure one network, in so many pairs of processes; the second variant goes first in every other pair."""
    cold: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    warm: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for number in range(pairs):
        with ExitStack() as alive:
            measures: dict[str, Measure] = {}
            for variant in VARIANTS if number % 2 == 0 else reversed(VARIANTS):
                progress(f"compile [{number + 1}/{pairs}] {network.name}: {variant}")
                process = alive.enter_context(_started(network, variant, threads, alive))
                try:
                    cold[variant].append(float(process.ask()))
                except RuntimeError as error:
                    return Finding(network.name, Rounds({}), Rounds({}), f"{variant}: {error}")
                measures[variant] = partial(_next_call, process)
            for variant, seconds in measured(measures, effort).seconds.items():
                warm[variant] += seconds
    return Finding(network.name, Rounds(cold), Rounds(warm))


def _started(network: Network, variant: str, threads: int, alive: ExitStack) -> AbstractContextManager[Child]:
    cache = alive.enter_context(tempfile.TemporaryDirectory(prefix="bnfuse-bench-", ignore_cleanup_errors=True))
    environment = {
        "TORCHINDUCTOR_CACHE_DIR": cache,
        "TORCHINDUCTOR_COMPILE_THREADS": str(threads),
        "OMP_NUM_THREADS": str(threads),
    }
    return child("bench.compiling", network.name, variant, str(threads), environment=environment)


def _next_call(process: Child) -> float:
    return float(process.ask("again"))


def report(findings: list[Finding]) -> Section:
    """Table and data of what was measured; nothing is promised, so there are no targets."""
    if not findings:
        return Section(())
    rows = []
    for finding in findings:
        cells = [finding.network]
        for rounds, unit, digits in ((finding.cold, 1, 1), (finding.warm, 1000, 2)):
            if finding.problem:
                cells += ["fails", "fails", "", "", ""]
                continue
            ratio = rounds.ratio(FUSED, ORIGINAL)
            cells += [f"{unit * rounds.median(variant):.{digits}f}" for variant in VARIANTS]
            cells += [str(ratio), ratio.range, str(rounds.count)]
        rows.append(tuple(cells))
    heads = ("cold s", "fused", "ratio", "quartiles", "pairs", "run ms", "fused", "ratio", "quartiles", "rounds")
    columns = (Column("network"), *(Column(head, True) for head in heads))
    table = Table("torch.compile: first call in a fresh process (wall time), and further calls", columns, tuple(rows))
    return Section([table], (), {"networks": [finding.to_dict() for finding in findings]})


def main(arguments: list[str]) -> None:
    """In a process of its own: compile, print the seconds of the first call, then of one more for every line of input.

    Raises:
        RuntimeError: the compiled network does not give what it gave before.
    """
    name, variant, count = arguments
    torch.set_num_threads(int(count))
    network = next(network for network in (*NETWORKS, *QUICK) if network.name == name)
    model, x = network.build(), network.inputs()
    if variant == FUSED:
        model = bnfuse.fuse(model, x)
    expected = forward(model, x)  # and everything that any first call loads is there
    compiled = torch.compile(model)
    outputs = []
    cold = timed(lambda: outputs.append(forward(compiled, x)))()
    if not is_right(expected, outputs[0]):
        raise RuntimeError("the compiled network gives something else")
    print(cold, flush=True)
    warm = timed(partial(forward, compiled, x), Settings(threads=int(count)).clock)
    for _ in sys.stdin:
        print(warm(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
