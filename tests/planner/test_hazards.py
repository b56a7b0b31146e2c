"""Networks of a few lines that are easy to get wrong, with the decision that each of their norms must get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import fused_and_checked, prepared, reason
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.ops import FrozenBatchNorm2d

import bnfuse
from bnfuse.api import fuse_with_plan
from bnfuse.planner.recorded_calls import FurtherCall
from bnfuse.planner.trying_plans import Trials
from bnfuse.verify.verdict import does_not_run

IMAGE = (2, 3, 8, 8)


class Net(nn.Module):
    """Layers by name, and a function of (self, x) as the forward."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module | Tensor) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.register_buffer(name, layer) if isinstance(layer, Tensor) else self.add_module(name, layer)
        self.function = forward

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


@dataclass
class Case:
    """A network, what it takes, and for every norm None if it goes or a part of the reason why it stays."""

    make: Callable[[], nn.Module]
    expected: dict[str, str | None]
    shapes: tuple[tuple[int, ...], ...] = field(default=(IMAGE,))


def conv(inputs: int = 3, outputs: int = 6, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, **{"padding": size // 2, "bias": False, **options})


def norm(channels: int = 6, **options: Any) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, **options)


class StandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias, self.stride, self.padding)


class BiasBlindConv(nn.Conv2d):
    """A forward that never reads the bias, as in partial convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, None, self.stride, self.padding)


class MaskedConv(nn.Conv1d):
    """Takes the lengths of the sequences as well, and masks what lies behind them."""

    def forward(self, x: Tensor, lengths: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        mask = torch.arange(x.shape[-1]) < lengths[:, None]
        return F.conv1d(x * mask[:, None] * scale, self.weight, self.bias), lengths


class BiasAwareConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


class BiasBranchConv(nn.Conv2d):
    """Does something else where it has a bias."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight if self.bias is None else 2 * self.weight, self.bias)


class BiasBySizeConv(nn.Conv2d):
    """Reads its bias on images of even width."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, None if self.bias is None or x.shape[-1] % 2 else self.bias)


class OctaveConv(nn.Conv2d):
    """One weight and one bias, whose parts belong to two resolutions; ``whole`` has one resolution."""

    whole = False
    spoiled = False

    def forward(self, high: Tensor, low: Tensor | None = None) -> Any:
        if self.whole:
            return F.conv2d(high, self.weight, self.bias, padding=1)

        def layer(x: Tensor, rows: slice, columns: slice) -> Tensor:
            bias = None if self.bias is None else self.bias[rows]
            if bias is not None and self.spoiled:
                bias = bias.exp()
            return F.conv2d(x, self.weight[rows, columns], bias, padding=1)

        first, rest = slice(0, 4), slice(4, None)
        if low is None:
            return layer(high, first, slice(None)), layer(F.avg_pool2d(high, 2), rest, slice(None))
        above = layer(high, first, first) + F.interpolate(layer(low, first, rest), scale_factor=2.0)
        return above, layer(F.avg_pool2d(high, 2), rest, first) + layer(low, rest, rest)


def octaves(m: Any, x: Tensor) -> Tensor:
    high, low = m.c(m.s(x))
    high, low = m.d(F.relu(m.n1(high)), F.relu(m.n2(low)))
    return m.n3(high).relu().sum((2, 3)) + m.n4(low).relu().sum((2, 3)).repeat(1, 2)


def octave_net(**flags: bool) -> Net:
    net = Net(
        octaves, s=OctaveConv(3, 3, 3, bias=False), c=OctaveConv(3, 6, 3, bias=False), d=OctaveConv(6, 6, 3, bias=False),
        n1=norm(4), n2=norm(2), n3=norm(4), n4=norm(2),
    )  # fmt: skip
    net.s.whole = True
    net.d.spoiled = flags.get("spoiled", False)
    return net


class SizePaddedConv(nn.Conv2d):
    """Pads to even sizes, as "same" padding of other frameworks does: nothing at the size of the example."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1))
        return super().forward(x)


class DoublingNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class SquashingNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


