"""Numbers that the code of a model makes are the same in float64 as in the model's own precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnfuse
from bnfuse import rules
from bnfuse.tools.zoo.randomise import randomise_
from bnfuse.units import Unit
from bnfuse.verify.constants import Constants
from bnfuse.verify.float64 import InFloat64, float64_copy

HALF, SINGLE = torch.float16, torch.float32


class Deep(nn.Module):
    """Layers and norms with ``between`` in between; the sines multiply a rounding error by a million."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.between = between
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm1d(16) for _ in range(4))
        self.gain = nn.Parameter(torch.rand(16) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = torch.sin(12 * norm(self.between(self, layer(x))))
        return x


def deep(between: Callable[[Any, Tensor], Tensor], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return randomise_(Deep(between), 0, 0.0).to(dtype).eval()


BETWEEN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "full": lambda m, y: y * torch.full((), 1.3, dtype=y.dtype),
    "tensor": lambda m, y: y * torch.tensor(1.3, dtype=y.dtype),
    "linspace": lambda m, y: y * torch.linspace(0.7, 1.3, 16, dtype=y.dtype),
    "float32": lambda m, y: y * torch.full((16,), 1.3, dtype=SINGLE).to(y.dtype),
    "root of zeros": lambda m, y: y * torch.rsqrt(torch.zeros(16) + 0.3).to(y.dtype),
    "number": lambda m, y: y * torch.tensor(3.0, dtype=y.dtype).sqrt().item(),
    "number of a parameter": lambda m, y: y / m.gain.exp().mean().item(),
    "Python number": lambda m, y: y / math.sqrt(3),
}


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("dtype", [HALF, SINGLE, torch.float64])
def test_a_right_fusion_is_found_right(between: str, dtype: torch.dtype) -> None:
    model = deep(BETWEEN[between], dtype)
    fused = bnfuse.fuse(model, torch.randn(64, 16).to(dtype))
    assert sum(isinstance(module, nn.BatchNorm1d) for module in fused.modules()) < 4


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_a_wrong_fusion_is_found_wrong(between: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    correct = rules.ABSORBERS["linear"]

    def slightly_wrong(node: Any, trial: Any) -> None:
        unit = trial.units.get(node.outputs[0])
        if unit is not None and unit.shift is not None:
            trial.units[node.outputs[0]] = Unit(unit.scale, unit.shift * (1 + 1e-6), unit.inverse)
        correct(node, trial)

    monkeypatch.setitem(rules.ABSORBERS, "linear", slightly_wrong)
    with pytest.raises(bnfuse.VerificationError):
        bnfuse.fuse(deep(BETWEEN[between], dtype), torch.randn(64, 16).to(dtype))


class Made(nn.Module):
    """Returns what ``make`` does of a parameter and the input."""

    def __init__(self, make: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.make, self.p = make, nn.Parameter(torch.tensor([0.5, 0.7]))

    def forward(self, x: Tensor) -> Any:
        return self.make(self.p, x)


def recorded(make: Callable[[Tensor, Tensor], Any], x: Tensor) -> Constants:
    model = Made(make)
    with torch.inference_mode(), Constants(model) as constants:
        model(x)
    return constants


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda p, x: torch.full((2,), 0.1), 1),
        (lambda p, x: torch.tensor([0.1, 0.2]) * torch.linspace(0, 1, 2), 2),
        (lambda p, x: torch.arange(3), 0),
        (lambda p, x: x.new_full((2,), 0.1), 0),  # of a tensor that depends on the input
        (lambda p, x: p.exp(), 0),  # follows from others
        (lambda p, x: p.exp().sum().item(), 1),
        (lambda p, x: x.exp().sum().item(), 0),
        (lambda p, x: (x.sum() * p).sum().item(), 0),
        (lambda p, x: torch.zeros(2).add_(x.sum()).sum().item(), 1),  # the zeros, and not what was written over them
        (lambda p, x: torch.zeros(0), 0),
        (lambda p, x: torch.full((), 1j), 0),
    ],
)
def test_what_is_a_constant(make: Callable[[Tensor, Tensor], Any], count: int) -> None:
    assert len(recorded(make, torch.ones(3)).made) == count


def followed(
    make: Callable[[Tensor, Tensor], Any], x: Tensor, other: Callable[[Tensor, Tensor], Any] | None = None
) -> Any:
    """What the model gives in float64 with the constants of its run in its own precision."""
    constants = recorded(make, x)
    model = float64_copy(Made(other or make))
    with torch.inference_mode(), InFloat64(), Constants(model, constants):
        return model(x.double())


def test_a_constant_keeps_the_rounding_of_the_own_precision() -> None:
    x = torch.ones(3)
    assert followed(lambda p, x: torch.full((), 0.1, dtype=x.dtype), x).item() == torch.tensor(0.1).item() != 0.1
    assert followed(lambda p, x: p.exp().sum().item(), x) == torch.tensor([0.5, 0.7]).exp().sum().item()
    sizes = followed(lambda p, x: torch.linspace(0, 1, 7, dtype=x.dtype), x)
    assert torch.equal(sizes, torch.linspace(0, 1, 7).double())
    assert sizes.dtype == torch.float64


def test_what_differs_by_more_than_rounding_is_left() -> None:
    """A number that went through Python may come from the input, so that a mistake before it would be hidden."""
    x = torch.tensor([1.0, 2.0])

    def through_python(p: Tensor, x: Tensor) -> Tensor:
        return torch.tensor([x.sum().item()], dtype=x.dtype)

    assert followed(through_python, x, lambda p, x: through_python(p, x * (1 + 1e-5))).item() == 3.0 * (1 + 1e-5)


def test_constants_that_only_one_run_makes_are_passed_over() -> None:
    """As those that a norm makes which is gone, or that take its place."""

    def make(p: Tensor, x: Tensor) -> Any:
        return [torch.full((), value, dtype=x.dtype) for value in (0.1, 0.2, 0.3)]

    def other(p: Tensor, x: Tensor) -> Any:
        return [torch.full((), value, dtype=x.dtype) for value in (0.2, 0.7, 0.3)]

    found = [float(value) for value in followed(make, torch.ones(3), other)]
    assert found == [torch.tensor(0.2).item(), 0.7, torch.tensor(0.3).item()]
