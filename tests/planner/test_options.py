"""What a caller may ask for beyond the defaults: other modules, kinds of layers, own layers and operators, a budget."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import assert_untouched, fused_and_checked, prepared, reason, snapshot
from torch import Tensor, nn

import bnfuse
from bnfuse.graph.graph import Node
from bnfuse.rules.registry import ABSORBERS, RULES, Trial, link, rule
from bnfuse.units import Unit


class LayerScale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(5, 7), nn.Linear(7, 5)
        self.norm, self.scale = nn.BatchNorm1d(7), LayerScale(5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale(self.fc2(F.silu(self.norm(self.fc1(x)))))


X = torch.randn(3, 5, dtype=torch.float64)


def test_layer_scale_goes_when_asked() -> None:
    model = prepared(Mlp())
    plan, fused = fused_and_checked(model, X)
    assert [decision.norm for decision in plan.decisions] == ["norm"]
    plan, fused = fused_and_checked(model, X, options=bnfuse.Options(also="layerscale"))
    assert [decision.norm for decision in plan.fused] == ["norm", "scale"]
    assert type(fused.scale) is nn.Identity


def test_also_with_a_typo() -> None:
    with pytest.raises(bnfuse.InputError, match=r"matches the class of no module.*layerscale"):
        bnfuse.fuse(Mlp(), X.float(), options=bnfuse.Options(also="layerscal"))


def test_layers_may_be_restricted() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.n1, self.fc, self.n2 = (
                nn.Conv1d(3, 4, 1),
                nn.BatchNorm1d(4),
                nn.Linear(4, 2),
                nn.BatchNorm1d(2),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.n2(self.fc(F.silu(self.n1(self.conv(x))).mean(-1)))

    model = prepared(Two())
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    plan, _ = fused_and_checked(model, x, options=bnfuse.Options(layers=(nn.Conv1d,)))
    assert [decision.norm for decision in plan.fused] == ["n1"]
    assert "layers= does not name Linear" in reason(plan, "n2")
    plan, _ = fused_and_checked(model, x, options=bnfuse.Options(layers=(nn.Linear, nn.Conv1d)))
    assert not plan.kept


class Periodic(nn.Module):
    """A layer of the caller's own: what it does to its weight no rule knows."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.angles = nn.Parameter(torch.randn(outputs, inputs))
        self.gain = nn.Parameter(torch.ones(outputs))
        self.offset = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x @ self.angles.cos().T) * self.gain.exp() + self.offset


def fold(layer: nn.Module, scale: Tensor, shift: Tensor) -> None:
    if bool((scale <= 0).any()):
        raise ValueError("only a positive gain has a logarithm")
    layer.gain.add_(scale.log())
    layer.offset.mul_(scale).add_(shift)


def own_layers(gamma: float = 2.0) -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), Periodic(4, 6), nn.BatchNorm1d(6), nn.Tanh())
    prepared(model)
    model[3].weight.data.fill_(gamma)
    return model


def test_handler() -> None:
    model = own_layers()
    plan, fused = fused_and_checked(model, X, options=bnfuse.Options(handlers={Periodic: fold}))
    assert plan.fused[0].into == ("2",)
    assert type(fused[3]) is nn.Identity


@pytest.mark.parametrize("inplace", [False, True])
def test_failing_handler_changes_nothing(inplace: bool) -> None:
    model = own_layers(-1.0)
    before = snapshot(model)
    with pytest.raises(bnfuse.FusionError, match=r"handler of Periodic at '2' failed: ValueError: only a .*\n.*scale"):
        bnfuse.fuse(model, X, options=bnfuse.Options(handlers={Periodic: fold}), inplace=inplace)
    assert_untouched(model, before)


def reshapes(layer: nn.Module, scale: Tensor, shift: Tensor) -> None:
    layer.gain.data = (layer.gain + scale.log())[:, None]


