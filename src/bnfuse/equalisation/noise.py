r"""Scales that make the noise of 8-bit integers at the outputs as small as it can be, to first order.

A weight that is rounded to steps of ``d`` has errors of variance ``d**2/12``. In the units before rescaling, an element
``w[o, i]`` of a layer whose output was rescaled by ``s[o]`` and its input by ``p[i]`` has the error of a step of
``d*p[i]/s[o]``, where ``127.5*d`` is the largest ``|w[o, i]|*s[o]/p[i]`` of the tensor, or of the row where every
output channel has a step of its own. With the sensitivity ``F[o, i]`` of the outputs to the element (see
:mod:`bnfuse.equalisation.observed`), the weight adds ``d**2/12 * sum(F[o, i]*p[i]**2/s[o]**2)`` to the variance of the
outputs. An activation that is rounded to ``255`` steps between its lowest and highest element adds
``d**2/12 * sum(A[i]/p[i]**2)``.

In the logarithms of the scales, every term is a sum of exponentials times the square of a maximum of exponentials, so
their sum is convex (a geometric programme; Boyd and Vandenberghe, Convex Optimization, 2004, section 4.5): one minimum,
and descent finds it. Maxima are smoothed to norms of a growing order on the way there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bnfuse.equalisation.observed import Observed
from bnfuse.equalisation.scales import LayerRange, Scales
from bnfuse.graph.graph import Value

_ORDERS = (8.0, 32.0)
"""Of the norms that stand for a maximum."""
_STEPS = (40, 30)
"""Of descent, for each of them."""
_SETTLED = 1e-4
"""Descent ends when a step changes the logarithm of the noise, and those of the scales, by less."""
_WEIGHT_STEPS, _ACTIVATION_STEPS = 127.5, 255.0
_LEAST = 1e-9
"""So much of the mean sensitivity every element has: a channel that does nothing on the data may do something later."""
_CENTRED = 1e-4
"""So much of the squares of the logarithms is added to the logarithm of the noise. Channels that hardly matter on the
data stay as they are: a few samples do not tell which channels others need, and training has left them all in use."""
_FARTHEST = 9.0
"""No logarithm of a scale goes farther from 0."""
_STAGE = 4.0
"""Nor farther within one stage of descent, whose powers would leave the range of float64."""


@dataclass(frozen=True, eq=False)
class _Activation:
    value: Value
    lowest: Tensor
    highest: Tensor
    sensitivity: Tensor


class Noise:
    """The variance that rounding adds to the outputs, as a share of their own power."""

    def __init__(self, scales: Scales, layers: list[LayerRange], observed: Observed, per_channel: bool) -> None:
        """
        Args:
            scales: what is free.
            layers: the weights, with their sensitivities.
            observed: what was found on data.
            per_channel: whether every output channel of a weight has a step of its own.
        """
        self._scales, self._per_channel = scales, per_channel
        free = [layer for layer in layers if scales.is_free(layer.layer.x) or scales.is_free(layer.layer.y)]
        self._activations = [
            _Activation(value, observed.lowest[value], observed.highest[value], _floored(sensitivity))
            for value, sensitivity in observed.of_input.items()
        ]
        self._weights = [_Weight(layer, per_channel) for layer in free]
        rest = [_Weight(layer, per_channel) for layer in layers if layer not in free]
        nothing = scales.none()
        self._rest = sum(float(weight(scales, nothing, nothing, None)) for weight in rest)

    def __call__(self, logarithms: Tensor) -> float:
        """The sum over all weights and activations, for the logarithms of all scales."""
        return float(self._smooth(torch.zeros_like(logarithms), logarithms, None))

    def _smooth(self, change: Tensor, start: Tensor, order: float | None) -> Tensor:
        """The same for a change of the logarithms.

        Args:
            order: of the norms that stand for the maxima, None for maxima.
        """
        terms = [weight(self._scales, change, start, order) for weight in self._weights]
        terms += [self._of_activation(activation, start + change, order) for activation in self._activations]
        return torch.stack(terms).sum() + self._rest

    def _of_activation(self, activation: _Activation, logarithms: Tensor, order: float | None) -> Tensor:
        scale = self._scales.of(activation.value, logarithms, len(activation.lowest))
        above, below = activation.highest.log() + scale, (-activation.lowest).log() + scale
        step = (_maximum(above, order).exp() + _maximum(below, order).exp()) / _ACTIVATION_STEPS
        return step.square() / 12 * (activation.sensitivity * (-2 * scale).exp()).sum()

    def least(self) -> Tensor:
        """The logarithms of the scales with the least noise."""
        best = self._scales.none()
        for order, steps in zip(_ORDERS, _STEPS, strict=True):
            best = min((best, self._descended(best, order, steps)), key=self)
        return best

    def _descended(self, start: Tensor, order: float, steps: int) -> Tensor:
        for weight in self._weights:
            weight.begin(self._scales, start, order)
        with torch.inference_mode(False), torch.enable_grad():
            change = torch.zeros_like(start).requires_grad_()
            optimiser = torch.optim.LBFGS(
                [change], max_iter=steps, history_size=20, line_search_fn="strong_wolfe", tolerance_change=_SETTLED
            )

            def closure() -> Tensor:
                optimiser.zero_grad()
                near = _STAGE * torch.tanh(change / _STAGE)
                loss = self._smooth(near, start, order).log() + _CENTRED * (start + near).square().sum()
                loss.backward()
                return loss

            optimiser.step(closure)
            near = _STAGE * torch.tanh(change.detach() / _STAGE)
        return self._scales.centred(start + near).clamp(-_FARTHEST, _FARTHEST)


class _Weight:
    """What the rounding of one weight adds."""

    def __init__(self, layer: LayerRange, per_channel: bool) -> None:
        self._layer, self._per_channel = layer, per_channel
        self._sensitivity = _floored(layer.sensitivity)
        self._powers = self._largest = torch.empty(0, device="cpu")

    def begin(self, scales: Scales, start: Tensor, order: float) -> None:
        """Prepare a stage of descent, which begins with some scales."""
        magnitude = self._layer.logarithms(scales, start)
        self._largest = self._maxima(magnitude)
        self._powers = (order * (magnitude - self._spread(self._largest))).exp()

    def _maxima(self, magnitude: Tensor) -> Tensor:
        """The logarithms of the largest magnitudes that count: of all, or of each output channel."""
        largest = self._layer.over_inputs(magnitude) if self._per_channel else magnitude.max()
        return torch.where(torch.isfinite(largest), largest, torch.zeros_like(largest))

    def _spread(self, numbers: Tensor) -> Tensor:
        return numbers[self._layer.outputs] if self._per_channel else numbers

    def __call__(self, scales: Scales, change: Tensor, start: Tensor, order: float | None) -> Tensor:
        """The variance; with an order, `begin` was called with it and with the same start."""
        layer = self._layer
        out, of_input = layer.change(scales, start + change)
        if order is None:
            largest = self._maxima(layer.magnitude + out + of_input)
        else:
            more_out, more_input = layer.change(scales, change)
            sums = self._sum(self._powers, (order * more_out).exp(), (order * more_input).exp())
            largest = self._largest + sums.clamp(min=1e-300).log() / order
        total = self._sum(self._sensitivity, (-2 * out).exp(), (-2 * of_input).exp())
        return ((2 * largest).exp() * total).sum() / (12 * _WEIGHT_STEPS**2)

    def _sum(self, numbers: Tensor, out: Tensor, of_input: Tensor) -> Tensor:
        """The sum of ``numbers*out*of_input`` over all elements, or for each output channel."""
        if self._per_channel and out.shape[1] == of_input.shape[0] == 1:
            return out.reshape(-1) * (numbers @ of_input.reshape(-1))
        if self._per_channel:
            rows = numbers * of_input * out
            index = self._layer.outputs.expand_as(rows).reshape(-1)
            return rows.new_zeros(self._layer.layer.channels_out).index_add(0, index, rows.reshape(-1))
        if out.shape[1] == of_input.shape[0] == 1:
            return (out.reshape(1, -1) @ numbers @ of_input.reshape(-1, 1)).reshape(())
        if out.shape[0] == of_input.shape[1] == 1:
            return (of_input.reshape(1, -1) @ numbers @ out.reshape(-1, 1)).reshape(())
        return (numbers * out * of_input).sum()


def _floored(sensitivity: Tensor | None) -> Tensor:
    assert sensitivity is not None
    return sensitivity + _LEAST * sensitivity.mean() + torch.finfo(sensitivity.dtype).tiny


def _maximum(logarithms: Tensor, order: float | None) -> Tensor:
    """The largest, or the norm of an order that stands for it; ``-inf`` for a magnitude of 0."""
    if not bool(torch.isfinite(logarithms).any()):
        return logarithms.new_full((), -torch.inf).detach()
    return logarithms.max() if order is None else torch.logsumexp(order * logarithms, 0) / order
