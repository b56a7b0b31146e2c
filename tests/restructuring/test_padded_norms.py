"""A padding with what zeros become is one with zeros: blocks that write a norm's shift into the border of its result."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
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
IMAGE = torch.randn(2, 4, 9, 11, dtype=torch.float64)


def shift(norm: nn.BatchNorm2d) -> Tensor:
    """What a norm makes of zeros."""
    scale = norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)
    return (norm.bias.detach() - norm.running_mean * scale).view(1, -1, 1, 1)


def written(y: Tensor, border: Any, width: int) -> Tensor:
    y[:, :, 0:width, :] = border
    y[:, :, -width:, :] = border
    y[:, :, :, 0:width] = border
    y[:, :, :, -width:] = border
    return y


class NormAndPad(nn.Module):
    """As the Diverse Branch Block has it."""

    def __init__(self, channels: int, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.bn, self.width = nn.BatchNorm2d(channels, eps=eps), width

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        return written(F.pad(y, [self.width] * 4), shift(self.bn), self.width) if self.width else y


class NearIdentity(nn.Conv2d):
    """Adds the identity to its weight."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(channels, channels, 1, groups=groups, bias=False)
        self.identity = torch.eye(channels // groups).repeat(groups, 1)[..., None, None]

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight + self.identity.to(self.weight), groups=self.groups)


def conv_norm(*sizes: Any, **options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(*sizes, bias=False, **options), nn.BatchNorm2d(sizes[1]))