class NormWithActivation(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def beside(
    layer: nn.Module,
    forward: Callable[..., Any] = lambda m, x: m.c(x) + m.n(x),
    norm: nn.Module | None = None,
    **others: nn.Module | Tensor,
) -> Net:
    return Net(forward, c=layer, n=norm or nn.BatchNorm2d(3), **others)


def branches(m: Any, x: Tensor) -> Tensor:
    """RepVGG's block."""
    x = m.a(x).relu()
    return (m.k(m.c(x)) + m.l(m.d(x)) + m.n(x)).relu()


def hooked_beside() -> nn.Module:
    net = beside(conv(3, 3))
    net.c.register_forward_hook(lambda module, args, output: None)
    return net


def tied(forward: Callable[..., Any] = lambda m, x: m.b(m.n(m.a(x)))) -> nn.Module:
    net = Net(forward, a=conv(3, 3), n=norm(3), b=conv(3, 3))
    net.b.weight = net.a.weight
    return net


def tied_by_memory() -> nn.Module:
    net = Net(lambda m, x: m.b(m.n(m.a(x))), a=conv(3, 3), n=norm(3), b=conv(3, 3)).double()
    net.b.weight.data = net.a.weight.data
    return net


def overlapping_memory() -> nn.Module:
    memory = torch.randn(200, dtype=torch.float64)
    net = Net(lambda m, x: m.b(m.n(m.a(x))), a=conv(3, 3), n=norm(3), b=conv(3, 3)).double()
    net.a.weight.data = memory[:81].view(3, 3, 3, 3)
    net.b.weight.data = memory[40:121].view(3, 3, 3, 3)
    return net


def with_parameters(forward: Callable[..., Any], **layers: nn.Module) -> nn.Module:
    net = Net(forward, **layers)
    net.p, net.q = nn.Parameter(torch.randn(6, 1, 1)), nn.Parameter(torch.randn(6, 1, 1))
    net.t = nn.Parameter(torch.randn(6, 6))
    return net


def hooked(where: str, hook: Callable[..., Any], pre: bool = False) -> nn.Module:
    net = Net(lambda m, x: F.relu(m.n(m.c(x))), c=conv(), n=norm())
    module = net.get_submodule(where)
    module.register_forward_pre_hook(hook) if pre else module.register_forward_hook(hook)
    return net


def watched_in_place() -> nn.Module:
    """A hook that keeps what an activation was given, in whose memory the activation has written since."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.c(x)
        return m.a(m.n(y)) + F.silu(m.k(y))

    net = Net(forward, c=conv(), n=norm(), k=norm(), a=nn.ReLU(inplace=True))
    net.a.register_forward_hook(lambda module, args, output: module.__dict__.update(seen=args[0]))
    return net


def write_to_data(m: Any, x: Tensor) -> Tensor:
    y = m.c(x)
    y.data[:, 0] *= 2
    return m.n(y)


def give_back(m: Any, x: Tensor) -> Tensor:
    y = m.c(x)
    z = F.relu(m.n(y))
    y.set_()
    z.data.set_()
    return torch.tanh(z)


def stored(m: Any, x: Tensor) -> Tensor:
    m.last = m.c(x)
    return F.relu(m.n(m.last))


def listed() -> nn.Module:
    net = Net(lambda m, x: m.norms[0](m.c(x)), c=conv(), n=norm())
    net.norms = [net.n]
    return net


def write_through_view(m: Any, x: Tensor) -> Tensor:
    y = m.c(x)
    y[:, :2].mul_(2)
    return m.n(y)


def write_to_base(m: Any, x: Tensor) -> Tensor:
    y = m.c(x)
    view = y.view(y.shape[0], -1)
    y.add_(1)
    return m.n(y).sum() + view.sum()


def order(x: Tensor) -> Tensor:
    """The places of the batch, by what the input holds."""
    return x.flatten(1).sum(1).argsort()


def added(messages: Tensor, x: Tensor) -> Tensor:
    """Messages of each to two others, added up, as torch_geometric does it."""
    index = (order(x) // 2).view(-1, 1, 1, 1).expand_as(messages)
    return messages.new_zeros(messages.shape).scatter_add_(0, index, messages)


def averaged(m: nn.Module, messages: Tensor) -> Tensor:
    index = (torch.arange(len(messages)) // 2).view(-1, 1, 1, 1).expand_as(messages)
    mean = torch.zeros_like(messages).scatter_reduce(0, index, messages, "mean", include_self=False)
    normed: Tensor = m.n(mean + m.b)
    return normed


def numpy_reader(m: Any, x: Tensor) -> Tensor:
    y = m.c(x)
    return m.n(y) * float(y.detach().numpy().max())


def called_twice(m: Any, x: Tensor) -> Tensor:
    return m.n1(m.c(x)) + m.n2(m.c(x.flip(-1)))


def in_place_by_side_effect(m: Any, x: Tensor) -> Tensor:
    s = m.a(x)
    y = m.n(s)
    m.r(y)
    return m.e(s + m.b(y))


class TupleNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Any:
        return (super().forward(x),)


def channel_by_data(m: Any, x: Tensor) -> Tensor:
    k = int(x.mean((0, 2, 3)).argmax())
    return m.c(m.n(F.silu(x))[:, k : k + 1])


def square_only(m: Any, x: Tensor) -> Tensor:
    assert x.shape[2] == x.shape[3]
    return m.c(m.n(F.silu(x)) / x.shape[-1])


def written_zero(m: Any, x: Tensor) -> Tensor:
    zero = x.new_zeros(6, 1, 1)
    y = m.c(x) + zero
    zero.fill_(2)
    return m.n(y + zero)


def padded_if_odd(m: Any, x: Tensor) -> Tensor:
    y = m.n(F.silu(x))
    if x.shape[3] % 2:
        y = F.pad(y, (0, 1, 0, 1))
    return m.c(y)


def counter(m: Any, x: Tensor) -> Tensor:
    m.calls = getattr(m, "calls", 0) + 1
    return m.n(m.c(x) * m.calls)


def stateful(net: nn.Module) -> nn.Module:
    net.register_buffer("state", torch.zeros(1, 6, 1, 1))
    return net


def last_call(m: Any, x: Tensor) -> Tensor:
    z = m.c(x) + m.state
    m.state = x.mean((0, 2, 3), keepdim=True)[:, :1].expand(1, 6, 1, 1).clone()
    return m.n(z)


BEHIND = (
    lambda y: y.clamp(0, 6),
    lambda y: y * y,
    lambda y: y.max(),
    lambda y: y[y > 0].sum(),
    lambda y: y.roll(1),
    lambda y: y.div(2, rounding_mode="floor"),
    lambda y: y * 1j,
)


def in_place_and_returned(m: Any, x: Tensor) -> Any:
    s = m.a(x)
    y = m.n(s)
    m.r(y)
    return y, m.e(s)


def input_overwritten(m: Any, x: Tensor) -> Tensor:
    s = m.a(x)
    y = m.n(s)
    s.mul_(0.5)
    return m.b(F.silu(y)) + m.b(F.silu(y))


def flattened_and_written(m: Any, x: Tensor) -> Tensor:
    y = m.n(m.a(x).chunk(2, 1)[0])
    y.flatten()[0] = 0
    return y


def shared_head(m: Any, x: Tensor) -> Tensor:
    return m.n(m.c(x)) + m.n(m.c(x.flip(-1)))


OUTPUT, TWICE, HOOK = "output of the model", "used more than once", "hook"
DIFFERENT = "two different units"

ROWS = (6, 4)


def rows(x: Tensor) -> Tensor:
    return x[:, 0].abs().long().clamp(max=3)


PARTS: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], tuple[int, ...]]] = {
    "part of a weight": (lambda m, x: (F.conv2d(x, m.w[:4], m.b[:4]), F.conv2d(2 * x, m.w[:4], m.b[4:])), (2, 4, 8, 8)),
    "part of a bias": (lambda m, x: (F.conv2d(x, m.w[:4], m.b[:4]), F.conv2d(2 * x, m.w[4:], m.b[2:6])), (2, 4, 8, 8)),
    "part of a weight of a linear layer": (lambda m, x: (F.linear(x, m.l[:4], m.b[:4]), F.linear(2 * x, m.l[:4], m.b[4:])), ROWS),
    "part of a matrix": (lambda m, x: (m.b[:4] + x @ m.l.t()[:, :4], 2 * x @ m.l.t()[:, :4]), ROWS),
    "part of an Einstein sum": (lambda m, x: (m.b[:4] + torch.einsum("bi,oi->bo", x, m.l[:4]), torch.einsum("bi,oi->bo", 2 * x, m.l[:4])), ROWS),
    "part of a gain": (lambda m, x: (F.layer_norm(x, (4,), m.g[:4], m.b[:4]), F.layer_norm(2 * x, (4,), m.g[:4], m.b[4:])), ROWS),
    "part of a bias of a norm": (lambda m, x: (F.layer_norm(x, (4,), m.g[:4], m.b[:4]), F.layer_norm(2 * x, (4,), m.g[4:], m.b[:4])), ROWS),
    "part of a table": (lambda m, x: (F.embedding(rows(x), m.e[:, :4]), F.embedding(rows(x) // 2, m.e[:, :4])), ROWS),
}  # fmt: skip


def registry_shared(forward: Callable[..., Any], **others: nn.Module) -> Net:
    net = Net(forward, a=conv(3, 3), b=conv(3, 3), n=norm(3), **others)
    net.b._parameters = net.a._parameters
    return net


def space_to_depth(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of columns are stacked, each with a row of two by two pixels as channels, as in i-RevNet."""
    y = m.c(x)
    batch, _, height, _ = y.shape
    pairs = [pair.contiguous().view(batch, height // 2, -1) for pair in y.permute(0, 2, 3, 1).split(2, 2)]
    blocks = torch.stack(pairs, 1).permute(0, 3, 2, 1)
    return F.relu(m.k(blocks)), F.relu(m.n(y))


def parts_net(two: Callable[..., tuple[Tensor, Tensor]], shape: tuple[int, ...]) -> Net:
    """A norm behind an operator that reads a part of a parameter, and another operator that reads it and has none."""

    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        mine, other = two(m, x)
        return (m.n if len(shape) == 4 else m.k)(mine).relu(), other.relu()

    net = Net(forward, n=norm(4)) if len(shape) == 4 else Net(forward, k=nn.BatchNorm1d(4))
    for name, size in {"w": (8, 4, 3, 3), "b": (8,), "g": (8,), "l": (8, 4), "e": (4, 8)}.items():
        net.register_parameter(name, nn.Parameter(torch.randn(size)))
    return net


CASES: dict[str, Case] = {
    # What everybody folds.
    "conv norm": Case(lambda: Net(lambda m, x: m.n(m.c(x)), c=conv(), n=norm()), {"n": None}),
    "bias kept": Case(lambda: Net(lambda m, x: m.n(m.c(x)), c=conv(bias=True), n=norm()), {"n": None}),
    "own eps": Case(lambda: Net(lambda m, x: m.n(m.c(x)), c=conv(), n=norm(eps=0.3)), {"n": None}),
    "no affine": Case(lambda: Net(lambda m, x: m.n(m.c(x)), c=conv(), n=norm(affine=False)), {"n": None}),
    "grouped": Case(lambda: Net(lambda m, x: m.n(m.d(m.c(x))), c=conv(), d=conv(6, 12, groups=3), n=norm(12)), {"n": None}),
    "depthwise": Case(lambda: Net(lambda m, x: m.n(m.d(m.c(x))), c=conv(), d=conv(6, 12, groups=6), n=norm(12)), {"n": None}),
    "circular padding": Case(lambda: Net(lambda m, x: m.n(m.c(x)), c=conv(padding_mode="circular"), n=norm()), {"n": None}),
    "same padding": Case(lambda: Net(lambda m, x: m.n(m.c(x)), c=conv(padding="same"), n=norm()), {"n": None}),
    "conv1d": Case(lambda: Net(lambda m, x: m.n(m.c(x)), c=nn.Conv1d(3, 5, 3), n=nn.BatchNorm1d(5)), {"n": None}, ((2, 3, 9),)),
    "conv3d": Case(lambda: Net(lambda m, x: m.n(m.c(x)), c=nn.Conv3d(3, 5, 3), n=nn.BatchNorm3d(5)), {"n": None}, ((2, 3, 5, 5, 5),)),
    "transposed, square": Case(lambda: Net(lambda m, x: m.n(m.c(x)), c=nn.ConvTranspose2d(3, 3, 3, 2), n=norm(3)), {"n": None}),
    "transposed, grouped": Case(lambda: Net(lambda m, x: m.n(m.d(m.c(x))), c=conv(), d=nn.ConvTranspose2d(6, 9, 3, 2, groups=3, bias=False), n=norm(9)), {"n": None}),
    "transposed 1d": Case(lambda: Net(lambda m, x: m.n(m.c(x)), c=nn.ConvTranspose1d(3, 4, 3), n=nn.BatchNorm1d(4)), {"n": None}, ((2, 3, 9),)),
    "transposed 3d": Case(lambda: Net(lambda m, x: m.n(m.c(x)), c=nn.ConvTranspose3d(3, 4, 2), n=nn.BatchNorm3d(4)), {"n": None}, ((2, 3, 3, 3, 3),)),
    "linear": Case(lambda: Net(lambda m, x: m.n(m.c(x)), c=nn.Linear(5, 7), n=nn.BatchNorm1d(7)), {"n": None}, ((3, 5),)),
    "sync": Case(lambda: Net(lambda m, x: m.n(m.c(x)), c=conv(), n=nn.SyncBatchNorm(6)), {"n": None}),
    "norm with activation": Case(lambda: Net(lambda m, x: m.n(m.c(x)), c=conv(), n=NormWithActivation(6)), {"n": None}),
    "norm that also doubles": Case(lambda: Net(lambda m, x: m.n(m.c(x)), c=conv(), n=DoublingNorm(6)), {"n": None}),
    "frozen": Case(lambda: Net(lambda m, x: m.n(m.c(x)), c=conv(), n=FrozenBatchNorm2d(6)), {"n": None}),
    "frozen, forward": Case(lambda: Net(lambda m, x: m.c(m.n(F.silu(x))), c=conv(size=1), n=FrozenBatchNorm2d(3)), {"n": None}),
    "norm after norm": Case(lambda: Net(lambda m, x: m.n2(m.n1(m.c(x))), c=conv(), n1=norm(), n2=norm()), {"n1": None, "n2": None}),
    "functional conv": Case(lambda: Net(lambda m, x: m.n(F.conv2d(x, m.c.weight, m.c.bias)), c=conv(bias=True), n=norm()), {"n": None}),
    "own conv class that reads its bias": Case(lambda: Net(lambda m, x: m.n(m.c(x)), c=BiasAwareConv(3, 6, 3, bias=False), n=norm()), {"n": None}),
    "unused branch": Case(lambda: Net(lambda m, x: m.n(m.c(x)), c=conv(), n=norm(), aux=norm(5)), {"n": None, "aux": "did not run"}),
    "unused norm that fits": Case(lambda: Net(lambda m, x: m.n(m.c(x)), c=conv(), n=norm(), aux=norm()), {"n": "aux, which did not run", "aux": "did not run"}),
    # Backward through other operators.
    "through concat": Case(lambda: Net(lambda m, x: m.n(torch.cat([m.a(x), m.b(x)], 1)), a=conv(), b=conv(3, 4), n=norm(10)), {"n": None}),
    "through add": Case(lambda: Net(lambda m, x: m.n(m.a(x) + m.b(x)), a=conv(), b=conv(), n=norm()), {"n": None}),
    "through add of twice the same": Case(lambda: Net(lambda m, x: m.n((y := m.a(x)) + y), a=conv(bias=True), n=norm()), {"n": None}),
    "through sub": Case(lambda: Net(lambda m, x: m.n(m.a(x) - m.b(x)), a=conv(), b=conv(), n=norm()), {"n": None}),
    "through max pool, no scale sign": Case(lambda: Net(lambda m, x: m.n(F.max_pool2d(m.a(x), 2)), a=conv(), n=norm()), {"n": "negative scale"}),
    "through average pool": Case(lambda: Net(lambda m, x: m.n(F.avg_pool2d(m.a(x), 2)), a=conv(), n=norm()), {"n": None}),
    "through shuffle": Case(lambda: Net(lambda m, x: m.n((y := m.a(x)).view(-1, 2, 3, *y.shape[2:]).transpose(1, 2).reshape(-1, 6, *y.shape[2:])), a=conv(), n=norm()), {"n": None}),
    "through shuffle of a literal size": Case(lambda: Net(lambda m, x: m.n(m.a(x).view(-1, 2, 3, 8, 8).transpose(1, 2).reshape(-1, 6, 8, 8)), a=conv(), n=norm()), {"n": "more than once"}),
    "through chunk": Case(lambda: Net(lambda m, x: m.n(torch.cat(m.a(x).chunk(2, 1)[::-1], 1)), a=conv(), n=norm()), {"n": None}),
    "through slices": Case(lambda: Net(lambda m, x: torch.cat([m.n((y := m.a(x))[:, ::2]), F.relu(y[:, 1::2])], 1), a=conv(3, 12), n=norm()), {"n": None}),
    "token norm behind linear": Case(lambda: Net(lambda m, x: m.n((y := m.a(x)).flatten(0, 1)).reshape_as(y), a=nn.Linear(5, 7, bias=False), n=nn.BatchNorm1d(7)), {"n": None}, ((2, 4, 5),)),
    "through add of a parameter": Case(lambda: Net(lambda m, x: m.n(m.a(x) + m.table.weight.view(1, 6, 8, 8)), a=BiasBlindConv(3, 6, 3, padding=1), table=nn.Embedding(6, 64), n=norm()), {"n": None}),
    "parameter added, and returned": Case(lambda: Net(lambda m, x: (m.n(m.a(x) + m.table.weight.view(1, 6, 8, 8)), m.table.weight), a=BiasBlindConv(3, 6, 3, padding=1), table=nn.Embedding(6, 64), n=norm()), {"n": OUTPUT}),
    # Forward into the next layer.
    "norm conv": Case(lambda: Net(lambda m, x: m.c(m.n(F.silu(x))), c=conv(size=1), n=norm(3)), {"n": None}),
    "norm grouped conv": Case(lambda: Net(lambda m, x: m.c(m.n(F.silu(x))), c=nn.Conv2d(6, 4, 3, groups=2, bias=False), n=norm()), {"n": None}, ((2, 6, 8, 8),)),
    "norm pool flatten linear": Case(lambda: Net(lambda m, x: m.c(F.adaptive_avg_pool2d(m.n(F.silu(x)), 2).flatten(1)), c=nn.Linear(12, 4), n=norm(3)), {"n": None}),
    "norm transposed pointwise": Case(lambda: Net(lambda m, x: m.c(m.n(F.silu(x))), c=nn.ConvTranspose2d(3, 4, 1), n=norm(3)), {"n": None}),
    "norm padded conv": Case(lambda: Net(lambda m, x: m.c(m.n(F.silu(x))), c=conv(), n=norm(3)), {"n": "pads with zeros"}),
    "norm transposed": Case(lambda: Net(lambda m, x: m.c(m.n(F.silu(x))), c=nn.ConvTranspose2d(3, 4, 2, 2), n=norm(3)), {"n": "same taps"}),
    "norm circular conv": Case(lambda: Net(lambda m, x: m.c(m.n(F.silu(x))), c=conv(padding_mode="circular"), n=norm(3)), {"n": None}),
    # In place after the norm is gone.
    "in place on the stream": Case(lambda: Net(lambda m, x: m.e((s := m.a(x)) + m.b(m.r(m.n(s)))), a=conv(), b=conv(6, 6), e=conv(6), r=nn.ReLU(inplace=True), n=norm()), {"n": None}),
    "built-in activation in place on the stream": Case(lambda: Net(lambda m, x: m.e((s := m.a(x)) + m.b(m.n(s))), a=conv(), b=conv(6, 6), e=conv(6), n=NormWithActivation(6)), {"n": None}),
    "function in place on the stream": Case(lambda: Net(lambda m, x: m.e((s := m.a(x)) + m.b(m.n(s).relu_())), a=conv(), b=conv(6, 6), e=conv(6), n=norm()), {"n": "overwrite in place"}),
    "caller counts on work in place": Case(lambda: Net(in_place_by_side_effect, a=conv(), b=conv(6, 6), e=conv(6), r=nn.ReLU(inplace=True), n=norm()), {"n": "overwrite in place"}),
    "caller counts on work in place, and returns it": Case(lambda: Net(in_place_and_returned, a=conv(), e=conv(6, size=1), r=nn.ReLU(inplace=True), n=norm()), {"n": "overwrite in place"}),
    "input overwritten after the norm": Case(lambda: Net(input_overwritten, a=conv(), b=conv(6, 6), n=norm()), {"n": "overwrite in place"}),
    "in place on the input of the model": Case(lambda: Net(lambda m, x: (m.c(m.n(x).neg_()), x), c=conv(size=1), n=norm(3)), {"n": "overwrite in place"}),
    "in place on one of two outputs of the same norm": Case(lambda: Net(lambda m, x: m.e(m.r(m.n(s := m.a(x)))) + m.e(m.n(s)), a=conv(), e=conv(6), r=nn.ReLU(inplace=True), n=norm()), {"n": None}),
    "view of a slice": Case(lambda: Net(lambda m, x: m.n(m.a(x)[:, ::2]).view(-1, 192), a=conv(), n=norm(3)), {"n": "layout"}),
    "view of a slice, one sample": Case(lambda: Net(lambda m, x: m.n(m.a(x)[:, :3]).view(-1, 192), a=conv(), n=norm(3)), {"n": "layout"}, ((1, 3, 8, 8),)),
    "reshape of a slice": Case(lambda: Net(lambda m, x: m.n(m.a(x)[:, ::2]).reshape(-1, 192), a=conv(), n=norm(3)), {"n": None}),
    "write through the flattened output": Case(lambda: Net(flattened_and_written, a=conv(), n=norm(3)), {"n": "layout"}),
    "pixel shuffle": Case(lambda: Net(lambda m, x: m.n(F.pixel_shuffle(m.a(x), 2)), a=conv(3, 12), n=norm(3)), {"n": None}),
    "pixel unshuffle, forward": Case(lambda: Net(lambda m, x: m.c(F.pixel_unshuffle(m.n(F.silu(x)), 2)), c=conv(12, 4, 1), n=norm(3)), {"n": None}),
    "zeros padded to the channels": Case(lambda: Net(lambda m, x: m.c(F.pad(m.n(F.silu(x)), (0, 0, 0, 0, 1, 2))), c=conv(6, 2, 1), n=norm(3)), {"n": None}),
    "channels cropped by padding": Case(lambda: Net(lambda m, x: m.n(F.pad(m.a(x), (0, 0, 0, 0, -1, -2))), a=conv(3, 6), n=norm(3)), {"n": None}),
    "padded and cropped": Case(lambda: Net(lambda m, x: m.n(F.pad(m.a(x), (0, 0, 0, 0, 1, -1))), a=conv(3, 6), n=norm(6)), {"n": "would not be shifted"}),
    "zeros padded around": Case(lambda: Net(lambda m, x: m.n(F.pad(m.a(x), (1, 1, 1, 1))), a=conv(3, 6), n=norm(6)), {"n": "would not be shifted"}),
    "reflected around": Case(lambda: Net(lambda m, x: m.n(F.pad(m.a(x), (1, 1, 1, 1), mode="reflect")), a=conv(3, 6), n=norm(6)), {"n": None}),
    "padding by the size": Case(lambda: Net(lambda m, x: m.n(F.pad(m.a(x), (0, x.shape[-1] % 2))), a=conv(3, 6), n=norm(6)), {"n": "depend on the size"}),
    "convolution that pads by the size": Case(lambda: Net(lambda m, x: m.c(m.n(F.silu(x))), c=SizePaddedConv(3, 6, 2), n=norm(3)), {"n": "pads with a number"}),
    "half of what comes": Case(lambda: Net(lambda m, x: m.c(m.n(F.silu(x)) / 2), c=conv(size=1), n=norm(3)), {"n": None}),
    "divided by the size": Case(lambda: Net(lambda m, x: m.c(m.n(F.silu(x)) / x.shape[-1]), c=conv(size=1), n=norm(3)), {"n": "depend on the size"}),
    "sum over positions": Case(lambda: Net(lambda m, x: m.c(m.n(F.silu(x)).sum((2, 3))), c=nn.Linear(3, 2), n=norm(3)), {"n": "depend on the size"}),
    "sum over branches": Case(lambda: Net(lambda m, x: m.c(torch.stack([m.n(F.silu(x)), F.silu(x)], 1).sum(1)), c=conv(size=1), n=norm(3)), {"n": "different scales"}),
    "einsum": Case(lambda: Net(lambda m, x: m.n(torch.einsum("bchw,oc->bohw", m.a(x), m.t.weight)), a=conv(3, 6), t=nn.Linear(6, 4), n=norm(4, affine=False)), {"n": "no bias"}),
    "einsum and a bias": Case(lambda: Net(lambda m, x: m.n(torch.einsum("oc,bchw->bohw", m.t.weight, F.silu(m.a(x))) + m.t.bias.view(1, 4, 1, 1)), a=conv(3, 6), t=nn.Linear(6, 4), n=norm(4)), {"n": None}),
    "einsum, forward": Case(lambda: Net(lambda m, x: torch.einsum("bchw,co->bhwo", m.n(F.silu(m.a(x))), m.t.weight) + m.t.bias[:4], a=conv(3, 6), t=nn.Linear(4, 6), n=norm(6)), {"n": None}),
    "made a tensor again": Case(lambda: Net(lambda m, x: m.n(torch.asarray(torch.as_tensor(m.c(x)))), c=conv(), n=norm()), {"n": None}),
    "made a tensor again, by keyword": Case(lambda: Net(lambda m, x: m.n(torch.as_tensor(data=m.c(x))), c=conv(), n=norm()), {"n": None}),
    "einsum with an ellipsis": Case(lambda: Net(lambda m, x: m.n((torch.einsum("...c,oc->...o", F.silu(m.a(x)).permute(0, 2, 3, 1), m.t.weight) + m.t.bias).movedim(-1, 1)), a=conv(3, 6), t=nn.Linear(6, 4), n=norm(4)), {"n": None}),
    "einsum without a result": Case(lambda: Net(lambda m, x: m.n((torch.einsum("bcij,co", F.silu(m.a(x)), m.t.weight) + m.t.bias[:4]).movedim(-1, 1)), a=conv(3, 6), t=nn.Linear(4, 6), n=norm(4)), {"n": None}),
    "einsum, broadcast by an ellipsis": Case(lambda: Net(lambda m, x: m.n(torch.einsum("...hw,...hv->...wv", F.silu(m.a(x)), m.t)), a=conv(3, 6), t=torch.randn(1, 1, 8, 4), n=norm(6)), {"n": "no scale or shift"}),
    "einsum, broadcast over what is summed": Case(lambda: Net(lambda m, x: torch.einsum("bchw,oc->bohw", m.n(F.silu(m.a(x))), m.s) + m.b, a=conv(3, 6), s=torch.randn(6, 1), b=torch.randn(6, 1, 1), n=norm(6)), {"n": "no scale or shift"}),
    "statistics pooling": Case(lambda: Net(lambda m, x: m.c(torch.cat([(y := m.n(F.silu(x))).mean((2, 3)), y.std((2, 3)), y.var((2, 3), correction=0)], 1)), c=nn.Linear(9, 2), n=norm(3)), {"n": None}),
    "deviation before a norm": Case(lambda: Net(lambda m, x: m.n(m.c(x).std(3)), c=conv(), n=nn.BatchNorm1d(6)), {"n": "a deviation takes no"}),
    "deviation before a scale": Case(lambda: Net(lambda m, x: m.n(m.c(x).var(3, keepdim=True) * m.b), c=conv(), n=norm(), b=torch.randn(6, 1, 1)), {"n": "a deviation takes no shift"}),
    "a zero added": Case(lambda: Net(lambda m, x: (m.n(m.c(x) + x.new_zeros(())), m.d(m.k(F.silu(x)) - torch.zeros(3, 1, 1))), c=conv(), d=conv(padding=0), n=norm(), k=norm(3)), {"n": None, "k": None}),
    "zeros added": Case(lambda: Net(lambda m, x: m.n(m.c(x) + 0.5 * (x.new_zeros(()).clone() - x.new_zeros(1) / 2)), c=conv(), n=norm()), {"n": None}),
    "zeros added up": Case(lambda: Net(lambda m, x: m.n(m.c(x) + sum([x.new_zeros(()), x.new_zeros(())])), c=conv(), n=norm()), {"n": None}),
    "a zero added, at one size": Case(lambda: Net(lambda m, x: m.n(m.c(x) + (x.new_zeros(()) + (x.shape[-1] - 8))), c=conv(), n=norm()), {"n": "depend"}),
    "a one added": Case(lambda: Net(lambda m, x: m.n(m.c(x) + (x.new_zeros(()) + 1)), c=conv(), n=norm()), {"n": "has no axis"}),
    "a zero added, written to": Case(lambda: Net(written_zero, c=conv(), n=norm()), {"n": "no scale or shift"}),
    "literal tensor": Case(lambda: Net(lambda m, x: m.n(m.a(x) * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)), a=conv(3, 3), n=norm(3)), {"n": None}),
    "messages of a graph, averaged": Case(lambda: Net(lambda m, x: averaged(m, m.c(x)), c=conv(), n=norm(), b=torch.randn(6, 1, 1)), {"n": None}),
    "messages of a graph, added up": Case(lambda: Net(lambda m, x: m.n(added(m.c(x), x) + m.b), c=conv(), n=norm(), b=torch.randn(6, 1, 1)), {"n": None}),
    "messages of a graph, without a bias": Case(lambda: Net(lambda m, x: m.n(added(m.c(x), x)), c=conv(), n=norm()), {"n": "makes a constant"}),
    "messages of a graph, forward": Case(lambda: Net(lambda m, x: m.c(added(m.n(F.silu(x)), x)), c=conv(), n=norm(3)), {"n": "any number of times"}),
    "the largest message": Case(lambda: Net(lambda m, x: m.n(m.c(x).scatter_reduce(0, order(x).view(-1, 1, 1, 1).expand(-1, 6, *x.shape[2:]), m.c(x), "amax") + m.b), c=conv(), n=norm(), b=torch.randn(6, 1, 1)), {"n": "no negative scale"}),
    "messages from channel to channel": Case(lambda: Net(lambda m, x: m.n(torch.zeros_like(y := m.c(x)).index_add(1, torch.arange(6) // 2, y) + m.b), c=conv(), n=norm(), b=torch.randn(6, 1, 1)), {"n": "whose places a tensor tells"}),
    "index by the input": Case(lambda: Net(lambda m, x: m.n(m.c(x).index_select(0, order(x))), c=conv(), n=norm()), {"n": None}),
    "index by several": Case(lambda: Net(lambda m, x: m.n(m.c(x)[order(x)[:, None], :, torch.arange(x.shape[2])].transpose(1, 2)), c=conv(), n=norm()), {"n": None}),
    "index by several at the front": Case(lambda: Net(lambda m, x: m.c(m.n(F.silu(x))[order(x)[:, None], torch.arange(3)]), c=conv(padding=0), n=norm(3)), {"n": "whose places a tensor tells"}),
    "index by a mask": Case(lambda: Net(lambda m, x: m.c(m.n(F.silu(x)).permute(0, 2, 3, 1)[x[:, 0] > 0]), c=nn.Linear(3, 2), n=norm(3)), {"n": None}),
    "gathered": Case(lambda: Net(lambda m, x: m.c(m.n(F.silu(x)).gather(2, x.argsort(2))), c=conv(padding=0), n=norm(3)), {"n": None}),
    "gathered from a part": Case(lambda: Net(lambda m, x: m.c(m.n(F.silu(x)).gather(2, x[:, :2].argsort(2))), c=conv(2, padding=0), n=norm(3)), {"n": "whose places a tensor tells"}),
    "random tensor": Case(lambda: Net(lambda m, x: m.n(m.a(x) * 0 + torch.rand(3, 1, 1)), a=conv(3, 3), n=norm(3)), {"n": "rand in"}),
    "positions of maxima": Case(lambda: dead(Net(lambda m, x: F.max_pool2d(m.n(m.a(x)), 2, return_indices=True)[1], a=conv(3, 3), n=norm(3))), {"n": None}),
    "division by 0": Case(lambda: Net(lambda m, x: torch.nan_to_num(m.n(m.a(x) / 0.0), 0.0, 0.0, 0.0) + x, a=conv(3, 3), n=norm(3)), {"n": "divides by 0"}),
    "nothing of it": Case(lambda: Net(lambda m, x: m.n(torch.rsub(m.a(x), 1, alpha=0)), a=conv(3, 3), n=norm(3)), {"n": "multiplies by 0"}),
    # For other inputs, other sizes, another call.
    "slice of a table": Case(lambda: Net(lambda m, x: m.n((m.a(x) + m.t.weight[: x.shape[1]]).transpose(1, 2)), a=nn.Linear(6, 4), t=nn.Embedding(16, 4), n=nn.BatchNorm1d(4)), {"n": None}, ((2, 5, 6),)),
    "crop": Case(lambda: Net(lambda m, x: m.n(m.a(x)[:, :, 1:-1]), a=conv(), n=norm()), {"n": None}),
    "number from the data": Case(lambda: Net(lambda m, x: m.c(m.n(F.silu(x)) * x.abs().max().item()), c=conv(size=1), n=norm(3)), {"n": "depend on the size"}),
    "channel by the data": Case(lambda: Net(channel_by_data, c=conv(1, 4, 1), n=norm(3)), {"n": "depend on the size"}),
    "table times the size": Case(lambda: Net(lambda m, x: m.c(m.n(F.silu(x)) * (m.t.weight.view(1, 3, 1, 1) * x.shape[-1])), c=conv(size=1), t=nn.Embedding(3, 1), n=norm(3)), {"n": "on the size"}),
    "both ways by the size": Case(lambda: Net(lambda m, x: m.d(m.n(m.c(x) / x.shape[2]) / x.shape[3]), c=conv(), d=conv(6, 2, 1), n=norm()), {"n": "depend on the size"}, ((2, 3, 6, 8),)),
    "square images only": Case(lambda: Net(square_only, c=conv(size=1), n=norm(3)), {"n": "depend on the size"}),
    "padded at odd sizes": Case(lambda: Net(padded_if_odd, c=conv(size=2, padding=0), n=norm(3)), {"n": "pads with a number"}),
    "counter": Case(lambda: Net(counter, c=conv(), n=norm()), {"n": "its numbers depend on"}),
    "state of the last call": Case(lambda: stateful(Net(last_call, c=conv(), n=norm())), {"n": "in its place"}),
    # The norm is not only called.
    "parameters of the norm read": Case(lambda: Net(lambda m, x: m.n(m.c(x)) + m.n.weight.abs().sum(), c=conv(), n=norm()), {"n": "also read"}),
    "norm called by its forward": Case(lambda: Net(lambda m, x: m.n.forward(m.d(m.n(m.c(x)))), c=conv(), d=conv(6), n=norm()), {"n": "also read", "batch_norm in Net": "function call"}),
    "norm that returns a tuple": Case(lambda: Net(lambda m, x: m.n(m.c(x))[0], c=conv(), n=TupleNorm(6)), {"n": "more than normalise"}),
    "keyword": Case(lambda: Net(lambda m, x: m.n(input=m.c(x)), c=conv(), n=norm()), {"n": None}),
    "parameter made of an activation": Case(lambda: Net(lambda m, x: m.n(y := m.c(x)) + nn.Parameter(y, requires_grad=False), c=conv(), n=norm()), {"n": "in another way"}),
    # Not touched by any unit.
    "operators behind": Case(lambda: Net(lambda m, x: [f(m.n(m.c(x))) for f in BEHIND], c=conv(), n=norm()), {"n": None}),
    # Slices, masks, patches, and operators that are made of others.
    "slices subtracted": Case(lambda: Net(lambda m, x: (lambda y: m.n(y[:, :3] - y[:, 3:]))(m.c(x)), c=conv(), n=norm(3)), {"n": None}),
    "slices exchanged": Case(lambda: Net(lambda m, x: (lambda y: m.n(torch.cat([y[:, 2:], y[:, :2]], 1)))(m.c(x)), c=conv(), n=norm()), {"n": None}),
    "slices that overlap": Case(lambda: Net(lambda m, x: (lambda y: m.n(y[:, :4] - y[:, 2:]))(m.c(x)), c=conv(), n=norm(4)), {"n": "two different units"}),
    "chunks subtracted": Case(lambda: Net(lambda m, x: (lambda y: m.n(y[0] - y[1]))(m.c(x).chunk(2, 1)), c=conv(), n=norm(3)), {"n": None}),
    "layer of several arguments": Case(lambda: Net(lambda m, x: m.n(m.c(x, torch.tensor([9, 4]).repeat(2)[: len(x)], scale=2.0)[0]), c=MaskedConv(3, 6, 3, bias=False), n=nn.BatchNorm1d(6)), {"n": None}, ((2, 3, 9),)),
    "index by Variable": Case(lambda: Net(lambda m, x: m.n(m.c(x).index_select(1, torch.autograd.Variable(m.order))), c=conv(), n=norm(), order=torch.tensor([3, 1, 2, 5, 0, 4])), {"n": None}),
    "hstack": Case(lambda: Net(lambda m, x: m.n(torch.hstack([m.c(x), m.d(x)])), c=conv(), d=conv(), n=norm(12)), {"n": None}),
    "repeat_interleave": Case(lambda: Net(lambda m, x: m.c(m.n(x).repeat_interleave(2, 1)), c=conv(6, 6, 1), n=norm(3)), {"n": None}),
    "repeat_interleave back": Case(lambda: Net(lambda m, x: m.n(m.c(x).repeat_interleave(2, 1)), c=conv(3, 3), n=norm()), {"n": "copies"}),
    "addcmul": Case(lambda: with_parameters(lambda m, x: m.n(torch.addcmul(m.p, m.c(x), m.q, value=2)), c=conv(), n=norm()), {"n": None}),
    "lerp": Case(lambda: with_parameters(lambda m, x: m.n(torch.lerp(m.c(x), m.d(x), m.p)), c=conv(), d=conv(), n=norm()), {"n": None}),
    "filled where masked": Case(lambda: Net(lambda m, x: m.n(m.c(x).masked_fill(x[:, :1] > 0, 0.0)), c=conv(), n=norm()), {"n": "does not change with the units"}),
    "one of two": Case(lambda: Net(lambda m, x: m.n(torch.where(x[:, :1] > 0, m.c(x), m.d(x))), c=conv(), d=conv(), n=norm()), {"n": None}),
    "chosen by itself": Case(lambda: Net(lambda m, x: (lambda y: m.n(torch.where(y > 0, y, 0.5 * y)))(m.c(x)), c=conv(), n=norm()), {"n": "gt"}),
    "patches": Case(lambda: Net(lambda m, x: m.l(F.unfold(m.n(x), 2).mT), n=norm(3), l=nn.Linear(12, 4)), {"n": None}),
    "padded patches": Case(lambda: Net(lambda m, x: m.l(F.unfold(m.n(x), 3, padding=1).mT), n=norm(3), l=nn.Linear(27, 4)), {"n": "pads with zeros"}),
    "tiles": Case(lambda: Net(lambda m, x: m.n(F.fold(m.l(x.flatten(2)[:, :, :16].mT).mT, (8, 8), 2, stride=2)), l=nn.Linear(3, 24), n=norm()), {"n": None}),
    "patches that overlap": Case(lambda: Net(lambda m, x: m.n(F.fold(m.l(x.flatten(2)[:, :, :49].mT).mT, (8, 8), 2)), l=nn.Linear(3, 24), n=norm()), {"n": "overlap"}),
    "sampled": Case(lambda: Net(lambda m, x: m.n(F.grid_sample(m.c(x), F.affine_grid(torch.eye(2, 3).to(x).repeat(len(x), 1, 1), x.shape, False), padding_mode="border", align_corners=False)), c=conv(), n=norm()), {"n": None}),
    "sampled zeros": Case(lambda: Net(lambda m, x: m.n(F.grid_sample(m.c(x), F.affine_grid(torch.eye(2, 3).to(x).repeat(len(x), 1, 1), x.shape, False), align_corners=False)), c=conv(), n=norm()), {"n": "samples zeros"}),
    "matrix on the left": Case(lambda: with_parameters(lambda m, x: (m.t @ m.n(m.c(x).relu()).flatten(2) + m.p.flatten(1)).sigmoid(), c=conv(), n=norm()), {"n": None}),
    "matrix on the left, no shift": Case(lambda: with_parameters(lambda m, x: (m.t @ m.n(m.c(x).relu()).flatten(2)).sigmoid(), c=conv(), n=norm()), {"n": "sigmoid"}),
    "softmax times a table": Case(lambda: with_parameters(lambda m, x: m.n((m.c(x).flatten(2).mT.softmax(-1) @ m.t).mT.unflatten(2, (8, 8))), c=conv(), n=norm()), {"n": None}),
    "softmax before a convolution": Case(lambda: with_parameters(lambda m, x: m.n(F.conv1d(m.c(x).flatten(2).softmax(-1), m.t[:, :, None])), c=conv(), n=nn.BatchNorm1d(6)), {"n": "none can be added"}),
    "scale back, shift on": Case(lambda: with_parameters(lambda m, x: torch.exp(m.n(m.c(x) * x[:, :1].sigmoid()) - m.p), c=conv(), n=norm()), {"n": None}),
    "shift back, scale on": Case(lambda: with_parameters(lambda m, x: m.c(m.n(x.repeat(1, 2, 1, 1) + m.p)), c=conv(6, 2), n=norm()), {"n": None}),
    # Beside a layer on the same tensor.
    "beside a convolution": Case(lambda: beside(conv(3, 3)), {"n": None}),
    "beside a convolution, subtracted": Case(lambda: beside(conv(3, 3), lambda m, x: m.c(x) - m.n(x)), {"n": None}),
    "beside a convolution, counted twice": Case(lambda: beside(conv(3, 3), lambda m, x: torch.sub(m.n(x), m.c(x), alpha=2)), {"n": None}),
    "beside a convolution, by the size": Case(lambda: beside(conv(3, 3), lambda m, x: torch.add(m.n(x), m.c(x), alpha=x.shape[-1])), {"n": "depend on the size"}),
    "beside a convolution, in place": Case(lambda: beside(conv(3, 3), lambda m, x: m.c(x).add_(m.n(x)).relu_()), {"n": None}),
    "beside a convolution, by sum": Case(lambda: beside(conv(3, 3), lambda m, x: sum([m.n(x), m.c(x), x])), {"n": None}),
    "beside a convolution and a table": Case(lambda: beside(conv(3, 3), lambda m, x: 2 - (m.c(x) + m.t) + torch.tensor(0.5) + (m.n(x) - m.t), t=torch.randn(3, 1, 1)), {"n": None}),
    "beside a convolution, dropout": Case(lambda: beside(conv(3, 3), lambda m, x: F.dropout(m.c(x), 0.5, m.training) + m.n(x).contiguous()), {"n": None}),
    "beside a convolution, copied": Case(lambda: beside(conv(3, 3), lambda m, x: m.c(x.contiguous()) + m.n(x.clone())), {"n": None}),
    "beside a large kernel": Case(lambda: beside(nn.Conv2d(3, 3, (5, 3), padding=(4, 1), dilation=(2, 1))), {"n": None}),
    "beside an even kernel": Case(lambda: beside(conv(3, 3, 4, padding="same", dilation=2)), {"n": "no tap"}),
    "beside an even kernel, same": Case(lambda: beside(conv(3, 3, 4, padding="same")), {"n": None}),
    "beside a kernel with a gap": Case(lambda: beside(conv(3, 3, 2, padding=1, dilation=2)), {"n": "no tap"}),
    "beside a kernel on one side": Case(lambda: beside(conv(3, 3, padding=0), lambda m, x: m.c(F.pad(x, (2, 0, 0, 2))) + m.n(x)), {"n": None}),
    "beside reflected padding": Case(lambda: beside(conv(3, 3, padding_mode="reflect")), {"n": None}),
    "beside padded channels": Case(lambda: beside(conv(4, 3), lambda m, x: m.c(F.pad(x, (0, 0, 0, 0, 1, 0))) + m.n(x)), {"n": "no tap"}),
    "beside padding by the size": Case(lambda: beside(conv(3, 3, 1), lambda m, x: m.c(F.pad(x, (x.shape[-1] % 2, 0)))[..., -x.shape[-1]:] + m.n(x)), {"n": "output of the model"}),
    "beside a depthwise convolution": Case(lambda: beside(conv(3, 3, groups=3)), {"n": None}),
    "beside a grouped convolution": Case(lambda: Net(lambda m, x: m.c(y := F.silu(m.a(x))) + m.n(y), a=conv(), c=conv(6, 6, groups=2), n=norm()), {"n": None}),
    "beside a transposed convolution": Case(lambda: beside(nn.ConvTranspose2d(3, 3, 3, padding=1)), {"n": None}),
    "beside a convolution in 1d": Case(lambda: beside(nn.Conv1d(3, 3, 3, padding=1), norm=nn.BatchNorm1d(3)), {"n": None}, ((2, 3, 8),)),
    "beside a convolution in 3d": Case(lambda: beside(nn.Conv3d(3, 3, 3, padding=1), norm=nn.BatchNorm3d(3)), {"n": None}, ((2, 3, 4, 4, 4),)),
    "beside a linear layer": Case(lambda: beside(nn.Linear(3, 3), norm=nn.BatchNorm1d(3)), {"n": None}, ((2, 3),)),
    "beside a linear layer on another axis": Case(lambda: beside(nn.Linear(3, 3), norm=nn.BatchNorm1d(3)), {"n": "axis 1 of its input"}, ((2, 3, 3),)),
    "beside a product": Case(lambda: beside(nn.Linear(3, 3), lambda m, x: torch.addmm(m.c.bias, x, m.c.weight, alpha=2) + m.n(x), nn.BatchNorm1d(3)), {"n": None}, ((2, 3),)),
    "beside a frozen norm": Case(lambda: beside(conv(3, 3), norm=FrozenBatchNorm2d(3)), {"n": None}),
    "two norms beside a convolution": Case(lambda: beside(conv(3, 3), lambda m, x: m.k(x) - m.c(x) + m.n(x), k=norm(3)), {"n": None, "k": None}),
    "branches, each with a norm": Case(lambda: Net(branches, a=conv(), c=conv(6, 6), d=conv(6, 6, 1), k=norm(), l=norm(), n=norm()), {"k": None, "l": None, "n": None}),
    "blocks of branches": Case(lambda: Net(lambda m, x: m.q(branches(m.p, branches(m, x))), a=conv(3, 3), c=conv(3, 3), d=conv(3, 3, 1), k=norm(3), l=norm(3), n=norm(3), p=Net(branches, a=nn.Identity(), c=conv(3, 3), d=conv(3, 3, 1), k=norm(3), l=norm(3), n=norm(3)), q=norm(3)), {"k": None, "l": None, "n": None, "p.k": None, "p.l": None, "p.n": None, "q": "relu"}),
    "block of branches, called twice": Case(lambda: beside(conv(3, 3), lambda m, x: (lambda y: (m.c(x) + m.n(x)) * (m.c(y) + m.n(y)))(-x)), {"n": None}),
    "norm beside itself": Case(lambda: beside(conv(3, 3), lambda m, x: m.c(x) + m.n(x) + m.n(x)), {"n": "input of the model"}),
    "beside a convolution that skips": Case(lambda: beside(conv(3, 3, stride=2)), {"n": "skips positions"}, ((2, 3, 1, 1),)),
    "beside a convolution of another tensor": Case(lambda: beside(conv(3, 3), lambda m, x: m.c(x.relu()) + m.n(x)), {"n": "input of the model"}),
    "beside a convolution of shuffled channels": Case(lambda: beside(conv(3, 3), lambda m, x: m.c(x.flip(1)) + m.n(x)), {"n": "input of the model"}),
    "beside a convolution before an activation": Case(lambda: beside(conv(3, 3), lambda m, x: F.gelu(m.c(x)) + m.n(x)), {"n": "input of the model"}),
    "beside a convolution, before an activation": Case(lambda: beside(conv(3, 3), lambda m, x: m.c(x) + F.gelu(m.n(x))), {"n": "input of the model"}),
    "beside a convolution, dropped at random": Case(lambda: beside(conv(3, 3), lambda m, x: m.c(x) + 0 * F.dropout(m.n(x), 0.5, True)), {"n": "input of the model"}),
    "beside a convolution, multiplied": Case(lambda: beside(conv(3, 3), lambda m, x: m.c(x) * m.n(x)), {"n": "input of the model"}),
    "beside a convolution that others read": Case(lambda: beside(conv(3, 3), lambda m, x: ((y := m.c(x)) + m.n(x), y.relu())), {"n": "input of the model"}),
    "beside a convolution, read by others": Case(lambda: beside(conv(3, 3), lambda m, x: (m.c(x) + (y := m.n(x)), y.relu())), {"n": "input of the model"}),
    "beside a convolution with a hook": Case(hooked_beside, {"n": "input of the model"}),
    "beside a weight that is shared": Case(lambda: beside(conv(3, 3), lambda m, x: m.c(x) + m.n(x) + m.c(x.relu())), {"n": TWICE}),
    "beside a weight that is computed": Case(lambda: beside(StandardisedConv(3, 3, 1), lambda m, x: F.conv2d(x, 2 * m.c.weight, m.c.bias) + m.n(x)), {"n": "no parameter of its own"}),
    "beside a function without a bias": Case(lambda: beside(conv(3, 3), lambda m, x: F.conv2d(x, m.c.weight, padding=1) + m.n(x)), {"n": "no bias"}),
    "beside a convolution, written in between": Case(lambda: beside(conv(3, 3), lambda m, x: (lambda y: m.n(y) + m.c(y.mul_(2)))(F.silu(x))), {"n": "silu"}),
    "beside a convolution, written to": Case(lambda: beside(conv(3, 3), lambda m, x: (lambda y: m.n(y).add_(m.c(y)))(F.silu(x))), {"n": None}),
    "beside a convolution, written to and read": Case(lambda: beside(conv(3, 3), lambda m, x: (lambda y: m.n(y).add_(m.c(y)) * y)(F.silu(x))), {"n": "overwrite in place"}),
    # What must stay.
    "output also returned": Case(lambda: Net(lambda m, x: (m.n(y := m.c(x)), y), c=conv(), n=norm()), {"n": OUTPUT}),
    "output also read": Case(lambda: Net(lambda m, x: m.n(y := m.c(x)) + F.silu(y), c=conv(), n=norm()), {"n": "silu"}),
    "called twice": Case(lambda: Net(called_twice, c=conv(), n1=norm(), n2=norm()), {"n1": None, "n2": TWICE}),
    "called twice, once bare": Case(lambda: Net(lambda m, x: m.n(m.c(x)) + F.relu(m.c(x.flip(-1))), c=conv(), n=norm()), {"n": TWICE}),
    "registry shared by two layers": Case(lambda: registry_shared(lambda m, x: F.relu(m.n(m.a(x))) + F.relu(m.n(m.b(-x)))), {"n": None}),
    "registry shared by two layers, two norms": Case(lambda: registry_shared(lambda m, x: F.relu(m.n(m.a(x))) + F.relu(m.k(m.b(-x))), k=norm(3)), {"n": None, "k": TWICE}),
    "registry shared by two layers, once bare": Case(lambda: registry_shared(lambda m, x: F.relu(m.n(m.a(x))) + F.relu(m.b(-x))), {"n": TWICE}),
    "called twice and summed": Case(lambda: Net(lambda m, x: m.n(m.c(x) + m.c(x.flip(-1))), c=conv(), n=norm()), {"n": None}),
    "called twice at two resolutions": Case(lambda: Net(lambda m, x: m.n(m.c(x) + F.interpolate(m.c(F.avg_pool2d(x, 2)), scale_factor=2.0)), c=conv(), n=norm()), {"n": None}),
    "called three times and summed": Case(lambda: Net(lambda m, x: m.n(m.c(x) + m.c(x.flip(-1)) + m.c(x.flip(-2))), c=conv(bias=True), n=norm()), {"n": None}),
    "called twice and subtracted": Case(lambda: Net(lambda m, x: m.n(m.c(x) - m.c(x.flip(-1))), c=conv(), n=norm()), {"n": TWICE}),
    "called twice and summed, with a factor": Case(lambda: Net(lambda m, x: m.n(torch.add(m.c(x), m.c(x.flip(-1)), alpha=3)), c=conv(), n=norm()), {"n": None}),
    "called three times, and summed with factors": Case(lambda: Net(lambda m, x: m.n(m.c(x) + (3 * m.c(x.flip(-1)) - m.c(-x) / 2)), c=conv(), n=norm()), {"n": None}),
    "space to depth, by stacking": Case(lambda: Net(space_to_depth, c=conv(), n=norm(), k=norm(24)), {"n": None, "k": "relu"}),
    "parts of a bias that is created": Case(octave_net, {"n1": None, "n2": None, "n3": None, "n4": None}),
    "parts of a bias that would do more": Case(lambda: octave_net(spoiled=True), {"n1": None, "n2": None, "n3": "no bias", "n4": "no bias"}),
    **{
        f"{what} that another operator reads": Case(lambda two=two, shape=shape: parts_net(two, shape), {"n": DIFFERENT} if len(shape) == 4 else {"k": DIFFERENT}, (shape,))
        for what, (two, shape) in PARTS.items()
    },
    "shared head": Case(lambda: Net(shared_head, c=conv(), n=norm()), {"n": None}),
    "norm shared between sites": Case(lambda: Net(lambda m, x: m.n(m.c(x)) + m.n(F.silu(m.d(x))), c=conv(), d=conv(), n=norm()), {"n": "silu"}),
    "tied weights": Case(tied, {"n": TWICE}),
    "tied by memory": Case(tied_by_memory, {"n": TWICE}),
    "tied to a module that did not run": Case(lambda: tied(lambda m, x: m.n(m.a(x))), {"n": "did not run"}),
    "overlapping memory": Case(overlapping_memory, {"n": "shares memory"}),
    "relu between": Case(lambda: Net(lambda m, x: m.n(F.relu(m.c(x))), c=conv(), n=norm()), {"n": "relu"}),
    "weight standardisation": Case(lambda: Net(lambda m, x: m.n(m.c(x)), c=StandardisedConv(3, 6, 3), n=norm()), {"n": "std"}),
    "forward that ignores its bias": Case(lambda: Net(lambda m, x: m.n(m.c(x)), c=BiasBlindConv(3, 6, 3, bias=False), n=norm()), {"n": "no bias"}),
    "forward that ignores its bias, which is there": Case(lambda: Net(lambda m, x: m.n(m.c(x)), c=BiasBlindConv(3, 6, 3), n=norm()), {"n": "no bias"}),
    "forward that does more with a bias": Case(lambda: Net(lambda m, x: m.n(m.c(x)), c=BiasBranchConv(3, 6, 3, bias=False), n=norm()), {"n": "no bias"}),
    "forward that reads its bias at some sizes": Case(lambda: Net(lambda m, x: m.n(m.c(x)), c=BiasBySizeConv(3, 6, 3, bias=False), n=norm()), {"n": "no bias"}),
    "weight read elsewhere": Case(lambda: Net(lambda m, x: m.n(m.c(x)) * m.c.weight.sum(), c=conv(), n=norm()), {"n": TWICE}),
    "write through a view": Case(lambda: Net(write_through_view, c=conv(), n=norm()), {"n": "through another view"}),
    "write to the base of a view": Case(lambda: Net(write_to_base, c=conv(), n=norm()), {"n": "through another view"}),
    "no running statistics": Case(lambda: Net(lambda m, x: m.n(m.c(x)), c=conv(), n=norm(track_running_stats=False)), {"n": "statistics of the batch"}),
    "batch statistics by call": Case(lambda: Net(lambda m, x: F.batch_norm(m.c(x), None, None, training=True), c=conv()), {"batch_norm in Net": "statistics of the batch"}),
    "function call": Case(lambda: Net(lambda m, x: F.batch_norm(m.c(x), m.n.running_mean, m.n.running_var), c=conv(), n=norm()), {"n": "did not run", "batch_norm in Net": "function call"}),
    "norm that does more": Case(lambda: Net(lambda m, x: m.n(m.c(x)), c=conv(), n=SquashingNorm(6)), {"n": "more than normalise"}),
    "norm over tokens": Case(lambda: Net(lambda m, x: m.n(m.c(x)), c=nn.Linear(5, 5), n=nn.BatchNorm1d(5)), {"n": "no axis for units"}, ((2, 5, 5),)),
    "hook on the convolution": Case(lambda: hooked("c", lambda m, args, y: None), {"n": HOOK}),
    "hook that changes the output": Case(lambda: hooked("c", lambda m, args, y: y * 3), {"n": HOOK}),
    "hook on the norm": Case(lambda: hooked("n", lambda m, args, y: y + 1), {"n": HOOK}),
    "hook before the norm": Case(lambda: hooked("n", lambda m, args: (args[0] * 2,), pre=True), {"n": HOOK}),
    "hook before the convolution": Case(lambda: hooked("c", lambda m, args: (args[0] * 2,), pre=True), {"n": HOOK}),
    "writes to overlapping windows": Case(lambda: Net(lambda m, x: m.n(y := F.silu(x).unfold(3, 2, 1)).add_(m.c(y)), c=nn.Conv3d(3, 3, 3, padding=1), n=nn.BatchNorm3d(3)), {"n": "another layout in memory"}),
    "hook on an activation in place": Case(watched_in_place, {"n": "overwrite in place", "k": None}),
    "output stored by the model": Case(lambda: Net(stored, c=conv(), n=norm()), {"n": "stored in"}),
    "norm held in a list": Case(listed, {"n": "also refers to it"}),
    "contents in a literal": Case(lambda: Net(lambda m, x: (y := m.c(x), m.n(y) + torch.tensor([y[0, 0, 0, 0], 0.0], dtype=y.dtype).sum())[1], c=conv(), n=norm()), {"n": "leave PyTorch"}),
    "contents in a literal, by keyword": Case(lambda: Net(lambda m, x: (y := m.c(x), F.silu(m.n(y)) + torch.as_tensor(data=[y[0, 0, 0, 0], 0.0], dtype=y.dtype).sum())[1], c=conv(), n=norm()), {"n": "leave PyTorch"}),
    "contents read by numpy": Case(lambda: Net(numpy_reader, c=conv(), n=norm()), {"n": "leave PyTorch"}),
    "data attribute": Case(lambda: Net(lambda m, x: m.n(m.c(x).data), c=conv(), n=norm()), {"n": None}),
    "write through the data attribute": Case(lambda: Net(write_to_data, c=conv(), n=norm()), {"n": "through another view"}),
    "memory that is given back": Case(lambda: Net(give_back, c=conv(), n=norm()), {"n": None}),
    "weight data attribute": Case(lambda: Net(lambda m, x: m.n(F.conv2d(x, m.c.weight.data)), c=conv(), n=norm()), {"n": "no bias"}),
    "old weight_norm": Case(lambda: Net(lambda m, x: m.n(m.c(x)), c=_old_weight_norm(conv()), n=norm()), {"n": None}),
    "weight_norm": Case(lambda: Net(lambda m, x: m.n(m.c(x)), c=parametrizations.weight_norm(conv()), n=norm()), {"n": None}),
    "spectral_norm": Case(lambda: Net(lambda m, x: m.n(m.c(x)), c=parametrizations.spectral_norm(conv()), n=norm()), {"n": "mv"}),
    "unknown operator": Case(lambda: Net(lambda m, x: m.n(torch.cumsum(m.c(x), 2)), c=conv(), n=norm()), {"n": "cumsum"}),
    "nothing but the norm": Case(lambda: norm(3), {"BatchNorm2d": "whole model"}),
    "norm on the input": Case(lambda: Net(lambda m, x: m.c(m.n(x)), c=conv(), n=norm(3)), {"n": "input of the model"}),
}  # fmt: skip


def dead(net: nn.Module) -> nn.Module:
    """With a channel that is multiplied by 0, of which every position is a maximum."""
    net.n.weight.data[0] = 0.0
    return net


def _old_weight_norm(layer: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning):
        return torch.nn.utils.weight_norm(layer)


@pytest.mark.parametrize("name", CASES)
def test_hazard(name: str) -> None:
    case = CASES[name]
    # A dead channel keeps a norm on a residual stream, since nothing can undo its scale.
    model = prepared(case.make(), dead=0.0 if "stream" in name or "in place" in name else 0.02)
    inputs = tuple(torch.randn(shape, dtype=torch.float64) for shape in case.shapes)
    plan, fused = fused_and_checked(model, inputs)
    decisions = {decision.norm: decision for decision in plan.decisions}
    assert set(decisions) == set(case.expected)
    modules, fused_modules = dict(model.named_modules()), dict(fused.named_modules())
    for label, expected in case.expected.items():
        decision = decisions[label]
        if expected is None:
            assert decision.fused, reason(plan, label)
            assert decision.into
            assert not isinstance(fused_modules[label], nn.modules.batchnorm._BatchNorm)
        else:
            assert not decision.fused
            assert expected in reason(plan, label)
            assert type(fused_modules.get(label)) is type(modules.get(label))


def test_padding_to_even_sizes_where_the_first_axis_is_not_the_batch() -> None:
    """No larger size with a larger first axis runs, and twice the size is even again."""
    net = Net(
        lambda m, x: m.c(F.pad(y := m.n(x.transpose(0, 1)), (0, y.shape[-1] % 2))),
        c=conv(2, 4, 2, padding=0),
        n=norm(2),
    )
    plan = bnfuse.plan(prepared(net), torch.randn(2, 4, 5, 6, dtype=torch.float64))
    assert not plan.fused


@pytest.mark.parametrize(("mean", "variance", "goes"), [(100.0, 1.0, True), (1e4, 1.0, False), (0.0, 1e8, False)])
def test_beside_a_convolution_with_large_activations(mean: float, variance: float, goes: bool) -> None:
    """Much larger numbers than the norm's own would have to cancel in float32."""
    net = prepared(beside(conv(3, 3)), dead=0.0).float()
    net.n.running_mean[0], net.n.running_var[0] = mean, variance
    plan = bnfuse.plan(net, torch.randn(IMAGE))
    assert bool(plan.fused) == goes
    assert goes or "beside: conv2d in c (Conv2d): it would have to add much more than the norm gives" in reason(
        plan, "n"
    )


def test_beside_is_said_where_there_is_a_layer_beside_only() -> None:
    plan = bnfuse.plan(prepared(beside(conv(3, 3, 4, padding="same", dilation=2))), torch.randn(IMAGE).double())
    assert [why.direction for why in plan.decisions[0].reasons] == ["backward", "forward", "beside"]
    plan = bnfuse.plan(prepared(Net(lambda m, x: m.n(x), n=norm(3))), torch.randn(IMAGE).double())
    assert [why.direction for why in plan.decisions[0].reasons] == ["backward", "forward"]


def test_scales_before_and_after_single_entries() -> None:
    """The norm behind the layer goes first, the one beside it next, then the one behind the sum."""
    net = Net(
        lambda m, x: m.k(m.l(m.c(y := m.a(x).relu())) + m.n(y)),
        a=conv(), c=conv(6, 6, groups=2), l=norm(), n=norm(), k=norm(),
    )  # fmt: skip
    prepared(net, dead=0.0).k.weight.data.abs_()
    plan, _ = fused_and_checked(net, torch.randn(IMAGE, dtype=torch.float64))
    assert [(decision.norm, decision.direction) for decision in plan.decisions] == [
        ("l", "backward"),
        ("n", "beside"),
        ("k", "backward"),
    ]
    [edit] = [edit for edit in plan.edits if edit.names == ("c.weight",)]
    assert [factor.entries is not None for factor in edit.factors] == [False, True, False]
    assert "beside: c" in str(plan)
    assert "fused beside into c" in plan.table()


def test_an_edit_of_entries_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bnfuse.units.PIECE", 20)
    monkeypatch.setattr("bnfuse.transaction.PIECE", 20)
    for options in ({}, {"inplace": True}, {"inplace": True, "verify": False}):
        net = prepared(Net(branches, a=conv(), c=conv(6, 6), d=conv(6, 6, 1), k=norm(), l=norm(), n=norm()))
        x = torch.randn(IMAGE, dtype=torch.float64)
        expected = net(x)
        fused = bnfuse.fuse(net, x, **options)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
        torch.testing.assert_close(fused(x), expected, rtol=1e-12, atol=1e-12)


class Rows(nn.Module):
    """Norms in a row, and then the rows of the batch in the order of their first number; it counts its calls."""

    def __init__(self, count: int, bad: int = -1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(count))
        self.norms = nn.ModuleList(nn.BatchNorm1d(8) for _ in range(count))
        self.bad, self.calls = bad, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for number, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            y = layer(x)
            # What is multiplied by one in the first call stands there as if it were not multiplied.
            if number == self.bad:
                y = y * self.calls
            x = 0.1 * torch.tanh(norm(y)) + x
        return x[x[:, 0].argsort()]


def failing(monkeypatch: pytest.MonkeyPatch, fails: Callable[[set[str]], bool]) -> list[bool]:
    """Plans that remove such norms fail on the further calls, as they would after a mistake in a rule.

    Returns:
        Whether each plan held that was tried, to be filled.
    """
    found: list[bool] = []
    failure = Trials.failure

    def tried(self: Trials, plan: bnfuse.Plan, fused: nn.Module, change: Any = None) -> Any:
        wrong = fails({decision.norm for decision in plan.fused})
        found.append(not wrong)
        if not wrong:
            return failure(self, plan, fused, change)
        return FurtherCall("a further call", (), None), does_not_run("Net", "float64", RuntimeError("planted"))

    monkeypatch.setattr(Trials, "failure", tried)
    return found


def test_near_ties_of_a_model_that_keeps_something_are_no_reason_to_stay() -> None:
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    model = prepared(Rows(8)).float()
    x = torch.cat([x, x + 1e-7 * x.roll(1, 0), x - 1e-7 * x.roll(1, 0)])
    assert len(bnfuse.plan(model, x).fused) == 8
    assert isinstance(bnfuse.fuse(model, x).get_submodule("norms.0"), nn.Identity)


@pytest.mark.parametrize("bad", [0, 5, 15])
def test_a_number_that_counts_calls_keeps_the_norm_before_it(bad: int) -> None:
    plan = bnfuse.plan(prepared(Rows(16, bad)), torch.randn(6, 8, dtype=torch.float64))
    assert [decision.norm for decision in plan.decisions if not decision.fused] == [f"norms.{bad}"]
    assert "its numbers depend on" in reason(plan, f"norms.{bad}")


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("bad", [0, 5, 15])
def test_the_one_norm_that_fails_on_a_further_call_is_found_by_halving(
    monkeypatch: pytest.MonkeyPatch, bad: int, inplace: bool
) -> None:
    found = failing(monkeypatch, lambda fused: f"norms.{bad}" in fused)
    model, x = prepared(Rows(16)), torch.randn(6, 8, dtype=torch.float64)
    expected = model(x)
    fused, plan = fuse_with_plan(model, x, inplace=inplace)
    assert [decision.norm for decision in plan.decisions if not decision.fused] == [f"norms.{bad}"]
    assert "treats apart" in reason(plan, f"norms.{bad}")
    assert len(found) <= 12
    torch.testing.assert_close(fused(x), expected, rtol=1e-12, atol=1e-12)


def test_few_trials_are_made_where_all_norms_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    found = failing(monkeypatch, bool)
    _, plan = fuse_with_plan(prepared(Rows(32)), torch.randn(6, 8, dtype=torch.float64))
    assert not plan.fused
    assert "not tried which" in reason(plan, "norms.3")
    assert len(found) <= 10


def test_a_stream_that_goes_back_at_each_of_hundreds_of_sums() -> None:
    """At each sum the shift may go two ways, of which the gate takes one only, as it turns out behind it."""

    class Gated(nn.Module):
        def __init__(self, blocks: int) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 2, 1), nn.Linear(2, 2)
            self.norms = nn.ModuleList(nn.BatchNorm2d(2) for _ in range(blocks))
            self.convs = nn.ModuleList(nn.Conv2d(2, 2, 1) for _ in range(blocks))
            self.gates = nn.ModuleList(nn.Linear(2, 2) for _ in range(blocks))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for norm, conv, gate in zip(self.norms, self.convs, self.gates, strict=True):
                y = conv(torch.relu(norm(x)))
                x = x + 0.1 * y * torch.sigmoid(gate(y.mean((2, 3))))[:, :, None, None]
            out: Tensor = self.head(x.mean((2, 3)))
            return out

    model, x = prepared(Gated(210)), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    plan = bnfuse.plan(model, x, keep="norms.[1-9]*")
    assert [decision.norm for decision in plan.fused] == ["norms.0"]


def test_what_a_shift_adds_behind_a_weight_is_summed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight behind the first norm has taken up the second one before."""
    for module in ("units", "solve.network", "transaction"):
        monkeypatch.setattr(f"bnfuse.{module}.PIECE", 20)
    layers = [nn.Linear(5, 7), nn.ReLU(), nn.BatchNorm1d(7), nn.Linear(7, 9), nn.BatchNorm1d(9), nn.ReLU()]
    plan, _ = fused_and_checked(prepared(nn.Sequential(*layers)), torch.randn(4, 5, dtype=torch.float64))
    assert {decision.direction for decision in plan.fused} == {"forward", "backward"}
