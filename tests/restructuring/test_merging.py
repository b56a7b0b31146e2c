"""Parallel branches become one layer where that takes less, and nothing else does."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from counting import work
from rule_cases import Net
from support import assert_untouched, fresh, prepared, snapshot
from torch import Tensor, nn

import bnfuse
from bnfuse.verify.measure import compare_outputs

EXACT = 1e-12
IMAGE = torch.randn(2, 4, 11, 11, dtype=torch.float64)
ROW = torch.randn(2, 4, 13, dtype=torch.float64)
VOLUME = torch.randn(2, 4, 5, 6, 7, dtype=torch.float64)
TOKENS = torch.randn(2, 5, 4, dtype=torch.float64)


def conv(size: Any = 3, inputs: int = 4, outputs: int = 4, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, **{"padding": size // 2 if isinstance(size, int) else 0, **options})


def conv_norm(size: int = 3, **options: Any) -> nn.Sequential:
    return nn.Sequential(conv(size, bias=False, **options), nn.BatchNorm2d(4))


class Counting(nn.Conv2d):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__(4, 4, 1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return super().forward(x)


class OneMore(nn.Conv2d):
    """Its weight and a tensor that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__(4, 4, 1, bias=False)
        self.constant = torch.eye(4)[..., None, None]

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight + self.constant.to(self.weight))


def parameter(*shape: int) -> nn.ParameterDict:
    return nn.ParameterDict({"p": nn.Parameter(torch.randn(*shape))})


def block(function: Callable[..., Any], **layers: nn.Module) -> nn.Module:
    """A block within a model, so that it can be replaced as a whole."""
    return Net(lambda m, x: m.block(F.relu(x)), block=Net(function, **layers))


def merged(model: nn.Module, x: Tensor, **options: Any) -> tuple[bnfuse.Plan, nn.Module]:
    """Fuse with merging, and check the outputs in float64 on fresh inputs of several sizes, and that it takes no more."""
    before = snapshot(model)
    plan = bnfuse.plan(model, x, restructure="merge", **options)
    fused = bnfuse.fuse(model, x, restructure="merge", **options)
    assert_untouched(model, before)
    assert type(fused) is type(model)
    plain = bnfuse.fuse(model, x, **options) if any("Norm" in type(m).__name__ for m in model.modules()) else model
    for batch, seed in ((0, 1), (1, 2)):
        other = fresh(x, batch, seed)
        with torch.no_grad():
            for output in compare_outputs(model(other), fused(other)).outputs:
                assert not output.problem, output
                assert output.relative_l2 <= EXACT, output
    assert all(after <= before for after, before in zip(work(fused, x), work(plain, x), strict=True))
    return plan, fused


@dataclass(frozen=True)
class Case:
    """A network and what is left of it.

    Attributes:
        build: the network.
        layers: so many layers (and pools) run afterwards.
        x: the input.
        norms: so many norms stay.
    """

    name: str
    build: Callable[[], nn.Module]
    layers: int
    x: Tensor = IMAGE
    norms: int = 0


def three(function: Callable[..., Any], **options: Any) -> nn.Module:
    return block(
        function, a=conv(5, **options), b=conv(3, padding=2, dilation=2, **options), c=conv(groups=2, **options)
    )


