"""Equalising: networks whose channels are rescaled without a change of the outputs, and networks that refuse."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule_cases import Net, parameter
from support import assert_untouched, snapshot
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import bnfuse
from bnfuse.equalisation.ceilings import Ceiling
from bnfuse.errors import NothingEqualisedWarning
from bnfuse.model.sandbox import run
from bnfuse.tools.zoo.randomise import randomise_

X = torch.randn(4, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def conv(inputs: int = 8, outputs: int = 8, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def uneven(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64, the output channels of its layers of very different size, their inputs to match."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            weight = module.weight.data
            for axis in (0, 1):
                shape = [1] * weight.dim()
                shape[axis] = weight.shape[axis]
                weight.mul_(torch.exp(1.2 * torch.randn(shape, generator=generator)))
            if module.bias is not None:
                module.bias.data.copy_(0.3 * torch.randn(module.bias.shape, generator=generator))
    return randomise_(model.double(), seed).eval()


@dataclass(frozen=True)
class Case:
    """A network, and the names of the weights that change."""

    name: str
    make: Callable[[], nn.Module]
    edited: str
    relu6: str = "keep"

    def __str__(self) -> str:
        return self.name


def _cat(m: Any, x: Tensor) -> Tensor:
    return m.c(F.relu(torch.cat([m.a(x), m.b(x)], 1)))


def _residual(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    x = x + m.c(F.relu(m.b(x)))
    return m.d(x + F.max_pool2d(x, 3, 1, 1))


def _shared(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.c(F.relu(m.b(F.relu(m.b(x)))))


def _gated(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.c(x * torch.sigmoid(m.b(F.adaptive_avg_pool2d(x, 1))))


CASES = [
    Case("chain", lambda: nn.Sequential(conv(3), nn.ReLU(), conv(8, 5)), "0 2"),
    Case("without biases", lambda: nn.Sequential(conv(3, bias=False), nn.ReLU(), conv(bias=False)), "0 2"),
    Case("linear between", lambda: nn.Sequential(conv(3), conv(8, 5, 1)), "0 1"),
    Case(
        "pooling and linear",
        lambda: nn.Sequential(conv(3), nn.ReLU(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(72, 4)),
        "0 4",
    ),
    Case("residual", lambda: Net(_residual, a=conv(3), b=conv(), c=conv(), d=conv()), "a b c d"),
    Case("concatenation", lambda: Net(_cat, a=conv(3), b=conv(3, 4), c=conv(12)), "a b c"),
    Case(
        "depthwise", lambda: nn.Sequential(conv(3), nn.ReLU(), conv(groups=8), nn.LeakyReLU(), conv(8, 5, 1)), "0 2 4"
    ),
    Case(
        "grouped", lambda: nn.Sequential(conv(3), nn.ReLU(), conv(groups=2), nn.ReLU(), conv(8, 5, groups=1)), "0 2 4"
    ),
    Case(
        "transposed",
        lambda: nn.Sequential(conv(3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, 2, groups=2), conv(6)),
        "0 2 3",
    ),
    Case("shared weight", lambda: Net(_shared, a=conv(3), b=conv(), c=conv()), "a b c"),
    Case("weight norm", lambda: nn.Sequential(weight_norm(conv(3)), nn.ReLU(), conv(8, 5)), "0 2"),
    Case(
        "matrix",
        lambda: Net(lambda m, x: F.relu(m.a(x).mean((2, 3))) @ m.b.p, a=conv(3), b=parameter([[1.0, 2.0]] * 8)),
        "a b",
    ),
    Case("gate", lambda: Net(_gated, a=conv(3), b=conv(), c=conv()), "a b c"),
    Case(
        "norms that stay", lambda: nn.Sequential(conv(3), nn.ReLU(), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 5)), "0 2 4"
    ),
    Case("tanh refuses", lambda: nn.Sequential(conv(3), nn.Tanh(), conv(), nn.ReLU(), conv(8, 5)), "2 4"),
    Case("relu6 refuses", lambda: nn.Sequential(conv(3), nn.ReLU6(), conv(), nn.ReLU(), conv(8, 5)), "2 4"),
    Case(
        "ceilings",
        lambda: nn.Sequential(conv(3), nn.ReLU6(), conv(groups=8), nn.Identity(), nn.ReLU6(), conv(8, 5)),
        "0 1 2 3 5",
        "ceilings",
    ),
]


BY_NAME = {case.name: case for case in CASES}


def changed(before: nn.Module, after: nn.Module) -> set[str]:
    """The modules whose weights or buffers differ."""
    old = {**dict(before.named_parameters()), **dict(before.named_buffers())}
    new = {**dict(after.named_parameters()), **dict(after.named_buffers())}
    return {name.split(".")[0] for name, tensor in new.items() if name not in old or not torch.equal(tensor, old[name])}


def relative_error(expected: Tensor, found: Tensor) -> float:
    return float((expected - found).norm() / expected.norm())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_stay_and_weights_change(case: Case) -> None:
    model = uneven(case.make())
    before = snapshot(model)
    equalised = bnfuse.equalise(model, X, relu6=case.relu6)  # type: ignore[arg-type]
    assert_untouched(model, before)
    assert type(equalised) is type(model)
    assert changed(model, equalised) == set(case.edited.split())
    for scale in (1.0, 30.0):  # where ReLU6 saturates too
        other = (
            scale * torch.randn(2, 3, 11, 9, dtype=torch.float64) if "linear" not in case.name else scale * X.flip(0)
        )
        assert relative_error(run(model, (other,), {}), run(equalised, (other,), {})) < 1e-12


def noise(model: nn.Module, x: Tensor, per_channel: bool = False) -> float:
    """What rounding all weights, and what all layers but the first read, does to the output: noise over signal."""

    def rounded(tensor: Tensor, low: Tensor, high: Tensor) -> Tensor:
        step = (high - low) / 255
        return (tensor / step).round() * step

    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    expected = run(model, (x,), {})
    hooks: list[Any] = []
    saved = [layer.weight.data for layer in layers]
    for layer in layers:
        size = layer.weight.data.abs()
        size = size.amax(tuple(range(1, size.dim())), keepdim=True) if per_channel else size.amax()
        layer.weight.data = rounded(layer.weight.data, -size, size)
        if layer.in_channels == X.shape[1]:
            continue
        hooks.append(
            layer.register_forward_pre_hook(
                lambda module, args: (rounded(args[0], args[0].amin().clamp(max=0), args[0].amax().clamp(min=0)),)
            )
        )
    found = model(x).detach()
    for hook in hooks:
        hook.remove()
    for layer, weight in zip(layers, saved, strict=True):
        layer.weight.data = weight
    return float((found - expected).square().sum() / expected.square().sum())


@pytest.mark.parametrize("name", ["chain", "residual", "concatenation", "depthwise", "grouped", "ceilings"])
def test_rounding_costs_less(name: str) -> None:
    case = BY_NAME[name]
    before = after = 0.0
    for seed in range(3):
        model = uneven(case.make(), seed)
        equalised = bnfuse.equalise(model, X, relu6=case.relu6)  # type: ignore[arg-type]
        test = torch.randn(8, 3, 9, 9, dtype=torch.float64)
        before += math.log10(noise(model, test))
        after += math.log10(noise(equalised, test))
    assert after < before - 3 * 0.2, f"{10 * before / 3:.1f} dB before, {10 * after / 3:.1f} dB after"


def test_rows_may_have_steps_of_their_own() -> None:
    """Where each row has its own step, only what reads a channel, and the activations, gain from its scale."""
    before = by_tensor = by_channel = 0.0
    for seed in range(3):
        model = uneven(BY_NAME["depthwise"].make(), seed)
        before += math.log10(noise(model, X, True))
        by_tensor += math.log10(noise(bnfuse.equalise(model, X), X, True))
        by_channel += math.log10(noise(bnfuse.equalise(model, X, weights="channel"), X, True))
    assert by_channel < min(before - 3 * 0.2, by_tensor + 3 * 0.1)


def test_a_second_time_changes_little() -> None:
    model = uneven(BY_NAME["depthwise"].make())
    once = bnfuse.equalise(model, X)
    twice = bnfuse.equalise(once, X)
    first, second = noise(once, X), noise(twice, X)
    assert abs(math.log10(first / second)) < 0.2 < 1.0 < math.log10(noise(model, X) / first)


@pytest.mark.parametrize("case", [BY_NAME["residual"], BY_NAME["depthwise"], BY_NAME["ceilings"]], ids=str)
def test_powers_of_two_leave_every_bit(case: Case) -> None:
    model = uneven(case.make()).float()
    x = 5 * torch.randn(2, 3, 9, 9)
    equalised = bnfuse.equalise(model, X.float(), relu6=case.relu6, powers_of_two=True)  # type: ignore[arg-type]
    assert changed(model, equalised) == set(case.edited.split())
    assert torch.equal(run(model, (x,), {}), run(equalised, (x,), {}))


def test_ceilings_stand_where_norms_were_and_leave_nothing_behind() -> None:
    class Twice(nn.Module):
        """One activation for two places, as in EfficientNet-Lite: only the places of the norms are told apart."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = conv(3), conv(groups=8), conv(8, 5)
            self.norm_a, self.norm_b = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
            self.relu6 = nn.ReLU6()

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu6(self.norm_a(self.a(x)))
            return self.c(self.relu6(self.norm_b(self.b(x))))

    model = uneven(Twice())
    fused = bnfuse.fuse(model, X)
    equalised = bnfuse.equalise(fused, X, relu6="ceilings")
    assert isinstance(equalised.norm_a, Ceiling)
    assert isinstance(equalised.norm_b, Ceiling)
    assert type(equalised.relu6) is nn.ReLU6
    assert float(equalised.norm_a.upper.max()) == 6.0
    assert relative_error(run(model, (9 * X,), {}), run(equalised, (9 * X,), {})) < 1e-12
    model = nn.Sequential(conv(3), nn.Identity(), nn.ReLU6(), nn.Tanh(), conv(), nn.ReLU(), conv())
    kept = bnfuse.equalise(uneven(model), X, relu6="ceilings")
    assert type(kept[1]) is nn.Identity  # nothing to rescale behind it


