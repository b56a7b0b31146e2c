"""What the activations of a model are like on given data, and how much its outputs mind errors of each number.

The recorded operators run once more on the data, with gradients. Of each tensor that a layer reads its range per
channel is taken. With random signs ``v`` for the outputs ``f``, the expectation of ``(d(v*f)/dz)^2`` is the sum of
``(df_k/dz)^2`` over all outputs: so much of the variance of an error of ``z`` arrives there, to first order. Signs that
differ from sample to sample keep the samples apart as well, so one run serves them all (Hutchinson, 1990; the diagonal
of the Fisher information where the outputs are logits).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bnfuse.capture.run import Run
from bnfuse.errors import InputError
from bnfuse.graph.graph import Kind, Node, Value
from bnfuse.rules.layers import Layer

_ROUNDS = 4
"""So many draws of signs."""

_DEVIATIONS = 3.0
"""So many standard deviations above their mean the maxima of other samples are expected to lie at most."""

_SEED = 0


@dataclass(frozen=True)
class Observed:
    """What was found on data. Sensitivities are those of outputs of which each has a sum of squares of 1.

    Attributes:
        lowest, highest: of each tensor that a layer reads, what its elements are expected to lie between on other data,
            0 included: float64 (channels,).
        of_input: of the same, the summed squared sensitivity to its elements, per channel: float64 (channels,).
        of_weight: of each weight, by its layer, the squared sensitivity to its elements: float64, of its shape.
    """

    lowest: dict[Value, Tensor] = field(default_factory=dict)
    highest: dict[Value, Tensor] = field(default_factory=dict)
    of_input: dict[Value, Tensor] = field(default_factory=dict)
    of_weight: dict[Value, Tensor] = field(default_factory=dict)


def observe(run: Run, layers: Iterable[Layer], recorded: Run) -> Observed:
    """Run the operators of a call on its data.

    Args:
        run: the call with the data.
        layers: those of the call that is solved.
        recorded: that call; both ran the same operators.

    Raises:
        InputError: they did not, or the operators cannot be run again one by one.
    """
    if [node.operator for node in run.nodes] != [node.operator for node in recorded.nodes]:
        raise InputError(
            "data= makes the model run other operators than example_inputs does. Pass data of the kind that the model "
            "takes, or none."
        )
    twin = dict(_twins(recorded, run))
    layers = list(layers)
    try:
        return _observe(run, layers, twin)
    except (RuntimeError, KeyError, TypeError, NotImplementedError) as error:
        raise InputError(
            f"The operators that ran cannot be run again with gradients ({type(error).__name__}: {error}), so what the "
            f"outputs mind is not known, and the model cannot be equalised."
        ) from error


def _twins(recorded: Run, run: Run) -> Iterable[tuple[Value, Value]]:
    for node, other in zip(recorded.nodes, run.nodes, strict=True):
        yield from zip(node.outputs, other.outputs, strict=False)
        for name, value in node.bound.items():
            there = other.bound.get(name)
            if isinstance(value, Value) and isinstance(there, Value):
                yield value, there
    yield from zip(recorded.inputs, run.inputs, strict=False)


def _observe(run: Run, layers: list[Layer], twin: dict[Value, Value]) -> Observed:
    found = Observed()
    weights = {twin[layer.w]: layer for layer in layers}
    read = {twin[layer.x]: layer for layer in layers}
    replay = _Replay(run, weights, read)
    with torch.inference_mode(False), torch.enable_grad():
        outputs = replay.outputs()
        for other, layer in read.items():
            tensor = replay.tensors[other]
            found.highest[layer.x] = _expected(tensor, layer.axis)
            found.lowest[layer.x] = -_expected(-tensor, layer.axis)
        scaled = [output / output.detach().norm().clamp(min=1e-30) for output in outputs]
        generator = torch.Generator().manual_seed(_SEED)
        for _ in range(_ROUNDS):
            signs = [torch.randint(0, 2, output.shape, generator=generator, device="cpu") * 2 - 1 for output in scaled]
            total = sum((output * sign.to(output)).sum() for output, sign in zip(scaled, signs, strict=True))
            replay.gradients.clear()
            total.backward(retain_graph=True)
            for other, layer in read.items():
                gradient = replay.gradients.get(other)
                sums = torch.zeros(layer.channels_in, dtype=torch.float64, device="cpu")
                if gradient is not None:
                    others = [axis for axis in range(gradient.dim()) if axis != layer.axis]
                    sums = gradient.float().square().sum(others).double().cpu()
                _add(found.of_input, layer.x, sums / _ROUNDS)
            for other, layer in weights.items():
                gradient = replay.gradients.get(other)
                shape = layer.w.shape
                squared = torch.zeros(shape, device="cpu") if gradient is None else gradient.cpu().double().square()
                _add(found.of_weight, layer.w, squared.double() / _ROUNDS)
    return found


def _expected(tensor: Tensor, axis: int) -> Tensor:
    """How large each channel is expected to become on other data, at least 0: float64 (channels,).

    Channels that are rescaled to fill the whole range have no room for what was not seen. The maxima of single samples
    tell how far they vary: not at all in a channel that something bounds.
    """
    samples = tensor.unsqueeze(0) if axis == 0 else tensor.movedim(axis, 1)
    maxima = samples.flatten(2).amax(2) if samples.dim() > 2 else samples  # samples, channels
    maxima = maxima.double().cpu()
    highest = maxima.amax(0)
    if len(maxima) > 1:
        highest = torch.maximum(highest, maxima.mean(0) + _DEVIATIONS * maxima.std(0))
    return highest.clamp(min=0.0)


def _add(sums: dict[Value, Tensor], value: Value, term: Tensor) -> None:
    sums[value] = sums[value] + term if value in sums else term


class _Replay:
    """The operators of a run, run once more.

    Attributes:
        tensors: what the values that are watched hold.
        gradients: what the last backward pass has brought to them.
    """

    def __init__(self, run: Run, weights: Iterable[Value], read: Iterable[Value]) -> None:
        self._run = run
        self._weights, self._read = set(weights), set(read)
        self._all: dict[Value, Tensor] = {}
        self.tensors: dict[Value, Tensor] = {}
        self.gradients: dict[Value, Tensor] = {}

    def outputs(self) -> list[Tensor]:
        """Run all operators; the outputs that depend on weights."""
        for value, tensor in zip(self._run.inputs, self._run.call.tensors, strict=True):
            self._all[value] = tensor.detach().clone()
            self._watch(value)
        last = {value: node for node in self._run.nodes for value in node.inputs}
        kept = set(self._run.outputs)
        for node in self._run.nodes:
            self._run_one(node)
            for value in node.inputs:
                if last[value] is node and value not in kept and not value.independent:
                    self._all.pop(value, None)
        outputs = [self._all[value] for value in self._run.outputs if value in self._all]
        found = [output for output in outputs if output.requires_grad]
        if not found:
            raise RuntimeError("no output has a gradient")
        return found

    def _run_one(self, node: Node) -> None:
        arguments = {name: self._put_in(argument) for name, argument in node.bound.items()}
        result = node.overload(**arguments)
        tensors = [
            item for item in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(item, Tensor)
        ]
        given = {id(self._all.get(value)) for value in node.inputs}
        written = list(dict.fromkeys(node.written))
        for place, value in enumerate(node.outputs):
            if place < len(written):
                self._all[value] = self._all[written[place]]
            else:
                fresh = [tensor for tensor in tensors if id(tensor) not in given]
                self._all[value] = fresh[place - len(written)]
            self._watch(value)

    def _put_in(self, argument: Any) -> Any:
        if isinstance(argument, Value):
            return None if argument.kind is Kind.ABSENT else self._of(argument)
        return type(argument)(map(self._put_in, argument)) if isinstance(argument, (tuple, list)) else argument

    def _of(self, value: Value) -> Tensor:
        if value not in self._all:
            if value.tensor is None or value.kind is Kind.COMPUTED:
                raise KeyError("a tensor that no operator has made")
            tensor = value.tensor.detach()
            self._all[value] = tensor.clone().requires_grad_() if value in self._weights else tensor
            self._watch(value)
        return self._all[value]

    def _watch(self, value: Value) -> None:
        """Note what a value holds, and the gradient that will arrive, as it is before anything is written to it."""
        tensor = self._all[value]
        if value in self._read:
            self.tensors[value] = tensor.detach().clone()
        if value in self._weights and not tensor.requires_grad:
            tensor.requires_grad_()  # one that is made of parameters, such as a normalised weight
        if (value in self._read or value in self._weights) and tensor.requires_grad:

            def note(gradient: Tensor) -> None:
                self.gradients[value] = gradient.detach()

            tensor.register_hook(note)