def one_of(axes: int, **options: Any) -> Callable[[int], nn.Module]:
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
    return lambda size: kind(4, 4, size, padding=size // 2, **options)


MERGED = [
    Case("repvgg", lambda: block(lambda m, x: F.relu(m.a(x) + m.b(x) + m.n(x)), a=conv_norm(), b=conv_norm(1),
                                 n=nn.BatchNorm2d(4)), 1),
    Case("dilated and grouped", lambda: three(lambda m, x: F.relu(m.a(x) + m.b(x) + m.c(x))), 1),
    Case("no bias", lambda: three(lambda m, x: m.a(x) + m.b(x) + m.c(x), bias=False), 1),
    Case("a difference in place", lambda: three(lambda m, x: m.a(x).sub_(m.b(x)).add_(m.c(x), alpha=0.5)), 1),
    Case("nested sums", lambda: three(lambda m, x: (m.a(x) + (m.b(x) - x)) * 2 + m.c(x)), 1),
    Case("stride 2", lambda: block(lambda m, x: m.a(x) + m.b(x) + F.avg_pool2d(x, 1, 2), a=conv_norm(stride=2),
                                   b=conv_norm(1, stride=2)), 1),
    Case("every second place", lambda: block(lambda m, x: m.a(x) + x[:, :, ::2, ::2], a=conv(stride=2)), 1),
    Case("asymmetric kernels", lambda: block(
        lambda m, x: F.relu(m.a(x) + m.b(x) + m.c(x)), a=conv(3), b=conv((1, 3), padding=(0, 1)),
        c=conv((3, 1), padding=(1, 0))), 1),
    Case("padding by itself", lambda: block(lambda m, x: m.a(F.pad(x, (1, 1, 1, 1))) + m.b(x), a=conv(3, padding=0),
                                            b=conv(1)), 1),
    Case("padding same", lambda: block(lambda m, x: m.a(x) + m.b(x), a=conv(3, padding="same"), b=conv(1)), 1),
    Case("an even kernel", lambda: block(lambda m, x: m.a(x) + m.b(x), a=conv(2, padding="same"), b=conv(3)), 1),
    Case("depthwise", lambda: block(lambda m, x: m.n(m.a(x) + m.b(x) + x), a=conv_norm(groups=4), b=conv(1, groups=4),
                                    n=nn.BatchNorm2d(4)), 1),
    Case("scaled branches", lambda: block(
        lambda m, x: x + m.g.p * (m.a(x) - m.b(x) / m.h.p), a=conv_norm(), b=conv_norm(1), g=parameter(4, 1, 1),
        h=parameter(1)), 1),
    Case("gains that are computed", lambda: block(
        lambda m, x: x * m.g.p.view(1, -1, 1, 1).exp() + m.a(x), a=conv(), g=parameter(4)), 1),
    Case("average pooling", lambda: block(lambda m, x: m.a(x) + F.avg_pool2d(x, 3, 1, 1), a=conv()), 1),
    Case("a pool in a branch", lambda: block(lambda m, x: m.a(x) + F.avg_pool2d(m.b(x), 3, 2),
                                             a=conv(3, padding=0, stride=2), b=conv_norm(1)), 1),
    Case("a sequence in a branch", lambda: block(lambda m, x: m.a(x) + m.c(m.b(x)), a=conv(), b=conv(1, bias=False),
                                                 c=conv()), 1),
    Case("children around it", lambda: block(
        lambda m, x: m.after(m.a(y := m.before(x)) + m.b(y)), a=conv(), b=conv(1), before=nn.Sequential(conv(), nn.SiLU()),
        after=nn.GELU()), 2),
    Case("weights that are computed", lambda: block(
        lambda m, x: m.a(x) + m.b(x), a=nn.utils.parametrizations.weight_norm(conv()),
        b=nn.utils.parametrizations.spectral_norm(conv(1))), 1),
    Case("weights that are computed of a constant", lambda: block(
        lambda m, x: m.a(x) + m.b(x), a=conv(), b=OneMore()), 1),
    Case("a block with a constant that runs twice", lambda: Net(
        lambda m, x: m.t(m.t(x)), t=Net(lambda m, x: F.relu(m.a(x) + m.b(x)), a=conv(), b=OneMore())), 2),
    Case("norms in the model itself", lambda: Net(
        lambda m, x: F.relu(m.n(m.a(x)) + m.o(m.b(x)) + x).exp(), a=conv(), b=conv(1), n=nn.BatchNorm2d(4),
        o=nn.BatchNorm2d(4)), 1),
    Case("dropout", lambda: block(lambda m, x: m.d(m.a(x)) + F.dropout(m.b(x), 0.5, m.training), a=conv(), b=conv(1),
                                  d=nn.Dropout(0.5)), 1),
    Case("a block that runs twice", lambda: Net(
        lambda m, x: m.t(m.t(x)), t=Net(lambda m, x: F.relu(m.a(x) + m.b(x)), a=conv(), b=conv(1))), 2),
    Case("a block under two names", lambda: (lambda t: nn.Sequential(t, nn.ReLU(), t))(
        Net(lambda m, x: m.a(x) + m.b(x), a=conv(), b=conv(1))), 2),
    Case("one axis", lambda: block(lambda m, x: m.a(x) + m.b(x) + x, a=one_of(1)(3), b=one_of(1, groups=2)(5)), 1, ROW),
    Case("one axis, groups", lambda: block(lambda m, x: m.n(m.a(x) + m.b(x)) + x, a=one_of(1)(5), b=one_of(1)(3),
                                           n=nn.BatchNorm1d(4)), 1, ROW),
    Case("three axes", lambda: block(lambda m, x: m.n(m.a(x) + m.b(x)) + x, a=one_of(3)(3), b=one_of(3)(1),
                                     n=nn.BatchNorm3d(4)), 1, VOLUME),
    Case("linear layers", lambda: block(lambda m, x: m.a(x) + 0.5 * m.c(m.b(x)), a=nn.Linear(4, 4),
                                        b=nn.Linear(4, 2, bias=False), c=nn.Linear(2, 4)), 1, TOKENS),
    Case("a kernel of a child alone", lambda: block(lambda m, x: m.a(x) + x, a=conv()), 1),
    # Code that stays: the model's own forward cannot be replaced.
    Case("in the model itself", lambda: Net(
        lambda m, x: F.relu(m.a(x) + m.b(x) + m.c(x)).flatten(1), a=conv(5), b=conv(3, padding=2, dilation=2),
        c=conv(groups=2)), 1),
    Case("in the model itself, with the tensor", lambda: Net(
        lambda m, x: F.relu(m.a(x) + m.b(x) + x) * 2, a=conv_norm(), b=conv_norm(1)), 1),
    Case("in the model itself, in place", lambda: Net(
        lambda m, x: m.b(x).add_(m.a(x)).sub_(m.c(x) * 2), a=conv(), b=conv(1), c=conv(1, groups=2)), 1),
    Case("one of three takes more", lambda: Net(
        lambda m, x: m.a(x) + m.b(x) + m.c(x), a=conv(), b=conv(3, padding=2, dilation=2), c=conv(1)), 2),
    Case("twice in the code", lambda: Net(
        lambda m, x: F.relu(m.a(x) + m.b(x)) + F.silu(m.a(y := x + 1) + m.b(y)), a=conv(), b=conv(1)), 2),
    # Layers one after the other.
    Case("wide between", lambda: nn.Sequential(conv(1, 4, 32), nn.BatchNorm2d(32), conv(3, 32, 4, padding=0), nn.ReLU()), 1),
    Case("wide between, no bias", lambda: nn.Sequential(conv(1, 4, 32, bias=False), conv(3, 32, 4), nn.ReLU()), 1),
    Case("wide between vectors", lambda: nn.Sequential(nn.Linear(4, 32), nn.Linear(32, 4), nn.GELU()), 1, TOKENS),
]  # fmt: skip


@pytest.mark.parametrize("case", MERGED, ids=lambda case: case.name)
def test_what_becomes_one_layer(case: Case) -> None:
    model = prepared(case.build(), dead=0.25)
    plan, fused = merged(model, case.x)
    assert work(fused, case.x)[0] == case.layers
    assert work(fused, case.x)[:2] < work(model, case.x)[:2]
    assert len(plan.kept) == case.norms
    assert [step.kind for step in plan.steps] == ["merge"] * len(plan.steps) != []
    assert all(decision.fused for decision in plan.decisions)


NOT_MERGED = [
    Case("a branch is read elsewhere", lambda: block(
        lambda m, x: (m.a(x) + (y := m.b(x))) * y.mean(), a=conv(), b=conv(1)), 2),
    Case("a branch is returned", lambda: Net(lambda m, x: (m.a(x) + (y := m.b(x)), y), a=conv(), b=conv(1)), 2),
    Case("an activation in a branch", lambda: block(lambda m, x: m.a(x) + F.relu(m.b(x)), a=conv(), b=conv(1)), 2),
    Case("other tensors", lambda: block(lambda m, x: m.a(x) + m.b(x.flip(2)), a=conv(), b=conv(1)), 2),
    Case("other strides", lambda: block(lambda m, x: m.a(x[:, :, :9, :9]) + m.b(x[:, :, 2:, 2:]), a=conv(), b=conv(1)), 2),
    Case("padded with what is there", lambda: block(
        lambda m, x: m.a(x) + m.b(x), a=conv(padding_mode="reflect"), b=conv(1)), 2),
    Case("padded around", lambda: block(lambda m, x: m.a(x) + m.b(x), a=conv(padding_mode="circular"), b=conv(1)), 2),
    Case("transposed", lambda: block(lambda m, x: m.a(x) + m.b(x), a=nn.ConvTranspose2d(4, 4, 3, padding=1), b=conv(1)), 2),
    Case("a pool that does not count", lambda: block(
        lambda m, x: m.a(x) + F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), a=conv()), 2),
    Case("the largest", lambda: block(lambda m, x: m.a(x) + F.max_pool2d(x, 3, 1, 1), a=conv()), 1),
    Case("a shift behind padding", lambda: block(lambda m, x: m.a(x) + m.c(m.b(x)), a=conv(), b=conv(1), c=conv()), 3),
    Case("one layer would take more", lambda: block(lambda m, x: m.a(x) + m.b(x), a=conv(groups=4), b=conv(1)), 2),
    Case("dilated apart", lambda: block(lambda m, x: m.a(x) + m.b(x), a=conv(), b=conv(padding=3, dilation=3)), 2),
    Case("narrow between", lambda: nn.Sequential(conv(3, 4, 4, groups=4), conv(1, 4, 4)), 2),
    Case("a shared layer", lambda: Net(
        lambda m, x: m.t(x) + m.u(m.t(x).relu()), t=(t := Net(lambda m, x: m.a(x) + m.b(x), a=conv(), b=conv(1))),
        u=Net(lambda m, x: m.b(x), b=t.b)), 5),
    Case("a gate", lambda: block(lambda m, x: m.a(x) + m.b(x) * x, a=conv(), b=conv(1)), 2),
    Case("a factor for each place", lambda: block(lambda m, x: m.a(x) + m.b(x) * m.g.p, a=conv(), b=conv(1),
                                                  g=parameter(11, 11)), 2),
    Case("a factor that is the size", lambda: block(lambda m, x: m.a(x) + m.b(x) / x.shape[2], a=conv(), b=conv(1)), 2),
    Case("a factor that is the size, in the model", lambda: Net(
        lambda m, x: (m.a(x) + m.b(x) / x.shape[2]).relu(), a=conv(), b=conv(1)), 2),
    Case("cut at a size", lambda: block(lambda m, x: m.a(x[:, :, :11]) + m.b(x[:, :, :11]), a=conv(), b=conv(1)), 2),
    Case("padded on one side", lambda: block(lambda m, x: m.a(F.pad(x, (2, 0, 1, 1))) + m.b(x), a=conv(padding=0),
                                             b=conv(1)), 2),
    Case("it counts its calls", lambda: block(lambda m, x: m.a(x) + m.b(x), a=conv(), b=Counting()), 2),
    Case("one of two calls", lambda: Net(lambda m, x: m.a(x) + m.b(x) + m.a(x.relu()), a=conv(), b=conv(1)), 3),
    Case("written in between", lambda: block(lambda m, x: m.a(x) + m.b(x.mul_(2)), a=conv(), b=conv(1)), 2),
]  # fmt: skip


