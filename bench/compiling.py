"""``torch.compile`` of the original and of the fused network: how long the first call takes, and how long the next.

Beside them stands the network with the same norms deleted, which is wrong, and as little work as fusing can leave. Each
in a fresh process with an empty cache; all stay alive afterwards, so that their further calls can take turns.
All of that as it is and with inductor's freezing, which folds norms that stand right behind a convolution by itself.
Where the first call goes, the C++ files say that inductor makes and compiles one after the other.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import bnfuse
from bench.child import Child, child
from bench.networks import QUICK as SMALL
from bench.networks import Network, forward, selected, zoo
from bench.rivals import is_right, without_norms
from bench.section import Section, Settings, at_most, progress
from bench.timing import Clock, Effort, Rounds, measured
from bnfuse.printing.tables import Column, Table
from bnfuse.tools.timing import Measure, timed

NETWORKS = (zoo("torchvision:mobilenet_v2"), zoo("torchvision:resnet50"))
QUICK = tuple(selected("own:small_mlp", SMALL))
VARIANTS = ORIGINAL, FUSED, DELETED = "original", "fused", "deleted"
FIRST_CALL, FROZEN_RUN = 0.6, 1.0
_CACHE = "TORCHINDUCTOR_CACHE_DIR"


@dataclass(frozen=True)
class Finding:
    """What was measured of one network.

    Attributes:
        cold: seconds of the first call of each variant, in every group of processes.
        warm: seconds of the next calls.
        files: how many files of C++ the first call of each variant compiles.
        freezing: whether inductor takes the parameters for constants.
        problem: why a variant could not be measured, or "".
    """

    network: str
    cold: Rounds
    warm: Rounds
    files: Mapping[str, int] = field(default_factory=dict)
    freezing: bool = False
    problem: str = ""

    @property
    def label(self) -> str:
        return f"{self.network}{', frozen' if self.freezing else ''}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "network": self.network,
            "freezing": self.freezing,
            "files": self.files,
            "cold seconds": self.cold.to_dict(),
            "warm seconds": self.warm.to_dict(),
            "problem": self.problem,
        }


def run(settings: Settings) -> Section:
    """Measure every network."""
    networks = selected(settings.networks, QUICK if settings.quick else NETWORKS)
    groups = settings.repeat or (1 if settings.quick else 2)
    effort = replace(settings, repeat=None).effort(seconds=15, least=15, most=100)
    return report(
        [
            examine(network, groups, effort, settings.threads, freezing)
            for network in networks
            for freezing in (False, True)
        ]
    )


def examine(network: Network, groups: int, effort: Effort, threads: int, freezing: bool = False) -> Finding:
    """Measure one network, in so many groups of processes; every other group has the variants the other way round."""
    cold: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    warm: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    files: dict[str, int] = {}
    for number in range(groups):
        with ExitStack() as alive:
            measures: dict[str, Measure] = {}
            for variant in VARIANTS if number % 2 == 0 else reversed(VARIANTS):
                progress(f"compile [{number + 1}/{groups}] {network.name}: {variant}{', frozen' if freezing else ''}")
                process = alive.enter_context(_started(network, variant, threads, freezing, alive))
                try:
                    seconds, files[variant] = json.loads(process.ask())
                except RuntimeError as error:
                    problem = f"{variant}: {error}"
                    return Finding(network.name, Rounds({}), Rounds({}), freezing=freezing, problem=problem)
                cold[variant].append(seconds)
                measures[variant] = partial(_next_call, process)
            for variant, found in measured(measures, effort).seconds.items():
                warm[variant] += found
    return Finding(network.name, Rounds(cold), Rounds(warm), files, freezing)


def _started(
    network: Network, variant: str, threads: int, freezing: bool, alive: ExitStack
) -> AbstractContextManager[Child]:
    cache = alive.enter_context(tempfile.TemporaryDirectory(prefix="bnfuse-bench-", ignore_cleanup_errors=True))
    environment = {
        _CACHE: cache,
        "TORCHINDUCTOR_FREEZING": str(int(freezing)),
        "TORCHINDUCTOR_COMPILE_THREADS": str(threads),
        "OMP_NUM_THREADS": str(threads),
    }
    return child("bench.compiling", network.name, variant, str(threads), environment=environment)


def _next_call(process: Child) -> float:
    return float(process.ask("again"))


def report(findings: list[Finding]) -> Section:
    """Table, targets and data of what was measured."""
    if not findings:
        return Section(())
    rows = []
    for finding in findings:
        cells = [finding.network, "yes" if finding.freezing else "no"]
        cells += [str(finding.files.get(variant, "")) for variant in VARIANTS]
        for rounds, unit, digits in ((finding.cold, 1, 1), (finding.warm, 1000, 2)):
            if finding.problem:
                cells += ["fails", "fails", "fails", *("",) * 5]
                continue
            cells += [f"{unit * rounds.median(variant):.{digits}f}" for variant in VARIANTS]
            for below in (ORIGINAL, DELETED):
                ratio = rounds.ratio(FUSED, below)
                cells += [str(ratio), ratio.range]
            cells.append(str(rounds.count))
        rows.append(tuple(cells))
    heads = ["C++ files", FUSED, DELETED]
    for what, many in (("cold s", "groups"), ("run ms", "rounds")):
        heads += [what, FUSED, DELETED, f"{FUSED} / {ORIGINAL}", "quartiles", f"/ {DELETED}", "quartiles", many]
    columns = (Column("network"), Column("freezing"), *(Column(head, True) for head in heads))
    table = Table("torch.compile: first call in a fresh process, and further calls", columns, tuple(rows))
    done = [finding for finding in findings if not finding.problem]
    first = {finding.label: finding.cold.ratio(FUSED, ORIGINAL).median for finding in done}
    frozen = {finding.label: finding.warm.ratio(FUSED, ORIGINAL).median for finding in done if finding.freezing}
    targets = (
        at_most(f"{FUSED} / {ORIGINAL}, first call,", FIRST_CALL, first),
        at_most(f"{FUSED} / {ORIGINAL}, run with freezing,", FROZEN_RUN, frozen, form=".3f"),
    )
    return Section([table], targets, {"networks": [finding.to_dict() for finding in findings]})


def _with_compilers() -> float:
    """Processor time of this process and of the compilers that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


_wall: Clock = time.perf_counter
"""With several threads compilers work beside: their time is not what the caller waits for."""


def main(arguments: list[str]) -> None:
    """In a process of its own: compile, print the seconds of the first call and how many files it compiled, then the
    seconds of one more for every line of input.

    Raises:
        RuntimeError: the compiled network does not give what it gave before.
    """
    name, variant, count = arguments
    torch.set_num_threads(int(count))
    network = next(network for network in (*NETWORKS, *QUICK) if network.name == name)
    model, x = network.build(), network.inputs()
    if variant != ORIGINAL:
        plan = bnfuse.plan(model, x)
        model = plan.apply(model) if variant == FUSED else without_norms(model, plan)
    expected = forward(model, x)  # and everything that any first call loads is there
    compiled = torch.compile(model)
    outputs = []
    cold = timed(lambda: outputs.append(forward(compiled, x)), _with_compilers if int(count) == 1 else _wall)()
    if not is_right(expected, outputs[0]):
        raise RuntimeError("the compiled network gives something else")
    print(json.dumps([cold, len(list(Path(os.environ[_CACHE]).rglob("*.cpp")))]), flush=True)
    warm = timed(partial(forward, compiled, x), Settings(threads=int(count)).clock)
    for _ in sys.stdin:
        print(warm(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
