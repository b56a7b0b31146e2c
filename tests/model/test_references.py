"""Copies of models: what refers to a part of the model refers to the copy of that part."""

from __future__ import annotations

import functools
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import fused_and_checked, prepared, reason
from torch import Tensor, nn

import bnfuse
from bnfuse.errors import InputError
from bnfuse.model.copying import copy_model


class Child(nn.Module):
    def __init__(self, refer: Callable[[nn.Module], Any], follow: Callable[[Any], Any], parent: nn.Module) -> None:
        super().__init__()
        self.follow = follow
        self.__dict__["parent"] = refer(parent)

    def forward(self, x: Tensor) -> Tensor:
        return self.follow(self.parent).conv(x)  # type: ignore[no-any-return]


class Parent(nn.Module):
    def __init__(self, refer: Callable[[nn.Module], Any], follow: Callable[[Any], Any]) -> None:
        super().__init__()
        self.child = Child(refer, follow, self)
        self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.child(x))  # type: ignore[no-any-return]


REFERENCES: dict[str, tuple[Callable[[nn.Module], Any], Callable[[Any], Any]]] = {
    "weak reference": (weakref.ref, lambda held: held()),
    "weak proxy": (weakref.proxy, lambda held: held.eval.__self__),
    "in a list": (lambda parent: [weakref.ref(parent)], lambda held: held[0]()),
    "in a dictionary": (lambda parent: {"a": (weakref.ref(parent),)}, lambda held: held["a"][0]()),
    "weak values": (lambda parent: weakref.WeakValueDictionary(a=parent), lambda held: held["a"]),
    "weak keys": (lambda parent: weakref.WeakKeyDictionary({parent: 1}), lambda held: next(iter(held))),
    "weak set": (lambda parent: weakref.WeakSet([parent]), lambda held: next(iter(held))),
    "closure": (lambda parent: lambda: parent, lambda held: held()),
    "weak reference in a closure": (lambda parent: functools.partial(weakref.ref(parent)), lambda held: held()),
    "closure of a closure": (
        lambda parent: functools.wraps(Parent.forward)(functools.partial(lambda function: function(), lambda: parent)),
        lambda held: held(),
    ),
    "default": (lambda parent: lambda found=parent: found, lambda held: held()),
    "method of a function": (lambda parent: types.MethodType(lambda found: found, parent), lambda held: held()),
    "weak method": (lambda parent: weakref.WeakMethod(parent.eval), lambda held: held().__self__),
    "partial": (lambda parent: functools.partial(lambda found: found, parent), lambda held: held()),
}


@pytest.mark.parametrize(("refer", "follow"), REFERENCES.values(), ids=REFERENCES)
def test_a_reference_leads_into_the_copy(refer: Callable[[nn.Module], Any], follow: Callable[[Any], Any]) -> None:
    model = prepared(Parent(refer, follow), dead=0.3)
    copied = copy_model(model)
    assert follow(copied.child.parent) is copied
    assert follow(model.child.parent) is model
    plan, _ = fused_and_checked(model, torch.randn(2, 2, 4, 4, dtype=torch.float64))
    assert plan.fused[0].into == ("conv",)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("refer", [weakref.ref, lambda norm: lambda: norm])
def test_a_norm_that_is_referred_to_stays(refer: Callable[[nn.Module], Any], inplace: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
            self.found = refer(self.norm)

        def forward(self, x: Tensor) -> Tensor:
            return self.found()(self.conv(x))  # type: ignore[no-any-return]

    model, x = prepared(Model()), torch.randn(2, 2, 4, 4, dtype=torch.float64)
    expected = model(x)
    assert "also refers to it from found" in reason(bnfuse.plan(model, x), "norm")
    torch.testing.assert_close(bnfuse.fuse(model, x, inplace=inplace)(x), expected, rtol=0, atol=0)


def test_functions_that_share_a_variable_share_it_in_the_copy() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(2)
            norm, count = self.norm, 0

            def add() -> nn.Module:
                nonlocal count
                count += 1
                return norm

            self.add, self.count = add, lambda: (norm, count)

    model = Counting()
    copied = copy_model(model)
    copied.add()
    copied.add()
    assert copied.count() == (copied.norm, 2)
    assert model.count() == (model.norm, 0)
    assert copied.add.__qualname__ == model.add.__qualname__


def test_functions_that_know_nothing_of_the_model_are_shared() -> None:
    number = 2.0
    model = nn.Sequential(nn.BatchNorm2d(2))
    model.function = lambda x: x * number
    assert copy_model(model).function is model.function


class Holder:
    def __init__(self, *held: Any) -> None:
        self.held = held
        self.lock = threading.Lock()


def test_what_cannot_be_copied_is_shared_unless_it_holds_a_part_of_the_model() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    model.lock, model.numbers = threading.Lock(), (number for number in range(3))
    copied = copy_model(model)
    assert (copied.lock, copied.numbers) == (model.lock, model.numbers)
    model.holder = Holder(torch.ones(2))
    with pytest.raises(InputError, match="Fuse it in place"):
        copy_model(model)
