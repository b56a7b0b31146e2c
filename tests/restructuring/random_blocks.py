"""Random networks of parallel branches, as programs: a seed gives the same network on every machine."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = 4


@dataclass(frozen=True)
class Branch:
    """What is done to the input of a block before it is added.

    Attributes:
        steps: names of layers, or of functions.
        factor: in the sum.
    """

    steps: tuple[str, ...]
    factor: float


class Branches(nn.Module):
    """Adds branches up, in one of several ways of writing that."""

    def __init__(self, layers: dict[str, nn.Module], branches: list[Branch], way: str, tail: str) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        used = {tail, *(step for branch in branches for step in branch.steps)} & {"gain", "shift"}
        self.gains = nn.ParameterDict({name: torch.randn(CHANNELS, 1, 1) for name in sorted(used)})
        self.branches, self.way, self.tail = branches, way, tail

    def branch(self, x: Tensor, branch: Branch, stride: int) -> Tensor:
        y = x
        for step in branch.steps:
            if step in self.layers:
                y = self.layers[step](y)
            else:
                y = FUNCTIONS[step](y, self, stride)
        return y if branch.factor == 1 else y * branch.factor

    def forward(self, x: Tensor) -> Any:
        stride = self.stride
        first, *rest = (self.branch(x, branch, stride) for branch in self.branches)
        if self.way == "in place":
            total = first if self.tail == "read" or first is x else first.clone()
            for y in rest:
                total = total + y if total is first else total.add_(y)
        elif self.way == "pairs":
            made = [first, *rest]
            while len(made) > 1:
                made = [sum(made[place : place + 2][1:], made[place]) for place in range(0, len(made), 2)]
            (total,) = made
        elif self.way == "differences":
            total = first
            for y in rest:
                total = total - y
        else:
            total = sum([first, *rest])
        if self.tail == "read":
            return F.relu(total) * first.mean()
        return {"relu": F.relu, "gain": lambda y: y * self.gains["gain"], "none": lambda y: y}[self.tail](total)

    stride = 1


FUNCTIONS = {
    "identity": lambda x, block, stride: x if stride == 1 else x[:, :, ::stride, ::stride],
    "pool": lambda x, block, stride: F.avg_pool2d(x, 3, stride, 1),
    "pool without the border": lambda x, block, stride: F.avg_pool2d(x, 3, stride, 1, count_include_pad=False),
    "gain": lambda x, block, stride: x * block.gains["gain"],
    "shift": lambda x, block, stride: x + block.gains["shift"],
    "number": lambda x, block, stride: x / -2,
    "relu": lambda x, block, stride: F.relu(x),
    "dropout": lambda x, block, stride: F.dropout(x, 0.5, block.training),
}


@dataclass(frozen=True)
class Style:
    """What the branches of one network are made of.

    Attributes:
        kinds: of branches.
        extras: what may follow a layer.
        groups, steps, modes: of convolutions: groups, dilations and ways of padding.
    """

    kinds: tuple[str, ...]
    extras: tuple[str, ...]
    groups: tuple[int, ...]
    steps: tuple[int, ...]
    modes: tuple[str, ...]


_PLAIN = Style(("layer", "layer", "layer", "identity"), ("gain", "shift", "number", "dropout"), (1,), (1,), ("zeros",))
_GROUPED = Style(("layer", "layer", "identity", "pool"), ("gain", "shift"), (2, 4), (1,), ("zeros",))
_DEPTHWISE = Style(("layer", "layer", "identity", "pool"), ("gain", "shift"), (4,), (1,), ("zeros",))
_ANYTHING = Style(
    ("layer", "layer", "layer", "two layers", "identity", "pool", "pool without the border"),
    ("gain", "shift", "number", "dropout", "relu"), (1, 1, 2, 4), (1, 1, 2), ("zeros", "zeros", "zeros", "reflect"),
)  # fmt: skip


def random_block(seed: int) -> nn.Module:
    """A network with one block, or with one that is the network itself."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    stride = choose.choice((1, 1, 1, 2))
    style = choose.choice((_PLAIN, _GROUPED, _DEPTHWISE, _ANYTHING))
    layers: dict[str, nn.Module] = {}
    branches = [_branch(choose, layers, stride, style) for _ in range(choose.randint(2, 4))]
    tail = choose.choice(("relu", "relu", "gain", "none", "read"))
    way = choose.choice(("sum", "sum", "in place", "pairs", "differences"))
    block = Branches(layers, branches, way, tail)
    block.stride = stride
    where = choose.choice(("inside", "inside", "alone", "twice"))
    if where == "alone":
        return block
    if where == "twice" and stride == 1:
        return nn.Sequential(nn.ReLU(), block, nn.Hardtanh(), block)
    head = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
    return nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3), nn.ReLU(), block, head, nn.BatchNorm2d(CHANNELS), nn.SiLU())


def _branch(choose: random.Random, layers: dict[str, nn.Module], stride: int, style: Style) -> Branch:
    steps: list[str] = []
    kind = choose.choice(style.kinds)
    if kind == "layer":
        steps.append(_layer(choose, layers, stride, style))
    elif kind == "two layers":
        pointwise = choose.random() < 0.5
        steps += [_layer(choose, layers, stride, style, pointwise), _layer(choose, layers, 1, style)]
    else:
        steps.append(kind)
    if choose.random() < 0.4:
        steps.append(_named(layers, nn.BatchNorm2d(CHANNELS)))
    if choose.random() < 0.3:
        steps.append(choose.choice(style.extras))
    return Branch(tuple(steps), choose.choice((1, 1, 1, 1, -1, 0.5)))


def _layer(
    choose: random.Random, layers: dict[str, nn.Module], stride: int, style: Style, pointwise: bool = False
) -> str:
    kernel, step = tuple(choose.choice((1, 3, 3, 5)) for _ in range(2)), choose.choice(style.steps)
    kernel = (1, 1) if pointwise else kernel
    layer = nn.Conv2d(
        CHANNELS, CHANNELS, kernel, stride, tuple(step * (taps - 1) // 2 for taps in kernel), step,
        choose.choice(style.groups), choose.random() < 0.5, choose.choice(style.modes),
    )  # fmt: skip
    return _named(layers, layer)


def _named(layers: dict[str, nn.Module], layer: nn.Module) -> str:
    name = f"layer{len(layers)}"
    layers[name] = layer
    return name
