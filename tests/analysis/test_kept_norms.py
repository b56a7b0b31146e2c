"""Kept norms: networks whose norm stays, with the exact reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rule_cases import Case, Net, anything, check, conv, image
from torch import nn

import bnfuse


def hooked():
    net = Net(lambda m, x: m.n(m.u(x)), u=conv(), n=anything())
    net.n.register_forward_hook(lambda module, inputs, output: None)
    return net


def held_in_a_list():
    net = Net(lambda m, x: m.norms[0](m.u(x)), u=conv(), n=anything())
    net.norms = [net.n]
    return net


class Squashing(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).tanh()


class LayerScale(nn.Module):
    def __init__(self, gain):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, x):
        return x * self.gain


class Clipped(LayerScale):
    def forward(self, x):
        return (x * self.gain).clamp(-1, 1)


CASES = [
    Case(
        lambda: Net(lambda m, x: m.n(m.u(x)), u=conv(), n=anything(), auxiliary=anything()),
        None,
        ["auxiliary: it did not run, so nothing is known of where it belongs"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(m.u(x)), u=conv(), n=nn.BatchNorm2d(2, track_running_stats=False)),
        None,
        ["n: it uses the statistics of the batch, since it tracks none of its own"],
    ),
    Case(
        lambda: Net(lambda m, x: F.batch_norm(m.u(x), None, None, training=True), u=conv()),
        None,
        ["batch_norm in Net: it uses the statistics of the batch"],
    ),
    Case(
        hooked,
        None,
        ["n: it has a forward hook, which would be lost"],
    ),
    Case(
        held_in_a_list,
        None,
        ["n: the model also refers to it from norms, where it cannot be replaced"],
    ),
    Case(
        lambda: anything(),
        None,
        ["BatchNorm2d: it is the whole model"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(m.u(x)), u=conv(), n=Squashing(2)),
        None,
        ["n: Squashing.forward does more than normalise"],
    ),
    Case(
        lambda: Net(lambda m, x: F.batch_norm(m.u(x), torch.zeros(2), torch.ones(2)), u=conv()),
        None,
        ["batch_norm in Net: the norm is a function call in the code, not a module that can be replaced"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(m.u(x)), u=conv(), n=anything()),
        None,
        ["n: the caller asked to keep 'n'"],
        options={"keep": "n"},
    ),
    Case(
        lambda: Net(lambda m, x: m.s(m.l(x)), l=nn.Linear(4, 2), s=Clipped([2.0, 3.0])),
        None,
        ["s: Clipped.forward does more than multiply and add per channel"],
        inputs=lambda: (torch.ones(3, 4),),
        options={"options": bnfuse.Options(also="clipped")},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_stays(case: Case) -> None:
    check(case)


def test_a_norm_that_the_caller_keeps_is_printed() -> None:
    model = Net(lambda m, x: m.n(m.u(x)), u=conv(), n=anything())
    assert str(bnfuse.plan(model, image(), keep="n")).splitlines() == [
        "Net: 1 batch norm, 0 fused, 1 kept",
        "kept: n",
        "  the caller asked to keep 'n'",
    ]
