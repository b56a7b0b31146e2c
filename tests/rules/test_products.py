"""Products: networks whose norm stays, with the exact reason, and some whose norm goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule_cases import (
    BACKWARD,
    FORWARD,
    Case,
    Net,
    Removal,
    anything,
    check,
    check_goes,
    check_removed,
    conv,
    dead_channel,
    no_shift,
    parameter,
)
from support import fused_and_checked
from torch import Tensor, nn
from torch.nn.utils import prune

import bnfuse


class Standardised(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight / self.weight.std((1, 2, 3), keepdim=True), self.bias)


def written(m, x):
    gain = torch.ones(2, 1, 1)
    gain.mul_(3)
    return m.u(m.n(F.silu(x)) * gain)


def pruned(layer: nn.Module, *names: str) -> nn.Module:
    for name in names or ("weight",):
        prune.random_unstructured(layer, name, 0.5)  # type: ignore[no-untyped-call]
    return layer


CASES = [
    Case(
        lambda: Net(lambda m, x: m.n(m.u(x) * torch.sigmoid(m.v(x))), u=conv(), v=conv(), n=anything()),
        BACKWARD,
        ["n: backward: mul in Net: no shift passes through a gate"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n((y := m.u(x)) * y), u=conv(), n=no_shift()),
        BACKWARD,
        ["n: backward: mul in Net: it multiplies a tensor by itself"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(torch.div(m.u(x), 2, rounding_mode="floor")), u=conv(), n=anything()),
        BACKWARD,
        ["n: backward: div in Net: it rounds"],
    ),
    Case(
        lambda: Net(lambda m, x: m.u(F.glu(m.n(F.silu(x)), 1)), u=conv(1), n=no_shift()),
        FORWARD,
        ["n: forward: glu in Net: its gating half cannot change units"],
    ),
    Case(
        lambda: Net(
            lambda m, x: m.n(F.conv2d(x, m.u.weight) + m.gain.p) * m.gain.p,
            u=conv(),
            gain=parameter([[[2.0]], [[4.0]]]),
            n=anything(),
        ),
        BACKWARD,
        ["n: backward: mul in Net: no shift passes through a factor"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(m.u(x)), u=Standardised(2, 2, 1), n=anything()),
        BACKWARD,
        ["n: backward: div in u (Standardised): the scales of its factors and its result do not fit"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(m.u(x)), u=nn.utils.parametrizations.weight_norm(conv(), dim=1), n=anything()),
        BACKWARD,
        [
            "n: backward: _weight_norm in u.parametrizations.weight.0 (_WeightNorm): its magnitude has no axis for the units"
        ],
    ),
    Case(
        lambda: Net(
            lambda m, x: m.n(torch._weight_norm(m.u(x), m.g.p)), u=conv(), g=parameter([[[[1.0]]]]), n=anything()
        ),
        BACKWARD,
        ["n: backward: _weight_norm in Net: no shift passes through it"],
    ),
    Case(
        lambda: Net(lambda m, x: torch._weight_norm(m.n(F.silu(x)), m.g.p), g=parameter([[[[1.0]]]]), n=anything()),
        FORWARD,
        ["n: forward: _weight_norm in Net: it normalises its direction, which must stay as it is"],
    ),
    Case(
        lambda: Net(
            lambda m, x: m.n(m.u(x) * m.gain.p), u=conv(2, 1), gain=parameter([[[2.0]], [[4.0]]]), n=anything()
        ),
        BACKWARD,
        ["n: backward: mul in Net: a factor that is broadcast has no axis for the units"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(m.u(x) * 0), u=conv(), n=anything()),
        BACKWARD,
        ["n: backward: mul in Net: it multiplies by 0"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(m.u(x) * m.gain.p), u=conv(), gain=parameter([[[0.0]], [[4.0]]]), n=anything()),
        BACKWARD,
        ["n: backward: mul in Net: no shift of its input undoes one of its output where it multiplies by 0"],
    ),
    Case(
        lambda: Net(lambda m, x: m.u(m.n(F.silu(x)) / x.shape[-1]), u=conv(), n=anything()),
        FORWARD,
        ["n: forward: div in Net: its numbers depend on the size or the contents of the input"],
    ),
    Case(
        lambda: Net(written, u=conv(), n=anything()),
        FORWARD,
        ["n: forward: mul in Net: its contents are written in place"],
    ),
    Case(
        lambda: Net(lambda m, x: m.u(m.v(x) / m.n(F.silu(x))), u=conv(), v=conv(), n=dead_channel()),
        FORWARD,
        ["n: forward: div in Net: it would have to undo a scale of (nearly) 0"],
    ),
    Case(
        lambda: Net(lambda m, x: m.n(m.u(x)), u=pruned(conv(), "weight", "bias"), n=anything()),
        BACKWARD,
        ["n: backward: mul in u (Conv2d): no shift passes through a gate"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_stays(case: Case) -> None:
    check(case)


REMOVED = [
    (lambda m, x: m.v(m.n(F.silu(m.u(x))) * 2), FORWARD),
    (lambda m, x: m.n(-m.u(x)), BACKWARD),
]


@pytest.mark.parametrize(("function", "direction"), REMOVED)
def test_norm_goes(function: Callable[..., Any], direction: str) -> None:
    check_removed(function, direction)


DEAD = [
    Removal(lambda: Net(lambda m, x: m.n(m.u(x)), u=pruned(conv()), n=nn.BatchNorm2d(2)), ("u",)),
    Removal(lambda: Net(lambda m, x: m.n(m.u(x)), u=pruned(conv(bias=False)), n=nn.BatchNorm2d(2)), ("u",)),
    Removal(lambda: Net(lambda m, x: m.n(m.u(x)), u=pruned(nn.ConvTranspose2d(2, 2, 2)), n=nn.BatchNorm2d(2)), ("u",)),
    Removal(lambda: Net(lambda m, x: m.u(m.n(F.silu(x))), u=pruned(conv()), n=nn.BatchNorm2d(2)), ("u",)),
    Removal(
        lambda: Net(lambda m, x: m.n(m.u(x) * m.v(x).sigmoid()), u=conv(), v=conv(), n=nn.BatchNorm2d(2)),
        ("u",),
        shiftless=True,
    ),
    Removal(
        lambda: Net(lambda m, x: m.v(m.n(F.silu(x)) * m.u(x).sigmoid()), u=conv(), v=conv(), n=nn.BatchNorm2d(2)),
        ("v",),
        shiftless=True,
    ),
    Removal(
        lambda: Net(lambda m, x: m.n(m.u(x) / (2 + x.square())), u=conv(), n=nn.BatchNorm2d(2)), ("u",), shiftless=True
    ),
]


@pytest.mark.parametrize("dead", [0.0, 0.6])
@pytest.mark.parametrize("case", DEAD)
def test_a_factor_takes_a_scale_of_zero(case: Removal, dead: float) -> None:
    check_goes(replace(case, dead=dead))


@pytest.mark.parametrize("seed", range(5))
def test_a_constant_factor_stays_whatever_the_rounding_of_the_scale(seed: int) -> None:
    """The scale goes past it, and s * (1/s) is not always 1."""
    torch.manual_seed(seed)
    model = Net(
        lambda m, x: torch.sin(m.n(m.u(x) * torch.full((64,), 1.3, dtype=x.dtype))),
        u=nn.Linear(3, 64),
        n=nn.BatchNorm1d(64),
    )
    nn.init.normal_(model.n.weight)
    model, x = model.double().eval(), torch.randn(5, 3, dtype=torch.float64)
    fused = bnfuse.fuse(model, x)
    assert type(fused.n) is nn.Identity
    torch.testing.assert_close(fused(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_a_gain_that_takes_a_scale_does_so_for_all_its_readers(seed: int) -> None:
    """For the second one the gain has its new units already, and what is left of the scale is 1 up to rounding."""
    torch.manual_seed(seed)

    def one(m: Any, y: Tensor) -> Tensor:
        return m.n(y) * m.gain.p + m.u(y)

    model = Net(
        lambda m, x: (one(m, F.silu(x)), one(m, x.cos())),
        u=conv(16, 16),
        gain=parameter([[[1.0 + channel / 7]] for channel in range(16)]),
        n=nn.BatchNorm2d(16),
    )
    nn.init.normal_(model.n.weight)
    nn.init.normal_(model.n.bias)
    plan, fused = fused_and_checked(model.double().eval(), torch.randn(2, 16, 4, 4, dtype=torch.float64))
    assert type(fused.n) is nn.Identity
    assert plan.fused[0].into == ("u", "gain")
