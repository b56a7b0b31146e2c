"""Weights that are computed from parameters alone: they become their result, or the plan says why not."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from restructuring.test_untie import IMAGE, Net, levels, norm, norms
from support import assert_untouched, fused_and_checked, prepared, snapshot
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import bnfuse
from bnfuse.api import fuse_with_plan
from bnfuse.model.copying import copy_model

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")


def conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, **{"padding": 1, "bias": False, **options})


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ScaledStandardised(nn.Conv2d):
    """With a gain, and a batch norm of the weight that does the work, as timm has it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.randn(self.out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, (self.gain * 0.3).view(-1), training=True
        ).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Masked(nn.Conv2d):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_buffer("mask", torch.rand(self.weight.shape).gt(0.4).float())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, self.stride, self.padding)


class Factors(nn.Module):
    """A product of two factors, and a bias of one more."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3, 4))
        self.b, self.transposed = nn.Parameter(torch.randn(4)), transposed

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.u @ self.v)[:, :, None, None].tanh()
        run = F.conv_transpose2d if self.transposed else F.conv2d
        return run(x, weight, self.b.exp(), stride=2)


class LowRank(nn.Module):
    """What is multiplied is on the right, the input axis first."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.u, self.v = (nn.Parameter(torch.randn(*size)) for size in ((4, 5), (4, 2), (2, 5)))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.base + self.u @ self.v)


class Swish(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * weight.sigmoid()


class Power(nn.Module):
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return first * second.exp()

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight, torch.zeros_like(weight)


def parametrized(layer: nn.Module, *parametrizations: nn.Module, place: str = "weight") -> nn.Module:
    for one in parametrizations:
        parametrize.register_parametrization(layer, place, one)
    return layer


def both_parametrized() -> nn.Module:
    return parametrized(parametrized(conv(bias=True), Power(), Swish()), Swish(), place="bias")


def pruned() -> nn.Module:
    layer = conv()
    prune.l1_unstructured(layer, "weight", 0.3)
    prune.random_unstructured(layer, "weight", 0.2)
    return layer


def behind(layer: nn.Module, kind: Callable[[], nn.Module] = norm) -> Net:
    return Net(lambda m, x: torch.sin(m.n(m.c(x))), c=layer, n=kind())


BAKED: dict[str, Callable[[], nn.Module]] = {
    "standardised": lambda: Standardised(4, 4, 3, padding=1),
    "standardised, grouped and dilated": lambda: Standardised(4, 4, 3, padding="same", groups=2, dilation=2),
    "scaled and standardised": lambda: ScaledStandardised(4, 4, 3, stride=2, padding=(1, 0), bias=False),
    "masked": lambda: Masked(4, 4, 3, padding=1, bias=False),
    "a product of two factors": Factors,
    "the same, transposed": lambda: Factors(transposed=True),
    "weight norm": lambda: parametrizations.weight_norm(conv()),
    "spectral norm": lambda: parametrizations.spectral_norm(conv()),
    "orthogonal": lambda: parametrizations.orthogonal(conv()),
    "weight norm by a hook": lambda: torch.nn.utils.weight_norm(conv()),
    "spectral norm by a hook": lambda: torch.nn.utils.spectral_norm(conv()),
    "pruned": pruned,
    "a parametrisation of one's own": lambda: parametrized(conv(), Swish()),
    "one of two tensors, and another on the bias": both_parametrized,
    "a standardised one, parametrized": lambda: parametrized(Standardised(4, 4, 3), Swish()),
}


@pytest.mark.parametrize("name", BAKED)
def test_a_weight_becomes_its_result(name: str) -> None:
    model = prepared(behind(BAKED[name]()))
    model(IMAGE)  # old-style hooks leave the weight of the last call behind
    plan, fused = fused_and_checked(model, IMAGE, restructure="bake")
    assert ([d.norm for d in plan.fused], plan.kept, plan.unchanged) == (["n"], (), ())
    assert {step.subject for step in plan.steps} == {"c"}
    price = sum(step.parameters for step in plan.steps)
    created = sum(math.prod(edit.shape) for edit in plan.edits if edit.created)
    assert count(fused) == count(model) + price + created - count(norm())
    assert type(fused.c) in (nn.Conv2d, nn.ConvTranspose2d)
    assert set(fused.c.state_dict()) == {"weight", "bias"}
    assert all(parameter.is_leaf for parameter in fused.parameters())
    copy.deepcopy(fused)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["spectral norm", "standardised", "weight norm by a hook", "pruned"])
