"""The logarithms of all scales as one vector, and the ranges of weights as functions of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bnfuse.equalisation.families import Family
from bnfuse.graph.graph import Value
from bnfuse.rules.layers import Layer, along_in, along_out


class Scales:
    """Where the scales of each family stand in the vector.

    Attributes:
        families: in their order in the vector.
        size: of the vector.
    """

    def __init__(self, families: Sequence[Family]) -> None:
        self.families = list(families)
        self.size = sum(family.channels for family in families)
        self._places: dict[Value, list[tuple[Tensor, Tensor]]] = {}
        self._starts = []
        start = 0
        for family in families:
            self._starts.append(start)
            for value, (index, sign) in family.places.items():
                # An index of `size` stands for a channel that has no scale of this family.
                there = torch.where(index == family.channels, torch.full_like(index, self.size), index + start)
                self._places.setdefault(value, []).append((there, sign))
            start += family.channels

    def none(self) -> Tensor:
        """The vector that changes nothing."""
        return torch.zeros(self.size, dtype=torch.float64, device="cpu")

    def is_free(self, value: Value) -> bool:
        """Whether some family rescales the value."""
        return value in self._places

    def of(self, value: Value, logarithms: Tensor, channels: int) -> Tensor:
        """The logarithms of the scales of a value, (channels,)."""
        found = logarithms.new_zeros(channels)
        if value in self._places:
            padded = torch.cat([logarithms, logarithms.new_zeros(1)])
            for index, sign in self._places[value]:
                found = found + sign * padded[index]
        return found

    def parts(self, logarithms: Tensor) -> list[Tensor]:
        """The part of each family."""
        return list(logarithms.split([family.channels for family in self.families]))

    def centred(self, logarithms: Tensor) -> Tensor:
        """The same with a mean of 0 in each family: a scale that is the same for all channels changes no range."""
        return torch.cat([part - part.mean() for part in self.parts(logarithms)])


class LayerRange:
    """The magnitudes of a weight, the largest of each pair of channels.

    Attributes:
        layer: the layer.
        magnitude: of the elements, (rows, columns) as in the weight, the largest over the kernel.
        sensitivity: of the outputs to the elements, (rows, columns), summed over the kernel; None if not known.
    """

    def __init__(self, layer: Layer, weight: Tensor, sensitivity: Tensor | None = None) -> None:
        self.layer = layer
        self.magnitude = (weight.abs().flatten(2).amax(2) if weight.dim() > 2 else weight.abs()).log()
        self.sensitivity = None
        if sensitivity is not None:
            self.sensitivity = sensitivity.flatten(2).sum(2) if sensitivity.dim() > 2 else sensitivity
        self._inputs = self._table(along_in(layer, torch.arange(layer.channels_in, device="cpu")))
        self._outputs = self._table(along_out(layer, torch.arange(layer.channels_out, device="cpu")))

    def _table(self, channels: Tensor | None) -> Tensor:
        """The channel of each element, (rows or 1, columns or 1)."""
        assert channels is not None
        return channels.reshape(channels.shape[:2])

    def change(self, scales: Scales, logarithms: Tensor) -> tuple[Tensor, Tensor]:
        """What is added to the logarithm of each element because of the output and because of the input."""
        out = scales.of(self.layer.y, logarithms, self.layer.channels_out)
        of_input = scales.of(self.layer.x, logarithms, self.layer.channels_in)
        return out[self._outputs], -of_input[self._inputs]

    def logarithms(self, scales: Scales, logarithms: Tensor) -> Tensor:
        """Of the magnitudes after rescaling."""
        out, of_input = self.change(scales, logarithms)
        return self.magnitude + out + of_input

    def over_inputs(self, magnitude: Tensor) -> Tensor:
        """The largest of each output channel, (channels,)."""
        return self._largest(magnitude, self._outputs, self.layer.channels_out)

    @staticmethod
    def _largest(magnitude: Tensor, channels: Tensor, count: int) -> Tensor:
        index = channels.expand_as(magnitude).reshape(-1)
        start = magnitude.new_full((count,), -torch.inf)
        return start.scatter_reduce(0, index, magnitude.reshape(-1), "amax")

    @property
    def outputs(self) -> Tensor:
        """The output channel of each element, (rows or 1, columns or 1)."""
        return self._outputs
