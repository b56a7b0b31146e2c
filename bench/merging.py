"""Networks with parallel branches: as they are, fused, fused and merged, and after timm's own reparameterisation.

timm's classes each know their own branches, and fold the norms behind their own layers only; merging goes by what the
network did. Both are compared by the layers that run, by the norms that stay, and by time, interleaved. How far a
merged network is from the original is measured in float64.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bnfuse
from bench.networks import matches
from bench.section import Section, Settings, Target, at_most, progress
from bench.timing import Rounds, measured
from bnfuse.printing.tables import Column, Table
from bnfuse.tools.timing import threads, timed
from bnfuse.tools.zoo.randomise import randomise_

NAMES = ("repvgg_a0", "mobileone_s0", "fastvit_t8", "repghostnet_050", "repvit_m0_9", "efficientformerv2_s0")
LIMIT = 1.03
ERROR = 1e-9
ORIGINAL, FUSED, MERGED, TIMM = "original", "fused", "merged", "timm's own"


@dataclass(frozen=True)
class Finding:
    """What was measured of one network.

    Attributes:
        layers: that run, by the kind of network.
        norms: that run, likewise.
        error: the relative error of the merged network in float64.
        rounds: the times.
    """

    network: str
    layers: dict[str, int]
    norms: dict[str, int]
    error: float
    rounds: Rounds

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"rounds": self.rounds.to_dict()}


def run(settings: Settings) -> Section:
    """Measure every network."""
    names = [name for name in NAMES if matches(settings.networks, name)][: 1 if settings.quick else None]
    findings = []
    for number, name in enumerate(names, 1):
        found = examine(name, settings)
        ratio = found.rounds.ratio(MERGED, TIMM)
        progress(f"merging [{number}/{len(names)}] {name}: merged / {TIMM} {ratio} ({ratio.range})")
        findings.append(found)
    return report(findings)


def examine(name: str, settings: Settings) -> Finding:
    """Measure one network."""
    timm = importlib.import_module("timm")
    torch.manual_seed(0)
    model: nn.Module = randomise_(timm.create_model(name)).eval()
    size = model.pretrained_cfg["input_size"][-1]  # type: ignore[index, union-attr]
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    options = bnfuse.Options(infer_calls=False)  # timm's step keeps nothing of other methods either
    networks: dict[str, nn.Module] = {
        ORIGINAL: model,
        FUSED: bnfuse.fuse(model, x, options=options),
        MERGED: bnfuse.fuse(model, x, restructure="merge", options=options),
        TIMM: timm.utils.reparameterize_model(model),
    }
    counts = {kind: ran(network, x) for kind, network in networks.items()}
    with threads(settings.threads), torch.inference_mode():
        work: dict[str, Callable[[], object]] = {
            kind: (lambda network=network: network(x))  # type: ignore[misc]
            for kind, network in networks.items()
        }
        measures = {kind: timed(call, settings.clock) for kind, call in work.items()}
        rounds = measured(measures, settings.effort(seconds=20, least=15, most=200))
    return Finding(
        network=name,
        layers={kind: layers for kind, (layers, _) in counts.items()},
        norms={kind: norms for kind, (_, norms) in counts.items()},
        error=error_of_merging(model, x, options),
        rounds=rounds,
    )


def error_of_merging(model: nn.Module, x: Tensor, options: bnfuse.Options) -> float:
    """The relative error of the outputs, both networks in float64."""
    wide = copy.deepcopy(model).double()
    merged = bnfuse.fuse(wide, x.double(), restructure="merge", options=options)
    with torch.inference_mode():
        expected, got = wide(x.double()), merged(x.double())
    return float((got - expected).norm() / expected.norm())


def ran(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """How many convolutions and linear layers, and how many batch norms a network runs."""
    with torch.inference_mode(), _Counter() as counter:
        model(x)
    return counter.layers, counter.norms


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.layers = self.norms = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        self.layers += name.startswith(("aten::conv", "aten::linear", "aten::addmm"))
        self.norms += "batch_norm" in name
        return func(*args, **(kwargs or {}))


def report(findings: list[Finding]) -> Section:
    """The table, and what was promised."""
    if not findings:
        return Section([])
    rows = [
        (
            found.network,
            *(f"{found.layers[kind]} + {found.norms[kind]}" for kind in (ORIGINAL, MERGED, TIMM)),
            *(f"{found.rounds.milliseconds(kind):.1f}" for kind in (ORIGINAL, FUSED, MERGED, TIMM)),
            str(found.rounds.ratio(MERGED, TIMM)),
            f"{found.error:.0e}",
        )
        for found in findings
    ]
    columns = [Column("network"), *(Column(f"layers + norms, {kind}", True) for kind in (ORIGINAL, MERGED, TIMM))]
    columns += [Column(f"ms, {kind}", True) for kind in (ORIGINAL, FUSED, MERGED, TIMM)]
    columns += [Column(f"merged/{TIMM}", True), Column("error", True)]
    ratios = {found.network: found.rounds.ratio(MERGED, TIMM).median for found in findings}
    more = [found.network for found in findings if found.layers[MERGED] > found.layers[TIMM]]
    left = [found.network for found in findings if found.norms[MERGED]]
    targets = [
        at_most(f"merged/{TIMM}", LIMIT, ratios),
        at_most("error in float64", ERROR, {found.network: found.error for found in findings}, form=".0e"),
        Target(f"no more layers than {TIMM}", not more),
        Target("no norm left", not left),
    ]
    table = Table("Parallel branches, one sample", tuple(columns), tuple(rows))
    return Section([table], targets, {"networks": [found.to_dict() for found in findings]})