def test_float32_is_rounded_once(name: str) -> None:
    narrow = copy_model(prepared(behind(BAKED[name]()))).float()
    wide = copy_model(narrow).double()
    fused, exact = (bnfuse.fuse(m, IMAGE.to(m.n.weight.dtype), restructure="bake") for m in (narrow, wide))
    for one, other in zip(fused.parameters(), exact.parameters(), strict=True):
        assert torch.allclose(one.double(), other, rtol=2**-24, atol=0)


def test_more_than_images() -> None:
    layers = {"l": LowRank(), "n": nn.BatchNorm1d(5), "t": parametrizations.spectral_norm(nn.Linear(5, 5))}
    net = Net(lambda m, x: torch.sin(m.n(m.l(x))) + m.t(m.l(x)), **layers)
    plan, fused = fused_and_checked(prepared(net), IMAGE[:, :, 0, 0], restructure="bake")
    assert {step.subject for step in plan.steps} == {"l", "t"}
    assert type(fused.l) is nn.Linear
    assert type(fused.t) is nn.Linear


def test_a_recurrent_layer_runs_on_the_result() -> None:
    layers = {
        "r": parametrizations.weight_norm(nn.LSTM(4, 4, batch_first=True), "weight_hh_l0"),
        "n": nn.BatchNorm1d(4),
    }
    net = Net(lambda m, x: m.r(m.n(x).transpose(1, 2))[0], **layers)
    plan, fused = fused_and_checked(prepared(net), IMAGE[:, :, 0], restructure="bake")
    assert [step.subject for step in plan.steps] == ["r"]
    assert not parametrize.is_parametrized(fused.r)


def test_the_model_itself_may_be_parametrized() -> None:
    model = prepared(parametrizations.weight_norm(nn.Conv2d(4, 4, 1)))
    plan, fused = bnfuse.plan(model, IMAGE, restructure="bake"), None
    assert plan.steps[0].subject == "ParametrizedConv2d"
    before = snapshot(model)
    inner = Net(lambda m, x: m.n(m.c(x)), c=model, n=norm())
    plan, fused = fused_and_checked(prepared(inner), IMAGE, restructure="bake")
    assert type(fused.c) is nn.Conv2d
    assert len(snapshot(model)) == len(before)


def test_called_twice_and_read_elsewhere() -> None:
    """A parametrised tensor is the same wherever it is read."""
    layer = parametrizations.weight_norm(conv())
    net = Net(lambda m, x: m.n(m.c(x)).sin() + m.n(m.c(-x)).cos() * m.c.weight.sum(), c=layer, n=norm())
    plan, fused = fused_and_checked(prepared(net), IMAGE, restructure="bake")
    assert type(fused.c) is nn.Conv2d
    assert [step.subject for step in plan.steps] == ["c"]


def test_baked_then_untied() -> None:
    """A standardised convolution that two levels share."""
    net = Net(
        lambda m, x: [n(m.c(y)).sin() for n, y in zip(m.n, levels(x, 2), strict=True)],
        c=Standardised(4, 4, 3, padding=1), n=norms(2),
    )  # fmt: skip
    model = prepared(net)
    assert not bnfuse.plan(model, IMAGE, restructure="untie").fused
    plan, fused = fused_and_checked(model, IMAGE, restructure=True)
    assert [(step.kind, step.parameters) for step in plan.steps] == [("bake", 0), ("untie", 4 * 4 * 9 + 4)]
    assert not plan.kept
    assert type(fused.n[1].layer) is nn.Conv2d
    fresh = Net(net.function, c=Standardised(4, 4, 3, padding=1), n=norms(2)).double()
    bnfuse.restructure(fresh, bnfuse.structure(fused).to_dict()).load_state_dict(fused.state_dict())
    assert all(map(torch.equal, fresh.eval()(IMAGE), fused(IMAGE)))


def test_two_modules_with_one_factor() -> None:
    first, second = Masked(4, 4, 3), Masked(4, 4, 3)
    second.weight = first.weight
    net = Net(lambda m, x: m.a(m.c(x)).sin() + m.b(m.d(x)).sin(), c=first, d=second, a=norm(), b=norm())
    plan, fused = fused_and_checked(prepared(net), IMAGE, restructure="bake")
    assert not plan.kept
    assert sum(step.parameters for step in plan.steps) == 4 * 4 * 9
    assert fused.c.weight is not fused.d.weight


