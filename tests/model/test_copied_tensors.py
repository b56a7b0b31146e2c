"""Tensors of other classes, results in buffers, and layers that PyTorch runs by another path while they are watched."""

from __future__ import annotations

import torch
from support import fused_and_checked, prepared
from torch import Tensor, nn

from bnfuse.model.copying import copy_model


class Marked(Tensor):
    """A subclass that ``copy.deepcopy`` does not take."""


def test_tensors_of_other_classes_and_results_in_buffers_are_copied() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    model.marked = nn.Parameter(torch.ones(3).as_subclass(Marked))
    model.register_buffer("mean", model[0].weight.mean())
    copied = copy_model(model)
    assert type(copied.marked) is type(model.marked)
    assert copied.marked.requires_grad
    assert isinstance(copied.marked, nn.Parameter)
    assert copied.mean.is_leaf
    assert torch.equal(copied.mean, model.mean.detach())
    assert copied.mean is not model.mean


def test_a_transformer_with_a_mask_is_watched_as_it_is_run() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.layers, self.norm = nn.TransformerEncoder(layer, 1), nn.BatchNorm1d(8)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.norm(self.layers(x, src_key_padding_mask=mask).flatten(0, 1))  # type: ignore[no-any-return]

    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    plan, _ = fused_and_checked(prepared(Masked()), (torch.randn(2, 5, 8, dtype=torch.float64), mask), batch=0)
    assert plan.fused[0].into == ("layers.layers.0.norm2",)
    assert torch.backends.mha.get_fastpath_enabled()
