"""Norms whose forward does something around the normalisation: those that go, and those that stay, with the reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rule_cases import BACKWARD, Case, Net, Removal, check, check_goes, conv, image, norm
from support import fused_and_checked, prepared
from torch import Tensor, nn
from torch.nn.utils import parametrize


class TokensLast(nn.BatchNorm1d):
    """Of (batch, tokens, features)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Flattened(nn.BatchNorm1d):
    """Of any number of axes before the features."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, x.shape[-1])).view(x.shape)


class Permuted(nn.BatchNorm2d):
    """Of (batch, height, width, channels)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()


class Scaled(nn.BatchNorm1d):
    """With arithmetic before and after, each in its own layout."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward((2 * x).transpose(1, 2))
        return y.mul(self.bias[:, None]).transpose(1, 2) + self.weight


class NotBack(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2))


class BackAnotherWay(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).reshape(x.shape)


class Stores(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x.transpose(1, 2))
        return self.last.transpose(1, 2)


def tokens() -> tuple[Tensor]:
    return (torch.linspace(-1, 1, 48, dtype=torch.float64).sin().reshape(3, 4, 4),)


def image_with_channels_last() -> tuple[Tensor]:
    return (torch.linspace(-1, 1, 64, dtype=torch.float64).sin().reshape(2, 2, 4, 4),)


GOES = [
    (TokensLast, tokens),
    (Flattened, tokens),
    (Flattened, image_with_channels_last),
    (Permuted, image_with_channels_last),
    (Scaled, tokens),
]


@pytest.mark.parametrize("dead", [0.0, 0.6])
@pytest.mark.parametrize(("kind", "inputs"), GOES)
def test_norm_goes(kind, inputs, dead) -> None:
    check_goes(Removal(lambda: Net(lambda m, x: m.n(m.l(x)), l=nn.Linear(4, 4), n=kind(4)), ("l",), inputs, dead=dead))
    check_goes(
        Removal(
            lambda: Net(lambda m, x: m.l(m.n(nn.functional.silu(x))), l=nn.Linear(4, 3), n=kind(4)),
            ("l",),
            inputs,
            dead=dead,
        )
    )


@pytest.mark.parametrize("kind", [NotBack, BackAnotherWay, Stores])
def test_norm_stays(kind) -> None:
    ones = [1.0, 2.0, 3.0, 4.0]
    check(
        Case(
            lambda: Net(lambda m, x: m.n(m.l(x)), l=nn.Linear(4, 4), n=norm(ones, ones, kind)),
            None,
            [f"n: {kind.__name__}.forward does more than normalise"],
            inputs=lambda: (tokens()[0].float(),),
        )
    )


def test_norms_pass_through_one_that_is_gone() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.v(m.third(m.second(m.first(m.u(x)))))

    model = prepared(
        Net(
            forward,
            u=nn.Linear(4, 4),
            v=nn.Linear(4, 4),
            first=TokensLast(4),
            second=Flattened(4),
            third=TokensLast(4),
        )
    )
    plan, _ = fused_and_checked(model, tokens())
    assert len(plan.fused) == 3


class Signed(nn.Module):
    """A parametrisation: each channel is multiplied by a fixed number."""

    def __init__(self, *signs: float) -> None:
        super().__init__()
        self.register_buffer("signs", torch.tensor(signs))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.signs


class Noisy(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.rand_like(weight)


def parametrised(place: str, parametrisation: nn.Module) -> nn.Module:
    made = norm([2.0, 3.0], [1.0, -2.0])
    parametrize.register_parametrization(made, place, parametrisation)
    return made


@pytest.mark.parametrize("place", ["weight", "bias"])
@pytest.mark.parametrize("signs", [(-1.5, 0.5), (-0.5, 0.0)])
def test_a_parametrised_norm_goes(place: str, signs: tuple[float, ...]) -> None:
    def backward() -> nn.Module:
        return Net(lambda m, x: m.n(m.u(x)), u=conv(), n=parametrised(place, Signed(*signs)))

    def forward() -> nn.Module:
        return Net(lambda m, x: m.u(m.n(nn.functional.silu(x))), u=conv(), n=parametrised(place, Signed(*signs)))

    for make in (backward, forward):
        check_goes(Removal(make, ("u",)))


def test_a_parametrised_norm_takes_up_another_and_goes_itself() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.u(m.n(nn.functional.avg_pool2d(m.k(nn.functional.silu(x)), 2)))

    made = Net(forward, u=conv(), n=parametrised("weight", Signed(-0.5, 2.0)), k=nn.BatchNorm2d(2))
    plan, fused = fused_and_checked(prepared(made), image().double())
    assert [set(decision.into) for decision in plan.decisions] == [{"u"}, {"n", "n.parametrizations.weight"}]
    assert {edit.names[0] for edit in plan.edits} == {"u.weight", "u.bias"}
    assert type(fused.n) is type(fused.k) is nn.Identity


def test_a_parametrised_norm_stays() -> None:
    reads = "its parameters are also read by mul in n.parametrizations.weight.0 (Signed)"
    check(
        Case(
            lambda: Net(
                lambda m, x: m.n(m.u(x)) + m.n.weight.sum(), u=conv(), n=parametrised("weight", Signed(1.0, 2.0))
            ),
            None,
            [f"n: {reads}"],
        )
    )


def test_a_parametrisation_with_random_numbers_stays() -> None:
    check(
        Case(
            lambda: Net(lambda m, x: m.n(m.u(x)), u=conv(), n=parametrised("weight", Noisy())),
            BACKWARD,
            ["n: backward: rand_like in n.parametrizations.weight.0 (Noisy): its contents are random"],
        )
    )


@pytest.mark.parametrize("dead", [0.0, 0.6])
@pytest.mark.parametrize("affine", [True, False])
def test_an_instance_norm_with_running_statistics_goes(affine: bool, dead: float) -> None:
    def tracked() -> nn.Module:
        return nn.InstanceNorm2d(2, affine=affine, track_running_stats=True)

    for case in (
        Removal(lambda: Net(lambda m, x: m.n(m.u(x)), u=conv(), n=tracked()), ("u",)),
        Removal(lambda: Net(lambda m, x: m.u(m.n(nn.functional.silu(x))), u=conv(bias=False), n=tracked()), ("u",)),
        Removal(lambda: Net(lambda m, x: m.n(m.u(x[0])), u=conv(), n=tracked()), ("u",)),
    ):
        check_goes(replace(case, dead=dead))


@pytest.mark.parametrize("affine", [True, False])
def test_an_instance_norm_that_stays_takes_up_a_batch_norm(affine: bool) -> None:
    model = Net(
        lambda m, x: m.n(m.k(nn.functional.silu(x))).sin(),
        k=nn.BatchNorm2d(2),
        n=nn.InstanceNorm2d(2, affine=affine, track_running_stats=True),
    )
    plan, _ = fused_and_checked(prepared(model, dead=0.0), image().double())
    assert [decision.fused for decision in plan.decisions].count(True) == 1


def test_an_instance_norm_without_running_statistics_is_no_norm() -> None:
    model = Net(lambda m, x: m.k(m.n(m.u(x))), u=conv(), n=nn.InstanceNorm2d(2, affine=True), k=nn.BatchNorm2d(2))
    plan, _ = fused_and_checked(prepared(model), image().double())
    assert [(decision.norm, decision.into) for decision in plan.decisions] == [("k", ("n",))]


def test_an_instance_norm_called_as_a_function_stays() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return nn.functional.instance_norm(m.u(x), torch.zeros(2), torch.ones(2), use_input_stats=False)

    check(
        Case(
            lambda: Net(forward, u=conv()),
            None,
            ["batch_norm in Net: the norm is a function call in the code, not a module that can be replaced"],
        )
    )