# What cannot be baked -------------------------------------------------------------------------------------------------


class Amid(nn.Module):
    """A weight that is computed amid other work."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.n = conv(), norm()

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.n(F.conv2d(x.relu(), self.conv.weight.tanh(), padding=1)))


class Dynamic(nn.Conv2d):
    """A weight that depends on the input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.tanh() * x.mean(), self.bias)


class Sized(nn.Conv2d):
    """A weight that depends on the size of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.tanh() / x.shape[-1], self.bias)


class Flagged(nn.Conv2d):
    """Another layer under a flag of its own."""

    sharp = False

    def forward(self, x: Tensor) -> Tensor:
        self.sharp = not self.sharp
        return F.conv2d(x, self.weight.tanh() if self.sharp else self.weight.sigmoid(), self.bias)


class Padding(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), value=2.0), self.weight.tanh(), self.bias)


class Asking(nn.Module):
    """Code that looks at the layer."""

    def __init__(self, look: Callable[[Any], Any]) -> None:
        super().__init__()
        self.c, self.n, self.look = Standardised(4, 4, 3), norm(), look

    def forward(self, x: Tensor) -> Any:
        factor = self.look(self.c)
        return factor * self.n(self.c(x)).sin()


def hooked() -> nn.Module:
    net = behind(Standardised(4, 4, 3))
    net.c.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    return net


LOOKS = "code around it does something else"

REFUSED: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "amid other work": (Amid, "its forward does more"),
    "padding of its own": (lambda: behind(Padding(4, 4, 3)), "its forward does more"),
    "depends on the input": (lambda: behind(Dynamic(4, 4, 3)), None),
    "depends on the size": (lambda: behind(Sized(4, 4, 3)), "size"),
    "a hook": (hooked, "a forward hook"),
    "the raw weight is read elsewhere": (lambda: Asking(lambda c: c.weight.sum()), "also read by sum"),
    "code that asks for the class": (lambda: Asking(lambda c: 2.0 if isinstance(c, Standardised) else 3.0), LOOKS),
    "code that reads an attribute": (lambda: Asking(lambda c: float(c.extra) if hasattr(c, "extra") else vars(c).get("x", 2.0)
                                                    if type(c).__name__ == "Standardised" else 3.0), LOOKS),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_baked_says_why(name: str) -> None:
    make, why = REFUSED[name]
    model = prepared(make())
    plan, fused = fused_and_checked(model, IMAGE, restructure="bake")
    assert not plan.steps
    assert [type(module) for module in fused.modules() if module is not fused.n] == [
        type(module) for module in model.modules() if module is not model.n
    ]
    assert (not plan.unchanged) if why is None else any(why in str(one) for one in plan.unchanged), plan.unchanged


class FakeQuantizeBase(nn.Module):
    """By the name by which what rounds a weight is recognised."""

    def forward(self, weight: Tensor) -> Tensor:
        return (8 * weight).round() / 8


class Rounded(nn.Conv2d):
    """As a layer of quantisation-aware training."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.weight_fake_quant = FakeQuantizeBase()

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight_fake_quant(self.weight), self.bias)


def test_what_is_prepared_for_quantisation_stays_so() -> None:
    for layer in (Rounded(4, 4, 3), parametrized(conv(), FakeQuantizeBase())):
        plan, fused = fused_and_checked(prepared(behind(layer)), IMAGE, restructure="bake")
        assert not plan.steps
        assert "prepared for quantisation" in str(plan.unchanged[0])
        assert type(fused.c) is type(layer)


def test_what_is_compiled_stays_so() -> None:
    with pytest.warns(Warning, match="deprecated"):
        layer = torch.jit.script(Standardised(4, 4, 3).eval())
    net = Net(lambda m, x: torch.sin(m.n(m.c(x))), c=layer, n=norm())
    plan = bnfuse.plan(net.double().eval(), IMAGE, restructure="bake")
    assert not plan.steps


