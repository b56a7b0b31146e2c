"""Models that something outside of PyTorch has put hooks on, as accelerate does, and models without numbers.

accelerate replaces a module's forward by a function that calls its hook, loads what is offloaded before the call, and
drops it afterwards. When it takes a hook away, it leaves the module's own forward in an attribute.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import fused_and_checked, prepared, reason
from torch import Tensor, nn

import bnfuse
from bnfuse.verify.compare import compare


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)]
    return prepared(nn.Sequential(*layers))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 8, 8, dtype=torch.float64)


def put_hook_on(module: nn.Module, hook: Any, before: Callable[[], None], after: Callable[[], None]) -> None:
    module._old_forward = module.forward
    module._hf_hook = hook

    def new_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        before()
        output = module._old_forward(*args, **kwargs)
        after()
        return output

    module.forward = functools.update_wrapper(functools.partial(new_forward, module), module._old_forward)


def offload(module: nn.Module, in_a_row: bool = False) -> None:
    """Weights are loaded for each call only."""
    for child in module.children():
        weights = dict(child._parameters)
        meta = {name: None if weight is None else nn.Parameter(weight.to("meta")) for name, weight in weights.items()}
        child._parameters.update(meta)
        hook = SimpleNamespace(offload=True)
        put_hook_on(
            child,
            SimpleNamespace(hooks=(SimpleNamespace(offload=False), hook)) if in_a_row else hook,
            functools.partial(child._parameters.update, weights),
            functools.partial(child._parameters.update, meta),
        )


def align(module: nn.Module) -> None:
    """Weights stay; inputs are moved to their device."""
    for child in module.children():
        put_hook_on(child, SimpleNamespace(offload=False), lambda: None, lambda: None)


def remove_hooks(module: nn.Module) -> None:
    for child in module.children():
        del child._hf_hook
        child.forward = child._old_forward
        del child._old_forward


def held(model: nn.Module) -> list[Any]:
    """What the modules hold, by identity."""
    return [
        {
            name: {key: id(item) for key, item in value.items()} if isinstance(value, dict) else value
            for name, value in held
        }
        for held in (vars(module).items() for module in model.modules())
    ]


@pytest.mark.parametrize("in_a_row", [False, True])
def test_an_offloaded_model_is_refused(x: Tensor, in_a_row: bool) -> None:
    model, original = network(), network()
    plan = bnfuse.plan(original, x)
    offload(model, in_a_row)
    before = held(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    verbs: list[Callable[[], Any]] = [
        lambda: bnfuse.fuse(model, x),
        lambda: bnfuse.fuse(model, x, inplace=True),
        lambda: bnfuse.plan(model, x),
        lambda: plan.apply(model),
    ]
    for verb in verbs:
        with pytest.raises(bnfuse.InputError) as caught:
            verb()
        assert str(caught.value).startswith("0.weight is offloaded: accelerate loads it for each call")
        assert "accelerate.hooks.remove_hook_from_module(model, recurse=True)" in str(caught.value)
    assert held(model) == before
    torch.testing.assert_close(model(x), original(x), rtol=0, atol=0)
    assert compare(original, model, x).within_tolerance()
    assert held(model) == before


def test_norms_inside_of_hooks_stay_and_the_way_out_is_named(x: Tensor) -> None:
    model = network()
    align(model)
    with pytest.warns(bnfuse.NothingFusedWarning, match=r"(?s)hooks of accelerate.*remove_hook_from_module.*dispatch"):
        fused = bnfuse.fuse(model, x)
    torch.testing.assert_close(fused(x), model(x), rtol=0, atol=0)
    assert reason(bnfuse.plan(model, x), "1") == "it has a forward hook, which would be lost"


def test_what_hooks_leave_behind_is_in_no_norms_way(x: Tensor) -> None:
    model = network()
    align(model)
    remove_hooks(model)
    assert "forward" in model[0].__dict__
    plan, fused = fused_and_checked(model, x)
    assert [decision.norm for decision in plan.fused] == ["1", "4"]
    assert fused[0].bias is not None
    assert fused[0].forward.__self__ is fused[0]
    bnfuse.fuse(model, x, inplace=True)
    assert type(model[1]) is nn.Identity


def test_another_forward_of_a_norms_own_is_still_in_its_way(x: Tensor) -> None:
    model = network()
    model[1].forward = functools.partial(lambda norm, x: type(norm).forward(norm, x), model[1])
    assert "also refers to it from 1.forward" in reason(bnfuse.plan(model, x), "1")


def test_models_without_numbers_say_what_is_to_be_done(x: Tensor) -> None:
    model = network().to("meta")
    with pytest.raises(
        bnfuse.InputError, match=r"(?s)^Sequential is on the meta device.*load_state_dict\(state, assign"
    ):
        bnfuse.fuse(model, x)
    model.load_state_dict(network().state_dict(), assign=True)
    assert len(fused_and_checked(model, x)[0].fused) == 2
    model[3].to("meta")
    with pytest.raises(bnfuse.InputError, match=r"^3\.weight is on the meta device and holds no numbers: load"):
        bnfuse.fuse(model, x)
