"""Runs leave no trace, whatever a model does in its forward."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bnfuse
from bnfuse.model.sandbox import leave_no_trace, run


class Messy(nn.Module):
    """Does everything that a forward should not."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Dropout(0.5)
        self.calls = 0
        self.cache: dict[str, Tensor] = {}
        self.seen: list[int] = []
        self.register_buffer("state", torch.zeros(4))
        self.register_buffer("expanded", torch.zeros(1).expand(4))
        self.state: Tensor

    def forward(self, x: Tensor, extra: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        self.calls += 1
        self.cache["x"] = x
        self.seen.append(1)
        self.late = x
        self.state += x.sum(dim=0)
        x += torch.rand(4) + random.random() + float(numpy.random.rand())
        extra.append(x)
        return self.frozen(self.norm(x)), self.state, self.expanded[None] + x


def test_run_leaves_no_trace_and_repeats() -> None:
    model = Messy().train()
    model.frozen.eval()
    x, extra = torch.ones(3, 4), [torch.ones(1)]
    torch.manual_seed(7)
    random.seed(7)
    numpy.random.seed(7)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generators = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    first, state, _ = run(model, (x,), {"extra": extra})
    assert model.training
    assert model.norm.training
    assert not model.frozen.training
    assert (model.calls, model.cache, model.seen, len(extra), hasattr(model, "late")) == (0, {}, [], 1, False)
    assert x.eq(1).all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert numpy.random.get_state()[1].tolist() == generators[2]
    assert state.eq(3).all(), "an output that lives in a buffer keeps its value"
    torch.rand(3), random.random()
    assert torch.equal(run(model, (x,), {"extra": extra})[0], first)
    assert not torch.equal(run(model, (x,), {"extra": extra}, seed=1)[0], first)
    assert bnfuse.compare(model, model, (x, extra)).within_tolerance()


def test_run_restores_after_an_error() -> None:
    model = Messy().train()
    with pytest.raises(RuntimeError):
        run(model, (torch.ones(3, 5), []), {})
    assert model.training
    assert model.calls == 0
    assert model.state.eq(0).all()


@pytest.mark.parametrize("watch_writes", [True, False])
def test_what_a_run_stores_is_told_and_put_back(watch_writes: bool) -> None:
    model = Messy().train()
    layers = list(model.modules())
    weight = model.norm.weight
    with leave_no_trace(layers, watch_writes=watch_writes) as state:
        assert not any(layer.training for layer in layers)
        assert torch.is_inference_mode_enabled()
        kept = torch.ones(3)
        model.cache["x"] = model.late = kept
        model.norm.weight = nn.Parameter(torch.zeros(4))
        stored = dict(state.stored())
        assert stored["Messy.late"] is kept
        assert stored["a dict of the model"] is not None
        assert [tensor is weight for tensor in state.replaced()] == [True]
        assert not state.held(kept)
        assert state.held(weight)
    assert not torch.is_inference_mode_enabled()
    assert model.norm.weight is weight
    assert (model.cache, hasattr(model, "late"), model.training) == ({}, False, True)


def test_what_a_call_stores_before_it_fails_is_put_back() -> None:
    model = Messy()

    def fail() -> None:
        with leave_no_trace(list(model.modules())) as state:
            assert not list(state.stored())  # of an earlier call
            model.cache["x"] = model.late = torch.ones(3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (model.cache, hasattr(model, "late")) == ({}, False)


def test_memory_that_is_replaced_and_contents_that_are_written_to_come_back() -> None:
    model = nn.Linear(2, 2)
    weight, bias, address = model.weight.detach().clone(), model.bias.detach().clone(), model.weight.data_ptr()
    with leave_no_trace([model]):
        model.bias.add_(1)
        model.weight.data = torch.zeros(2, 2)
    assert torch.equal(model.bias, bias)
    assert torch.equal(model.weight, weight)
    assert model.weight.data_ptr() == address
    model(torch.ones(1, 2)).sum().backward()  # the parameters are none of inference mode


def test_without_a_watch_over_writes_the_caller_saves_contents() -> None:
    model = nn.Linear(2, 2)
    bias = model.bias.detach().clone()
    with leave_no_trace([model], watch_writes=False) as state:
        state.save_contents(model.bias)
        model.bias.add_(1)
        model.weight.add_(1)
        weight = model.weight.detach().clone()
    assert torch.equal(model.bias, bias)
    assert torch.equal(model.weight, weight), "nobody saved it"


def test_a_mode_sees_the_forward_and_not_the_copy_of_the_inputs() -> None:
    seen = []

    class Listing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    run(nn.ReLU(), (torch.ones(2),), {}, mode=Listing())
    assert seen == ["aten::relu"]


def test_a_model_that_just_fits_on_the_stack_runs_while_it_is_watched() -> None:
    limit = sys.getrecursionlimit()
    x = torch.randn(2, 2, 3, 3)
    model: nn.Module = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    inner = 0
    for _ in range(limit):
        deeper = nn.Sequential(model)
        try:
            deeper.eval()(x)
        except RecursionError:
            break
        model, inner = deeper, inner + 1
    assert inner > 50
    for _ in range(20):  # the calls of the test itself
        model = model[0]  # type: ignore[index]
    fused = bnfuse.fuse(model, x)
    assert isinstance(fused.get_submodule(".".join(["0"] * (inner - 20)) + ".1"), nn.Identity)
    assert sys.getrecursionlimit() == limit


class Instances(OrderedDict[str, Any]):
    """Makes an object of the class that it holds, as the table of activations of transformers does."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key)()


ACTIVATIONS = Instances(relu=nn.ReLU, silu=nn.SiLU)


class Looking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.own = Instances(relu=nn.ReLU)
        self.act = ACTIVATIONS["relu"]

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(x)) if len(ACTIVATIONS) else self.own["relu"](x)


def test_a_container_that_makes_something_of_what_it_holds_keeps_it() -> None:
    model, x = Looking(), torch.randn(2, 3)
    assert torch.equal(run(model, (x,), {}), model(x))
    assert list(ACTIVATIONS.items()) == [("relu", nn.ReLU), ("silu", nn.SiLU)]
    assert list(model.own.items()) == [("relu", nn.ReLU)]
