"""Networks for the report, one for each way in which a norm goes or stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rule_cases import Net
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from bnfuse.api import fuse_with_plan, plan_observed
from bnfuse.fusion_plan import Plan
from bnfuse.model import pytree
from bnfuse.reporting import facts
from bnfuse.reporting.facts import Facts
from bnfuse.tools.zoo.randomise import randomise_


class FrozenNorm(nn.Module):
    """A norm written as arithmetic on buffers, as detectors have it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        gain = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * gain.reshape(1, -1, 1, 1) + (self.bias - self.running_mean * gain).reshape(1, -1, 1, 1)


@dataclass(frozen=True)
class Example:
    """A network, what it takes, which of its layers can be compared, and how its norms go (None: they stay)."""

    make: Callable[[], nn.Module]
    inputs: Any
    compared: tuple[str, ...]
    directions: tuple[str | None, ...] = ("backward",)

    def model(self, dtype: torch.dtype = torch.float64, dead: float = 0.2) -> nn.Module:
        torch.manual_seed(0)
        return randomise_(self.make().to(dtype), dead=dead).eval()

    def given(self, dtype: torch.dtype = torch.float64) -> Any:
        return pytree.map_tensors(self.inputs, lambda t: t.to(dtype) if t.is_floating_point() else t)


def conv(inputs: int = 3, outputs: int = 4, size: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, **options)


def norm(channels: int = 4) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels)


def images(channels: int = 3) -> Tensor:
    return torch.randn(2, channels, 6, 5, generator=torch.Generator().manual_seed(1))


def _shared() -> nn.Module:
    return Net(lambda m, x: m.v(m.n(m.u(x))).relu() + m.n(m.u(x + 1)), u=conv(), v=conv(4), n=norm())


def _beside() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x).sin()
        return m.last((m.u(x) + m.n(x) + m.other(m.v(x))).relu())

    layers = {"first": conv(), "u": conv(4, 4, 3, padding=1), "v": conv(4), "last": conv(4)}
    return Net(forward, **layers, n=norm(), other=norm())


def _stream() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        x = x + m.a(m.u(x))
        x = x + m.b(m.v(x.relu()))
        return m.last(m.c(x).sin())

    layers = {"first": conv(), "u": conv(4), "v": conv(4), "last": conv(4)}
    return Net(forward, **layers, a=norm(), b=norm(), c=norm())


EXAMPLES = {
    "two inputs": Example(
        lambda: Net(lambda m, a, b: m.n(m.u(a)) + m.v(b), u=conv(), v=conv(), n=norm()),
        (images(), images() + 1),
        ("u", "v"),
    ),
    "concatenation": Example(
        lambda: Net(lambda m, x: m.n(torch.cat([m.u(x), m.v(x)], 1)), u=conv(), v=conv(), n=norm(8)),
        images(),
        ("u", "v"),
    ),
    "forward": Example(
        lambda: Net(lambda m, x: m.v(m.u(m.n(x.sigmoid())).sin()), u=conv(), v=conv(4), n=norm(3)),
        images(),
        ("u", "v"),
        ("forward",),
    ),
    "another layer in between": Example(
        lambda: Net(lambda m, x: m.v(m.n(m.u(x)).relu()), u=conv(), v=conv(4, size=3, padding=1), n=norm()),
        images(),
        ("u", "v"),
    ),
    "shared": Example(_shared, images(), ("u", "v", "u")),
    "norm after norm": Example(
        lambda: Net(lambda m, x: m.v(m.b(m.a(m.u(x))).sin()), u=conv(), v=conv(4), a=norm(), b=norm()),
        images(),
        ("u", "v"),
        ("backward", "backward"),
    ),
    "beside": Example(_beside, images(), ("first", "", "v", "last"), ("beside", "backward")),
    "stream": Example(_stream, images(), ("first", "u", "v", "c", "last"), ("backward", "backward", None)),
    "two on one way": Example(
        lambda: Net(
            lambda m, x: m.last(m.b(m.a(m.u(x)) + m.v(x)).sin()), u=conv(), v=conv(), last=conv(4), a=norm(), b=norm()
        ),
        images(),
        ("u", "v", "last"),
        ("backward", "backward"),
    ),
    "frozen": Example(lambda: Net(lambda m, x: m.n(m.u(x)), u=conv(), n=FrozenNorm(4)), images(), ("u",)),
    "computed weight": Example(
        lambda: Net(lambda m, x: m.v(m.n(m.u(x)).relu()), u=weight_norm(conv()), v=conv(4), n=norm()),
        images(),
        ("u", "v"),
    ),
    "pixels and tokens": Example(
        lambda: Net(
            lambda m, x: m.l(F.pixel_shuffle(m.n(m.u(x)), 2).flatten(1)), u=conv(), n=norm(), l=nn.Linear(120, 2)
        ),
        images(),
        ("u", "l"),
    ),
    "transposed": Example(
        lambda: Net(lambda m, x: m.n(m.u(x)), u=nn.ConvTranspose2d(3, 4, 3, 2), n=norm()), images(), ("u",)
    ),
    "recurrent": Example(
        lambda: Net(
            lambda m, x: m.l(m.n(x).transpose(1, 2))[0], l=nn.LSTM(3, 5, batch_first=True), n=nn.BatchNorm1d(3)
        ),
        images()[:, :, 0],
        ("l",),
        ("forward",),
    ),
    "whole numbers out": Example(lambda: Net(lambda m, x: m.n(m.u(x)).argmax(1), u=conv(), n=norm()), images(), ("u",)),
    "whole numbers in": Example(
        lambda: Net(lambda m, x: m.n(m.e(x).transpose(1, 2)), e=nn.Embedding(9, 4), n=nn.BatchNorm1d(4)),
        torch.arange(8).reshape(2, 4),
        ("e",),
    ),
    "infinite": Example(
        lambda: Net(
            lambda m, x: m.v(m.n(m.u(x)).masked_fill(x[:, :1] > 0, -torch.inf).exp()), u=conv(), v=conv(4), n=norm()
        ),
        images(),
        ("u", "v"),
    ),
    "named input": Example(lambda: Masked(), {"x": images(), "mask": torch.ones(2, 1, 6, 5)}, ("u",)),
    "nothing goes": Example(
        lambda: Net(lambda m, x: m.n(m.u(x).relu()).sin(), u=conv(), n=norm()), images(), ("u", "n"), (None,)
    ),
    "no norm": Example(lambda: Net(lambda m, x: m.u(x), u=conv()), images(), ("u",), ()),
}


class Masked(nn.Module):
    """Takes its arguments by name."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.n = conv(), norm()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.n(self.u(x)) * mask


def fused_facts(model: nn.Module, inputs: Any, **options: Any) -> tuple[dict[str, Any], nn.Module, Plan]:
    """The facts of fusing a model, with the fused model."""
    found = Facts()
    fused, plan = fuse_with_plan(model, inputs, observer=found, **options)
    return found.finished(), fused, plan


def planned_facts(model: nn.Module, inputs: Any, **options: Any) -> tuple[dict[str, Any], Plan]:
    """The facts of planning."""
    found = Facts()
    plan = plan_observed(model, inputs, observer=found, **options)
    return found.finished(), plan


def quickly(monkeypatch: Any) -> None:
    """Measure latency for one round."""
    monkeypatch.setattr(facts, "SECONDS", 0.0)
