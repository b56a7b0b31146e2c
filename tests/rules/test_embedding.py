"""Embedding: networks whose norm stays, with the exact reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from rule_cases import BACKWARD, Case, Net, Removal, check, check_goes, norm
from torch import nn


def table() -> tuple[torch.Tensor]:
    return (torch.tensor([[0, 3, 6], [1, 1, 2]]),)


def feature_norm():
    return norm([2.0, -1.0], [1.0, 3.0], nn.BatchNorm1d)


CASES = [
    Case(
        lambda: Net(
            lambda m, x: m.n(m.e(x)), e=nn.Embedding(4, 2), n=norm([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], nn.BatchNorm1d)
        ),
        BACKWARD,
        ["n: backward: embedding in e (Embedding): its table has one row for each token"],
        inputs=lambda: (torch.tensor([[0, 1, 1]]),),
    ),
    Case(
        lambda: Net(lambda m, i: m.n(m.e(i)), e=nn.EmbeddingBag(7, 2, mode="sum"), n=feature_norm()),
        BACKWARD,
        [
            "n: backward: embedding_bag in e (EmbeddingBag): it takes no shift: an element may be added any number of times"
        ],
        inputs=table,
    ),
    Case(
        lambda: Net(lambda m, i: m.n(m.e(i)), e=nn.EmbeddingBag(7, 2, mode="max"), n=feature_norm()),
        BACKWARD,
        ["n: backward: embedding_bag in e (EmbeddingBag): no negative scale passes through a maximum"],
        inputs=table,
    ),
    *(
        Case(
            lambda function=function, options=options: Net(
                function, e=nn.EmbeddingBag(7, 2, mode="mean", **options), n=feature_norm()
            ),
            BACKWARD,
            ["n: backward: embedding_bag in e (EmbeddingBag): it takes no shift: a bag may be empty, and gives zeros"],
            inputs=table,
        )
        for function, options in (
            (lambda m, i: m.n(m.e(i)), {"padding_idx": 1}),
            (lambda m, i: m.n(m.e(i.flatten(), torch.tensor([0, 3, 3]))), {}),
            (lambda m, i: m.n(m.e(i.flatten(), torch.arange(0, 6, 3))), {}),
        )
    ),
    Case(
        lambda: Net(lambda m, i: m.n(m.e(i)[None]), e=nn.EmbeddingBag(7, 3, mode="mean"), n=feature_norm()),
        BACKWARD,
        ["n: backward: embedding_bag in e (EmbeddingBag): its table has one row for each token"],
        inputs=table,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_stays(case: Case) -> None:
    check(case)


REMOVED = [
    Removal(
        lambda: Net(lambda m, i: m.n(m.e(i).mT), e=nn.Embedding(7, 4), n=nn.BatchNorm1d(4)),
        ("e",),
        table,
    ),
    Removal(lambda: bags(lambda m, i: m.n(m.e(i)), "mean"), ("e",), table),
    Removal(lambda: bags(lambda m, i: m.n(m.e(i)), "max"), ("e",), table, positive=True),
    Removal(lambda: bags(lambda m, i: m.n(m.e(i)), "sum"), ("e",), table, shiftless=True),
    Removal(lambda: bags(lambda m, i: m.n(m.e(i)), "mean", padding_idx=1), ("e",), table, shiftless=True),
    Removal(
        lambda: bags(lambda m, i: m.n(m.e(i.flatten(), torch.tensor([0, 3, 3]))), "sum"), ("e",), table, shiftless=True
    ),
    Removal(
        lambda: bags(lambda m, i: m.n(m.e(i, per_sample_weights=i.double().sin())), "sum"),
        ("e",),
        table,
        shiftless=True,
    ),
]


def bags(function: Any, mode: str, **options: Any) -> nn.Module:
    return Net(function, e=nn.EmbeddingBag(7, 4, mode=mode, **options), n=nn.BatchNorm1d(4))


@pytest.mark.parametrize("dead", [0.0, 0.6])
@pytest.mark.parametrize("case", REMOVED)
def test_norm_goes(case: Removal, dead: float) -> None:
    check_goes(replace(case, dead=dead))
