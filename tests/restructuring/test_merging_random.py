"""Random networks of parallel branches give the same when they are merged, and take no more; mistakes are found."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from counting import work
from random_blocks import random_block
from support import prepared
from torch import nn

import bnfuse
from bnfuse.restructuring import linear_maps, regions
from bnfuse.restructuring.linear_maps import LinearMap, NotOneLayerError

SEEDS = range(24)
QUICK = bnfuse.Options(infer_calls=False)


def drawn(seed: int) -> tuple[nn.Module, torch.Tensor]:
    return prepared(random_block(seed), seed, dead=0.1), torch.randn(1, 4, 14, 15, dtype=torch.float64)


def problem(seed: int, **options: Any) -> str:
    """What is wrong with a network once it is merged, empty if nothing is."""
    model, x = drawn(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bnfuse.NothingFusedWarning)
        fused, merged = (bnfuse.fuse(model, x, restructure=kinds, **options) for kinds in ((), "merge"))
    for size in ((14, 15), (17, 12), (13, 13)):
        x = torch.randn(2, 4, *size, dtype=torch.float64)
        with torch.inference_mode():
            if not torch.allclose(merged(x), model(x), rtol=1e-12, atol=1e-12):
                return "it gives something else"
    (layers, _, products), (layers_before, _, products_before) = work(merged, x), work(fused, x)
    return "it takes more" if layers > layers_before or products > products_before else ""


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_block(seed: int) -> None:
    assert not problem(seed)


def test_many_of_them_are_merged() -> None:
    plans = (bnfuse.plan(*drawn(seed), restructure="merge", options=QUICK) for seed in SEEDS)
    assert sum(bool(plan.steps) for plan in plans) >= 8


def signs_ignored(patch: pytest.MonkeyPatch) -> None:
    original = LinearMap.scaled
    patch.setattr(LinearMap, "scaled", lambda self, scale: original(self, abs(scale)))


def taps_at_the_wrong_place(patch: pytest.MonkeyPatch) -> None:
    original = linear_maps._Grid.placed
    patch.setattr(
        linear_maps._Grid, "placed", lambda self, weight, of: original(self, weight, replace(of, first=self.first))
    )


def padded_biases_ignored(patch: pytest.MonkeyPatch) -> None:
    original = LinearMap.then

    def then(self: LinearMap, after: LinearMap) -> LinearMap:
        try:
            return original(self, after)
        except NotOneLayerError:
            return original(replace(self, bias=None), after)

    patch.setattr(LinearMap, "then", then)


def prices_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(regions.Price, "is_less_than", lambda self, other: True)


MISTAKES = {
    signs_ignored: range(6),
    taps_at_the_wrong_place: range(6),
    padded_biases_ignored: range(100, 101),
    prices_ignored: range(20),
}
"""Mistakes, with the seeds that are tried."""


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_mistakes_are_found(mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in MISTAKES[mistake]:
        with monkeypatch.context() as patch:
            mistake(patch)
            found = problem(seed, verify=False, options=QUICK)
        if found and not problem(seed, verify=False, options=QUICK):
            return
    pytest.fail("no random block shows it")
