"""Which value each tensor holds: versions, shared memory, tied parameters."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from recording import X, graph_of
from support import fused_and_checked, prepared, reason
from torch import Tensor, nn

from bnfuse.graph.graph import Kind
from bnfuse.reasons import IS_OUTPUT, WRITTEN_THROUGH_VIEW


def test_values_are_followed() -> None:
    graph = graph_of(lambda m, x: m["c"](x) + x, X, c=nn.Conv2d(3, 3, 1))
    conv, add = graph.nodes
    assert conv.bound["input"].kind is Kind.INPUT
    assert conv.bound["weight"].names == ("layers.c.weight",)
    assert add.inputs == [conv.outputs[0], conv.bound["input"]]
    assert conv.bound["input"].consumers == [conv, add]
    assert add.outputs[0].pinned == IS_OUTPUT.reason()


def test_in_place_makes_a_new_version() -> None:
    graph = graph_of(lambda m, x: (y := x * 2).add_(1) + y, X)
    mul, add, total = graph.nodes
    assert add.written == mul.outputs
    assert total.inputs == [add.outputs[0], add.outputs[0]]
    assert mul.outputs[0].pinned is None


def test_stale_views_are_pinned() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        y = x * 2
        y[:, 0].zero_()
        return y + 1

    graph = graph_of(function, X)
    assert graph.nodes[0].outputs[0].pinned == WRITTEN_THROUGH_VIEW.reason()


def test_tied_and_shared() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    second.bias.data = first.bias.data
    graph = graph_of(lambda m, x: m["b"](m["a"](x)), torch.ones(2, 3), a=first, b=second)
    a, b = graph.nodes
    assert a.bound["weight"] is b.bound["weight"]
    assert a.bound["weight"].names == ("layers.a.weight", "layers.b.weight")
    assert a.bound["bias"] is b.bound["bias"]


def test_no_activation_is_kept() -> None:
    import gc
    import weakref

    alive: list[weakref.ref[Tensor]] = []

    def function(m: Any, x: Tensor) -> Tensor:
        y = x * 2
        alive.append(weakref.ref(y))
        return y + 1

    graph = graph_of(function, X)
    gc.collect()
    assert alive[0]() is None
    assert len(graph.nodes) == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_tensor_that_the_code_copies_takes_no_value_along(copied: Any) -> None:
    class Copying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u, self.n, self.v = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = copied(self.n(self.u(copied(x))))
            return self.v(y.add_(1) * y)  # type: ignore[no-any-return]

    plan, _ = fused_and_checked(prepared(Copying(), dead=0.3), torch.randn(2, 2, 4, 4, dtype=torch.float64))
    assert [decision.norm for decision in plan.decisions] == ["n"]
    assert plan.fused or "its output cannot change units" in reason(plan, "n")
