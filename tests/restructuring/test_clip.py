"""Norms beside activations that only clip become the bounds of the clip, or an addition."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnfuse
from bnfuse.model.clip import Clip
from bnfuse.tools.zoo.randomise import randomise_

Bounded = Callable[[], nn.Module]

BOUNDED: dict[str, Bounded] = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "relu6": nn.ReLU6,
    "hardtanh": lambda: nn.Hardtanh(-1.5, 0.5),
    "bounds above 0": lambda: nn.Hardtanh(0.25, 2.0),
}

MIXED = torch.tensor([-0.8, 1.5, 0.0, -2.0, 1e-12, 0.4, 0.0, -1e-9])
POSITIVE = torch.tensor([0.8, 1.5, 0.3, 2.0, 1.1, 0.4, 0.9, 0.2])


class Net(nn.Module):
    """What neither a norm nor a scale passes on both sides, and parts of the kind in between."""

    def __init__(self, activation: nn.Module, kernel: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.activation = activation
        self.last = nn.Conv2d(8, 8, kernel, padding=kernel // 2)


class Before(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.last(self.activation(self.norm(torch.sigmoid(self.first(x))))))


class Behind(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.last(F.max_pool2d(self.norm(self.activation(self.first(x))), 2)))


class Function(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.last(F.relu(self.norm(torch.sigmoid(self.first(x))))))


def made(kind: type[Net], activation: Bounded, gains: Tensor, kernel: int = 1) -> tuple[Net, Tensor]:
    """A network in float64 with random norms but for their gains, and an input."""
    torch.manual_seed(0)
    model = randomise_(kind(activation(), kernel)).eval().double()
    with torch.no_grad():
        model.norm.weight.copy_(gains)
    return model, torch.randn(2, 8, 7, 7, dtype=torch.float64)


def error(model: nn.Module, fused: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        expected = model(x)
        return float((fused(x) - expected).norm() / expected.norm())


def held(clip: nn.Module) -> set[str]:
    assert isinstance(clip, Clip)
    return {name for name, _ in clip.named_parameters()}


@pytest.mark.parametrize("activation", BOUNDED)
@pytest.mark.parametrize("gains", [MIXED, POSITIVE, -POSITIVE], ids=["mixed", "positive", "negative"])
def test_a_norm_before_a_clip_goes(activation: str, gains: Tensor) -> None:
    """Negative gains and gains of 0 too, though no rule lets them pass the activation itself."""
    model, x = made(Before, BOUNDED[activation], gains)
    assert len(bnfuse.plan(model, x).kept) == 1
    fused = bnfuse.fuse(model, x, restructure="clip")
    assert isinstance(fused.norm, nn.Identity)
    assert error(model, fused, x) < 1e-12
    one_side = {"positive": {"lower"}, "negative": {"upper"}}
    name = "positive" if gains is POSITIVE else "negative"
    relu = activation.startswith("relu") and activation != "relu6"
    assert held(fused.activation) == (one_side[name] if relu and gains is not MIXED else {"lower", "upper"})


@pytest.mark.parametrize("activation", BOUNDED)
def test_a_norm_behind_a_clip_goes(activation: str) -> None:
    model, x = made(Behind, BOUNDED[activation], torch.where(MIXED.abs() < 1e-6, 0.0, MIXED))
    assert len(bnfuse.plan(model, x).kept) == 1
    fused = bnfuse.fuse(model, x, restructure="clip")
    assert isinstance(fused.norm, nn.Identity)
    assert error(model, fused, x) < 1e-12


def test_what_pads_gets_the_shift_from_the_clip() -> None:
    """A shift cannot go on where zeros are put in."""
    model, x = made(Before, nn.ReLU, POSITIVE, 3)
    fused = bnfuse.fuse(model, x, restructure="clip")
    assert held(fused.activation) == {"lower", "bias"}
    assert error(model, fused, x) < 1e-12


@pytest.mark.parametrize("activation", [nn.ReLU6, nn.ReLU])
def test_three_operators_are_not_put_in_the_place_of_two(activation: Bounded) -> None:
    model, x = made(Before, activation, POSITIVE * torch.tensor([1.0, -1.0] * 4), 3)
    plan = bnfuse.plan(model, x, restructure="clip")
    assert len(plan.kept) == 1
    assert not plan.steps
    assert [one.reason.code for one in plan.unchanged] == ["clip-takes-longer"]


def test_a_norm_before_a_function_becomes_an_addition() -> None:
    """Where a positive scale passes, only the shift has to stay."""
    model, x = made(Function, nn.Identity, POSITIVE)
    fused = bnfuse.fuse(model, x, restructure="clip")
    assert held(fused.norm.get_submodule("shift")) == {"bias"}
    assert isinstance(fused.norm.get_submodule("norm"), nn.Identity)
    assert error(model, fused, x) < 1e-12
    model, x = made(Function, nn.Identity, MIXED)
    plan = bnfuse.plan(model, x, restructure="clip")
    assert len(plan.kept) == 1
    assert not plan.steps
    assert not plan.unchanged


def test_nothing_is_clipped_where_the_norm_goes_plainly() -> None:
    torch.manual_seed(0)
    model = randomise_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))).eval()
    assert not bnfuse.plan(model, torch.randn(1, 3, 8, 8), restructure="clip").steps


@pytest.mark.parametrize("shape", [(4, 8), (4, 8, 5), (2, 8, 3, 4, 5)])
def test_any_number_of_axes(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    axes = len(shape) - 2
    norm, layer = ((nn.BatchNorm1d, nn.Linear), (nn.BatchNorm1d, nn.Conv1d), (), (nn.BatchNorm3d, nn.Conv3d))[axes]
    end = layer(8, 2) if axes == 0 else layer(8, 2, 1)
    model = randomise_(nn.Sequential(nn.Tanh(), norm(8), nn.ReLU(), end)).eval().double()
    x = torch.randn(shape, dtype=torch.float64)
    fused = bnfuse.fuse(model, x, restructure=True)
    assert isinstance(fused[1], nn.Identity)
    assert fused[2].lower.shape == (8, *[1] * axes)
    assert error(model, fused, x) < 1e-12


class Dense(nn.Module):
    """As in DenseNet: every norm reads what others read too, with an activation of one module or two."""

    def __init__(self, shared: bool = False, inplace: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 * size) for size in (1, 2, 3))
        self.activations = nn.ModuleList([nn.ReLU()] * 3 if shared else [nn.ReLU(inplace) for _ in range(3)])
        self.layers = nn.ModuleList(nn.Conv2d(4 * size, 4, 1) for size in (1, 2, 3))

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for norm, activation, layer in zip(self.norms, self.activations, self.layers, strict=True):
            x = torch.cat([x, layer(activation(norm(x)))], 1)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x).mean((2, 3))


@pytest.mark.parametrize("inplace", [False, True])
def test_dense_blocks_lose_all_norms(inplace: bool) -> None:
    """What another method showed, in a call that was dropped, does not keep an activation from working out of place."""
    torch.manual_seed(0)
    model = randomise_(Dense(inplace=inplace)).eval().double()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    assert len(bnfuse.plan(model, x).kept) == 3
    fused, plan = bnfuse.fuse(model, x, restructure="clip"), bnfuse.plan(model, x, restructure="clip")
    assert not plan.kept
    assert error(model, fused, x) < 1e-12
    with torch.no_grad():
        assert torch.allclose(fused.forward_features(x), model.forward_features(x), rtol=0, atol=1e-12)
    assert len(plan.steps) == 3


def test_an_activation_of_several_norms_stays() -> None:
    """It cannot have the bounds of all of them."""
    torch.manual_seed(0)
    model = randomise_(Dense(shared=True)).eval().double()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    assert len(bnfuse.plan(model, x, restructure="clip").kept) == 3


class Activated(nn.BatchNorm2d):
    """With a built-in activation, as in timm."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


