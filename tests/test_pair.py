"""fuse_pair: every layer with every norm, and every clear refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import bnfuse
from bnfuse.errors import FusionError
from bnfuse.tools.zoo.randomise import randomise_

PAIRS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(3, 6, 3, bias=False), lambda: nn.BatchNorm1d(6), (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 6, 3, padding=2, dilation=2), lambda: nn.BatchNorm2d(6, eps=0.1), (2, 3, 9, 9)),
    "conv2d, reflect": (lambda: nn.Conv2d(3, 6, 3, padding=4, padding_mode="reflect"), lambda: nn.BatchNorm2d(6), (2, 3, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3, groups=2), lambda: nn.BatchNorm3d(6), (2, 4, 5, 5, 5)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(3, 3, 3, bias=False), lambda: nn.BatchNorm1d(3), (2, 3, 9)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), lambda: nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 3, 2), lambda: nn.BatchNorm3d(3), (2, 2, 3, 3, 3)),
    "linear": (lambda: nn.Linear(5, 7, bias=False), lambda: nn.BatchNorm1d(7), (4, 5)),
    "no affine": (lambda: nn.Conv2d(3, 6, 1), lambda: nn.BatchNorm2d(6, affine=False), (2, 3, 4, 4)),
    "sync": (lambda: nn.Conv2d(3, 6, 1), lambda: nn.SyncBatchNorm(6), (2, 3, 4, 4)),
    "frozen": (lambda: nn.Conv2d(3, 6, 1), lambda: FrozenBatchNorm2d(6), (2, 3, 4, 4)),
    "with activation switched off": (lambda: nn.Conv2d(3, 6, 1), lambda: BatchNormAct2d(6, apply_act=False), (2, 3, 4, 4)),
}  # fmt: skip


def contents(module: nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in module.state_dict().items()}


def assert_same(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    assert module.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in module.state_dict().items())


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_pair(name: str, inplace: bool) -> None:
    make_layer, make_norm, shape = PAIRS[name]
    layer, norm = make_layer().double().eval(), make_norm().double().eval()
    randomise_(norm, 3)
    layer_state, norm_state = contents(layer), contents(norm)
    x = torch.randn(shape, dtype=torch.float64)
    expected = norm(layer(x))
    fused = bnfuse.fuse_pair(layer, norm, inplace=inplace)
    assert (fused is layer) == inplace
    assert type(fused) is type(layer)
    assert torch.allclose(fused(x), expected, rtol=1e-11, atol=1e-11)
    assert_same(norm, norm_state)
    if not inplace:
        assert_same(layer, layer_state)


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "channels": (lambda: nn.Conv2d(3, 6, 1), lambda: nn.BatchNorm2d(3), "expected: 6"),
    "training norm": (lambda: nn.Conv2d(3, 6, 1), lambda: nn.BatchNorm2d(6).train(), "Call .eval()"),
    "no statistics": (lambda: nn.Conv2d(3, 6, 1), lambda: nn.BatchNorm2d(6, track_running_stats=False), "no running statistics"),
    "not a norm": (lambda: nn.Conv2d(3, 6, 1), lambda: nn.ReLU(), "must be a batch norm"),
    "not a layer": (lambda: nn.ReLU(), lambda: nn.BatchNorm2d(6), "got ReLU"),
    "axes": (lambda: nn.Conv2d(3, 6, 1), lambda: nn.BatchNorm1d(6), "numbers of axes differ"),
    "activation": (lambda: nn.Conv2d(3, 6, 1), lambda: BatchNormAct2d(6), "activation built in"),
}  # fmt: skip


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, inplace: bool) -> None:
    make_layer, make_norm, message = REFUSED[name]
    layer, norm = make_layer().eval(), make_norm()
    norm.train(name == "training norm")
    state = contents(layer)
    with pytest.raises(FusionError, match=message.replace("(", r"\(").replace(")", r"\)")):
        bnfuse.fuse_pair(layer, norm, inplace=inplace)
    assert_same(layer, state)


def test_layer_in_training_mode() -> None:
    with pytest.raises(FusionError, match="training mode"):
        bnfuse.fuse_pair(nn.Linear(2, 3), nn.BatchNorm1d(3).eval())
