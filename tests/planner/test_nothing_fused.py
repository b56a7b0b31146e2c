"""The warning where no norm goes: it names the commonest reason and the way out, and is not given in vain."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import prepared
from torch import Tensor, nn
from torch.nn import functional

import bnfuse
from bnfuse.errors import NothingFusedWarning
from bnfuse.planner.nothing_fused import nothing_fused


class Predictor(nn.Module):
    """A wrapper whose forward works on a copy of its own, as those of some detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Wrapped(nn.Module):
    """Two models beside each other, of which neither runs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Predictor().model, Predictor().model

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return functional.batch_norm(self.conv(x), self.mean, self.variance)


class WithoutGradients(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.norm(self.conv(x))


def exported() -> nn.Module:
    model = WithoutGradients().double().eval()
    return torch.export.export(model, (torch.randn(2, 3, 4, 4, dtype=torch.float64),)).module()


def first() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(3), nn.SiLU(), nn.Conv2d(3, 2, 1, padding=1, bias=False), nn.Softmax(1))


CASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "wrapper": (
        Predictor,
        r"(?s)No batch norm of Predictor.*None of its batch norms ran.*such as model\.model, and put",
    ),
    "wrapper of two": (Wrapped, r"(?s)None of its batch norms ran.*the one whose forward calls the norms"),
    "exported": (exported, r"(?s)stand in an inner graph.*run_decompositions\(\{\}\)"),
    "function": (Functional, r"(?s)calls F\.batch_norm as a function.*Call a module instead"),
    "is the model": (
        lambda: nn.BatchNorm2d(3),
        r"(?s)The reason: it is the whole model\.\nWhat can be done: Fuse the model that holds",
    ),
    "algebra": (
        first,
        r"(?s)of Sequential was fused\.\nThe reason: backward: .*print\(bnfuse\.plan\(model, inputs\)\)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_reason_and_the_way_out_are_named(case: str) -> None:
    make, message = CASES[case]
    model, x = make(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    model = model if isinstance(model, torch.fx.GraphModule) else prepared(model)
    with pytest.warns(NothingFusedWarning, match=message) as caught:
        bnfuse.fuse(model, x)
    assert caught[0].filename == __file__


def test_the_commonest_reason_is_named_with_its_number() -> None:
    model = prepared(nn.Sequential(*(layer for _ in range(2) for layer in (nn.SiLU(), nn.BatchNorm2d(3), nn.SiLU()))))
    plan = bnfuse.plan(model, torch.randn(2, 3, 4, 4, dtype=torch.float64))
    assert "The commonest reason of the 2: forward: silu in 2 (SiLU)" in nothing_fused(plan, model)


@pytest.mark.parametrize("options", [{}, {"keep": "1"}, {"keep": ["1", "3"]}, {"options": bnfuse.Options(budget=1.0)}])
def test_no_warning_where_a_norm_goes_or_the_caller_keeps_all(options: dict[str, Any]) -> None:
    model = prepared(Predictor().model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bnfuse.fuse(model, torch.randn(2, 3, 4, 4, dtype=torch.float64), **options)
