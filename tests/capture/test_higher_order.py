"""Operators that are given functions: the operators of these functions are seen, and what is chosen may be another."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rule_cases import Net
from support import fused_and_checked, prepared, reason
from torch import Tensor, nn
from torch._higher_order_ops.map import map as map_rows
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bnfuse.model import pytree
from bnfuse.model.sandbox import run
from bnfuse.verify.discrete_choices import DiscreteChoices
from bnfuse.verify.float64 import InFloat64

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without", "ignore:The .grad attribute")


def chosen(m: nn.Module, x: Tensor) -> Any:
    y = m.n(m.u(x))
    return torch.cond(y.sum() > 0, lambda y: m.v(y), lambda y: m.v(y).sin(), (y,))


def repeated(m: nn.Module, x: Tensor) -> Any:
    y = m.n(m.u(x))
    return while_loop(lambda i, z: i < 3, lambda i, z: (i + 1, m.v(z)), (torch.zeros((), dtype=torch.int64), y))[1]


def scanned(m: nn.Module, x: Tensor) -> Any:
    y = m.n(m.u(x))
    return scan(lambda total, row: (total + row, torch.tanh(total + row)), torch.zeros_like(y[0]), y)


def mapped(m: nn.Module, x: Tensor) -> Any:
    return map_rows(lambda row: m.v(row.sin()), m.n(m.u(x)))


def attended(m: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        query, value = m.n(m.u(x)), m.v(x)
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 4, 4, device="cpu")
        scored = flex_attention(query, query, value, score_mod=lambda score, b, h, i, j: score + (i - j))
        return scored + flex_attention(query, query, value, block_mask=mask)


def network(forward: Callable[..., Any]) -> nn.Module:
    return prepared(Net(forward, u=nn.Conv2d(2, 2, 1), v=nn.Conv2d(2, 2, 1), n=nn.BatchNorm2d(2)), dead=0.3)


@pytest.mark.parametrize("forward", [chosen, repeated, scanned, mapped, attended])
def test_a_norm_before_it_goes(forward: Callable[..., Any]) -> None:
    model, x = network(forward), torch.randn(2, 2, 4, 4, dtype=torch.float64)
    plan, _ = fused_and_checked(model, x, batch=0)
    assert plan.fused[0].into == ("u",)
    expected = pytree.tensors(run(model, (x,), {}))
    for mode in (InFloat64(), DiscreteChoices()):
        for (_, got), (_, wanted) in zip(pytree.tensors(run(model, (x,), {}, mode=mode)), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_a_norm_goes_into_both_branches() -> None:
    def forward(m: nn.Module, x: Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda x: m.n(m.u(x)), lambda x: m.n(m.v(x)), (x,))

    model, x = network(forward), torch.rand(2, 2, 4, 4, dtype=torch.float64)
    plan, fused = fused_and_checked(model, x, batch=0)
    assert plan.fused[0].into == ("u", "v")
    for inputs in (x, -x):
        torch.testing.assert_close(run(fused, (inputs,), {}), run(model, (inputs,), {}), rtol=1e-12, atol=1e-12)


def test_what_is_chosen_keeps_its_units() -> None:
    def forward(m: nn.Module, x: Tensor) -> Any:
        return m.n(torch.cond(x.sum() > 0, lambda x: m.u(x), lambda x: x.sin(), (x,)))

    model, x = network(forward), torch.rand(2, 2, 4, 4, dtype=torch.float64)
    plan, _ = fused_and_checked(model, x, batch=0)
    assert "cond chooses by contents what becomes of it, or makes it" in reason(plan, "n")


def test_a_weight_that_both_branches_read_is_edited_for_both() -> None:
    def forward(m: nn.Module, x: Tensor) -> Any:
        y = m.u(x)
        return m.v(m.n(torch.cond(x.sum() > 0, lambda y: y.relu(), lambda y: 2 * m.u(y), (y,))))

    model, x = network(forward), torch.rand(2, 2, 4, 4, dtype=torch.float64)
    plan, fused = fused_and_checked(model, x, batch=0)
    assert [decision.direction for decision in plan.decisions] == ["forward"]
    for inputs in (x, -x):
        torch.testing.assert_close(run(fused, (inputs,), {}), run(model, (inputs,), {}), rtol=1e-12, atol=1e-12)


def test_an_operator_without_code_in_python_is_named() -> None:
    func: Any = types.SimpleNamespace(name=lambda: "unknown", py_kernels={})
    with pytest.raises(NotImplementedError, match="unknown has no implementation in Python"):
        InFloat64().unrolled(func, (), {})