def replaces(layer: nn.Module, scale: Tensor, shift: Tensor) -> None:
    layer.offset = nn.Parameter(shift[None])


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("handler", "place", "shape"), [(reshapes, "gain", "6, 1"), (replaces, "offset", "1, 6")])
def test_a_handler_that_changes_a_shape_changes_nothing(handler: Any, place: str, shape: str, inplace: bool) -> None:
    model = own_layers()
    before = snapshot(model)
    message = rf"handler of Periodic at '2' left {place} with shape \({shape}\), not \(6,\)"
    with pytest.raises(bnfuse.FusionError, match=message):
        bnfuse.fuse(model, X, options=bnfuse.Options(handlers={Periodic: handler}), inplace=inplace)
    assert_untouched(model, before)


@pytest.mark.parametrize("inplace", [False, True])
def test_wrong_handler_is_caught(inplace: bool) -> None:
    def half(layer: nn.Module, scale: Tensor, shift: Tensor) -> None:
        layer.gain.add_(scale.log())
        layer.note = "changed"

    model = own_layers()
    before = snapshot(model)
    with pytest.raises(bnfuse.VerificationError, match=r"your handlers for Periodic at '2'.*scale\*y \+ shift"):
        bnfuse.fuse(model, X, options=bnfuse.Options(handlers={Periodic: half}), inplace=inplace)
    assert_untouched(model, before)


@pytest.fixture
def own_rule() -> Iterator[None]:
    library = torch.library.Library("bnfuse_tests", "DEF")
    library.define("halve(Tensor x) -> Tensor")
    library.impl("halve", lambda x: x / 2, "CompositeExplicitAutograd")

    @rule("bnfuse_tests::halve")
    def halve(node: Node, trial: Trial) -> None:
        def by(factor: float) -> object:
            return lambda unit: Unit(unit.scale, None if unit.shift is None else unit.shift * factor, unit.inverse)

        link(trial, node.inputs[0], node.outputs[0], by(0.5), by(2.0))

    yield
    del RULES["bnfuse_tests::halve"]
    library._destroy()


@pytest.mark.usefixtures("own_rule")
def test_own_operator() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(5, 6), nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(torch.ops.bnfuse_tests.halve(self.fc(x)))

    model = prepared(Net())
    plan, _ = fused_and_checked(model, X)
    assert not plan.kept
    saved = RULES.pop("bnfuse_tests::halve")
    plan, _ = fused_and_checked(model, X)
    RULES["bnfuse_tests::halve"] = saved
    assert "bnfuse_tests::halve in Net: no scale or shift passes through it" in reason(plan, "norm")
    assert "bnfuse_tests::halve" not in ABSORBERS


def imprecise() -> nn.Module:
    """Of three norms in float16, the second costs precision: a large mean over a tiny variance."""
    model = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh())))
    prepared(model)
    for i in range(3):
        model[3 * i].weight.data.mul_(0.5)
        model[3 * i + 1].weight.data.fill_(1.0)
    model[4].running_mean.fill_(300.0)
    model[3].bias.data.fill_(300.0)
    model[4].running_var.fill_(0.01)
    return model.half()


def test_budget_keeps_what_costs_most() -> None:
    model, x = imprecise(), torch.randn(64, 6).half()
    full = bnfuse.plan(model, x)
    assert not full.kept
    plan = bnfuse.plan(model, x, options=bnfuse.Options(budget=1e-2))
    assert [decision.norm for decision in plan.kept] == ["4"]
    assert "more precision than the budget of 0.01" in reason(plan, "4")
    fused = bnfuse.fuse(model, x, options=bnfuse.Options(budget=1e-2))
    assert bnfuse.compare(model, fused, x).outputs[0].relative_l2 <= 1e-2
    assert bnfuse.compare(model, full.apply(model), x).outputs[0].relative_l2 > 1e-2


def test_budget_of_zero_and_nonsense() -> None:
    model, x = imprecise(), torch.randn(64, 6).half()
    fused = bnfuse.fuse(model, x, options=bnfuse.Options(budget=0.0))
    assert torch.equal(model(x), fused(x))
    with pytest.raises(bnfuse.InputError, match="at least 0"):
        bnfuse.fuse(model, x, options=bnfuse.Options(budget=float("nan")))


