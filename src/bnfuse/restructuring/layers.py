"""Layers of PyTorch's as data, and the layers that recorded operators are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bnfuse.graph.graph import Kind, Node, Value

LAYER, NORM = "layer", "norm"
"""The names of a layer and of the norm behind it, where both stand in the place of the norm."""

_CONVOLUTION = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_LINEAR = ("in_features", "out_features")

_SETTINGS: dict[type[nn.Module], tuple[str, ...]] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _CONVOLUTION),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), (*_CONVOLUTION, "output_padding")),
    nn.Linear: _LINEAR,
}
"""The arguments that a layer is made with, and keeps as attributes."""


def settings_of(layer: nn.Module) -> tuple[str, dict[str, Any]] | None:
    """The class and the arguments by which a convolution or linear layer is made anew; None for any other module.

    >>> settings_of(nn.Linear(4, 2))
    ('Linear', {'in_features': 4, 'out_features': 2, 'bias': True})

    Of a subclass it is PyTorch's class: whoever asks must know that it runs PyTorch's forward.
    """
    kind = next((kind for kind in type(layer).__mro__ if kind in _SETTINGS), None)
    if kind is None or layer._modules or set(layer._parameters) != {"weight", "bias"}:
        return None
    arguments = {name: getattr(layer, name) for name in _SETTINGS[kind]}
    return kind.__name__, arguments | {"bias": layer._parameters["bias"] is not None}


@dataclass(frozen=True)
class Run:
    """A layer as one operator.

    Attributes:
        node: the operator.
        x: what it is given.
        kind, settings: of the layer of PyTorch's that does the same.
        tensors: its weight and, if it has one, its bias, by these names.
        turned_round: whether the weight has the input axis first, where a linear layer has it last.
    """

    node: Node
    x: Value
    kind: str
    settings: dict[str, Any]
    tensors: dict[str, Value]
    turned_round: bool = False

    def turned(self, place: str, tensor: Tensor) -> Tensor:
        """A tensor of the operator as the layer holds it."""
        return tensor.t().contiguous() if self.turned_round and place == "weight" else tensor


def layer_run(node: Node) -> Run | None:
    """The layer that an operator is, with a weight that does not depend on the input; None for any other operator."""
    if node.operator in _CONVOLUTIONS:
        x, w, b = node.bound["input"], node.bound["weight"], _bias(node)
        transposed, axes = "transpose" in node.operator, int(node.operator[-2])
        groups = node.argument("groups", 1)
        channels = (w.shape[0], w.shape[1] * groups)
        settings: dict[str, Any] = {
            "in_channels": channels[0] if transposed else channels[1],
            "out_channels": channels[1] if transposed else channels[0],
            "kernel_size": tuple(w.shape[2:]),
            "groups": groups,
            "bias": b is not None,
        }
        names = {"stride": 1, "padding": 0, "dilation": 1} | ({"output_padding": 0} if transposed else {})
        for name, default in names.items():
            given = node.argument(name, default)
            settings[name] = given if isinstance(given, str) else _for_each_axis(given, axes)
        kind = f"Conv{'Transpose' if transposed else ''}{axes}d"
        turned_round = False
    elif node.operator in ("linear", "matmul", "mm"):
        linear = node.operator == "linear"
        x = node.bound["input" if linear else "self"]
        w = node.bound["weight" if linear else "mat2" if node.operator == "mm" else "other"]
        b, kind, turned_round = _bias(node) if linear else None, "Linear", not linear
        if len(w.shape) != 2 or len(x.shape) < 2:
            return None
        sizes = w.shape if linear else w.shape[::-1]
        settings = {"in_features": sizes[1], "out_features": sizes[0], "bias": b is not None}
    else:
        return None
    tensors = {"weight": w} | ({} if b is None else {"bias": b})
    if x.independent or not all(value.independent for value in tensors.values()):
        return None
    return Run(node, x, kind, settings, tensors, turned_round)


_CONVOLUTIONS = (
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
)  # fmt: skip


def _bias(node: Node) -> Value | None:
    """The bias that an operator reads; one that could be created is none yet."""
    bias: Value | None = node.argument("bias")
    return None if bias is None or bias.kind is Kind.ABSENT else bias


def _for_each_axis(given: int | Sequence[int], axes: int) -> tuple[int, ...]:
    numbers = (given,) if isinstance(given, int) else tuple(given)
    return numbers * axes if len(numbers) == 1 else numbers