def test_layers_that_are_not_named_stay() -> None:
    model = prepared(behind(Standardised(4, 4, 3)))
    options = bnfuse.Options(layers=nn.Linear)
    plan, _ = fused_and_checked(model, IMAGE, restructure="bake", options=options)
    assert not plan.steps
    assert "layers= does not name Standardised" in str(plan.unchanged[0])
    options = bnfuse.Options(layers=nn.Conv2d)
    assert fused_and_checked(model, IMAGE, restructure="bake", options=options)[0].fused


def test_a_layer_that_is_another_from_call_to_call() -> None:
    model = prepared(behind(Flagged(4, 4, 3)))
    net = Net(lambda m, x: (m.c(x), m.c(x)), c=model)
    expected = copy.deepcopy(net)(IMAGE)
    fused = bnfuse.fuse(net, IMAGE, restructure="bake")
    assert all(map(torch.allclose, fused(IMAGE), expected))
    assert type(fused.c.c) is Flagged


def test_in_place_and_back() -> None:
    net = Net(
        lambda m, x: m.a(m.c(x)).sin() + m.b(m.d(x)).sin(),
        c=both_parametrized(), d=torch.nn.utils.spectral_norm(conv()), a=norm(), b=norm(),
    )  # fmt: skip
    model = prepared(net)
    expected, state = model(IMAGE), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert bnfuse.fuse(model, IMAGE, inplace=True, restructure="bake", options=bnfuse.Options(reversible=True)) is model
    assert type(model.c) is nn.Conv2d
    assert torch.allclose(model(IMAGE), expected)
    bnfuse.unfuse(model, inplace=True)
    assert parametrize.is_parametrized(model.c, "bias")
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    assert torch.equal(model(IMAGE), expected)


def test_the_original_keeps_its_parametrisations_when_the_copy_loses_them() -> None:
    """Copies of a parametrised layer have one class in common, to which the property belongs."""
    model = prepared(behind(both_parametrized()))
    twin = copy.deepcopy(model)
    before = snapshot(model)
    bnfuse.fuse(model, IMAGE, restructure="bake")
    assert_untouched(model, before)
    bnfuse.fuse(twin, IMAGE, restructure="bake", inplace=True)
    assert torch.equal(model.c.weight, model.c.parametrizations.weight())


def test_a_step_that_fails_takes_no_other_along() -> None:
    """What is baked and then untied holds only with both; beside it a layer whose class is asked for as a number."""

    def forward(m: Any, x: Tensor) -> Any:
        factor = 2.0 if isinstance(m.b[1], nn.BatchNorm2d) else 3.0
        made = [n(m.c(y)).sin() for n, y in zip(m.a, levels(x, 2), strict=True)]
        return [*made, *(factor * n(m.d(y)).sin() for n, y in zip(m.b, (x, -x), strict=True))]

    net = Net(forward, c=Standardised(4, 4, 3, padding=1), d=conv(), a=norms(2), b=norms(2))
    model = prepared(net)
    fused, plan = fuse_with_plan(model, IMAGE, restructure=("bake", "untie"))
    assert [(step.kind, step.subject) for step in plan.steps] == [("bake", "c"), ("untie", "c")]
    assert [(one.kind, one.subject) for one in plan.unchanged] == [("untie", "d")]
    assert all(map(torch.allclose, fused(IMAGE), model(IMAGE)))


def test_what_did_not_run_stays() -> None:
    """Its contents are no part of what is known of the model, so that a plan would not see that they have changed."""
    idle = parametrizations.weight_norm(conv())
    net = Net(lambda m, x: m.n(m.c(x)).sin(), c=parametrizations.weight_norm(conv()), n=norm(), idle=idle)
    plan, fused = fused_and_checked(prepared(net), IMAGE, restructure="bake")
    assert [step.subject for step in plan.steps] == ["c"]
    assert "no bake of idle: it did not run" in str(plan)
    assert parametrize.is_parametrized(fused.idle)


def test_a_plan_knows_what_it_was_computed_from() -> None:
    for name in ("spectral norm", "weight norm by a hook", "pruned", "masked", "scaled and standardised"):
        model = prepared(behind(BAKED[name]()))
        plan = bnfuse.plan(model, IMAGE, restructure="bake")
        with torch.no_grad():
            next(iter(model.c.parameters())).view(-1)[-1].add_(1.0)
        with pytest.raises(bnfuse.FusionError, match="has changed"):
            plan.apply(model)
