"""Models that are prepared for quantisation keep their norms, and say when to fuse; fused before, they lose them."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from support import prepared
from torch import Tensor, nn
from torch.ao import quantization

import bnfuse
from bnfuse.errors import NothingFusedWarning
from bnfuse.tools.zoo.randomise import randomise_

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


def with_settings(model: nn.Module) -> nn.Module:
    """The model with what PyTorch's tools need to know; PyTorch warns of all of them that they are old."""
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")  # type: ignore[assignment]
    return model


def folding_by_itself() -> nn.Module:
    """A layer of quantisation-aware training with the norm in it."""
    model = quantization.fuse_modules_qat(randomise_(Net()).train(), [["conv", "norm"]])
    return quantization.prepare_qat(with_settings(model))


def observed() -> nn.Module:
    """The norm is measured as any other layer."""
    return quantization.prepare_qat(with_settings(randomise_(Net()).train()))


def after_training() -> nn.Module:
    """Quantisation without training: observers, which have measured."""
    model = quantization.prepare(with_settings(randomise_(Net()).eval()))
    model(X)
    return model


CASES: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "the layer folds": (folding_by_itself, "conv.bn", "conv (ConvBn2d)"),
    "observed": (observed, "norm", "norm (BatchNorm2d)"),
    "after training": (after_training, "norm", "norm (BatchNorm2d)"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_prepared_model_keeps_its_norms_and_says_when_to_fuse(case: str) -> None:
    make, name, place = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make()
    model(X)
    model.eval()
    (decision,) = bnfuse.plan(model, X).kept
    assert decision.norm == name
    assert [reason.code for reason in decision.reasons] == ["prepared-for-quantisation"]
    assert str(decision.reasons[0]).startswith(f"{place} is prepared for quantisation")
    with pytest.warns(NothingFusedWarning, match=r"(?s)is prepared for quantisation.*Fuse first, then prepare"):
        fused = bnfuse.fuse(model, X)
    assert torch.equal(model(X), fused(X))


def test_a_model_that_is_fused_first_is_prepared_without_a_norm() -> None:
    model = prepared(Net()).float()
    fused = bnfuse.fuse(model, X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = quantization.prepare_qat(with_settings(quantization.QuantWrapper(fused).train()))
        trained(X)
        converted = quantization.convert(trained.eval())
    assert "quantized" in type(converted.module.conv).__module__
    assert not any("norm" in type(module).__name__.lower() for module in converted.modules())
