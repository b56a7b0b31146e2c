"""Runs without arithmetic: the same record as of a real run, and the same errors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import prepared
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

import bnfuse
from bnfuse.capture import shapes_only
from bnfuse.capture.run import capture, capture_shapes
from bnfuse.capture.shapes_only import NeedsContentsError
from bnfuse.graph.graph import Graph
from bnfuse.planner.options import Options
from bnfuse.planner.planner import Planner
from bnfuse.planner.problem import Problem
from bnfuse.rules import RULES
from bnfuse.tools.zoo.specs import build

IMAGE = (2, 6, 9, 8)


class Net(nn.Module):
    """A function of (self, x), with two parameters."""

    def __init__(self, function: Callable[..., Any], *shape: int) -> None:
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.randn(shape)) if shape else None
        self.v = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "conv": (lambda m, x: F.conv2d(x, m.w, None, 2, (1, 0)), (4, 6, 3, 3)),
    "conv, grouped": (lambda m, x: F.conv2d(x, m.w, None, 1, 0, (2, 1), 3), (9, 2, 3, 2)),
    "conv, same": (lambda m, x: F.conv2d(x, m.w, None, 1, "same"), (4, 6, 3, 5)),
    "conv, same, dilated": (lambda m, x: F.conv2d(x, m.w, None, 1, "same", (3, 1), 2), (4, 3, 3, 1)),
    "conv, same, channels last": (
        lambda m, x: F.conv2d(x.to(memory_format=torch.channels_last), m.w, None, 1, "same"),
        (4, 6, 3, 3),
    ),
    "conv, same, of the wrong stride": (lambda m, x: F.conv2d(x, m.w, None, 2, "same"), (4, 6, 3, 3)),
    "conv, valid": (lambda m, x: F.conv2d(x, m.w, None, 2, "valid"), (4, 6, 3, 3)),
    "conv, valid, of too large a kernel": (lambda m, x: F.conv2d(x, m.w, None, 1, "valid"), (4, 6, 12, 3)),
    "conv, of the wrong width": (lambda m, x: F.conv2d(x, m.w), (4, 5, 3, 3)),
    "conv, of too large a kernel": (lambda m, x: F.conv2d(x, m.w), (4, 6, 12, 3)),
    "conv, channels last": (lambda m, x: F.conv2d(x.to(memory_format=torch.channels_last), m.w), (4, 6, 3, 3)),
    "conv, turned": (lambda m, x: F.conv2d(x.transpose(2, 3), m.w), (4, 6, 3, 3)),
    "conv, without a batch": (lambda m, x: F.conv2d(x[0], m.w), (4, 6, 3, 3)),
    "conv1d": (lambda m, x: F.conv1d(x.flatten(2), m.w, stride=2), (4, 6, 3)),
    "conv3d": (lambda m, x: F.conv3d(x[:, None], m.w, padding=1), (4, 1, 3, 3, 3)),
    "linear": (lambda m, x: F.linear(x, m.w, None), (5, 8)),
    "linear, of the wrong width": (lambda m, x: F.linear(x, m.w, None), (5, 7)),
    "norm": (lambda m, x: F.batch_norm(x, m.v, m.v.abs(), m.v, m.v), ()),
    "norm, turned": (lambda m, x: F.batch_norm(x.permute(0, 1, 3, 2), m.v, m.v.abs(), m.v, m.v), ()),
    "norm, of the wrong width": (lambda m, x: F.batch_norm(x[:, :4], m.v, m.v.abs(), m.v, m.v), ()),
    "layer norm": (lambda m, x: F.layer_norm(x, (9, 8)), ()),
    "layer norm, of the wrong shape": (lambda m, x: F.layer_norm(x, (8, 9)), ()),
    "group norm": (lambda m, x: F.group_norm(x, 3, m.v, m.v), ()),
    "group norm, of the wrong number": (lambda m, x: F.group_norm(x, 4, m.v, m.v), ()),
    "activations": (lambda m, x: F.hardswish(F.silu(x).clamp(min=0.1)) + F.gelu(x.mT).mT, ()),
    "in place": (lambda m, x: F.relu(x.exp(), inplace=True).add_(1).mul_(m.v[:, None, None]), ()),
    "broadcast": (lambda m, x: (x.mT * m.v[:, None, None]) / x.mean((2, 3), keepdim=True), ()),
    "with numbers": (lambda m, x: 2 * (x - 1) + (x > 0) * 3 + torch.div(x, 2, rounding_mode="floor"), ()),
    "types": (lambda m, x: x.half() + x.double() * x.int(), ()),
    "products": (lambda m, x: (x @ x.mT) @ m.w, (2, 6, 9, 3)),
    "product of the wrong width": (lambda m, x: x @ m.w, (7, 3)),
    "softmax": (lambda m, x: torch.softmax(x, 1) + torch.softmax(x, -1, dtype=torch.float32), ()),
    "softmax over no axis": (lambda m, x: torch.softmax(x, 4), ()),
    "joined": (lambda m, x: torch.cat([x, x.relu(), x[:, :2]], 1), ()),
    "joined, turned": (lambda m, x: torch.cat([x.mT, x.mT], -1), ()),
    "joined, of other sizes": (lambda m, x: torch.cat([x, x[..., 1:]], 1), ()),
    "views": (lambda m, x: x.relu().flatten(2).unflatten(2, (3, -1)).unbind(1)[2][:, ::2].squeeze(), ()),
    "squeezed in place": (lambda m, x: x[:, :1].clone().squeeze_(1).unsqueeze_(0), ()),
    "pooled": (lambda m, x: F.adaptive_avg_pool2d(F.max_pool2d(x, 3, 2, 1), 2), ()),
    "by the shape": (lambda m, x: x.reshape(x.shape[0], -1)[:, : len(x)], ()),
}


def recorded(graph: Graph) -> list[Any]:
    """Everything about a graph but the contents of its tensors."""
    return [
        (
            node.operator,
            [value.index for value in node.inputs],
            [
                (value.shape, value.strides, value.dtype, value.pinned, value.independent, value.storage.version)
                for value in node.outputs
            ],
        )
        for node in graph.nodes
    ]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_same_record(name: str) -> None:
    function, shape = FUNCTIONS[name]
    model, x = Net(function, *shape), torch.randn(IMAGE)
    if " of the wrong " in name or name.endswith(("sizes", "kernel", "no axis")):
        with pytest.raises(bnfuse.InputError):
            capture(model, (x,), {}, known=RULES)
        with pytest.raises(Exception, match=r"."):
            capture_shapes(model, (x,), {}, known=RULES)
        return
    real, shapes = capture(model, (x,), {}, known=RULES), capture_shapes(model, (x,), {}, known=RULES)
    assert recorded(shapes.graph) == recorded(real.graph)
    assert (shapes.looks, shapes.stateful, shapes.output) == (real.looks, real.stateful, None)


LOOKING: dict[str, Callable[..., Any]] = {
    "if": lambda m, x: x if x.mean() > 0 else -x,
    "item": lambda m, x: x * x.max().item(),
    "numpy": lambda m, x: x * float(x.numpy().max()),
    "list": lambda m, x: x * x[0, 0, 0].tolist()[0],
    "nonzero": lambda m, x: x.flatten()[x.flatten() > 0],
    "masked": lambda m, x: x.masked_select(x > 0),
    "other library": lambda m, x: deform_conv2d(x, torch.zeros(2, 2, 9, 8), torch.zeros(1, 6, 1, 1)),
}


@pytest.mark.parametrize("name", LOOKING)
def test_a_model_that_looks_at_contents(name: str) -> None:
    model, x = Net(LOOKING[name]), torch.randn(IMAGE)
    with pytest.raises(NeedsContentsError):
        capture_shapes(model, (x,), {})
    capture(model, (x,), {})


def test_what_does_not_depend_on_the_input_is_real() -> None:
    model = Net(lambda m, x: F.conv2d(x, m.w / m.w.norm()), 4, 6, 3, 3)
    graph = capture_shapes(model, (torch.randn(IMAGE),), {}).graph
    weight = graph.nodes[-1].inputs[1]
    assert weight.independent
    assert not graph.nodes[-1].outputs[0].independent


@pytest.mark.parametrize("spec", ["torchvision:shufflenet_v2_x0_5", "timm:levit_128s", "timm:mixnet_s"])
def test_networks(spec: str) -> None:
    model, x = build(spec).eval(), torch.randn(1, 3, 224, 224)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert recorded(capture_shapes(model, (x,), {}).graph) == recorded(capture(model, (x,), {}).graph)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_error_of_unwritten_numbers_is_no_size_that_the_model_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is then tried in numbers, where it turns out that the code pads at other sizes."""

    class Padding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 2)
            self.table = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(F.pad(self.norm(x), (0, x.shape[-1] % 2)))
            place = torch.sigmoid(y.mean((1, 2, 3))).round().long()
            return y + F.embedding(place, self.table)[:, :, None, None]

    monkeypatch.setitem(shapes_only._MADE, "sigmoid", lambda x: torch.full_like(x, 1e6))
    model, x = prepared(Padding()), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    with pytest.raises(IndexError):
        capture_shapes(model, (x,), {})
    for plan in (bnfuse.plan(model, x), Planner(Problem.of(model, x, Options())).plan()):
        assert not plan.fused