def test_refusals_say_why(caplog: pytest.LogCaptureFixture) -> None:
    model = uneven(nn.Sequential(conv(3), nn.ReLU6(), conv(8, 5)))
    with (
        caplog.at_level(logging.INFO, "bnfuse"),
        pytest.warns(NothingEqualisedWarning, match=r"0 \(Conv2d\): hardtanh"),
    ):
        equalised = bnfuse.equalise(model, X)
    assert not changed(model, equalised)
    assert (
        "2 (Conv2d): its channels keep their scales, conv2d in 2 (Conv2d): its output cannot change units"
        in caplog.text
    )
    with pytest.warns(NothingEqualisedWarning, match="no layers"):
        bnfuse.equalise(nn.ReLU(), X)


def test_wrong_arguments() -> None:
    model = uneven(BY_NAME["chain"].make())
    with pytest.raises(bnfuse.InputError, match="weights= takes one of a few words"):
        bnfuse.equalise(model, X, weights="row")  # type: ignore[arg-type]
    with pytest.raises(bnfuse.InputError, match="relu6= takes one of a few words"):
        bnfuse.equalise(model, X, relu6="relu")  # type: ignore[arg-type]

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(3), conv()

        def forward(self, x: Tensor, more: bool = False) -> Tensor:
            x = self.a(x)
            return self.b(F.relu(x)) if more else self.b(x)

    with pytest.raises(bnfuse.InputError, match="no output has a gradient"):
        bnfuse.equalise(Net(lambda m, x: m.b(F.relu(m.a(x))).argmax(1), a=conv(3), b=conv()).double(), X)
    with pytest.raises(bnfuse.InputError, match="other operators"):
        bnfuse.equalise(Branches().double(), X, data=(X, True))


def test_a_wrong_edit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from bnfuse.equalisation import equalising

    made = equalising._changes

    def wrong(*arguments: Any) -> Any:
        changes = made(*arguments)
        return type(changes)(edits=changes.edits[:1])

    monkeypatch.setattr(equalising, "_changes", wrong)
    with pytest.raises(bnfuse.VerificationError):
        bnfuse.equalise(uneven(BY_NAME["chain"].make()), X)
