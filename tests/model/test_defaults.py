"""The caller's default device and dtype: the library's own tensors go by neither, the model runs by both."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from rule_cases import Net
from support import prepared
from torch import Tensor, nn

import bnfuse


@contextlib.contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def joined(model: nn.Module, x: Tensor) -> Tensor:
    """A bias is created, units are cut in two, a norm goes forward and one beside a convolution."""
    both = F.pad(torch.cat([model.u(x), model.v(x)], 1), (1, 1, 1, 1), mode="reflect")
    inner = model.w(model.second(model.first(both)))
    return model.third(F.hardtanh(model.beside(inner) + model.k(inner)))


def network() -> nn.Module:
    layers = {
        "u": nn.Conv2d(2, 2, 1, bias=False),
        "v": nn.Conv2d(2, 2, 3, padding=1),
        "w": nn.Conv2d(4, 4, 3, bias=False),
        "k": nn.Conv2d(4, 4, 3, padding=1, bias=False),
        **{name: nn.BatchNorm2d(4) for name in ("first", "second", "third", "beside")},
    }
    return prepared(Net(joined, **layers), dead=0.3)


CONTEXTS = [
    lambda: torch.device("meta"),
    lambda: torch.device("cpu"),
    lambda: default_device("meta"),
    lambda: default_device("cpu"),
    lambda: default_dtype(torch.float64),
    lambda: default_dtype(torch.float16),
]


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("inplace", [False, True])
def test_our_own_tensors_go_by_no_default(context: object, inplace: bool) -> None:
    model, x = network(), torch.randn(2, 2, 6, 6, dtype=torch.float64)
    expected = model(x)
    with context():  # type: ignore[operator]
        plan = bnfuse.plan(model, x)
        fused = bnfuse.fuse(model, x, inplace=inplace)
    assert len(plan.fused) == 3
    assert all(tensor.device.type == "cpu" for tensor in fused.state_dict().values())
    assert all(parameter.dtype == torch.float64 for parameter in fused.parameters())
    torch.testing.assert_close(fused(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_model_runs_by_the_default_dtype(dtype: torch.dtype) -> None:
    seen = []

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        table = torch.ones(4, 1, 1)
        seen.append(table.dtype)
        return model.n(model.u(x)) * table

    model = prepared(Net(forward, u=nn.Conv2d(2, 4, 1), n=nn.BatchNorm2d(4)))
    with default_dtype(dtype):
        fused = bnfuse.fuse(model, torch.randn(2, 2, 6, 6, dtype=torch.float64))
    assert set(seen) == {dtype}
    assert isinstance(fused.n, nn.Identity)


def test_inferred_inputs_do_not_go_by_the_default_device() -> None:
    model = prepared(nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)))
    with torch.device("meta"):
        fused = bnfuse.fuse(model)
    assert isinstance(fused[1], nn.Identity)
