"""Whole networks from three zoos: how many norms go, and that nothing else changes (float64, randomised norms)."""

from __future__ import annotations

import pytest
import torch
from support import fused_and_checked, prepared
from torch import nn

import bnfuse
from bnfuse.zoo import build

# Removed, of those that run. An auxiliary head does not run in evaluation.
NETWORKS: dict[str, tuple[int, int]] = {
    "torchvision:resnet50": (53, 53),
    "torchvision:mobilenet_v3_large": (46, 46),
    "torchvision:efficientnet_b0": (49, 49),
    "torchvision:googlenet": (57, 57),
    "torchvision:inception_v3": (94, 94),
    "torchvision:shufflenet_v2_x1_0": (56, 56),
    "torchvision:densenet121": (59, 121),
    "timm:efficientnet_b0": (49, 49),
    "timm:mixnet_s": (49, 49),
    "timm:levit_128s": (52, 52),
    "timm:visformer_tiny": (28, 28),
    "timm:inception_next_atto": (16, 16),
}


@pytest.mark.parametrize("spec", NETWORKS)
def test_network(spec: str) -> None:
    model = prepared(build(spec), seed=1)
    size = 224 if spec.startswith("timm:") else 96  # those of timm here have tables of a fixed size
    plan, fused = fused_and_checked(model, torch.randn(1, 3, size, size, dtype=torch.float64))
    ran = [decision for decision in plan.decisions if "did not run" not in "".join(map(str, decision.reasons))]
    assert (len(plan.fused), len(ran)) == NETWORKS[spec]
    left = [module for module in fused.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert len(left) == len(plan.kept)
    assert all(decision.reasons for decision in plan.kept)


def test_ill_conditioned_network_is_not_refused() -> None:
    """In float32 the outputs of levit with random statistics differ visibly, although the algebra is exact."""
    model = build("timm:levit_128s")
    prepared(model, seed=1).float()
    fused = bnfuse.fuse(model)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in fused.modules())