@pytest.mark.parametrize("layers", [["Conv2d"], [nn.Conv2d(1, 1, 1)], [int]])
def test_layers_are_classes_of_modules(layers: list[object]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    for call in (bnfuse.plan, bnfuse.fuse):
        with pytest.raises(bnfuse.InputError, match=r"layers= takes classes of modules.*\n  got: .*\n  expected:"):
            call(net, options=bnfuse.Options(layers=layers))


@pytest.mark.parametrize("argument", ["keep", "also"])
@pytest.mark.parametrize("given", [3, [nn.Linear], None])
def test_names_that_are_no_strings_are_refused(argument: str, given: Any) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    for call in (bnfuse.fuse, bnfuse.plan):
        with pytest.raises(bnfuse.InputError, match=rf"{argument}= takes a name.*\n  got: .*\n  expected:"):
            call(net, **({"keep": given} if argument == "keep" else {"options": bnfuse.Options(also=given)}))


@pytest.mark.parametrize("handlers", [{"Linear": print}, {int: print}, {nn.Linear: 3}, print])
def test_handlers_of_the_wrong_form_are_refused(handlers: Any) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    for call in (bnfuse.fuse, bnfuse.plan):
        with pytest.raises(bnfuse.InputError, match=r"handlers= takes a dict.*\n  got: .*\n  expected:"):
            call(net, options=bnfuse.Options(handlers=handlers))


@pytest.mark.parametrize("budget", ["small", -1.0, True])
def test_a_budget_is_a_number(budget: Any) -> None:
    with pytest.raises(bnfuse.InputError, match=r"budget= is a relative error.*\n  got: .*\n  expected: a number"):
        bnfuse.Options(budget=budget)


def test_options_are_options() -> None:
    for call in (bnfuse.fuse, bnfuse.plan):
        with pytest.raises(bnfuse.InputError, match=r"options= takes bnfuse.Options"):
            call(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), options={"also": "LayerScale"})


# Hooks ----------------------------------------------------------------------------------------------------------------


class Hooked(nn.Module):
    """Convolution, norm and activation, with a hook on one of them that notes what it sees and may change it."""

    def __init__(self, where: str, factor: float | None = None, pre: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.ReLU()
        self.last = nn.Conv1d(4, 2, 1)
        layer = self.get_submodule(where)

        def hook(module: nn.Module, *values: Any) -> Any:
            NOTED.append(type(module))
            value = values[-1][0] if pre else values[-1]
            return None if factor is None else factor * value

        self.handle = layer.register_forward_pre_hook(hook) if pre else layer.register_forward_hook(hook)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.norm(self.conv(x))))


NOTED: list[type] = []
LINE = torch.randn(2, 3, 7, dtype=torch.float64)
IGNORING = bnfuse.Options(hooks="ignore")


@pytest.mark.parametrize("factor", [None, -3.0])
@pytest.mark.parametrize("where", ["conv", "norm", "act"])
def test_hooks_may_see_other_numbers_with_consent(where: str, factor: float | None) -> None:
    model = prepared(Hooked(where, factor))
    assert bool(bnfuse.plan(model, LINE).kept) == (where != "act")  # nothing changes behind the activation
    plan, fused = fused_and_checked(model, LINE, options=IGNORING)
    assert not plan.kept
    assert type(fused.norm) is nn.Identity
    NOTED.clear()
    fused(LINE)
    stands_there = {"conv": nn.Conv1d, "norm": nn.Identity, "act": nn.ReLU}
    assert [stands_there[where]] == NOTED


def test_a_hook_moves_with_consent_in_place_and_can_still_be_removed() -> None:
    model = prepared(Hooked("norm"))
    expected = model(LINE)
    assert bnfuse.fuse(model, LINE, inplace=True, options=IGNORING) is model
    assert torch.allclose(model(LINE), expected, rtol=1e-12)
    model.handle.remove()
    NOTED.clear()
    model(LINE)
    assert NOTED == []


def test_a_hook_before_a_norm_stays() -> None:
    plan, _ = fused_and_checked(prepared(Hooked("norm", 2.0, pre=True)), LINE, options=IGNORING)
    assert "has a forward hook" in reason(plan, "norm")


def test_hooks_take_one_of_two_words() -> None:
    with pytest.raises(bnfuse.InputError, match="'keep' or 'ignore'"):
        bnfuse.Options(hooks="drop")
