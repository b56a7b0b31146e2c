"""What running a model costs: multiply-adds, counted from the sizes of what was recorded, and time.

With x of so many channels in and y out, a convolution takes ``elements(y) * in/groups * kernel`` multiply-adds, a
transposed one ``elements(x) * out/groups * kernel``, a product of matrices ``elements(y)`` times the length of the axis
that is summed over, and a batch norm one for each element. All else is left out.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from bnfuse.graph.graph import Node, Value
from bnfuse.model import tree
from bnfuse.model.calls import Call
from bnfuse.model.sandbox import leave_no_trace, own_input

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "torchvision::deform_conv2d")
_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")

_ROUNDS = 50
_FEWEST = 4


def multiply_adds(nodes: Iterable[Node], norms: Collection[Node]) -> int:
    """How many multiply-adds operators take.

    Args:
        nodes: the operators.
        norms: those that count as one batch norm each.
    """
    return sum(node.outputs[0].elements if node in norms else _products(node) for node in nodes if node.outputs)


def _products(node: Node) -> int:
    y, name = node.outputs[0], node.operator
    if name in _CONVOLUTIONS:
        return y.elements * _per_row(node.bound["weight"])
    if name in _TRANSPOSED:
        x: Value = node.bound["input"]
        return x.elements * _per_row(node.bound["weight"])
    if name == "linear":
        return y.elements * int(node.bound["weight"].shape[-1])
    if name in ("mm", "matmul", "bmm", "mv", "dot", "addmm"):
        left = node.inputs[1 if name == "addmm" else 0]
        return y.elements * (left.shape[-1] if left.shape else 1)
    if name == "bilinear":
        return y.elements * _per_row(node.bound["weight"])
    if name == "einsum":
        return _letters(node)
    if name == "scaled_dot_product_attention":
        query, key, value = (tuple(node.bound[part].shape) for part in ("query", "key", "value"))
        return int(math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1]))
    if name in _RECURRENT:
        weights = sum(value.elements for value in node.inputs if value.names and len(value.shape) == 2)
        return math.prod(node.inputs[0].shape[:-1]) * weights
    return 0


def _per_row(weight: Value) -> int:
    return weight.elements // max(weight.shape[0], 1)


def _letters(node: Node) -> int:
    """The product of the sizes of all letters of an einsum; 0 for one with dots."""
    words = str(node.argument("equation", "")).replace(" ", "").partition("->")[0].split(",")
    if any("." in word for word in words) or len(words) != len(node.inputs) or len(words) < 2:
        return 0
    sizes: dict[str, int] = {}
    for word, value in zip(words, node.inputs, strict=True):
        if len(word) != len(value.shape):
            return 0
        sizes.update(zip(word, value.shape, strict=True))
    return math.prod(sizes.values())


@dataclass(frozen=True)
class Latency:
    """How long a call takes, in seconds.

    Attributes:
        median: of all calls but the first.
        quartiles: the first and the third; None of fewer than four calls.
    """

    median: float
    quartiles: tuple[float, float] | None

    @staticmethod
    def of(times: Sequence[float]) -> Latency:
        """Of the times of calls, the first of which warms up.

        >>> Latency.of([9.0, 1.0, 2.0, 3.0, 4.0, 5.0])
        Latency(median=3.0, quartiles=(2.0, 4.0))
        """
        counted = times[1:] or times
        if len(counted) < _FEWEST:
            return Latency(statistics.median(counted), None)
        low, middle, high = statistics.quantiles(counted, n=4, method="inclusive")
        return Latency(middle, (low, high))


def latencies(original: nn.Module, fused: nn.Module, call: Call, seconds: float) -> tuple[Latency, Latency]:
    """The time of a call of each model. They take turns, and each round begins with the other.

    Args:
        original, fused: neither may write to its parameters or buffers.
        call: is made with copies of its tensors.
        seconds: to spend in all; one round is run even if it takes longer.
    """
    models = (original, fused)
    modules = list({id(module): module for model in models for module in tree.modules(model)}.values())
    times: tuple[list[float], list[float]] = ([], [])
    with leave_no_trace(modules, watch_writes=False):  # which would cost time at every operator
        own = call.map(lambda tensor: own_input(tensor, False))
        end = time.perf_counter() + seconds
        for turn in range(_ROUNDS):
            for place in (0, 1) if turn % 2 else (1, 0):
                started = time.perf_counter()
                own.run(models[place])
                _wait(own)
                times[place].append(time.perf_counter() - started)
            if time.perf_counter() > end:
                break
    before, after = map(Latency.of, times)
    return before, after


def _wait(call: Call) -> None:
    """Until what a call has begun on an accelerator is done."""
    for device in {tensor.device for tensor in call.tensors}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
