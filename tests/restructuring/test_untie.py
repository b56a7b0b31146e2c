"""Shared layers with a norm for each use: each use gets weights of its own, or the plan says why not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import assert_untouched, fused_and_checked, prepared, snapshot
from torch import Tensor, nn

import bnfuse

IMAGE = torch.randn(2, 4, 8, 8, dtype=torch.float64)


class Net(nn.Module):
    """Layers by name, and a function of (self, x) as the forward."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def conv(size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(4, 4, size, **{"padding": size // 2, "bias": False, **options})


def norm() -> nn.BatchNorm2d:
    return nn.BatchNorm2d(4)


def norms(count: int) -> nn.ModuleList:
    return nn.ModuleList(norm() for _ in range(count))


def levels(x: Tensor, count: int) -> list[Tensor]:
    return [F.avg_pool2d(x, 2**level) for level in range(count)]


class Head(nn.Module):
    """As in EfficientDet: separable convolutions that all levels share, and a norm for each level and depth."""

    def __init__(self, depth: int = 2, count: int = 3, bias: bool = True) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Sequential(conv(groups=4), nn.Conv2d(4, 4, 1, bias=bias)) for _ in range(depth))
        self.norms = nn.ModuleList(norms(count) for _ in range(depth))
        self.predict = conv()

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for level, y in enumerate(levels(x, len(self.norms[0]))):
            for layer, behind in zip(self.convs, self.norms, strict=True):
                y = F.silu(behind[level](layer(y)))
            found.append(self.predict(y))
        return found


class ConvModule(nn.Module):
    """As in RTMDet: the convolution of the first level stands in the modules of all levels."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn = layer, norm()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class SharedModules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shared = conv()
        self.levels = nn.ModuleList(ConvModule(shared) for _ in range(4))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [level(y) for level, y in zip(self.levels, levels(x, 4), strict=True)]


class NormAct(nn.BatchNorm2d):
    """A norm with a built-in activation."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.LeakyReLU(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


def tied(count: int, uses: int = 1) -> Net:
    """Layers that have one weight, each with as many norms as uses."""

    def forward(m: Any, x: Tensor) -> Tensor:
        for place in range(count):
            for use in range(uses):
                x = torch.sigmoid(m.n[place * uses + use](m.c[place](x)))
        return x

    net = Net(forward, c=nn.ModuleList(conv(bias=True) for _ in range(count)), n=norms(count * uses))
    for layer in net.c[1:]:
        layer.weight = net.c[0].weight
    return net


def tie(net: nn.Module) -> nn.Module:
    net.a.weight = net.c.weight
    return net


@dataclass
class Case:
    """A network, how many of its norms go when it is untied, and the parameters that it costs."""

    make: Callable[[], nn.Module]
    norms: int
    price: int


W, B = 4 * 4 * 9, 4
"""The parameters of a weight and a bias."""

