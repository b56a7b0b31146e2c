"""Pins: networks whose norm stays, with the exact reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rule_cases import BACKWARD, FORWARD, Case, Net, Odd, anything, check, conv, fold, image, no_shift
from torch import nn

import bnfuse


def keeps_it(m, x):
    m.features = m.u(x)
    return m.n(m.features)


def read_by_a_hook():
    net = Net(lambda m, x: m.n(m.u(x)), u=conv(), n=anything())
    net.u.register_forward_hook(lambda module, inputs, output: None)
    return net


def writes_through_a_view(m, x):
    y = m.u(x)
    y[:, :1].mul_(2)
    return m.n(y)


def counts(m, x):
    m.table.seen.add_(1)
    return m.n(m.u(x) + m.table.seen)


def counting():
    table = nn.Module()
    table.register_buffer("seen", torch.zeros(2, 1, 1))
    return Net(counts, u=conv(), table=table, n=anything())


def unsaved_mask():
    table = nn.Module()
    table.register_buffer("mask", torch.ones(2, 1, 1), persistent=False)
    return Net(lambda m, x: m.n(m.u(x) + m.table.mask), u=conv(), table=table, n=anything())


def unsaved_kernel():
    table = nn.Module()
    table.register_buffer("kernel", torch.ones(2, 2, 1, 1), persistent=False)
    return Net(lambda m, x: m.n(F.conv2d(x, m.table.kernel)), table=table, n=no_shift())


def offset_of_integers():
    table = nn.Module()
    table.register_buffer("offset", torch.ones(2, 1, 1, dtype=torch.int64))
    return Net(lambda m, x: m.n(m.u(x) + m.table.offset), u=conv(), table=table, n=anything())


class Special(nn.Parameter):
    pass


def of_a_subclass():
    layer = conv()
    layer.weight = Special(torch.ones(2, 2, 1, 1))
    return Net(lambda m, x: m.n(m.u(x)), u=layer, n=anything())


def expanded_weight():
    layer = conv()
    layer.weight = nn.Parameter(torch.ones(1, 2, 1, 1).expand(2, 2, 1, 1))
    return Net(lambda m, x: m.n(m.u(x)), u=layer, n=anything())


def overlapping_weights():
    u, v, memory = (conv(), conv(), torch.ones(6))
    u.weight.data, v.weight.data = (memory[:4].view(2, 2, 1, 1), memory[2:].view(2, 2, 1, 1))
    return Net(lambda m, x: m.n(m.u(x)) + m.v(x), u=u, v=v, n=anything())


CASES = [
    Case(
        lambda: Net(lambda m, x: m.u(m.n(x)), u=conv(size=3, padding=1), n=anything()),
        BACKWARD,
        ["n: backward: an input of shape 1x2x4x4 cannot change units: it is an input of the model"],
    ),
    Case(
        lambda: Net(lambda m, x: (m.n(y := m.u(x)), y), u=conv(), n=anything()),
        BACKWARD,
        ["n: backward: conv2d in u (Conv2d): its output cannot change units: it is an output of the model"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(F.silu(x)), n=anything()),
        FORWARD,
        ["n: forward: batch_norm in n (BatchNorm2d): its output cannot change units: it is an output of the model"],
    ),
    Case(
        lambda: Net(keeps_it, u=conv(), n=anything()),
        BACKWARD,
        ["n: backward: conv2d in u (Conv2d): its output cannot change units: it is stored in Net.features"],
    ),
    Case(
        read_by_a_hook,
        BACKWARD,
        ["n: backward: conv2d in u (Conv2d): its output cannot change units: a hook on u (Conv2d) reads it"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(y := m.u(x)) * float(y.numpy().max()), u=conv(), n=anything()),
        BACKWARD,
        ["n: backward: conv2d in u (Conv2d): its output cannot change units: its contents leave PyTorch by .numpy()"],
    ),
    Case(
        lambda: Net(writes_through_a_view, u=conv(), n=anything()),
        BACKWARD,
        ["n: backward: a tensor of shape 1x2x4x4 cannot change units: its memory is written through another view"],
    ),
    Case(
        counting,
        BACKWARD,
        ["n: backward: add in Net: its output cannot change units: it is written to during the run"],
    ),
    Case(
        unsaved_mask,
        BACKWARD,
        ["n: backward: table.mask cannot change units: it is a constant that no parameter or saved buffer holds"],
    ),
    Case(
        unsaved_kernel,
        BACKWARD,
        ["n: backward: table.kernel cannot change: it is a constant that no parameter or saved buffer holds"],
    ),
    Case(
        lambda: Net(lambda m, x, w: m.n(F.conv2d(x, w)), n=no_shift()),
        BACKWARD,
        ["n: backward: a weight cannot change: it is an input of the model"],
        inputs=lambda: (
            image(),
            torch.ones(2, 2, 1, 1),
        ),
    ),
    Case(
        offset_of_integers,
        BACKWARD,
        ["n: backward: table.offset cannot change units: it holds torch.int64"],
    ),
    Case(
        of_a_subclass,
        BACKWARD,
        ["n: backward: u.weight cannot change: Special is a tensor subclass"],
    ),
    Case(
        expanded_weight,
        BACKWARD,
        ["n: backward: u.weight cannot change: several of its elements share memory"],
    ),
    Case(
        overlapping_weights,
        BACKWARD,
        ["n: backward: u.weight cannot change: it shares memory with v.weight"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(m.u(x)), u=conv(), n=anything()),
        BACKWARD,
        ["n: backward: u.weight cannot change: layers= does not name Conv2d"],
        options={"options": bnfuse.Options(layers=[nn.Linear])},
    ),
    Case(
        lambda: Net(lambda m, x: m.n(m.u(x) + m.o.offset) + m.o(x), u=conv(), o=Odd(), n=anything()),
        BACKWARD,
        ["n: backward: o.offset cannot change units: a handler looks after the layer that reads it"],
        options={"options": bnfuse.Options(handlers={Odd: fold})},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_stays(case: Case) -> None:
    check(case)