def test_an_activation_built_into_the_norm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomise_(nn.Sequential(nn.Tanh(), Activated(4), nn.Conv2d(4, 3, 1))).eval().double()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    fused = bnfuse.fuse(model, x, restructure="clip")
    assert held(fused[1]) == {"lower", "upper"}
    assert error(model, fused, x) < 1e-12
    bnfuse.save(fused, tmp_path / "fused.safetensors")
    again = nn.Sequential(nn.Tanh(), Activated(4), nn.Conv2d(4, 3, 1)).eval()
    with torch.no_grad():
        assert torch.equal(bnfuse.load(again, tmp_path / "fused.safetensors")(x), fused(x))


class Looked(Before):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2.0 if isinstance(self.activation, nn.ReLU) else 1.0)


def test_code_that_looks_at_the_activation_keeps_it() -> None:
    model, x = made(Looked, nn.ReLU, MIXED)
    plan = bnfuse.plan(model, x, restructure="clip")
    assert not plan.steps
    assert [one.reason.code for one in plan.unchanged] == ["layer-is-looked-at"]


class Weighed(Dense):
    """Which of two parameters it reads goes by a module, so that the operators are the same all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (self.one if isinstance(self.activations[1], nn.ReLU) else self.other)


def test_one_activation_that_is_looked_at_keeps_no_other() -> None:
    torch.manual_seed(0)
    model = randomise_(Weighed()).eval().double()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    fused = bnfuse.fuse(model, x, restructure="clip")
    assert error(model, fused, x) < 1e-12
    assert [type(norm) for norm in fused.norms] == [nn.Identity, nn.BatchNorm2d, nn.Identity]


class InPlace(Net):
    """Counts on the activation changing what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(torch.sigmoid(self.first(x)))
        self.activation(y)
        return torch.sigmoid(self.last(y))