UNTIED = {
    "two levels": Case(
        lambda: Net(lambda m, x: [torch.sigmoid(n(m.c(y))) for n, y in zip(m.n, levels(x, 2), strict=True)],
                    c=conv(), n=norms(2)), 2, W),
    "called twice in a row": Case(
        lambda: Net(lambda m, x: torch.sigmoid(m.n[1](m.c(torch.sigmoid(m.n[0](m.c(x)))))), c=conv(), n=norms(2)), 2, W),
    "a shared head of two depths": Case(Head, 6, 2 * 2 * (16 + 4)),
    "a shared head without biases": Case(lambda: Head(bias=False), 6, 2 * 2 * 16),
    "one layer in the modules of all levels": Case(SharedModules, 4, 3 * W),
    "norms with activations": Case(
        lambda: Net(lambda m, x: [n(m.c(y)).sin() for n, y in zip(m.n, levels(x, 3), strict=True)],
                    c=conv(bias=True), n=nn.ModuleList(NormAct(4) for _ in range(3))), 3, 2 * (W + B)),
    "a norm that two uses share, and one of its own": Case(
        lambda: Net(lambda m, x: m.a(m.c(x)).sin() + m.a(m.c(x + 1)).cos() + m.b(m.c(x - 1)).sin(),
                    c=conv(), a=norm(), b=norm()), 2, W),
    "linear": Case(
        lambda: Net(lambda m, x: (m.a(m.l(x[:, :, 0, 0])).sin(), m.b(m.l(x[:, :, 1, 1])).sin()),
                    l=nn.Linear(4, 5), a=nn.BatchNorm1d(5), b=nn.BatchNorm1d(5)), 2, 25),
    "transposed, with circular padding beside": Case(
        lambda: Net(lambda m, x: (m.a(m.t(x)).sin(), m.b(m.t(-x)).sin(), m.d(m.c(x)).sin(), m.e(m.c(-x)).sin()),
                    t=nn.ConvTranspose2d(4, 4, 3, 2, 1, output_padding=1, bias=False), a=norm(), b=norm(),
                    c=conv(padding_mode="circular"), d=norm(), e=norm()), 4, 2 * W),
    "a weight tied between two modules": Case(lambda: tied(2), 2, W),
    "a weight tied in three places": Case(lambda: tied(3), 3, 2 * W),
    "tied in two places, each called twice": Case(lambda: tied(2, uses=2), 4, 3 * W + 2 * B),
    "tied, one of them without a norm": Case(
        lambda: tie(Net(lambda m, x: m.a(m.n(m.c(x)).sin()), c=conv(), a=conv(), n=norm())), 1, W),
    "tied to a layer that does not run": Case(
        lambda: tie(Net(lambda m, x: m.n(m.c(x)).sin(), c=conv(), a=conv(), n=norm())), 1, W),
    "norms before a shared layer": Case(
        lambda: Net(lambda m, x: [m.c(n(y.sin())) for n, y in zip(m.n, levels(x, 2), strict=True)],
                    c=conv(padding=0, bias=True), n=norms(2)), 2, W + B),
    "tied, all in one module": Case(lambda: Net(lambda m, x: m.s(x), s=Head(1)), 3, 2 * (16 + 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", UNTIED)
def test_each_use_gets_its_own_weights(name: str) -> None:
    case = UNTIED[name]
    model = prepared(case.make())
    assert len(bnfuse.plan(model, IMAGE).fused) < case.norms
    plan, fused = fused_and_checked(model, IMAGE, restructure="untie")
    assert [decision.norm for decision in plan.kept] == []
    assert len(plan.fused) == case.norms
    assert {decision.norm for decision in plan.fused} <= dict(model.named_modules()).keys()  # by the names that it has
    assert sum(step.parameters for step in plan.steps) == case.price
    assert {step.kind for step in plan.steps} == {"untie"}
    applied = plan.apply(model)
    for one, other in zip(applied.parameters(), fused.parameters(), strict=True):
        assert torch.equal(one, other)


class Reader(nn.Module):
    """Two uses of a convolution, and code that looks at layers."""

    def __init__(self, look: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.c, self.n = conv(stride=2), norms(2)
        self.look = look

    def forward(self, x: Tensor) -> Any:
        factor = self.look(self, x)
        return [factor * n(self.c(y)).sigmoid() for n, y in zip(self.n, (x, -x), strict=True)]


def hooked() -> nn.Module:
    net = Reader(lambda m, x: 1.0)
    net.c.register_forward_hook(lambda module, args, output: None)
    return net


class Optional(nn.Module):
    """A flag that leads past a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.n = conv(), norms(2)

    def forward(self, x: Tensor, features: bool = False) -> Any:
        y = self.c(x)
        if features:
            return y
        return self.n[0](y).sigmoid(), self.n[1](self.c(-x)).sigmoid()


class Domains(nn.Module):
    """Norms by domain, of which only two ran."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.n = conv(), norms(3)

    def forward(self, x: Tensor) -> Any:
        return [self.n[domain](self.c(x + domain)).sigmoid() for domain in (0, 1)]


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.n = conv(), norms(2)
        self.also = [self.c]

    def forward(self, x: Tensor) -> Any:
        return [n(self.also[0](y)).sigmoid() for n, y in zip(self.n, (x, -x), strict=True)]


class Padded(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1), value=0.5))


class Between(nn.Module):
    """A size is read between the layer and the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.n = conv(stride=2), norms(2)

    def forward(self, x: Tensor) -> Any:
        found = []
        for n, y in zip(self.n, (x, -x), strict=True):
            y = self.c(y)
            found.append(n(y).sigmoid().sum() / y.shape[-1])
        return found


def two(function: Callable[[Any, Tensor], Any], **layers: nn.Module) -> Net:
    return Net(function, **{"c": conv(), "a": norm(), "b": norm(), **layers})


LOOKS = "code around it does something else"

REFUSED = {
    "a use without a norm": (lambda: two(lambda m, x: (m.a(m.c(x)).sin(), m.b(m.c(-x)).sin(), m.c(2 * x).sin())),
                             "not every use of it has a norm"),
    "a use that is returned": (lambda: two(lambda m, x: (m.a(m.c(x)).sin(), m.b(m.c(-x)).sin(), m.c(2 * x))),
                               "an output of the model"),
    "a result that is also returned": (lambda: two(lambda m, x: (m.a(y := m.c(x)).sin(), m.b(m.c(-x)).sin(), y)),
                                       "it is an output"),
    "a result that is also read": (lambda: two(lambda m, x: (m.a(y := m.c(x)).sin() + y.cos(), m.b(m.c(-x)).sin())),
                                   "not every use of it has a norm"),
    "an activation between": (lambda: two(lambda m, x: (m.a(m.c(x)).sin(), m.b(m.c(-x).relu()).sin())), "not every use"),
    "a norm that also is used elsewhere": (
        lambda: two(lambda m, x: (m.a(m.c(x)).sin(), m.b(m.c(-x)).sin() + m.b(x).sin())), "also normalises"),
    "the weight is read elsewhere": (
        lambda: two(lambda m, x: (m.a(m.c(x)).sin(), m.b(m.c(-x)).sin(), m.c.weight.sum())), "also read by sum"),
    "the weight is used elsewhere": (
        lambda: two(lambda m, x: (m.a(m.c(x)).sin(), m.b(m.c(-x)).sin(), F.conv2d(x, m.c.weight).sin())),
        "also read by conv2d"),
    "a hook on the layer": (hooked, "a forward hook"),
    "a forward of its own": (lambda: two(lambda m, x: (m.a(m.c(x)).sin(), m.b(m.c(-x)).sin()),
                                         c=Padded(4, 4, 3, bias=False)), "Padded is not one"),
    "norms before it, and a use without one": (
        lambda: two(lambda m, x: (m.c(m.a(x.sin())), m.c(m.b(x.cos())), m.c(x.exp())), c=conv(padding=0)),
        "right before it that can go: see exp"),
    "a norm before it that is also read": (
        lambda: two(lambda m, x: (m.c(y := m.a(x.sin())), y.exp(), m.c(m.b(x.cos()))), c=conv(padding=0)), "see exp"),
    "held in a list": (Listed, "also refers to it from also"),
    "a flag that returns the result": (Optional, "an output"),
    "a norm that did not run": (Domains, "which did not run, may read it"),
    "code that reads a setting": (lambda: Reader(lambda m, x: float(m.c.out_channels)), LOOKS),
    "code that asks for the class of the layer": (lambda: Reader(lambda m, x: 2.0 if type(m.c) is nn.Conv2d else x[0, 0, 0, 0]),
                                                  LOOKS),
    "code that asks for the class of a norm": (
        lambda: Reader(lambda m, x: 1.0 if isinstance(m.n[0], nn.BatchNorm2d) else x.sum()), LOOKS),
    "code that reads a size between": (Between, LOOKS),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_untied_says_why(name: str) -> None:
    make, why = REFUSED[name]
    model = prepared(make())
    plan, fused = fused_and_checked(model, IMAGE, restructure="untie")
    assert not plan.steps
    assert any(why in str(one) for one in plan.unchanged), plan.unchanged
    assert type(fused.c) is type(model.c)
    assert all(one.subject == "c" and one.kind == "untie" for one in plan.unchanged)


def test_code_that_gives_other_numbers_without_other_operators() -> None:
    """The class of a norm as a number: nothing but the outputs shows it."""
    model = prepared(Reader(lambda m, x: 2.0 if isinstance(m.n[1], nn.BatchNorm2d) else 3.0))
    before = snapshot(model)
    fused = bnfuse.fuse(model, IMAGE, restructure="untie")
    assert_untouched(model, before)
    for one, other in zip(model(IMAGE), fused(IMAGE), strict=True):
        assert torch.allclose(one, other, rtol=1e-12)
    assert type(fused.c) is nn.Conv2d


def test_nothing_is_untied_that_fuses_as_it_is() -> None:
    net = Net(lambda m, x: m.n(m.c(x)).sin() + m.n(m.c(-x)).cos(), c=conv(), n=norm())
    plan, _ = fused_and_checked(prepared(net), IMAGE, restructure="untie")
    assert (len(plan.fused), plan.steps, plan.unchanged) == (1, (), ())


def test_a_norm_that_the_caller_keeps_stays_with_its_layer() -> None:
    model = prepared(two(lambda m, x: (m.a(m.c(x)).sin(), m.b(m.c(-x)).sin())))
    plan, fused = fused_and_checked(model, IMAGE, keep="b", restructure="untie")
    assert not plan.steps
    assert type(fused.b) is nn.BatchNorm2d
    assert "the caller asked to keep 'b'" in str(plan)


def test_norms_that_stay_all_the_same_are_worth_no_copies() -> None:
    """Statistics that are no numbers keep both norms."""
    model = prepared(two(lambda m, x: (m.a(m.c(x)).sin(), m.b(m.c(-x)).sin())))
    for layer in (model.a, model.b):
        layer.running_var.fill_(-1.0)
    plan = bnfuse.plan(model, IMAGE, restructure="untie")
    assert not plan.steps
    assert "no norm goes with it" in str(plan)


def test_the_model_may_be_in_training_mode() -> None:
    model = prepared(Head()).train()
    model.norms[0][1].eval()
    before = snapshot(model)
    fused = bnfuse.fuse(model, IMAGE, restructure="untie")
    assert_untouched(model, before)
    assert not any(module.training for module in fused.modules())
    expected = copy.deepcopy(model).eval()(IMAGE)
    assert all(map(torch.allclose, fused(IMAGE), expected))


def test_parameters_keep_their_kind() -> None:
    model = prepared(SharedModules()).to(memory_format=torch.channels_last)
    model.levels[0].conv.weight.requires_grad_(False)
    fused = bnfuse.fuse(model, IMAGE, restructure="untie")
    for level in fused.levels:
        weight = level.bn.layer.weight
        assert not weight.requires_grad
        assert weight.is_contiguous(memory_format=torch.channels_last)
    assert len({level.bn.layer.weight.data_ptr() for level in fused.levels}) == 4


def test_in_place_and_back() -> None:
    model = prepared(Head())
    expected, before = model(IMAGE), copy.deepcopy(model)
    options = bnfuse.Options(reversible=True)
    assert bnfuse.fuse(model, IMAGE, inplace=True, restructure="untie", options=options) is model
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert all(map(torch.allclose, model(IMAGE), expected))
    for back in (bnfuse.unfuse(copy.deepcopy(model)), bnfuse.unfuse(model, inplace=True)):
        assert type(back) is Head
        assert back.state_dict().keys() == before.state_dict().keys()
        assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in before.state_dict().items())
        assert all(map(torch.equal, back(IMAGE), expected))


def test_what_was_trained_since_is_not_lost_on_the_way_back() -> None:
    fused = bnfuse.fuse(prepared(Head()), IMAGE, restructure="untie", options=bnfuse.Options(reversible=True))
    with torch.no_grad():
        fused.predict.weight.mul_(2)
    with pytest.raises(bnfuse.FusionError, match=r"predict\.weight"):
        bnfuse.unfuse(fused)


def test_a_failed_fuse_in_place_leaves_the_model_as_it_was() -> None:
    model = prepared(Reader(lambda m, x: 2.0 if isinstance(m.n[1], nn.BatchNorm2d) else 3.0))
    expected = model(IMAGE)
    assert bnfuse.fuse(model, IMAGE, inplace=True, restructure="untie") is model
    assert all(map(torch.allclose, model(IMAGE), expected))
    assert type(model.c) is nn.Conv2d


def test_a_tied_weight_that_is_read_without_a_name_of_its_own() -> None:
    net = Net(lambda m, x: m.a(m.n(m.c(x)).sin()) + F.conv2d(x, m.c.weight, padding=1), c=conv(), a=conv(), n=norm())
    plan, fused = fused_and_checked(prepared(tie(net)), IMAGE, restructure="untie")
    assert not plan.steps
    assert "no untie of c.weight: its parameters are also read by conv2d in Net" in str(plan.unchanged[0])
    assert fused.c.weight is fused.a.weight


def test_a_tie_that_costs_no_norm_stays() -> None:
    net = tie(Net(lambda m, x: m.a(m.c(x)).sin() + m.n(m.d(x)).cos(), c=conv(), a=conv(), d=conv(), n=norm()))
    plan, fused = fused_and_checked(prepared(net), IMAGE, restructure="untie")
    assert not plan.steps
    assert fused.c.weight is fused.a.weight
