"""Networks whose structure may change: as they are, fused, and restructured; those with branches also by timm's own.

Networks for each kind of restructuring: branches to merge, layers to untie, weights to bake, activations to clip. All
kinds are asked for at once (``restructure=True``), and what runs is measured interleaved. How far a restructured
network is from the original is measured in float64.

timm's classes each know their own branches, and fold the norms behind their own layers only; merging goes by what the
network did. Both are compared by the layers that run, by the norms that stay, and by time.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bnfuse
from bench.networks import Network, detector, discriminator, effdet, forward, selected, temporal_network, zoo
from bench.section import Section, Settings, Target, at_most, progress
from bench.timing import Rounds, geometric_mean, measured
from bnfuse.errors import SpecError
from bnfuse.printing.tables import Column, Table
from bnfuse.tools.timing import threads, timed
from bnfuse.verify.measure import compare_outputs

BRANCHES = (
    zoo("timm:repvgg_a0"),
    zoo("timm:mobileone_s0"),
    zoo("timm:fastvit_t8", (3, 256, 256)),
    zoo("timm:repghostnet_050"),
    zoo("timm:repvit_m0_9"),
    zoo("timm:efficientformerv2_s0"),
)
"""Those that timm can restructure, too."""

NETWORKS = (
    *BRANCHES,
    effdet("tf_efficientdet_d0", 128),
    effdet("cspresdet50", 128),
    Network("own:detector", detector, (3, 256, 256)),
    zoo("timm:resnetv2_50x1_bit"),
    zoo("timm:nf_regnet_b0"),
    Network("own:temporal_network", temporal_network, (64, 400)),
    Network("own:discriminator", discriminator, (3, 128, 128)),
    zoo("torchvision:densenet121"),
    zoo("timm:convmixer_1024_20_ks9_p14"),
)
QUICK = (
    Network("own:small_detector", partial(detector, 8, 1, 2), (3, 32, 32)),
    Network("own:small_discriminator", partial(discriminator, 4, 2), (3, 32, 32)),
)
LIMIT = 1.03
ERROR = 1e-9
ORIGINAL, FUSED, RESTRUCTURED, TIMM = "original", "fused", "restructured", "timm's own"
_OPTIONS = bnfuse.Options(infer_calls=False)  # timm's step keeps nothing of other methods either


@dataclass(frozen=True)
class Finding:
    """What was measured of one network.

    Attributes:
        steps: of the restructuring, by kind.
        layers: that run, by the kind of network.
        norms: that run, likewise; those that standardise a weight are norms, too.
        parameters: likewise.
        error: the relative error of the restructured network in float64.
        rounds: the times.
        problem: why the network could not be measured, or "".
    """

    network: str
    steps: Mapping[str, int] = field(default_factory=dict)
    layers: Mapping[str, int] = field(default_factory=dict)
    norms: Mapping[str, int] = field(default_factory=dict)
    parameters: Mapping[str, int] = field(default_factory=dict)
    error: float = 0.0
    rounds: Rounds = Rounds({})  # noqa: RUF009 (nothing writes to it)
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"rounds": self.rounds.to_dict()}


def run(settings: Settings) -> Section:
    """Measure every network."""
    networks = selected(settings.networks, QUICK if settings.quick else NETWORKS)
    findings = []
    for number, network in enumerate(networks, 1):
        found = examine(network, settings)
        said = found.problem or f"{RESTRUCTURED} / {ORIGINAL} {found.rounds.ratio(RESTRUCTURED, ORIGINAL)}"
        progress(f"restructuring [{number}/{len(networks)}] {network.name}: {said}")
        findings.append(found)
    return report(findings)


def examine(network: Network, settings: Settings) -> Finding:
    """Measure one network."""
    try:
        model = network.build(dead=0.0)  # as trained ones; a gain of 0 lets no addition stand for its norm
    except ModuleNotFoundError as error:
        return Finding(network.name, problem=f"{error.name} is not installed")
    except SpecError as error:
        return Finding(network.name, problem=str(error))
    x = network.inputs()
    plan = bnfuse.plan(model, x, restructure=True, options=_OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bnfuse.NothingFusedWarning)  # what only restructuring can do
        networks = {
            ORIGINAL: model,
            FUSED: bnfuse.fuse(model, x, options=_OPTIONS),
            RESTRUCTURED: bnfuse.fuse(model, x, restructure=True, options=_OPTIONS),
        }
    if network in BRANCHES:
        networks[TIMM] = importlib.import_module("timm").utils.reparameterize_model(model)
    counts = {kind: ran(candidate, x) for kind, candidate in networks.items()}
    with threads(settings.threads):
        measures = {kind: timed(partial(forward, candidate, x), settings.clock) for kind, candidate in networks.items()}
        rounds = measured(measures, settings.effort(seconds=20, least=15, most=200))
    return Finding(
        network=network.name,
        steps=Counter(step.kind for step in plan.steps),
        layers={kind: layers for kind, (layers, _) in counts.items()},
        norms={kind: norms for kind, (_, norms) in counts.items()},
        parameters={kind: sum(p.numel() for p in candidate.parameters()) for kind, candidate in networks.items()},
        error=error_of_restructuring(model, x),
        rounds=rounds,
    )


def error_of_restructuring(model: nn.Module, x: Tensor) -> float:
    """The largest relative error of an output, both networks in float64."""
    wide = copy.deepcopy(model).double()
    restructured = bnfuse.fuse(wide, x.double(), restructure=True, options=_OPTIONS)
    outputs = compare_outputs(forward(wide, x.double()), forward(restructured, x.double())).outputs
    return max(float("inf") if output.problem else output.relative_l2 for output in outputs)


def ran(model: Callable[[Tensor], object], x: Tensor) -> tuple[int, int]:
    """How many convolutions and linear layers, and how many batch norms a network runs."""
    with torch.inference_mode(), _Counter() as counter:
        model(x)
    return counter.layers, counter.norms


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers = self.norms = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        self.layers += name.startswith(("aten::conv", "aten::linear", "aten::addmm"))
        self.norms += "batch_norm" in name
        return func(*args, **(kwargs or {}))


def report(findings: Sequence[Finding]) -> Section:
    """The tables, and what was promised."""
    if not findings:
        return Section(())
    done = [found for found in findings if not found.problem]
    beside = [found for found in done if found.rounds.has(TIMM)]
    tables = [_table(findings), *([_beside_timm(beside)] if beside else [])]
    targets = [_ratios(done, RESTRUCTURED, FUSED)]
    if beside:
        more = [found.network for found in beside if found.layers[RESTRUCTURED] > found.layers[TIMM]]
        left = [found.network for found in beside if found.norms[RESTRUCTURED]]
        targets += [
            _ratios(beside, RESTRUCTURED, TIMM),
            Target(f"no more layers than {TIMM}, no norm left", not (more or left)),
        ]
    targets.append(at_most("error in float64", ERROR, {found.network: found.error for found in done}, form=".0e"))
    more = [found.network for found in done if found.norms[RESTRUCTURED] > found.norms[FUSED]]
    targets.append(Target(f"no norm more than {FUSED}", not more if done else None))
    return Section(tables, targets, {"networks": [found.to_dict() for found in findings]})


def _ratios(findings: Sequence[Finding], above: str, below: str) -> Target:
    ratios = {found.network: found.rounds.ratio(above, below).median for found in findings}
    return at_most(f"{above} / {below}", LIMIT, ratios, form=".3f")


def _table(findings: Sequence[Finding]) -> Table:
    rows = [(found.network, found.problem) if found.problem else _row(found) for found in findings]
    done = [found for found in findings if not found.problem]
    if done:
        means = {
            kind: geometric_mean(found.rounds.ratio(kind, ORIGINAL).median for found in done)
            for kind in (FUSED, RESTRUCTURED)
        }
        rows.append(("geometric mean", "", "", *(cell for mean in means.values() for cell in (f"{mean:.3f}", ""))))
    heads = [f"{ORIGINAL}, ms", f"{FUSED} /", "quartiles", f"{RESTRUCTURED} /", "quartiles"]
    heads += ["norms", FUSED, RESTRUCTURED, "parameters", RESTRUCTURED, "error"]
    columns = (Column("network"), Column("steps"), *(Column(head, True) for head in heads))
    empty = ("",) * len(columns)
    filled = tuple((*row, *empty[len(row) :]) for row in rows)
    return Table("Latency of restructured networks, one sample: medians of the ratios to the original", columns, filled)


def _row(found: Finding) -> tuple[str, ...]:
    ratios = [found.rounds.ratio(kind, ORIGINAL) for kind in (FUSED, RESTRUCTURED)]
    return (
        found.network,
        ", ".join(f"{count} {kind}" for kind, count in found.steps.items()),
        f"{found.rounds.milliseconds(ORIGINAL):.1f}",
        *(cell for ratio in ratios for cell in (str(ratio), ratio.range)),
        *(str(found.norms[kind]) for kind in (ORIGINAL, FUSED, RESTRUCTURED)),
        *(f"{found.parameters[kind]:,}" for kind in (ORIGINAL, RESTRUCTURED)),
        f"{found.error:.0e}",
    )


def _beside_timm(findings: Sequence[Finding]) -> Table:
    kinds = (ORIGINAL, RESTRUCTURED, TIMM)
    rows = [
        (
            found.network,
            *(f"{found.layers[kind]} + {found.norms[kind]}" for kind in kinds),
            *(f"{found.rounds.milliseconds(kind):.1f}" for kind in kinds),
            str(found.rounds.ratio(RESTRUCTURED, TIMM)),
        )
        for found in findings
    ]
    columns = [Column("network"), *(Column(f"layers + norms, {kind}", True) for kind in kinds)]
    columns += [*(Column(f"ms, {kind}", True) for kind in kinds), Column(f"{RESTRUCTURED} / {TIMM}", True)]
    return Table(f"Parallel branches, beside {TIMM} reparameterisation", tuple(columns), tuple(rows))