class Diverse(nn.Module):
    """The Diverse Branch Block (Ding et al. 2021)."""

    def __init__(self, inputs: int, out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        width = kernel // 2
        self.origin = conv_norm(inputs, out, kernel, stride=stride, padding=width, groups=groups)
        if groups < out:
            self.small = conv_norm(inputs, out, 1, stride=stride, groups=groups)
            first = [nn.Conv2d(inputs, out, 1, groups=groups, bias=False), NormAndPad(out, width)]
            self.pooled = nn.Sequential(*first, nn.AvgPool2d(kernel, stride), nn.BatchNorm2d(out))
        else:
            self.pooled = nn.Sequential(nn.AvgPool2d(kernel, stride, width), nn.BatchNorm2d(out))
        self.row = nn.Sequential(
            NearIdentity(inputs, groups),
            NormAndPad(inputs, width),
            nn.Conv2d(inputs, out, kernel, stride, groups=groups, bias=False),
            nn.BatchNorm2d(out),
        )
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.origin(x)
        if hasattr(self, "small"):
            y = y + self.small(x)
        return self.act(y + self.pooled(x) + self.row(x))


def merged(model: nn.Module, x: Tensor, kinds: Any = "merge") -> tuple[bnfuse.Plan, nn.Module]:
    """Fuse with merging, and check the outputs in float64 at several sizes."""
    before = snapshot(model)
    plan = bnfuse.plan(model, x, restructure=kinds)
    fused = plan.apply(model)
    assert_untouched(model, before)
    others = [fresh(x, 1, 1), F.pad(fresh(x, 0, 2), [0, 2] * (x.dim() - 2))]
    with torch.no_grad():
        for other in others:
            for output in compare_outputs(model(other), fused(other)).outputs:
                assert not output.problem, output
                assert output.relative_l2 <= EXACT, output
    return plan, fused


DIVERSE = {
    "same": {}, "stride": {"stride": 2}, "other channels": {"out": 6}, "groups": {"groups": 2},
    "groups, other channels, stride": {"out": 6, "groups": 2, "stride": 2}, "depthwise": {"groups": 4},
    "depthwise, stride": {"groups": 4, "stride": 2}, "kernel 5": {"kernel": 5},
    "kernel 5, stride": {"kernel": 5, "stride": 2}, "kernel 1": {"kernel": 1},
}  # fmt: skip


@pytest.mark.parametrize("options", DIVERSE.values(), ids=DIVERSE)
def test_diverse_branches_are_one_convolution(options: dict[str, int]) -> None:
    block = Diverse(4, **{"out": 4, **options})
    model = prepared(nn.Sequential(nn.ReLU(), block), dead=0.25)
    plan, fused = merged(model, IMAGE)
    assert plan.kept == ()
    assert [type(part) for part in fused[1].modules()] == [nn.Sequential, nn.Conv2d, nn.ReLU]
    assert fused[1].merged.groups == options.get("groups", 1)
    assert fused[1].merged.stride == (options.get("stride", 1),) * 2
    assert fused[1].merged.kernel_size == (options.get("kernel", 3),) * 2


def test_diverse_branches_of_a_network() -> None:
    blocks = [Diverse(8, 8), nn.MaxPool2d(2), Diverse(8, 12, stride=2, groups=4), Diverse(12, 12, 5, groups=12)]
    model = prepared(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *blocks, nn.Conv2d(12, 3, 1)))
    x = torch.randn(2, 3, 17, 17, dtype=torch.float64)
    plan, fused = merged(model, x, True)
    assert plan.kept == ()
    assert work(fused, x)[0] == 5
    verified = bnfuse.fuse(model, x, restructure=True)
    assert all(torch.equal(verified.state_dict()[name], tensor) for name, tensor in fused.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_rounded_once(dtype: torch.dtype) -> None:
    model = prepared(nn.Sequential(nn.ReLU(), Diverse(4, 6))).to(dtype)
    single = bnfuse.fuse(model, IMAGE.to(dtype), restructure="merge")[1].merged
    double = bnfuse.fuse(copy.deepcopy(model).double(), IMAGE, restructure="merge")[1].merged
    assert torch.equal(single.weight, double.weight.to(dtype))
    assert torch.equal(single.bias, double.bias.to(dtype))


def test_a_block_that_runs_at_several_sizes() -> None:
    model = prepared(Net(lambda m, x: [m.t(x), m.t(x[..., 1:, :-2])], t=Diverse(4, 4)))
    plan, fused = merged(model, IMAGE)
    assert plan.kept == ()
    assert work(fused, IMAGE)[0] == 2


# Other ways to write it ----------------------------------------------------------------------------------------------


def layer(name: str, axes: int) -> nn.Module:
    """A layer of four channels: ``a`` has no bias, ``b`` has one, ``c`` and ``d`` look around, ``n`` and ``o`` are norms."""
    kind: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
    if name in "no":
        return nn.BatchNorm2d(4) if axes == 2 else nn.BatchNorm3d(4) if axes == 3 else nn.BatchNorm1d(4)
    return kind(4, 4, {"a": 1, "b": 1, "c": 3, "d": 5, "e": 3}[name], bias=name != "a", padding=int(name == "e"))


@dataclass(frozen=True)
class Case:
    """A branch that pads; the block adds another one.

    Attributes:
        forward: of the branch.
        names: of its layers.
    """

    name: str
    forward: Callable[[Any, Tensor], Tensor]
    names: str = "anc"
    x: Tensor = IMAGE

    def model(self, *more: str) -> nn.Module:
        axes = self.x.dim() - 2
        layers = {name: layer(name, axes) for name in (*self.names, *more)}
        others = {"first": layer("e", axes), "second": layer("a", axes)}

        def forward(m: Any, x: Tensor) -> Tensor:
            return F.relu(m.first(x) + m.second(x) + self.forward(m, x))

        return prepared(nn.Sequential(nn.ReLU(), Net(forward, **others, **layers)))


def by_index(y: Tensor, border: Tensor) -> Tensor:
    for place in (0, -1):
        y[:, :, place] = border[:, :, 0]
        y.select(-1, place).copy_(border[..., 0])
    return y


def in_parts(y: Tensor, border: Tensor) -> Tensor:
    y[:, :, 0].fill_(7.0)
    y[:, :, :1, 1:-1] = border
    y[:, :, -1, 1:-1] = border[0, :, 0]
    y.narrow(3, 0, 1)[:] = border
    y[..., -1].copy_(border[0, :, 0])
    return y


def at_ends(y: Tensor, border: Tensor) -> Tensor:
    for axis in range(2, y.dim()):
        y.narrow(axis, 0, 1).copy_(border)
        y.narrow(axis, -1, 1).copy_(border)
    return y


def filled(y: Tensor, number: float | None = None) -> Tensor:
    for axis in (2, 3):
        for place in (0, -1):
            side = y.select(axis, place)
            _ = side.zero_() if number is None else side.fill_(number)
    return y


def padded(m: Any, x: Tensor, width: int = 1, value: float = 0.0) -> Tensor:
    return F.pad(m.n(m.a(x)), (width,) * 2 * (x.dim() - 2), value=value)


def shifted(m: Any, x: Tensor, value: float) -> Tensor:
    return F.pad(m.a(x) + 0.25, (1, 1, 1, 1), value=value)


def one_axis(m: Any, x: Tensor) -> Tensor:
    y = F.pad(m.n(m.a(x)), (0, 0, 1, 1))
    y[:, :, 0:1], y[:, :, -1:] = shift(m.n), shift(m.n)
    return F.avg_pool2d(y, (3, 1), 1)


WRITTEN = [
    Case("by index", lambda m, x: m.c(by_index(padded(m, x), shift(m.n)))),
    Case("in parts, some twice", lambda m, x: m.c(in_parts(padded(m, x), shift(m.n)))),
    Case("what a bias is", lambda m, x: m.c(written(F.pad(m.b(x), (1, 1, 1, 1)), m.b.bias.view(1, -1, 1, 1), 1)), "bc"),
    Case("a number", lambda m, x: m.c(shifted(m, x, 0.25)), "ac"),
    Case("a number that is written", lambda m, x: m.c(filled(shifted(m, x, 0.0), 0.25)), "ac"),
    Case("zeros that are written", lambda m, x: m.c(filled(F.pad(m.a(x), (1, 1, 1, 1), value=3.0), 0)), "ac"),
    Case("set to zero", lambda m, x: m.c(filled(F.pad(m.a(x), (1, 1, 1, 1), value=3.0))), "ac"),
    Case("a pool", lambda m, x: F.avg_pool2d(written(padded(m, x), shift(m.n), 1), 3, 1), "an"),
    Case("one axis of two", one_axis, "an"),
    Case("two norms", lambda m, x: m.c(written(
        F.pad(m.n(m.a(x)) - 2 * m.o(x), (1, 1, 1, 1)), shift(m.n) - 2 * shift(m.o), 1)), "anoc"),
    Case("a row", lambda m, x: m.c(at_ends(padded(m, x), shift(m.n)[..., 0])), x=torch.randn(2, 4, 9).double()),
    Case("a volume", lambda m, x: m.c(at_ends(padded(m, x), shift(m.n)[..., None])),
         x=torch.randn(2, 4, 5, 4, 6).double()),
    Case("in place afterwards", lambda m, x: m.c(written(padded(m, x), shift(m.n), 1)).mul_(-1)),
]  # fmt: skip


@pytest.mark.parametrize("case", WRITTEN, ids=lambda case: case.name)
def test_ways_to_write_it(case: Case) -> None:
    model = case.model()
    plan, fused = merged(model, case.x)
    assert work(fused, case.x)[0] == 1
    assert plan.kept == ()


def test_a_norm_without_parameters() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        border = -m.n.running_mean / torch.sqrt(m.n.running_var + m.n.eps)
        return m.c(written(F.pad(m.n(m.a(x)), (1, 1, 1, 1)), border.view(-1, 1, 1), 1)) + m.e(x)

    layers = {name: layer(name, 2) for name in "ace"}
    model = prepared(nn.Sequential(nn.ReLU(), Net(forward, n=nn.BatchNorm2d(4, affine=False), **layers)))
    _, fused = merged(model, IMAGE)
    assert work(fused, IMAGE)[0] == 1


def test_in_code_that_stays() -> None:
    layers = {"a": layer("a", 2), "n": NormAndPad(4, 1), "c": layer("c", 2), "e": layer("e", 2)}
    model = prepared(Net(lambda m, x: F.relu(m.e(x) + m.c(m.n(m.a(x)))) * x.mean(), **layers))
    plan, fused = merged(model, IMAGE)
    assert [step.subject for step in plan.steps] == ["e"]
    assert work(fused, IMAGE)[0] == 1


def test_one_after_the_other() -> None:
    def row(bias: bool) -> nn.Module:
        layers = nn.Conv2d(4, 32, 1, bias=bias), NormAndPad(32, 1), nn.Conv2d(32, 4, 3), nn.ReLU()
        return prepared(nn.Sequential(*layers))

    plan, fused = merged(row(bias=False), IMAGE)
    assert [type(part) for part in fused] == [nn.Conv2d, nn.Identity, nn.Identity, nn.ReLU]
    assert plan.kept == ()
    plan, fused = merged(row(bias=True), IMAGE)  # of the first layer's zeros the border is not made, but of the norm's
    assert [type(part) for part in fused] == [nn.Conv2d, nn.Conv2d, nn.Identity, nn.ReLU]
    assert (fused[0].padding, fused[1].padding) == ((0, 0), (1, 1))
    assert plan.kept == ()


class Edges(nn.Module):
    """A branch of ECBSR (Zhang et al. 2021): a layer, its bias in the border, and a fixed kernel with gains."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 1)
        self.scale, self.bias = nn.Parameter(torch.randn(channels, 1, 1, 1)), nn.Parameter(torch.randn(channels))
        kernel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        self.mask = nn.Parameter(kernel.expand(channels, 1, 3, 3).clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(F.conv2d(x, self.first.weight, self.first.bias), (1, 1, 1, 1), "constant", 0)
        y = written(y, self.first.bias.view(1, -1, 1, 1), 1)
        return F.conv2d(y, self.scale * self.mask, self.bias, groups=y.shape[1])


def test_edges_beside_a_convolution() -> None:
    block = Net(lambda m, x: m.act(m.e(x) + m.rep(x) + x), e=layer("e", 2), rep=Edges(4), act=nn.PReLU(4))
    model = prepared(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), block))
    _, fused = merged(model, IMAGE)
    assert work(fused[3], IMAGE)[0] == 1


# What stays ----------------------------------------------------------------------------------------------------------


def on_some(y: Tensor, border: Tensor, ends: tuple[int, ...]) -> Tensor:
    y[:, :, :1] = border
    y[:, :, -1:] = border
    for place in ends:
        y[..., place] = border[..., 0]
    return y


def counted(y: Tensor, border: Tensor) -> Tensor:
    """Counts the places from the other end."""
    y[:, :, :1], y[..., :1] = border, border
    y[:, :, y.shape[2] - 1 :] = border
    y[..., y.shape[3] - 1 :] = border
    return y


def read_before(m: Any, x: Tensor) -> Tensor:
    y = padded(m, x)
    return m.c(written(y, shift(m.n), 1)) * y.mean()


def read_between(m: Any, x: Tensor) -> Tensor:
    y = padded(m, x)
    mean = y.mean()
    return m.c(written(y, shift(m.n), 1)) * mean


def read_beside(m: Any, x: Tensor) -> Tensor:
    y = written(padded(m, x), shift(m.n), 1)
    return m.c(y) * y[:, :, :1].mean()


def at_first(y: Tensor, border: Tensor) -> Tensor:
    written(y[:1], border, 1)
    return y


def on_channels(y: Tensor, border: Tensor) -> Tensor:
    written(y[:, :2], border[:, :2], 1)
    return y


STAYS = [
    Case("another number", lambda m, x: m.c(written(padded(m, x), shift(m.n) * (1 + 1e-8), 1))),
    Case("another eps", lambda m, x: m.c(written(
        padded(m, x), (m.n.bias - m.n.running_mean * m.n.weight / (m.n.running_var + 1e-3).sqrt()).view(-1, 1, 1), 1))),
    Case("of one channel", lambda m, x: m.c(written(padded(m, x), shift(m.n)[:, 2:3], 1))),
    Case("of another norm", lambda m, x: m.c(written(padded(m, x), shift(m.o), 1) + 0 * m.o(x).mean()), "anoc"),
    Case("only some sides", lambda m, x: m.c(on_some(padded(m, x), shift(m.n), ()))),
    Case("three sides", lambda m, x: m.c(on_some(padded(m, x), shift(m.n), (0,)))),
    Case("more than the border", lambda m, x: m.c(written(padded(m, x), shift(m.n), 2))),
    Case("less than the border", lambda m, x: m.d(written(padded(m, x, 2), shift(m.n), 1)), "and"),
    Case("of one sample", lambda m, x: m.c(at_first(padded(m, x), shift(m.n)))),
    Case("of some channels", lambda m, x: m.c(on_channels(padded(m, x), shift(m.n)))),
    Case("of every place", lambda m, x: m.c(written(padded(m, x), shift(m.n) + torch.zeros_like(x[:1, :, :1, :1]), 1))),
    Case("by the size", lambda m, x: m.c(counted(padded(m, x), shift(m.n)))),
    Case("padded once more", lambda m, x: m.e(written(padded(m, x), shift(m.n), 1))[:, :, 1:-1, 1:-1], "ane"),
    Case("a kernel before", lambda m, x: m.c(written(F.pad(m.n(m.e(x)), (1, 1, 1, 1)), shift(m.n), 1)), "enc"),
    Case("another number by pad", lambda m, x: m.c(shifted(m, x, 0.5)), "ac"),
    Case("a number for all by pad", lambda m, x: m.c(padded(m, x, value=0.25))),
    Case("a number without end by pad", lambda m, x: m.c(padded(m, x, value=float("inf")))),
    Case("read afterwards", read_before),
    Case("read in between", read_between),
    Case("a part is read", read_beside),
]  # fmt: skip


@pytest.mark.parametrize("case", STAYS, ids=lambda case: case.name)
def test_what_stays(case: Case) -> None:
    model = case.model()
    plan = bnfuse.plan(model, case.x, restructure="merge")
    fused = plan.apply(model)
    wide = "c" if "c" in case.names else "d" if "d" in case.names else "e"
    assert type(fused[1].get_submodule(wide)) is nn.Conv2d
    assert [step.subject for step in plan.steps] == ["1.first"]  # the others are merged all the same
    x = fresh(case.x)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-9, atol=1e-12, equal_nan=True)


def test_why_a_norm_stays() -> None:
    plan = bnfuse.plan(STAYS[0].model(), IMAGE, restructure="merge")
    assert [(decision.norm, *(reason.code for reason in decision.reasons)) for decision in plan.kept] == [
        ("1.n", "parameters-read-elsewhere")
    ]


def test_statistics_that_make_another_border_keep_their_norm() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.pad(m.n(m.b(m.a(x))), (1, 1, 1, 1))
        return m.c(written(y, 0.5 - m.n.running_mean.view(1, -1, 1, 1), 1)) + x

    norm = nn.BatchNorm2d(4, affine=False)
    model = prepared(Net(forward, a=nn.Conv2d(4, 32, 1), b=nn.Conv2d(32, 4, 1), n=norm, c=layer("c", 2)))
    plan = bnfuse.plan(model, IMAGE, restructure="merge")
    assert not plan.steps
    assert [each.reason.code for each in plan.unchanged] == ["parameters-read-elsewhere"]
    assert [decision.norm for decision in plan.kept] == ["n"]


def test_a_hook_on_the_padding_keeps_it() -> None:
    model = prepared(nn.Sequential(nn.ReLU(), Diverse(4, 4)))
    seen: list[Tensor] = []
    model[1].row[1].register_forward_hook(lambda module, args, output: seen.append(output))
    plan = bnfuse.plan(model, IMAGE, restructure="merge")
    assert {decision.norm for decision in plan.kept} >= {"1.row.1.bn"}


def test_a_shift_that_is_read_elsewhere_keeps_its_block() -> None:
    model = prepared(Net(lambda m, x: m.t(x) * shift(m.t.row[1].bn), t=Diverse(4, 4)))
    plan = bnfuse.plan(model, IMAGE, restructure="merge")
    assert "t" not in {step.subject for step in plan.steps}
    assert "1 " not in {str(each) for each in plan.unchanged}


def test_what_is_returned_is_seen() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = written(F.pad(m.n(m.a(x)), (1, 1, 1, 1)), shift(m.n), 1)
        return F.relu(m.c(y) + m.e(x)), y[:, :, :1] if m.part else y

    for part in (False, True):
        model = prepared(Net(forward, **{name: layer(name, 2) for name in "ance"}))
        model.part = part
        assert not bnfuse.plan(model, IMAGE, restructure="merge").steps
