"""Whole networks from three zoos: how many norms go, and that nothing else changes (float64, randomised norms)."""

from __future__ import annotations

import pytest
import torch
from support import fused_and_checked, prepared
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

import bnfuse
from bnfuse.tools.zoo.specs import build

# Removed, of those that run; with dead channels among the norms. An auxiliary head does not run in evaluation.
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
    "timm:visformer_tiny": (27, 28),
    "timm:inception_next_atto": (16, 16),
    "timm:repvgg_a0": (61, 61),
    "timm:repghostnet_050": (111, 112),
    "timm:mobileone_s0": (226, 226),
    "timm:fastvit_t8": (70, 70),
}


# Without dead channels, whose scale nothing on a residual stream or in a dense block could undo.
ALIVE: dict[str, tuple[int, int]] = {
    "torchvision:densenet121": (62, 121),
    "timm:convmixer_1024_20_ks9_p14": (1, 41),
    "timm:resnetv2_18": (8, 17),
    "timm:repvit_m0_9": (108, 108),
    "timm:nextvit_small": (60, 61),
    "timm:efficientvit_m0": (113, 113),
    "timm:swiftformer_xs": (25, 26),
    "timm:ghostnet_100": (79, 80),
    "timm:pnasnet5large": (201, 201),
    "pytorchcv:ibn_resnet50": (53, 53),
    "pytorchcv:channelnet": (15, 15),
    "pytorchcv:ntsnet_cub": (53, 53),
}
# Networks with tables or windows of a fixed size are run at it, and the rest at a smaller one.
FIXED_SIZE = ("levit", "visformer", "efficientvit", "nextvit", "channelnet", "ntsnet", "ibn_")


@pytest.mark.parametrize(("spec", "dead"), [*((spec, 0.02) for spec in NETWORKS), *((spec, 0.0) for spec in ALIVE)])
def test_network(spec: str, dead: float) -> None:
    model = prepared(build(spec), seed=1, dead=dead)
    size = 448 if "ntsnet" in spec else 224 if any(name in spec for name in FIXED_SIZE) else 96
    plan, fused = fused_and_checked(model, torch.randn(1, 3, size, size, dtype=torch.float64), batch=0)
    ran = [decision for decision in plan.decisions if "did not run" not in "".join(map(str, decision.reasons))]
    assert (len(plan.fused), len(ran)) == (ALIVE if dead == 0 else NETWORKS)[spec]
    left = [module for module in fused.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert len(left) == len(plan.kept)
    assert all(decision.reasons for decision in plan.kept)


def test_frozen_norms_of_a_detector() -> None:
    """Faster R-CNN as torchvision builds it, whose norms are arithmetic in the code; images of another size after."""
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d)
    model = prepared(FasterRCNN(backbone, 91, min_size=96, max_size=128), seed=1, dead=0.0)
    plan = bnfuse.plan(model, ([torch.rand(3, 96, 96, dtype=torch.float64)],))
    assert (len(plan.fused), len(plan.decisions)) == (53, 53)
    fused = plan.apply(model)
    comparison = bnfuse.compare(model, fused, ([torch.rand(3, 90, 110, dtype=torch.float64)],))
    assert comparison.within_tolerance(), comparison


def test_ill_conditioned_network_is_not_refused() -> None:
    """In float32 the outputs of levit with random statistics differ visibly, although the algebra is exact."""
    model = build("timm:levit_128s")
    prepared(model, seed=1).float()
    fused = bnfuse.fuse(model)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in fused.modules())