def test_an_activation_whose_result_nobody_reads_stays_right() -> None:
    model, x = made(InPlace, BOUNDED["relu in place"], MIXED)
    plan = bnfuse.plan(model, x, restructure="clip")
    assert not plan.steps
    model.activation = nn.Sequential(nn.ReLU(inplace=True))
    assert not bnfuse.plan(model, x, restructure="clip").steps


def test_a_hook_on_the_activation_keeps_it() -> None:
    model, x = made(Before, nn.ReLU, MIXED)
    seen: list[Tensor] = []
    model.activation.register_forward_hook(lambda module, args, output: seen.append(output))
    assert not bnfuse.plan(model, x, restructure="clip").steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model, x = made(Before, nn.ReLU, torch.where(MIXED.abs() < 1e-6, 0.0, MIXED))
    model, x = model.to(dtype), x.to(dtype)
    fused = bnfuse.fuse(model, x, restructure="clip")
    assert isinstance(fused.norm, nn.Identity)
    assert fused.activation.lower.dtype == fused(x).dtype == dtype
    wide = copy.deepcopy(model).double()
    assert error(wide, fused.double(), x.double()) < 4 * torch.finfo(dtype).eps


def test_saved_and_loaded_and_trained_and_exported(tmp_path: Path) -> None:
    model, x = made(Before, nn.ReLU, POSITIVE, 3)
    fused = bnfuse.fuse(model, x, restructure="clip", options=bnfuse.Options(reversible=True))
    bnfuse.save(fused, tmp_path / "fused.safetensors")
    again = bnfuse.load(Before(nn.ReLU(), 3).eval(), tmp_path / "fused.safetensors")
    with torch.no_grad():
        assert torch.equal(again(x), fused(x))
        exported = torch.export.export(fused, (x,)).module()
        assert torch.equal(exported(x), fused(x))
        assert torch.equal(bnfuse.unfuse(fused)(x), model(x))
    again.train()(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in again.parameters())


def test_another_number_of_axes_is_no_silent_matter() -> None:
    """A norm for vectors takes sequences too, and what comes next may."""
    torch.manual_seed(0)
    model = randomise_(nn.Sequential(nn.Tanh(), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))).eval()
    fused = bnfuse.fuse(model, torch.randn(4, 8), restructure="clip")
    assert held(fused[2])
    with pytest.raises(ValueError, match=r"one axis more, got \(4, 8, 8\)"):
        fused(torch.randn(4, 8, 8))


def test_under_autocast_the_dtype_stays() -> None:
    model, x = made(Before, nn.ReLU, MIXED)
    model, x = model.float(), x.float()
    fused = bnfuse.fuse(model, x, restructure="clip")
    found: list[torch.dtype] = []
    fused.activation.register_forward_hook(lambda module, args, output: found.append(output.dtype))
    with torch.no_grad(), torch.autocast("cpu"):
        fused(x)
    assert found == [torch.bfloat16]


def test_a_clip_in_code_is_as_it_was() -> None:
    """PyTorch has an operator of that name."""
    torch.manual_seed(0)
    model = randomise_(nn.Sequential(nn.Tanh(), nn.BatchNorm2d(4), CalledClip(), nn.Conv2d(4, 3, 1))).eval().double()
    with torch.no_grad():
        model[1].weight.abs_()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    fused = bnfuse.fuse(model, x, restructure="clip")
    assert held(fused[1].get_submodule("shift")) == {"bias"}
    assert error(model, fused, x) < 1e-12


class CalledClip(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clip(0)


class Stream(nn.Module):
    """Of two norms on one stream only one can go: ``x + n2(gelu(conv(x)))`` with ``x = n1(gelu(...))``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mid, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 1)
        self.next = nn.Conv2d(8, 8, 1)
        self.before, self.behind = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(F.gelu(self.first(x)))
        return self.last(F.gelu(self.next(x + self.behind(F.gelu(self.mid(x))))))


def test_no_addition_takes_the_place_of_a_norm_that_goes_without() -> None:
    torch.manual_seed(0)
    model = randomise_(Stream(), dead=0.0).eval()
    x = torch.randn(1, 3, 9, 9)
    plain, clipped = bnfuse.plan(model, x), bnfuse.plan(model, x, restructure="clip")
    assert {one.norm for one in plain.fused} == {one.norm for one in clipped.fused} == {"behind"}
    assert not clipped.steps
