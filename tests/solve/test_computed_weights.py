"""Weights that long chains of operators compute, and networks that are deep: neither is a matter of patience."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from rule_cases import Net
from support import fused_and_checked, prepared, reason
from torch import Tensor, nn

STEPS = 400

CHAINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matrices": lambda w, a: torch.tanh(w @ a),
    "every result is read twice": lambda w, a: w + 0.01 * torch.tanh(w),
    "pieces": lambda w, a: torch.cat(w.split(2)[::-1]),
    "products": lambda w, a: w * (a.abs() + 0.5).pow(0.01),
}


@pytest.mark.parametrize("step", CHAINS.values(), ids=CHAINS)
def test_a_shift_meets_a_weight_at_the_end_of_a_chain(step: Callable[[Tensor, Tensor], Tensor]) -> None:
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        weight = model.w
        for _ in range(STEPS):
            weight = step(weight, model.a)
        return F.linear(model.n(model.u(x).sin()), weight * model.gain, model.b)

    model = Net(forward, u=nn.Linear(4, 4), n=nn.BatchNorm1d(4))
    for name, shape in {"w": (4, 4), "a": (4, 4), "gain": (4, 4), "b": (4,)}.items():
        model.register_parameter(name, nn.Parameter(torch.randn(shape) / 2))
    prepared(model)
    with torch.no_grad():
        model.n.weight.fill_(1.0)  # the scale is 1, so only the shift needs the weight's contents
        model.n.running_var.fill_(1.0 - model.n.eps)
        model.n.running_mean.normal_()
    plan, _ = fused_and_checked(model, torch.randn(3, 4, dtype=torch.float64))
    assert [decision.direction for decision in plan.fused] == ["forward"]


def test_a_computed_weight_follows_what_was_folded_before() -> None:
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        weight = model.w * model.gain
        return F.linear(model.second(F.linear(model.first(x.sin()), weight, model.b)).sin(), model.v)

    model = Net(forward, first=nn.BatchNorm1d(4), second=nn.BatchNorm1d(4))
    for name, shape in {"w": (4, 4), "gain": (4, 4), "v": (4, 4), "b": (4,)}.items():
        model.register_parameter(name, nn.Parameter(torch.randn(shape)))
    plan, _ = fused_and_checked(prepared(model), torch.randn(3, 4, dtype=torch.float64))
    assert [decision.direction for decision in plan.decisions] == ["forward", "backward"]


def test_an_operator_that_does_not_run_in_float64_keeps_the_norm() -> None:
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        index = model.p.argsort()
        packed = torch.quantize_per_tensor(model.p.float(), 0.1, 0, torch.qint8).dequantize().double()
        return F.linear(model.n(x.sin()), packed[index][:, None], model.b)

    model = Net(forward, n=nn.BatchNorm1d(1))
    model.p, model.b = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
    plan, _ = fused_and_checked(prepared(model), torch.randn(3, 1, dtype=torch.float64))
    assert "contents depend on the run" in reason(plan, "n")


def test_two_thousand_activations() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), *[nn.LeakyReLU(0.9999) for _ in range(2000)], nn.BatchNorm2d(2))
    prepared(model)
    with torch.no_grad():
        model[-1].weight.abs_()
        model[-1].bias.zero_()
        model[-1].running_mean.zero_()
    plan, _ = fused_and_checked(model, torch.randn(2, 2, 4, 4, dtype=torch.float64))
    assert plan.fused[0].into == ("0",)
