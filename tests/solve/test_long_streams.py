"""Norms that are refused far along a stream: each costs as much work as in a shorter one, and is decided alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnfuse
from bnfuse.fusion_plan import Plan
from bnfuse.planner.options import Options
from bnfuse.solve.fixed_units import Limits
from bnfuse.solve.propagation import Trial
from bnfuse.tools.zoo.randomise import randomise_

CHANNELS = 4
Step = Callable[[Tensor, Tensor, nn.Module], Tensor]
"""What becomes of the stream, of the stream, the branch and the block."""


class Block(nn.Module):
    """A branch behind a norm, which nothing that follows the norm takes up."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.convolution = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.gain = nn.Parameter(torch.rand(CHANNELS, 1, 1) + 0.5)
        self.register_buffer("mean", torch.randn(CHANNELS, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x, self.convolution(F.silu(self.norm(x))), self)


class Stream(nn.Module):
    def __init__(self, step: Step, end: Callable[[Tensor], Tensor], length: int) -> None:
        super().__init__()
        self.end = end
        self.first, self.last = (nn.Conv2d(CHANNELS, CHANNELS, 1) for _ in range(2))
        self.blocks = nn.Sequential(*(Block(step) for _ in range(length)))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.end(self.blocks(self.first(x))))


def maximum(x: Tensor) -> Tensor:
    return x.amax((2, 3), True)


def squared(x: Tensor) -> Tensor:
    return x * x


def cut_off(x: Tensor) -> Tensor:
    return F.hardtanh(x, -0.5, 0.5)


def constant(x: Tensor) -> Tensor:
    return torch.full((CHANNELS, 1, 1), 0.75)


def position_wise(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


REFUSED = {
    "square": (lambda x, y, m: x + y, squared),
    "bounds": (lambda x, y, m: x + y, cut_off),
    "one value per channel": (lambda x, y, m: x + y.mean((2, 3), True), squared),
    "negated": (lambda x, y, m: -(x - y), F.silu),
    "numbers": (lambda x, y, m: 0.5 * (x + y) + 0.25, squared),
    "interpolated": (lambda x, y, m: F.interpolate(x + y, size=x.shape[2:], mode="bilinear"), F.silu),
    "pooled": (lambda x, y, m: F.max_pool2d(x + y, 3, 1, 1), F.silu),
    "rearranged": (lambda x, y, m: (position_wise(x) + position_wise(y)).transpose(1, 2).reshape(x.shape), squared),
    "elementwise maximum": (lambda x, y, m: torch.maximum(x, y), F.silu),
    "constant gains": (lambda x, y, m: constant(x) * x + y, F.silu),
}
"""Streams, and what refuses at their end: of such that the work would grow as the square, if each norm went there."""

OTHERS = {
    "maximum": (lambda x, y, m: x + y, maximum),
    "gates": (lambda x, y, m: x * torch.sigmoid(y), maximum),
    "quotients": (lambda x, y, m: x / (1 + torch.sigmoid(y)), F.silu),
    "padded": (lambda x, y, m: F.pad(x + y, (0, 0, 1, 0))[:, :, 1:], maximum),
    "deviations": (lambda x, y, m: x + x.std((2, 3), keepdim=True) * 0.1 + y, maximum),
    "magnitudes": (lambda x, y, m: x + 0.1 * x.abs() + y, F.relu),
    "zeros that are broadcast": (lambda x, y, m: x + y + torch.zeros(CHANNELS, 1, 1), maximum),
    "gains": (lambda x, y, m: x * m.gain + y, F.silu),
    "norms as arithmetic": (lambda x, y, m: x + y + (x - m.mean) * m.gain, maximum),
    "matrices on the left": (lambda x, y, m: x + y + m.gain.flatten().diag() @ x, maximum),
    "stacked": (lambda x, y, m: torch.stack([x, y]).sum(0), maximum),
}


def planned(step: Step, end: Callable[[Tensor], Tensor], length: int, positive: bool = False) -> Plan:
    torch.manual_seed(length)
    model = randomise_(Stream(step, end, length), length).eval()
    if positive:
        for block in model.blocks:
            block.norm.weight.data.abs_().add_(0.1)
    return bnfuse.plan(model, torch.randn(1, CHANNELS, CHANNELS, CHANNELS), options=Options(infer_calls=False))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many rules are applied and units demanded."""
    work = [0]
    with monkeypatch.context() as patch:
        for name in ("_apply", "demand"):
            original = getattr(Trial, name)

            def one_more(self: Trial, *arguments: Any, original: Callable[..., Any] = original) -> Any:
                work[0] += 1
                return original(self, *arguments)

            patch.setattr(Trial, name, one_more)
        yield work


@pytest.mark.parametrize("name", REFUSED)
def test_the_work_grows_with_the_number_of_norms(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for length in (15, 45):
        with counted(monkeypatch) as work:
            plan = planned(*REFUSED[name], length)
        assert len(plan.kept) >= length - 1
        found[length] = work[0] / length
    assert found[45] < 1.2 * found[15] + 5


@pytest.mark.parametrize("positive", [False, True], ids=["any", "positive"])
@pytest.mark.parametrize("name", [*REFUSED, *OTHERS])
def test_what_is_found_out_changes_no_decision(name: str, positive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    step, end = (REFUSED | OTHERS)[name]
    plan = planned(step, end, 10, positive)
    monkeypatch.setattr(Limits, "learned_refusal", lambda *_: None)
    alone = planned(step, end, 10, positive)
    assert plan.decisions == alone.decisions
    assert plan.to_dict() == alone.to_dict()
