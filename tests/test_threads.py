"""Several threads that fuse at once: each gets what it would get alone, and models and random states are as before."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from support import assert_untouched, prepared, snapshot
from torch import Tensor, nn

import bnfuse

THREADS = 6


class Net(nn.Module):
    """Random numbers, an attribute and a buffer that every call changes."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.c, self.n, self.d, self.k = (
            nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Conv2d(width, 5, 1), nn.BatchNorm2d(5),
        )  # fmt: skip
        self.register_buffer("calls", torch.zeros(()))
        self.last = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last += 1
        noise = random.random() + torch.rand(1, dtype=x.dtype)
        return self.k(self.d(torch.relu(self.n(self.c(x)) + noise)))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 9, 9, dtype=torch.float64)


def at_once(*tasks: Callable[[], Any]) -> list[Any]:
    """What the tasks give, each in a thread of its own."""
    barrier = Barrier(len(tasks))

    def run(task: Callable[[], Any]) -> Any:
        barrier.wait()
        return task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        return [future.result() for future in [pool.submit(run, task) for task in tasks]]


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(0)
    random.seed(0)
    return model(x).detach()


def check(fused: nn.Module, expected: Tensor, x: Tensor) -> None:
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    torch.testing.assert_close(outputs(fused, x), expected, rtol=1e-11, atol=1e-11)


def test_one_model(x: Tensor) -> None:
    model = prepared(Net(), dead=0.0)
    expected = outputs(model, x)
    model.train()
    before, state, python_state = snapshot(model), torch.get_rng_state(), random.getstate()
    for _ in range(3):
        tasks = [lambda: bnfuse.fuse(model, x), lambda: bnfuse.plan(model, x).apply(model)] * (THREADS // 2)
        for fused in at_once(*tasks):
            state_after, python_after = torch.get_rng_state(), random.getstate()
            assert torch.equal(state_after, state)
            assert python_after == python_state
            check(fused, expected, x)
            torch.set_rng_state(state)
            random.setstate(python_state)
        assert_untouched(model, before)
    assert gc.isenabled()


def test_one_model_is_compared_while_it_is_fused(x: Tensor) -> None:
    model = prepared(Net(), dead=0.0).train()
    fused = bnfuse.fuse(model, x)
    before = snapshot(model)
    found = at_once(*[lambda: bnfuse.compare(model, fused, x), lambda: bnfuse.fuse(model, x)] * (THREADS // 2))
    assert all(comparison.within_tolerance() for comparison in found[::2])
    assert_untouched(model, before)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_model_each(inplace: bool, x: Tensor) -> None:
    models = [prepared(Net(width), width, 0.0) for width in range(2, 2 + THREADS)]
    expected = [outputs(model, x) for model in models]
    made = at_once(*(lambda model=model: bnfuse.fuse(model, x, inplace=inplace) for model in models))  # type: ignore[misc]
    for fused, output in zip(made, expected, strict=True):
        check(fused, output, x)


def test_one_model_in_place(x: Tensor) -> None:
    """The first thread fuses it, and the others find it fused."""
    model = prepared(Net(), dead=0.0)
    expected = outputs(model, x)
    assert at_once(*[lambda: bnfuse.fuse(model, x, inplace=True)] * THREADS) == [model] * THREADS
    check(model, expected, x)
