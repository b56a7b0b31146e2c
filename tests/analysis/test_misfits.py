"""Code that looks at a norm as an object: fuse keeps the norm instead of breaking the code."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import assert_untouched, prepared, snapshot
from torch import Tensor, nn

import bnfuse


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.n, self.d, self.k = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def rest(self, x: Tensor) -> Tensor:
        return self.k(self.d(F.silu(x)))


class ReadsType(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.n(self.c(x.to(self.n.weight.dtype))))


class BranchesOnClass(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.n(self.c(x))
        return self.rest(F.relu(y) if isinstance(self.n, nn.BatchNorm2d) else y)


class NumberOfClass(Base):
    """The same operators run with other numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.n(self.c(x)) * (2 if isinstance(self.n, nn.BatchNorm2d) else 3))


class NumberOfBias(Base):
    """The number changes with the bias that the layer is given."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(3, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.n(self.c(x)) * len(list(self.c.parameters())))


class HeldInAnObject(Base):
    def __init__(self) -> None:
        super().__init__()
        self.held = SimpleNamespace(norm=self.n)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.held.norm(self.c(x)))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", [ReadsType, BranchesOnClass, NumberOfClass, NumberOfBias, HeldInAnObject])
def test_misfit(kind: Any, inplace: bool) -> None:
    model = prepared(kind())
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    expected, before = model(x), snapshot(model)
    fused = bnfuse.fuse(model, x, inplace=inplace)
    if not inplace:
        assert_untouched(model, before)
    if kind is HeldInAnObject and not inplace:  # the copy of the object holds what the copy of the model holds
        assert type(fused.n) is nn.Identity
        assert fused.held.norm is fused.n
    else:
        assert type(fused.n) is nn.BatchNorm2d
    assert type(fused.k) is nn.Identity
    torch.testing.assert_close(fused(x), expected, rtol=1e-11, atol=1e-11)


class AlsoGoesBySize(nn.Module):
    """``n`` is left out at larger sizes, and the code looks at the class of ``k``."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.n, self.d, self.k = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(x)
        if x.shape[-1] <= 4:
            y = self.n(y)
        z = self.k(self.d(y.tanh()))
        return z if isinstance(self.k, nn.BatchNorm2d) else z + 1


@pytest.mark.parametrize("inplace", [False, True])
def test_what_stays_for_other_inputs_stays_beside_a_misfit(inplace: bool) -> None:
    model = prepared(AlsoGoesBySize())
    small, large = (torch.randn(2, 2, size, size, dtype=torch.float64) for size in (4, 8))
    expected = model(small), model(large)
    fused = bnfuse.fuse(model, small, inplace=inplace)
    for found, wanted in zip((fused(small), fused(large)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert [type(fused.n), type(fused.k)] == [nn.BatchNorm2d] * 2


class BranchesOnEqualClasses(Base):
    """Either norm alone is a misfit, both together are none."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.rest(self.n(self.c(x)))
        return z if type(self.n) is type(self.k) else z + 1


def test_only_a_norm_that_fails_alone_is_called_a_misfit() -> None:
    model = prepared(BranchesOnEqualClasses())
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    assert [type(norm) for norm in (bnfuse.fuse(model, x).n, bnfuse.fuse(model, x).k)] == [nn.Identity] * 2


class OneOrTheOther(Base):
    """Of ``n`` and ``m`` one can go, and the code looks at the layer that would take it up, at some sizes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.c, self.m, self.size = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), size

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(self.c(x)).sin() + self.m(self.c(x.relu())).sin()
        return self.rest(y * len(list(self.c.parameters())) if x.shape[-1] >= self.size else y)


@pytest.mark.parametrize("size", [0, 6])
def test_a_norm_is_not_blamed_for_another_that_goes_once_a_third_stays(size: int) -> None:
    model = prepared(OneOrTheOther(size))
    small, large = (torch.randn(2, 3, side, side, dtype=torch.float64) for side in (5, 10))
    fused = bnfuse.fuse(model, small)
    assert [type(norm) for norm in (fused.n, fused.m, fused.k)] == [nn.BatchNorm2d, nn.BatchNorm2d, nn.Identity]
    for x in (small, large):
        torch.testing.assert_close(fused(x), model(x), rtol=1e-11, atol=1e-11)


class TwoTogether(nn.Module):
    """Alone, each norm goes into ``c``. Together, one goes on into ``d``, whose bias the code looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.d = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.n, self.m = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.n(self.c(x))
        return self.d(self.m(self.c(x))), y * (2 if self.d.bias is None else 3)


@pytest.mark.parametrize("inplace", [False, True])
def test_of_two_that_fit_alone_and_not_together_one_goes(inplace: bool) -> None:
    model = prepared(TwoTogether())
    x = torch.randn(2, 4, dtype=torch.float64)
    expected = model(x)
    fused = bnfuse.fuse(model, x, inplace=inplace)
    assert [type(norm) for norm in (fused.n, fused.m)] == [nn.Identity, nn.BatchNorm1d]
    torch.testing.assert_close(fused(x), expected, rtol=1e-12, atol=1e-12)