def test_fusing_loads_no_compiler() -> None:
    """That takes two seconds, which only those should spend who compile."""
    code = """
import sys
import torch
from torch import nn
from torch.nn.functional import conv2d
import bnfuse
from bnfuse.verify.discrete_choices import DiscreteChoices
from bnfuse.verify.float64 import InFloat64
from bnfuse.tools.zoo import randomise_

class Conv(nn.Conv2d):
    def forward(self, x):
        return conv2d(x, self.weight, self.bias)

class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.conv, self.norm = nn.Conv2d(4, 4, 1), Conv(4, 4, 3, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        x = x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()
        scores = x.flatten(2).softmax(2) @ x.flatten(2)[:1].mT
        return self.norm(self.conv(x.reshape(x.shape[0], 4, *x.shape[2:]))) + scores.mean((1, 2))[:, None, None, None]

model = randomise_(nn.Sequential(Conv(3, 4, 3, bias=False), nn.BatchNorm2d(4), Gate())).eval()
assert not any(isinstance(module, nn.BatchNorm2d) for module in bnfuse.fuse(model, torch.randn(2, 3, 9, 9)).modules())
with torch.inference_mode():
    for mode in (InFloat64(), DiscreteChoices()):
        with mode:
            model(torch.randn(2, 3, 9, 9)).argmax(1)
print(sorted({"sympy", "torch._dynamo", "torch._inductor"} & set(sys.modules)))
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.stdout == "[]\n", finished.stdout + finished.stderr
