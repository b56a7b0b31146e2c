"""Fusing under autocast, which keeps casts of the weights that it has seen until the context ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnfuse
from bnfuse.tools.zoo.randomise import randomise_


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))
    return randomise_(model, 0, 0.0).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def close(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype
    assert float((got - expected).double().norm() / expected.double().norm()) < 2e-2


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def fused_in_place(model: nn.Module, x: Tensor, **options: Any) -> nn.Module:
    return bnfuse.fuse(model, x, inplace=True, **options)


FUSE: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "copy": bnfuse.fuse,
    "in place": fused_in_place,
    "in place, not verified": lambda model, x: fused_in_place(model, x, verify=False),
    "plan": lambda model, x: bnfuse.plan(model, x).apply(model),
    "plan, in place": lambda model, x: bnfuse.plan(model, x).apply(model, inplace=True),
}


@pytest.mark.parametrize("how", FUSE)
@pytest.mark.parametrize("inside", [False, True])
def test_the_new_weights_are_used_at_once(how: str, inside: bool, model: nn.Module, x: Tensor) -> None:
    """Before, during and after: in one autocast context, and where only the model runs in it."""
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x).detach()
        with torch.autocast("cpu", enabled=inside):
            fused = FUSE[how](model, x)
        assert norms(fused) == 0
        close(fused(x).detach(), expected)
        fused(x).float().sum().backward()  # no cast that was made in inference mode is left behind
    assert all(parameter.grad is not None for parameter in fused.parameters())


def test_the_original_can_be_trained_in_the_same_context(model: nn.Module, x: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        bnfuse.fuse(model, x)
        model(x).float().sum().backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("inplace", [False, True])
def test_a_refused_fusion_leaves_the_old_weights(
    inplace: bool, model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bnfuse.api._verify", _refuse)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x).detach()
        with pytest.raises(bnfuse.VerificationError):
            bnfuse.fuse(model, x, inplace=inplace)
        assert torch.equal(model(x).detach(), expected)


def _refuse(plan: Any, original: Any, fused: nn.Module, *_: Any) -> None:
    fused(torch.zeros(1, 3, 8, 8))  # casts the weights as they are now
    raise bnfuse.VerificationError
