"""Cases for the tables beside the rules: a small network, and the exact reason why a norm of it stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from support import fused_and_checked
from torch import Tensor, nn

import bnfuse
from bnfuse.analysis.norms import is_norm
from bnfuse.tools.zoo.randomise import randomise_

BACKWARD, FORWARD, BESIDE = "backward", "forward", "beside"


class Net(nn.Module):
    """Layers by name, and a function of the module and its inputs as the forward."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


def norm(gain: list[float], shift: list[float], kind: type[Any] = nn.BatchNorm2d) -> Any:
    """A norm that computes ``gain * x + shift``: its variance and eps add up to one."""
    made = kind(len(gain), eps=0.25)
    made.running_var.fill_(0.75)
    made.weight.data, made.bias.data = torch.tensor(gain), torch.tensor(shift)
    return made


def anything() -> Any:
    return norm([2.0, -1.0], [1.0, 3.0])


def no_shift() -> Any:
    return norm([2.0, -1.0], [0.0, 0.0])


def shift_alone() -> Any:
    return norm([1.0, 1.0], [1.0, 3.0])


def dead_channel() -> Any:
    return norm([2.0, 0.0], [0.0, 0.0])


def conv(inputs: int = 2, outputs: int = 2, size: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, **options)


def parameter(contents: Any) -> nn.ParameterDict:
    """A module that holds one parameter, ``p``."""
    return nn.ParameterDict({"p": nn.Parameter(torch.tensor(contents))})


class Odd(nn.Module):
    """A layer that no rule sees through: per channel of two, ``gain * sin(x) + offset``."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.offset = (nn.Parameter(torch.ones(2, 1, 1)), nn.Parameter(torch.zeros(2, 1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return x.sin() * self.gain.exp().log() + self.offset


def fold(layer: Odd, scale: Tensor, shift: Tensor) -> None:
    """A handler for it."""
    layer.gain.mul_(scale.view(2, 1, 1))
    layer.offset.mul_(scale.view(2, 1, 1)).add_(shift.view(2, 1, 1))


def image() -> Tensor:
    return torch.linspace(-1, 1, 32).reshape(1, 2, 4, 4)


@dataclass
class Case:
    """A network, the direction that is tried (None: none), and the reasons, a norm each, as they are printed."""

    make: Callable[[], nn.Module]
    direction: str | None
    reasons: list[str]
    inputs: Callable[[], tuple[Any, ...]] = lambda: (image(),)
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.reasons[0]


def check(case: Case) -> None:
    """The reasons are exactly these, and the network is right when it is fused as planned."""
    torch.manual_seed(0)
    model, inputs = case.make(), case.inputs()
    plan = bnfuse.plan(model, inputs, **case.options)
    found = [
        f"{decision.norm}: {reason}"
        for decision in plan.kept
        for reason in decision.reasons
        if reason.direction == case.direction
    ]
    assert found == case.reasons
    bnfuse.fuse(model, inputs, **case.options)


def check_removed(function: Callable[..., Any], direction: str) -> None:
    """The norm ``n`` between the convolutions ``u`` and ``v`` goes that way, and the outputs stay equal."""
    torch.manual_seed(0)
    model = Net(function, u=conv(), v=conv(), n=nn.BatchNorm2d(2)).double()
    randomise_(model, 0, 0.0)
    model.eval()
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    ran: list[nn.Module] = []
    hooks = [layer.register_forward_hook(lambda layer, *_: ran.append(layer)) for layer in model.children()]
    model(x)
    for name, layer in list(model.named_children()):
        if layer not in ran:
            del model._modules[name]  # it could be called another time
    for hook in hooks:
        hook.remove()
    plan = bnfuse.plan(model, x)
    assert [decision.direction for decision in plan.fused] == [direction]
    torch.testing.assert_close(bnfuse.fuse(model, x)(x), model(x), rtol=1e-12, atol=1e-12)


@dataclass
class Removal:
    """A network whose only norm goes, and the names of the modules that take it up.

    Attributes:
        positive: the gammas are positive, as a relu asks for.
        shiftless: the norm is ``a*x``, as what takes no shift asks for.
        dead: the share of gammas that are 0.
    """

    make: Callable[[], nn.Module]
    into: tuple[str, ...]
    inputs: Callable[[], tuple[Any, ...]] = lambda: (image().double(),)
    positive: bool = False
    shiftless: bool = False
    dead: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)


def check_goes(case: Removal) -> None:
    """The norm goes into these modules, and the outputs stay equal to 1e-12, of a larger batch too."""
    torch.manual_seed(0)
    model = randomise_(case.make().double(), 0, case.dead).eval()
    [found] = [module for module in model.modules() if is_norm(module)]
    assert isinstance(found, nn.modules.batchnorm._NormBase)
    if case.positive:
        found.weight.data.abs_()
    if case.shiftless:
        found.running_mean.zero_()
        found.bias.data.zero_()
    inputs = case.inputs()
    plan, fused = fused_and_checked(model, inputs, **case.options)
    assert [decision.into for decision in plan.decisions] == [case.into]
    torch.testing.assert_close(fused(*inputs), model(*inputs), rtol=1e-12, atol=1e-12)