@pytest.mark.parametrize("case", NOT_MERGED, ids=lambda case: case.name)
def test_what_stays(case: Case) -> None:
    model = prepared(case.build())
    plan = bnfuse.plan(model, case.x, restructure="merge")
    assert not plan.steps
    assert work(model, case.x)[0] == case.layers


def test_a_hook_keeps_its_block() -> None:
    model = prepared(block(lambda m, x: m.a(x) + m.b(x), a=conv(), b=conv(1)))
    seen: list[Tensor] = []
    model.block.b.register_forward_hook(lambda module, args, output: seen.append(output))
    plan = bnfuse.plan(model, IMAGE, restructure="merge")
    assert not plan.steps


def test_what_a_tied_weight_says() -> None:
    model = prepared(block(lambda m, x: m.a(x) + m.b(x), a=conv(), b=conv(1)))
    model.other = conv(1).double()
    model.other.weight = model.block.b.weight
    plan = bnfuse.plan(model, IMAGE, restructure="merge")
    assert not plan.steps
    assert [str(each) for each in plan.unchanged] == [
        "no merge of block: it is also other.weight, whose module did not run"
    ]


class Looking(nn.Module):
    """Its code asks its block for an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Net(lambda m, x: m.a(x) + m.b(x), a=conv(), b=conv(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(F.relu(x)) * self.block.a.out_channels


def test_a_block_that_is_looked_at_stays() -> None:
    model = prepared(Looking())
    plan = bnfuse.plan(model, IMAGE, restructure="merge")
    assert not plan.steps
    assert [each.reason.code for each in plan.unchanged] == ["layer-is-looked-at"]
    fused = bnfuse.fuse(model, IMAGE, restructure="merge")
    assert torch.equal(fused(IMAGE), model(IMAGE))


class Same(nn.Module):
    """Pads as TensorFlow does, which depends on the size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, padding=0, stride=2), conv(1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        more = [max((-(-size // 2) - 1) * 2 + 3 - size, 0) for size in x.shape[-2:]]
        return self.a(F.pad(x, (more[1] // 2, more[1] - more[1] // 2, more[0] // 2, more[0] - more[0] // 2))) + self.b(
            x
        )


@pytest.mark.parametrize("size", [10, 11])
def test_a_block_that_pads_by_its_size(size: int) -> None:
    model = prepared(nn.Sequential(nn.ReLU(), Same()))
    fused = bnfuse.fuse(model, torch.randn(1, 4, size, size).double(), restructure="merge")
    for other in (10, 11, 12, 13):
        x = torch.randn(1, 4, other, other).double()
        torch.testing.assert_close(fused(x), model(x), rtol=1e-12, atol=1e-12)


def test_kept_norms_keep_their_block() -> None:
    model = prepared(block(lambda m, x: m.a(x) + m.n(x), a=conv(), n=nn.BatchNorm2d(4)))
    plan = bnfuse.plan(model, IMAGE, restructure="merge", keep="block.n")
    assert not plan.steps
    assert [decision.norm for decision in plan.kept] == ["block.n"]


def test_a_merge_is_rounded_once() -> None:
    model = prepared(
        block(lambda m, x: m.n(m.a(x) + m.b(x)), a=conv_norm(), b=conv_norm(1), n=nn.BatchNorm2d(4))
    ).float()
    single = bnfuse.fuse(model, IMAGE.float(), restructure="merge").block
    double = bnfuse.fuse(copy.deepcopy(model).double(), IMAGE, restructure="merge").block
    assert torch.equal(single.weight, double.weight.float())
    assert torch.equal(single.bias, double.bias.float())


def test_a_norm_behind_a_merge_is_rounded_once_too() -> None:
    layers = {"block": Net(lambda m, x: m.a(x) + m.b(x) + x, a=conv_norm(), b=conv(1)), "norm": nn.BatchNorm2d(4)}
    model = prepared(Net(lambda m, x: m.norm(m.block(x)).relu(), **layers)).float()
    single = bnfuse.fuse(model, IMAGE.float(), restructure="merge").block
    double = bnfuse.fuse(copy.deepcopy(model).double(), IMAGE, restructure="merge").block
    assert torch.equal(single.weight, double.weight.float())


def test_the_new_layer_is_like_the_old_ones() -> None:
    model = prepared(block(lambda m, x: F.relu(m.a(x) + m.b(x)), a=conv(), b=conv(1))).to(
        memory_format=torch.channels_last
    )
    model = model.half().requires_grad_(False)
    fused = bnfuse.fuse(model.eval(), IMAGE.half(), restructure="merge").block
    assert type(fused.merged) is nn.Conv2d
    assert type(fused.activation) is nn.ReLU
    assert fused.merged.weight.dtype == torch.half
    assert not fused.merged.weight.requires_grad
    assert fused.merged.weight.is_contiguous(memory_format=torch.channels_last)


def made(seed: int) -> nn.Module:
    body = Net(
        lambda m, x: m.act(m.a(x) + m.b(x) + m.n(x)), a=conv_norm(), b=conv_norm(1), n=nn.BatchNorm2d(4), act=nn.SiLU()
    )
    tail = Net(lambda m, x: F.relu(m.a(x) + m.b(x)), a=conv(), b=conv(1))
    return prepared(nn.Sequential(body, tail, Sums(), nn.Flatten()), seed)


class Sums(nn.Module):
    """Code that stays, since it is given a list."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = conv(), conv(1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm(self.a(x) + self.b(x)) * x.mean((2, 3), keepdim=True)).sigmoid()


def test_files_and_pickles(tmp_path: Path) -> None:
    model = made(0)
    plan, fused = merged(model, IMAGE)
    assert {step.subject for step in plan.steps} == {"0", "1", "2.a"}
    bnfuse.save(fused, tmp_path / "merged.safetensors")
    loaded = bnfuse.load(made(1), tmp_path / "merged.safetensors")
    again = bnfuse.restructure(made(2), bnfuse.structure(fused).to_dict())
    again.load_state_dict(fused.state_dict())
    applied = plan.apply(model)
    inplace = copy.deepcopy(model)
    bnfuse.fuse(inplace, IMAGE, restructure="merge", inplace=True)
    pickled = pickle.loads(pickle.dumps(fused[2]))
    expected = fused(IMAGE)
    for other in (loaded, again, applied, inplace, copy.deepcopy(fused)):
        assert torch.equal(other.eval()(IMAGE), expected)
    assert torch.equal(pickled(IMAGE), fused[2](IMAGE))


class Nested(nn.Module):
    """Its activation stands in a list, and a block within that has branches of its own."""

    def __init__(self) -> None:
        super().__init__()
        inner = Net(lambda m, x: F.gelu(m.a(x) + m.b(x)), a=conv(), b=conv(1))
        self.after = nn.ModuleList([nn.Sequential(nn.PReLU(4), inner)])
        self.a, self.b = conv(), conv(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after[0](self.a(x) + self.b(x))


def test_a_block_within_what_stays_of_a_block() -> None:
    model = prepared(nn.Sequential(nn.ReLU(), Nested()))
    plan, fused = merged(model, IMAGE)
    assert [step.subject for step in plan.steps] == ["1", "1.after.0.1"]
    assert {"1.after.0.0.weight", "1.merged.weight", "1.after.0.1.merged.weight"} <= set(fused.state_dict())
    again = bnfuse.restructure(prepared(nn.Sequential(nn.ReLU(), Nested()), 1), bnfuse.structure(fused))
    again.load_state_dict(fused.state_dict())
    assert torch.equal(again(IMAGE), fused(IMAGE))


def test_one_of_many_blocks_is_looked_at() -> None:
    layers = {f"b{number}": Net(lambda m, x: F.relu(m.a(x) + m.b(x)), a=conv(), b=conv(1)) for number in range(6)}

    def forward(m: Any, x: Tensor) -> Tensor:
        for number in range(6):
            x = getattr(m, f"b{number}")(x)
        return x * m.b4.a.out_channels

    plan, _ = merged(prepared(Net(forward, **layers)), IMAGE)
    assert len(plan.steps) == 5
    assert [each.subject for each in plan.unchanged] == ["b4"]


def test_norms_that_go_along_are_in_the_plan() -> None:
    layers = {"a": conv(1), "n": nn.BatchNorm2d(4), "o": nn.BatchNorm2d(4)}
    model = block(lambda m, x: m.a(x) + m.n(x) + m.o(x), **layers)
    model.block.n.weight = model.block.o.weight
    plan, _ = merged(prepared(model), IMAGE)
    assert [(decision.norm, decision.direction) for decision in plan.fused] == [
        ("block.n", "merge"), ("block.o", "merge"),
    ]  # fmt: skip


def test_what_leaves_the_range_stays() -> None:
    model = prepared(block(lambda m, x: m.a(x) + m.b(x), a=conv(1), b=conv(1)))
    for layer in (model.block.a, model.block.b):
        layer.weight.data.fill_(40000.0)
    x = IMAGE.half() / 2**14
    model.half()
    plan = bnfuse.plan(model, x, restructure="merge")
    assert not plan.steps
    assert len(plan.unchanged) == 1


def test_export_and_tracing() -> None:
    fused = bnfuse.fuse(made(0), IMAGE, restructure="merge")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        assert torch.equal(torch.jit.trace(fused, IMAGE)(IMAGE), fused(IMAGE))
    assert torch.equal(torch.export.export(fused, (IMAGE,)).module()(IMAGE), fused(IMAGE))
    with torch.autocast("cpu", torch.bfloat16):
        assert fused.float()(IMAGE.float()).isfinite().all()


def test_what_is_printed() -> None:
    text = str(bnfuse.plan(made(0), IMAGE, restructure="merge"))
    assert "merge 0: 2 layers and their sum, as one Conv2d" in text.replace("\n    ", " ")
