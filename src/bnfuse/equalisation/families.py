"""Which tensors may have their channels rescaled, and what changes with them: found by asking the solver.

Rescaling the channels of one tensor by ``s`` rescales others with it (all of a residual stream, the part of a
concatenation), and the weights of the layers around them take it up. All tensors that one vector of scales moves are a
*family*. To find one, units of scales that are all different are demanded of a tensor, in a trial that is not accepted:
the unit that another tensor is given then tells, channel by channel, which of the scales has arrived there. So no
operator is known here; what passes scales is up to :mod:`bnfuse.rules`.

The scale of a channel of any tensor is then ``prod s_f[i]`` over the families, or in logarithms a sum: a layer of
weight ``w`` that reads ``x`` and makes ``y`` has ``log|w'[o, i]| = log|w[o, i]| + log s_y[o] - log s_x[i]`` afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bnfuse.graph.graph import Node, Value
from bnfuse.reasons import NOTHING_PASSES, Reason
from bnfuse.rules.layers import UNDEFORMED, Layer, layer_of
from bnfuse.solve.network import Network, Refusal
from bnfuse.solve.propagation import Trial
from bnfuse.units import NotInvertibleError, Unit, channel_vector, per_channel

_NEAR, _FAR = 0.05, 0.65
"""The logarithms of the test scales lie between these, below 0: a clamp from above may pass no others."""

_TOLERANCE = 1e-9

_SEED = 0


@dataclass(frozen=True, eq=False)
class Family:
    """Tensors whose channels are rescaled together.

    Attributes:
        value: the tensor of which units are demanded.
        axis: of its channels.
        channels: how many scales there are.
        places: for each input and output of a layer that moves: for each channel, the index of the scale that it has,
            ``channels`` for none, int64; and the sign of its exponent, float64.
    """

    value: Value
    axis: int
    channels: int
    places: dict[Value, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def unit(self, scales: Tensor) -> Unit:
        """The unit that is demanded, for scales of shape (channels,)."""
        return Unit.of(per_channel(scales, self.axis, len(self.value.shape)), None)


@dataclass(frozen=True)
class Families:
    """What may be rescaled.

    Attributes:
        layers: the layers with weights, in the order of the run.
        free: the families.
        refused: for each layer whose output cannot be rescaled, by its name, the reason.
    """

    layers: list[Layer]
    free: list[Family]
    refused: dict[str, Reason]


def find_families(network: Network, nodes: Iterable[Node]) -> Families:
    """Ask what may be rescaled.

    Args:
        network: of all calls.
        nodes: the operators of the first call, to begin with; scales that move weights move what other calls do too.
    """
    pairs = list(_layers(nodes))
    layers = [layer for _, layer in pairs]
    axes = {value: layer.axis for layer in layers for value in (layer.x, layer.y)}
    free: list[Family] = []
    refused: dict[str, Reason] = {}
    moved: set[Value] = set()
    outputs = [(node, layer, layer.y) for node, layer in pairs]
    inputs = [(node, layer, layer.x) for node, layer in pairs]
    for node, layer, value in (*outputs, *inputs):
        if value in moved:
            continue
        found = _test(network, node, value, layer.axis, axes)
        if isinstance(found, Family):
            free.append(found)
            moved.update(found.places)
        elif value is layer.y:
            refused.setdefault(node.call.label, found)
    return Families(layers, free, {name: why for name, why in refused.items() if name not in _names(pairs, moved)})


def _layers(nodes: Iterable[Node]) -> Iterator[tuple[Node, Layer]]:
    for node in nodes:
        if node.operator in UNDEFORMED:
            layer = layer_of(node)
            if layer is not None and layer.w.independent and not layer.x.independent:
                yield node, layer


def _names(pairs: Iterable[tuple[Node, Layer]], moved: set[Value]) -> set[str]:
    return {node.call.label for node, layer in pairs if layer.y in moved}


def _test(network: Network, node: Node, value: Value, axis: int, axes: dict[Value, int]) -> Family | Reason:
    """The family of a tensor, or why its channels cannot be rescaled."""
    channels = value.shape[axis]
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(_SEED), device="cpu")
    logarithms = -torch.linspace(_NEAR, _FAR, channels, dtype=torch.float64, device="cpu")[order]
    family = Family(value, axis, channels)
    trial = Trial(network)
    try:
        trial.run({value: family.unit(logarithms.exp())})
        for other, its_axis in axes.items():
            unit = trial.unit_or_identity(other)
            if not unit.is_identity:
                scale, _ = unit.direct()
                family.places[other] = _recognised(
                    channel_vector(scale, its_axis, other.shape[its_axis], 1.0).log(), logarithms
                )
    except Refusal as refusal:
        return refusal.reason
    except (NotInvertibleError, _UnknownScaleError):
        return NOTHING_PASSES.reason(*node.place)
    return family


class _UnknownScaleError(Exception):
    """A tensor was given a scale that is none of those that were demanded."""


def _recognised(found: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the known logarithms each is, and the sign: int64 and float64 of the shape of ``found``."""
    ordered, places = known.sort()
    magnitude = -found.abs()
    after = torch.searchsorted(ordered, magnitude).clamp(max=len(ordered) - 1)
    before = (after - 1).clamp(min=0)
    nearer = (ordered[before] - magnitude).abs() < (ordered[after] - magnitude).abs()
    nearest = torch.where(nearer, before, after)
    still = found == 0
    if bool((((ordered[nearest] - magnitude).abs() > _TOLERANCE) & ~still).any()):
        raise _UnknownScaleError
    index = torch.where(still, torch.full_like(nearest, len(known)), places[nearest])
    return index, -found.sign()
