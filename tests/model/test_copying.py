"""A copy runs on layers and parameters of its own, whatever functions the model holds; else it is refused."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import assert_untouched, prepared, snapshot
from torch import Tensor, nn

import bnfuse
from bnfuse.api import fuse_with_plan
from bnfuse.model.copying import copy_model
from bnfuse.reasons import REFERENCED_ELSEWHERE


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.n, self.d, self.k = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.helper: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.n(self.c(x)))
        return self.k(self.d(y if self.helper is None else self.helper(y)))

    def other(self, x: Tensor) -> Tensor:
        return self.k(self.d(F.relu(self.n(self.c(x)))))


def passed_on(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def no_gradients(model: Any) -> None:
    model.forward = torch.no_grad()(model.forward)


def no_gradients_through_a_parametrised_layer(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model.d)
    model.d.forward = torch.no_grad()(model.d.forward)


class CopiesItself(nn.Conv2d):
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self)] = made = object.__new__(type(self))
        made.__dict__ = copy.deepcopy(self.__dict__, memo)
        return made


def no_gradients_through_a_layer_that_copies_itself(model: Any) -> None:
    model.d.__class__ = CopiesItself
    model.d.forward = torch.no_grad()(model.d.forward)


def wrapped_twice(model: Any) -> None:
    model.forward = passed_on(passed_on(model.forward))


def closure(model: Any) -> None:
    model.forward = lambda x: model.k(model.d(model.n(model.c(x))))


def closure_over_layers(model: Any) -> None:
    c, n, rest = model.c, model.n, [model.d, model.k]
    model.forward = lambda x: functools.reduce(lambda y, layer: layer(y), rest, n(c(x)))


def closure_over_parameters(model: Any) -> None:
    weight, bias = model.c.weight, model.c.bias
    model.c.forward = lambda x: F.conv2d(x, weight, bias)


def default_argument(model: Any) -> None:
    model.forward = lambda x, m=model, *, n=model.n: m.k(m.d(n(m.c(x))))


def partial_of_the_class(model: Any) -> None:
    model.forward = functools.partial(Net.forward, model)


def partial_of_a_closure(model: Any) -> None:
    model.forward = functools.partial(lambda scale, x: model.k(model.d(scale * model.n(model.c(x)))), 2.0)


def as_accelerate_does(model: Any) -> None:
    old = model.d.forward
    model.d.old_forward = old
    model.d.forward = functools.update_wrapper(functools.partial(lambda module, x: module.old_forward(x), model.d), old)


def another_method(model: Any) -> None:
    model.forward = model.other


def compiled(model: Any) -> None:
    model.forward = torch.compile(model.forward, backend="eager")


def compiled_layer(model: Any) -> None:
    model.c.forward = torch.compile(model.c.forward, backend="eager")


def calls_itself(model: Any) -> None:
    def forward(x: Tensor, again: bool = True) -> Tensor:
        return forward(model.c(x), False) if again else model.k(model.d(model.n(x)))

    model.forward = forward


def function_in_an_attribute(model: Any) -> None:
    d = model.d
    model.helper = lambda x: x + d(x)


def functions_in_containers(model: Any) -> None:
    steps = {"first": [lambda x: x + model.d(x)], "second": (lambda x: x * 2,)}
    model.helper = lambda x: steps["second"][0](steps["first"][0](x))


def hooks(model: Any) -> None:
    model.c.register_forward_hook(lambda module, args, output: output + model.d.bias[:, None, None])
    model.d.register_forward_pre_hook(lambda module, args, norm=model.k: (args[0] * norm.weight[0],))


REBOUND = [
    no_gradients, no_gradients_through_a_parametrised_layer, no_gradients_through_a_layer_that_copies_itself,
    wrapped_twice, closure, closure_over_layers, closure_over_parameters, default_argument, partial_of_the_class, partial_of_a_closure, as_accelerate_does, another_method, compiled, compiled_layer,
    calls_itself, function_in_an_attribute, functions_in_containers, hooks,
]  # fmt: skip


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 5, 5, dtype=torch.float64)


def spoil(model: nn.Module) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.fill_(float("nan"))


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("replace", REBOUND)
def test_a_copy_runs_on_what_is_its_own(replace: Callable[[Any], None], wrapped: bool, x: Tensor) -> None:
    net = prepared(Net())
    replace(net)
    model = nn.Sequential(net) if wrapped else net
    expected, before = model(x).detach(), snapshot(model)
    copied, fused = copy_model(model), bnfuse.fuse(model, x)
    assert_untouched(model, before)
    torch.testing.assert_close(model(x).detach(), expected)
    spoil(model)
    for own in (copied, fused):
        torch.testing.assert_close(own(x).detach(), expected, rtol=1e-11, atol=1e-11)
    spoil(fused)
    assert fused(x).isnan().all()


@pytest.mark.parametrize("replace", [replace for replace in REBOUND if replace is not hooks])
def test_norms_still_go(replace: Callable[[Any], None], x: Tensor) -> None:
    model = prepared(Net())
    replace(model)
    fused, plan = fuse_with_plan(model, x)
    referenced = [d.norm for d in plan.kept if d.reasons[0].code == REFERENCED_ELSEWHERE.code]
    assert ("n" in referenced) is (type(fused.n) is nn.BatchNorm2d)  # its function could read anything of it
    if not referenced and model.helper is None:  # else it calls the layer before the second norm once more
        assert type(fused.k) is nn.Identity


@pytest.mark.parametrize("replace", REBOUND)
def test_in_place_the_functions_stay(replace: Callable[[Any], None], x: Tensor) -> None:
    model = prepared(Net())
    replace(model)
    expected, forward = model(x).detach(), model.forward
    assert bnfuse.fuse(model, x, inplace=True) is model
    assert model.forward == forward
    torch.testing.assert_close(model(x).detach(), expected, rtol=1e-11, atol=1e-11)


def test_functions_without_parts_of_the_model_are_shared() -> None:
    model = prepared(Net())
    seen: list[Any] = []
    model.helper = lambda x: seen.append(x) or x
    copied = copy_model(model)
    assert copied.helper is model.helper
    copied(torch.randn(2, 3, 5, 5, dtype=torch.float64))
    assert len(seen) == 1


def test_a_function_is_copied_with_all_that_it_has() -> None:
    model = prepared(Net())

    def helper(x: Tensor, scale: float = 2.0, *, shift: float = 1.0) -> Tensor:
        """Not a word."""
        return model.c.weight * x * scale + shift

    helper.note = ["kept"]
    model.helper = helper
    made = copy_model(model).helper
    assert made is not helper
    for name in ("__name__", "__qualname__", "__module__", "__doc__", "__annotations__", "__defaults__", "__dict__"):
        assert getattr(made, name) == getattr(helper, name)
    assert made.__kwdefaults__ == {"shift": 1.0}
    assert made.note == helper.note


def test_functions_that_share_a_variable_share_it_in_the_copy() -> None:
    model = prepared(Net())
    layer = model.c

    def switch() -> None:
        nonlocal layer
        layer = None

    model.switch, model.current = switch, lambda: layer
    model.touch = lambda: (layer, switch)
    copied = copy_model(model)
    assert copied.current() is copied.c
    assert copied.touch()[0] is copied.c
    copied.touch()[1]()
    assert copied.current() is None
    assert model.current() is model.c


class Patched(Net):
    """Its forward is that of one object, which a closure holds."""


OUTSIDE: dict[str, Any] = {}


def a_class(model: Any) -> None:
    Patched.forward = passed_on(model.forward)  # type: ignore[method-assign]
    Patched.forward = lambda self, x, inner=Patched.forward: inner(x)  # type: ignore[method-assign]


def a_global(model: Any) -> None:
    OUTSIDE["model"] = model
    model.helper = lambda x: OUTSIDE["model"].d(x)


def a_global_parameter(model: Any) -> None:
    OUTSIDE["weight"] = model.d.weight
    model.helper = lambda x: F.conv2d(x, OUTSIDE["weight"])


def a_global_in_a_list(model: Any) -> None:
    OUTSIDE["bias"] = model.d.bias
    model.helper = lambda x: x + torch.stack([torch.zeros(4), OUTSIDE["bias"]])[1][:, None, None]


def a_view(model: Any) -> None:
    OUTSIDE["view"] = model.d.weight.detach().flatten(1).unsqueeze(2)
    model.helper = lambda x: F.conv1d(x.flatten(2), OUTSIDE["view"]).reshape(x.shape)


def a_cache(model: Any) -> None:
    model.helper = functools.lru_cache(lambda x: model.d(x))


def an_object(model: Any) -> None:
    model.held = SimpleNamespace(function=lambda x: model.d(x))
    model.helper = functools.partial(lambda held, x: held.function(x), model.held)


@pytest.mark.parametrize(
    "replace", [a_class, a_global, a_global_parameter, a_global_in_a_list, a_view, a_cache, an_object]
)
def test_what_no_copy_can_have_of_its_own_is_refused(
    replace: Callable[[Any], None], x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Patched, "forward", Net.forward)
    model = prepared(Patched())
    replace(model)
    expected, before = model(x).detach(), snapshot(model)
    model.train()
    with pytest.raises(bnfuse.InputError, match=r"(?s)copy of Patched still runs.*inplace=True.*del model\.forward"):
        bnfuse.fuse(model, x)
    assert_untouched(model.eval(), before)
    bnfuse.fuse(model, x, inplace=True)
    torch.testing.assert_close(model(x).detach(), expected, rtol=1e-11, atol=1e-11)
