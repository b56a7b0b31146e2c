"""What is promised beyond the recorded call: fused models are tried on calls that bnfuse was not given.

Statistics and affine parameters are random, in float64, and the outputs agree to 1e-9 or far better.
"""

from __future__ import annotations

import array
import collections
import contextvars
import functools
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import assert_untouched, prepared, reason, snapshot
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import bnfuse
from bnfuse import Call, InputError, Options
from bnfuse.model import pytree
from bnfuse.model.calls import PipedCall
from bnfuse.model.copying import copy_model
from bnfuse.planner.options import checked_options
from bnfuse.planner.problem import Problem

EXACT = 1e-9


class Net(nn.Module):
    """Layers by name, and a function of the module and its arguments as the forward."""

    def __init__(self, function: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def x(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def conv(inputs: int = 3, outputs: int = 4) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


IMAGE = (2, 3, 8, 8)


def norm(channels: int = 4) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels)


def relu_on_large(s: Any, x: Tensor) -> Tensor:
    y = s.c(x)
    return s.n(y.relu() if x.numel() > 400 else y)


def by_stride(s: Any, x: Tensor) -> Tensor:
    y = s.c(x)
    return s.n(y.relu() if x.stride(0) != 192 else y)


def by_text(s: Any, x: Tensor, mask: Tensor) -> Tensor:
    y = s.c(x)
    return s.n(y if f"{mask.sum()}" == "64.0" else y * mask)


def by_allclose(s: Any, x: Tensor, mask: Tensor) -> Tensor:
    y = s.c(x)
    return s.n(y if torch.allclose(mask, torch.ones_like(mask)) else y.masked_fill(mask == 0, 0.0))


def by_any(s: Any, x: Tensor, mask: Tensor) -> Tensor:
    y = s.c(x)
    return s.n(y.masked_fill(mask == 0, 0.0) if (mask == 0).any() else y)


def of_list(s: Any, frames: list[Tensor]) -> Tensor:
    return s.n(sum(s.c(frame) for frame in frames))


def with_flag(s: Any, x: Tensor, raw: bool = False) -> Tensor:
    y = s.c(x)
    return y if raw else s.n(y)


def split_images(s: Any, x: Tensor) -> Tensor:
    return s.n(sum(s.c(part) for part in x.split(3, 1)))


@dataclass
class Case:
    """A network, the inputs that it is fused with, and calls that bnfuse was not given."""

    make: Callable[[], nn.Module]
    inputs: tuple[Any, ...]
    others: list[Call] = field(default_factory=list)


class Flagged(Net):
    def forward(self, x: Tensor, raw: bool = False, scale: float = 1.0, mask: Tensor | None = None) -> Tensor:
        y = self.c(x)
        if raw:
            return y.relu()
        if mask is not None:
            y = y * mask
        return self.n(y * scale)


class FlagThatLooks(Net):
    def forward(self, x: Tensor, mixed: bool = False) -> Tensor:
        y = self.c(x)
        if mixed:
            y = y.relu() if y.shape[0] == 1 else y
        return self.n(y)


class Optional(Net):
    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y = self.n(self.c(x)) if skip is None else self.c(x) + skip
        return self.d(y)


class Methods(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.forward_features(x).relu())

    def forward_features(self, x: Tensor) -> Tensor:
        return self.n(F.silu(self.c(x)))

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        return [y := self.c(x), F.silu(y), self.n(F.silu(y))]


class Counter(Net):
    """Does something else in a later call, until it is reset."""

    def __init__(self, after: int) -> None:
        super().__init__(lambda s, x: None, c=conv(), n=norm())
        self.after, self.calls = after, 0

    def reset(self) -> None:
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.c(x)
        return self.n(y.relu() if self.calls > self.after else y)


class Domains(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.norms = conv(), nn.ModuleList([norm(), norm(), norm()])

    def forward(self, x: Tensor, domain: int = 0) -> Tensor:
        return self.norms[domain](self.c(x))


def taller(s: Any, x: Tensor) -> Tensor:
    y = s.c(x)
    return s.n(y.relu() if x.shape[2] > x.shape[3] else y)


def to_a_square(s: Any, x: Tensor) -> Tensor:
    y = s.c(x)
    side = max(y.shape[2:])
    return s.n(F.pad(y, (0, side - y.shape[3], 0, side - y.shape[2])))


def of_two_sizes(s: Any, a: Tensor, b: Tensor) -> Tensor:
    y, z = s.c(a), s.c(b)
    return s.n(y + F.pad(z, (0, y.shape[3] - z.shape[3], 0, y.shape[2] - z.shape[2])))


def of_large_ones(s: Any, x: Tensor) -> Tensor:
    y = s.c(x)
    return s.n(F.max_pool2d(y, 2) if max(x.shape[2:]) > 48 else y)


def of_lists_inside(s: Any, batch: dict[str, list[Tensor]]) -> Tensor:
    return s.n(sum(s.c(frame) for frame in batch["frames"]))


def with_key(s: Any, batch: dict[str, Any]) -> Tensor:
    y = s.c(batch["x"])
    return s.n(y.relu() if batch["flag"] else y)


class AskingForMore(Net):
    """A forward that goes by an argument as a function says."""

    def forward(
        self,
        x: Tensor,
        y: Any = None,
        first: bool = False,
        second: bool = False,
        keep: float = 1.0,
        taps: Any = (),
        level: int = 0,
    ) -> Any:
        z = self.c(x)
        if self.function(x, y, first, second, keep, taps, level):
            z = z.relu()
        return self.n(z)


def asking(function: Callable[..., Any]) -> Callable[[], nn.Module]:
    return lambda: AskingForMore(function, c=conv(), n=norm())


class OwnConv(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = super()._conv_forward(x, weight, bias)
        return y.relu() if x.shape[0] > 2 else y


class Intermediates(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.c(x))

    def forward_intermediates(self, x: Tensor, raw: bool = False) -> list[Tensor]:
        y = F.pad(self.c(x), (0, -x.shape[-1] % 4))
        return [y if raw else self.n(y)]


class MaskIfTensor(Net):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.c(x).mean((2, 3))
        return self.n(y * ~mask if isinstance(mask, Tensor) else y)


class MaskIfTensorAndWritten(Net):
    """What is read behind the write counts as something else in every call, whatever the mask is."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.c(x)
        z = self.d(self.n(y * mask if isinstance(mask, Tensor) else y))
        z[:, 0] = 0
        return z.sin()


class FlagOrNumber(Net):
    def forward(self, x: Tensor, scale: Any = True) -> Tensor:
        y = self.c(x)
        return self.n(y if scale is True else y + scale)


class FlagForANumber(Net):
    """What it does to the axes cannot be told apart from something else at another size, whatever the flag is."""

    def forward(self, x: Tensor, more: bool = False) -> Tensor:
        y = self.c(x)
        z = self.n(F.silu(y.flatten(0, 1).unflatten(0, (-1, y.shape[1]))))
        return self.d(z + 1 if more else z + 0.5)


class Stages(Net):
    def forward(self, x: Tensor, stages: int = 2) -> Tensor:
        y = self.c(x)
        return self.n(sum(layer(y) for layer in self.layers[:stages]))


def of_one_length(s: Any, x: Tensor) -> Tensor:
    y = s.c(x)
    return s.n(y.relu() if x.shape[2] != 4 else y) * torch.linspace(0.5, 1.5, 2, dtype=x.dtype)


def conv1d(inputs: int = 3, outputs: int = 4, padding: int = 1, stride: int = 1) -> nn.Conv1d:
    return nn.Conv1d(inputs, outputs, 3, stride, padding)


def norm1d(channels: int = 4) -> nn.BatchNorm1d:
    return nn.BatchNorm1d(channels)


ONES = torch.ones(1, 1, 8, 8, dtype=torch.float64)
SOME = (x(1, 1, 8, 8, seed=3) > 0).double()

CASES = {
    "number of elements": Case(lambda: Net(relu_on_large, c=conv(), n=norm()), (x(*IMAGE),), [Call(x(4, 3, 8, 8)), Call(x(2, 3, 12, 12))]),
    "stride": Case(lambda: Net(by_stride, c=conv(), n=norm()), (x(*IMAGE),), [Call(x(2, 3, 9, 9))]),
    "text of a tensor": Case(lambda: Net(by_text, c=conv(), n=norm()), (x(*IMAGE), ONES), [Call(x(*IMAGE), SOME)]),
    "allclose": Case(lambda: Net(by_allclose, c=conv(), n=norm()), (x(*IMAGE), ONES), [Call(x(*IMAGE), SOME)]),
    "any": Case(lambda: Net(by_any, c=conv(), n=norm()), (x(*IMAGE), ONES), [Call(x(*IMAGE), SOME)]),
    "length of a list": Case(lambda: Net(of_list, c=conv(), n=norm()), ([x(*IMAGE), x(*IMAGE, seed=2)],), [Call([x(*IMAGE)] * 3), Call([x(*IMAGE)])]),
    "parts of a split": Case(lambda: Net(split_images, c=conv(), n=norm()), (x(2, 6, 8, 8),), [Call(x(2, 9, 8, 8)), Call(x(2, 3, 8, 8))]),
    "iteration": Case(lambda: Net(lambda s, x: s.n(sum(map(s.c, x))), c=nn.Conv1d(3, 4, 1), n=nn.BatchNorm1d(4)), (x(5, 2, 3, 7),), [Call(x(4, 2, 3, 7)), Call(x(6, 2, 3, 7))]),
    "expand to a literal size": Case(lambda: Net(lambda s, x: s.n(s.c(x).expand(-1, -1, 8).sum(2)), c=nn.Conv1d(3, 4, 1), n=nn.BatchNorm1d(4)), (x(2, 3, 1),), [Call(x(2, 3, 8))]),
    "sum over positions": Case(lambda: Net(lambda s, x: s.d(s.n(x.sin()).sum((2, 3))), n=norm(3), d=nn.Linear(3, 2)), (x(*IMAGE),), [Call(x(2, 3, 9, 9))]),
    "flag of the forward": Case(lambda: Flagged(with_flag, c=conv(), n=norm()), (x(*IMAGE),), [Call(x(*IMAGE), raw=True), Call(x(*IMAGE), scale=2.0), Call(x(*IMAGE), mask=SOME)]),
    "flag behind which sizes count": Case(lambda: FlagThatLooks(with_flag, c=conv(), n=norm()), (x(*IMAGE),), [Call(x(1, 3, 8, 8), mixed=True), Call(x(*IMAGE), mixed=True)]),
    "flag of a function behind the forward": Case(lambda: Net(with_flag, c=conv(), n=norm()), (x(*IMAGE),), [Call(x(*IMAGE), True)]),
    "optional skip": Case(lambda: Optional(with_flag, c=conv(), n=norm(), d=conv(4, 2)), (x(*IMAGE),), [Call(x(*IMAGE), x(2, 4, 8, 8)), Call(x(*IMAGE), skip=x(2, 4, 8, 8))]),
    "methods": Case(lambda: Methods(with_flag, c=conv(), n=norm(), d=conv(4, 2)), (x(*IMAGE),), [Call(x(*IMAGE), method="forward_features"), Call(x(*IMAGE), method="forward_intermediates")]),
    "other domain": Case(Domains, (x(*IMAGE),), [Call(x(*IMAGE), 1), Call(x(*IMAGE), domain=2)]),
    "one tensor twice": Case(lambda: Net(lambda s, a, b: s.c(a) + s.n(b), c=conv(3, 3), n=norm(3)), (same := x(*IMAGE), same), [Call(x(*IMAGE), -x(*IMAGE, seed=4))]),
    "one tensor twice, in a list": Case(lambda: Net(lambda s, a: s.c(a[0]) + s.n(a[1]), c=conv(3, 3), n=norm(3)), ([same, same],), [Call([x(*IMAGE), -x(*IMAGE, seed=4)])]),
    "taller than wide": Case(lambda: Net(taller, c=conv(), n=norm()), (x(*IMAGE),), [Call(x(2, 3, 9, 8))]),
    "filled up to a square": Case(lambda: Net(to_a_square, c=conv(), n=norm()), (x(*IMAGE),), [Call(x(2, 3, 8, 10))]),
    "inputs of different sizes": Case(lambda: Net(of_two_sizes, c=conv(), n=norm()), (x(*IMAGE), x(*IMAGE, seed=2)), [Call(x(*IMAGE), x(2, 3, 6, 7))]),
    "a number in the code": Case(lambda: Net(of_large_ones, c=conv(), n=norm()), (x(2, 3, 32, 32),), [Call(x(2, 3, 64, 64))]),
    "length of a list in a dictionary": Case(lambda: Net(of_lists_inside, c=conv(), n=norm()), ({"frames": [x(*IMAGE)] * 2},), [Call({"frames": [x(*IMAGE)] * 3})]),
    "flag in a dictionary": Case(lambda: Net(with_key, c=conv(), n=norm()), ({"x": x(*IMAGE), "flag": False},), [Call({"x": x(*IMAGE), "flag": True})]),
    "two flags": Case(asking(lambda x, y, first, second, *_: first and second), (x(*IMAGE),), [Call(x(*IMAGE), first=True, second=True)]),
    "a flag and a size": Case(asking(lambda x, y, first, *_: first and x.shape[0] > 2), (x(*IMAGE),), [Call(x(4, 3, 8, 8), first=True)]),
    "a flag and contents": Case(asking(lambda x, y, first, *_: first and x.min() >= 0), (x(*IMAGE),), [Call(x(*IMAGE).abs(), first=True)]),
    "a mask that hides something": Case(asking(lambda x, y, *_: y is not None and not y.all()), (x(*IMAGE),), [Call(x(*IMAGE), SOME > 0)]),
    "a word": Case(asking(lambda x, y, *_: y == "raw"), (x(*IMAGE),), [Call(x(*IMAGE), "raw")]),
    "a smaller number": Case(asking(lambda x, y, a, b, keep, *_: keep < 1.0), (x(*IMAGE),), [Call(x(*IMAGE), keep=0.5)]),
    "an entry of a tuple": Case(asking(lambda x, y, a, b, keep, taps, *_: 0 in taps), (x(*IMAGE),), [Call(x(*IMAGE), taps=(0,))]),
    "a large number": Case(asking(lambda *arguments: arguments[-1] >= 5), (x(*IMAGE),), [Call(x(*IMAGE), level=5)]),
    "a mask that was given is left out": Case(asking(lambda x, y, *_: y is None), (x(*IMAGE), ONES), [Call(x(*IMAGE)), Call(x(*IMAGE), None)]),
    "two tensors, and one twice": Case(asking(lambda x, y, *_: x is y), (x(*IMAGE), -x(*IMAGE)), [Call(same, same)]),
    "a method that a layer of PyTorch's calls": Case(lambda: Net(lambda s, x: s.n(s.c(x)), c=OwnConv(3, 4, 3, padding=1), n=norm()), (x(*IMAGE),), [Call(x(4, 3, 8, 8))]),
    "torch.numel": Case(lambda: Net(lambda s, x: s.n(s.c(x).relu() if torch.numel(x) > 400 else s.c(x)), c=conv(), n=norm()), (x(*IMAGE),), [Call(x(4, 3, 8, 8))]),
    "sizes and flags of another method": Case(lambda: Intermediates(with_flag, c=conv(), n=norm()), (x(*IMAGE),), [Call(x(2, 3, 9, 9), method="forward_intermediates"), Call(x(*IMAGE), raw=True, method="forward_intermediates")]),
    "fewer tensors": Case(lambda: Net(lambda s, *xs: s.n(s.c(xs[0] + xs[-1])) if xs[1:] else s.c(xs[0]), c=conv(), n=norm()), (same, same), [Call(x(*IMAGE))]),
    "a mask of few axes, if it is a tensor": Case(lambda: MaskIfTensor(with_flag, c=conv(), n=norm1d()), (x(*IMAGE),), [Call(x(*IMAGE), x(1, 4, seed=5) > 0)]),
    "a mask, if it is a tensor, and a write": Case(lambda: MaskIfTensorAndWritten(with_flag, c=conv(), n=norm(), d=conv(4, 2)), (x(*IMAGE),), [Call(x(*IMAGE), SOME)]),
    "a number or a tensor in place of a flag": Case(lambda: FlagOrNumber(with_flag, c=conv(), n=norm()), (x(*IMAGE),), [Call(x(*IMAGE), 0.5), Call(x(*IMAGE), scale=x(1))]),
    "a flag that changes a number": Case(lambda: FlagForANumber(with_flag, c=conv1d(), n=norm1d(), d=conv1d(4, 2, 0)), (x(2, 3, 5),), [Call(x(2, 3, 5), more=True), Call(x(4, 3, 5), more=True)]),
    "a norm of a number": Case(lambda: Stages(with_flag, c=conv(), layers=nn.ModuleList([conv(4, 4), conv(4, 4)]), n=FrozenBatchNorm2d(4)), (x(*IMAGE),), [Call(x(*IMAGE), stages=0), Call(x(*IMAGE), stages=1)]),
    "a literal shape": Case(lambda: Net(lambda s, x: s.n(s.c(x).reshape(-1, 4, 3)), c=conv1d(padding=2), n=norm1d()), (x(4, 3, 1),), [Call(x(4, 3, 4))]),
    "a literal number of samples": Case(lambda: Net(lambda s, x: s.n(s.c(x).reshape(2, -1)), c=conv1d(), n=norm1d()), (x(2, 3, 1),), [Call(x(1, 3, 2))]),
    "a literal end": Case(lambda: Net(lambda s, x: s.n(s.c(x).flatten(1)[:, :4]), c=conv1d(), n=norm1d()), (x(2, 3, 1),), [Call(x(2, 3, 2))]),
    "hardly smaller": Case(lambda: Net(lambda s, x: s.n(s.c(x).relu() if x[0].nbytes < 120 else s.c(x)), c=conv1d(padding=0), n=norm1d()), (x(2, 3, 5),), [Call(x(2, 3, 4))]),
    "sizes that a stride makes alike": Case(lambda: Net(of_one_length, c=conv1d(stride=2), n=norm1d()), (x(2, 3, 4),), [Call(x(2, 3, 3))]),
    "contents far below zero": Case(asking(lambda x, *_: x.min() < -5), (x(*IMAGE).abs(),), [Call(-9 * x(*IMAGE).abs())]),
    "large contents": Case(asking(lambda x, *_: x.norm() > 1e4), (x(*IMAGE),), [Call(1e3 * x(*IMAGE))]),
}  # fmt: skip


def difference(expected: Any, got: Any) -> float:
    pairs = zip(pytree.tensors(expected), pytree.tensors(got), strict=True)
    return max(float(((a - b).norm() / a.norm()).detach()) for (_, a), (_, b) in pairs)


def agree(model: nn.Module, fused: nn.Module, *calls: Call) -> None:
    """Both give the same, call after call on the same objects."""
    mine, theirs = copy_model(model), copy_model(fused)
    with torch.no_grad():
        for call in calls:
            assert difference(call.run(mine), call.run(theirs)) <= EXACT, call


@pytest.mark.parametrize("name", CASES)
def test_calls_that_were_not_given(name: str) -> None:
    case = CASES[name]
    model = prepared(case.make(), dead=0.0)
    before = snapshot(model)
    for fused in (bnfuse.fuse(model, case.inputs), bnfuse.plan(model, case.inputs).apply(model)):
        for call in (Call(*case.inputs), *case.others):
            agree(model, fused, call)
    assert_untouched(model, before)
    inplace = copy_model(model)
    bnfuse.fuse(inplace, case.inputs, inplace=True)
    for call in (Call(*case.inputs), *case.others):
        agree(model, inplace, call)


@pytest.mark.parametrize("after", [1, 2, 3])
def test_later_calls_and_a_reset(after: int) -> None:
    model = prepared(Counter(after), dead=0.0)
    call, reset = Call(x(*IMAGE)), Call(method="reset")
    fused = bnfuse.fuse(model, x(*IMAGE))
    agree(model, fused, *[call] * 5)
    mine, theirs = copy_model(model), copy_model(fused)
    for step in (call, call, call, call, reset, call):
        with torch.no_grad():
            found = [step.run(net) for net in (mine, theirs)]
    assert difference(*found) <= EXACT
    assert model.calls == 0


# Calls that the caller names ----------------------------------------------------------------------------------------


class Encoder(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.d(F.gelu(self.n(self.c(x))))

    def encode(self, x: Tensor) -> Tensor:
        return self.n(self.c(x)).relu()

    def raw(self, x: Tensor) -> Tensor:
        return self.c(x)


def encoder() -> nn.Module:
    return prepared(Encoder(with_flag, c=conv(), n=norm(), d=conv(4, 2)), dead=0.0)


def test_a_method_that_the_caller_names() -> None:
    model = encoder()
    alone = bnfuse.fuse(model, x(*IMAGE))
    assert isinstance(alone.n, nn.Identity)
    with pytest.raises(AssertionError):  # nobody knows of it
        agree(model, alone, Call(x(*IMAGE), method="raw"))
    calls = [Call(x(*IMAGE), method="raw"), Call(x(*IMAGE), method="encode")]
    fused = bnfuse.fuse(model, x(*IMAGE), calls=calls)
    agree(model, fused, Call(x(*IMAGE)), *calls)
    assert isinstance(fused.n, nn.BatchNorm2d)
    assert isinstance(bnfuse.fuse(model, x(*IMAGE), calls=calls[1:]).n, nn.Identity)
    assert "output of the model" in reason(bnfuse.plan(model, x(*IMAGE), calls=calls), "n")


def test_a_mask_that_the_caller_gives_is_no_longer_unseen() -> None:
    model = prepared(Flagged(with_flag, c=conv(), n=norm()), dead=0.0)
    options = Options(infer_calls=False)
    mask = torch.ones(2, 1, 1, 1, dtype=torch.float64)
    assert bnfuse.plan(model, x(*IMAGE), options=options).fused
    plan = bnfuse.plan(model, x(*IMAGE), calls=[Call(x(*IMAGE), mask=mask)], options=options)
    assert not plan.fused  # the shift does not pass the product
    model.n.bias.data.copy_(model.n.running_mean * model.n.weight / (model.n.running_var + model.n.eps).sqrt())
    plan = bnfuse.plan(model, x(*IMAGE), calls=[Call(x(*IMAGE), mask=mask)], options=options)
    assert plan.fused  # without a shift it does
    agree(model, plan.apply(model), Call(x(*IMAGE), mask=mask))


def test_what_is_inferred_can_be_switched_off() -> None:
    class Stages(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.n(self.forward_features(x))

        def forward_features(self, x: Tensor) -> Tensor:
            return self.c(x)

    model = prepared(Stages(with_flag, c=conv(), n=norm()), dead=0.0)
    assert not bnfuse.plan(model, x(*IMAGE)).fused
    assert bnfuse.plan(model, x(*IMAGE), options=Options(infer_calls=False)).fused


class Routes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs, self.norms = (nn.ModuleList(make() for _ in range(3)) for make in (conv, norm))

    def forward(self, x: Tensor, domain: int = 0) -> Tensor:
        return self.norms[domain](self.convs[domain](x))


def test_a_norm_that_runs_in_a_further_call_goes_too() -> None:
    model = prepared(Routes(), dead=0.0)
    calls = [Call(x(*IMAGE), domain=1), Call(x(*IMAGE), domain=2)]
    plan = bnfuse.plan(model, x(*IMAGE), calls=calls)
    assert len(plan.fused) == 3
    assert not plan.unseen
    agree(model, plan.apply(model), Call(x(*IMAGE)), *calls)


def test_what_was_not_seen_is_said() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.n(s.c(x))

    class Choosing(Net):
        def forward(self, x: Tensor, mode: str = "a", sizes: Any = None) -> Tensor:
            y = self.n(self.c(x))
            return y if sizes is None else F.interpolate(y, size=[int(size) for size in sizes])

    plan = bnfuse.plan(prepared(Choosing(forward, c=conv(), n=norm(), other=norm(7))), x(*IMAGE))
    assert any("sizes" in text for text in plan.unseen)
    assert any("other did not run" in text for text in plan.unseen)
    assert plan.to_dict()["unseen"] == list(plan.unseen)


@pytest.mark.parametrize(
    ("asks", "says"),
    [
        (lambda x: torch.is_grad_enabled(), "gradients are tracked"),
        (lambda x: torch.is_inference_mode_enabled(), "gradients are tracked"),
        (lambda x: x.requires_grad, "gradients are tracked"),
        (lambda x: x.untyped_storage().nbytes() > x.numel() * x.itemsize, "lie in memory"),
        (lambda x: x.storage_offset() > 0, "lie in memory"),
        (lambda x: x.shape[0] > 0, ""),
    ],
)
def test_what_cannot_be_tried_is_said(asks: Callable[[Tensor], bool], says: str) -> None:
    class Asking(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.n(self.c(x))
            return y.relu() if self.function(x) else y

    plan = bnfuse.plan(prepared(Asking(asks, c=conv(), n=norm())), x(*IMAGE))
    assert any(says in text for text in plan.unseen) if says else not plan.unseen


def test_a_mask_that_no_guess_fits_is_unseen() -> None:
    class OfOneSize(Net):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            y = self.c(x)
            return self.n(y * mask.reshape(1, 4, 1, 1) if isinstance(mask, Tensor) else y)

    plan = bnfuse.plan(prepared(OfOneSize(with_flag, c=conv(), n=norm())), x(*IMAGE))
    assert "mask was never given another value: what that does is not known" in plan.unseen


@pytest.mark.parametrize(
    ("calls", "says"),
    [
        (Call(x(*IMAGE)), "a list of calls"),
        ([x(*IMAGE)], "bnfuse.Call"),
        ([Call(x(*IMAGE), method="no_such")], "no method 'no_such'"),
        ([Call(x(*IMAGE), method="encod")], "Did you mean 'encode'"),
        ([Call(x(2, 5, 8, 8))], "does not run on the inputs"),
        ([Call(x(*IMAGE), method="encode", wrong=1)], "Encoder.encode does not run"),
    ],
)
def test_a_wrong_call_is_one_clear_error(calls: Any, says: str) -> None:
    model = encoder()
    before = snapshot(model)
    for function in (bnfuse.fuse, bnfuse.plan):
        with pytest.raises(InputError, match=says):
            function(model, x(*IMAGE), calls=calls)
    assert_untouched(model, before)


def test_a_budget_counts_the_calls_that_the_caller_names() -> None:
    model = encoder().float()
    calls = [Call(x(*IMAGE).float(), method="encode")]
    fused = bnfuse.fuse(model, x(*IMAGE).float(), calls=calls, options=Options(budget=1e-3))
    assert isinstance(fused.n, nn.Identity)
    kept = bnfuse.fuse(model, x(*IMAGE).float(), calls=calls, options=Options(budget=0.0))
    assert isinstance(kept.n, nn.BatchNorm2d)


def test_compare_takes_calls() -> None:
    model = encoder()
    calls = [Call(x(*IMAGE)), Call(x(*IMAGE), method="encode")]
    fused = bnfuse.fuse(model, x(*IMAGE), calls=calls)
    assert bnfuse.compare(model, fused, calls).within_tolerance()
    assert bnfuse.compare(model, fused, calls[1]).within_tolerance()
    fused.c.weight.data.mul_(2)
    assert not bnfuse.compare(model, fused, calls[1]).within_tolerance()


class Steps(Net):
    """Methods that remember, go by sizes and take flags."""

    def __init__(self) -> None:
        super().__init__(with_flag, c=conv(), n=norm())
        self.steps, self.raw = 0, False

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(x)
        return self.n(y.relu() if self.raw else y)

    def set_raw(self) -> None:
        self.raw = True

    def step(self, x: Tensor) -> Tensor:
        self.steps += 1
        y = self.c(x)
        return self.n(y.relu() if self.steps > 1 else y)

    def encode(self, x: Tensor, raw: bool = False) -> Tensor:
        y = self.c(x)
        return self.n(y.relu() if raw or x.shape[0] > 2 else y)


@pytest.mark.parametrize(
    ("given", "calls"),
    [
        (Call(x(*IMAGE), method="encode"), [Call(x(4, 3, 8, 8), method="encode")]),
        (Call(x(*IMAGE), method="encode"), [Call(x(*IMAGE), True, method="encode")]),
        (Call(x(*IMAGE), method="step"), [Call(x(*IMAGE), method="step")] * 2),
        (Call(method="set_raw"), [Call(method="set_raw"), Call(x(*IMAGE))]),
    ],
)
def test_what_follows_from_a_call_that_the_caller_names(given: Call, calls: list[Call]) -> None:
    model = prepared(Steps(), dead=0.0)
    fused = bnfuse.fuse(model, x(*IMAGE), calls=[given])
    mine, theirs = copy_model(model), copy_model(fused)
    with torch.no_grad():
        found = [[call.run(net) for call in calls][-1] for net in (mine, theirs)]
    assert difference(*found) <= EXACT


class Slots:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class OnTheClass(Net):
    count = 0


def counters() -> dict[str, tuple[Any, Callable[[Any], Any], Callable[[Any], Any]]]:
    """Places of a number that counts calls: what holds it, how it is counted up, how it is read."""

    def on_class(s: Any) -> None:
        OnTheClass.count += 1

    def in_slots(s: Any) -> None:
        s.held.count += 1

    def in_array(s: Any) -> None:
        s.held[0] += 1

    def in_hidden_module(s: Any) -> None:
        s.held[0].count += 1

    hidden = nn.Identity()
    hidden.count = 0  # type: ignore[assignment]
    return {
        "class": (None, on_class, lambda s: OnTheClass.count),
        "slots": (Slots(), in_slots, lambda s: s.held.count),
        "array": (array.array("i", [0]), in_array, lambda s: s.held[0]),
        "tensor": (torch.zeros(1), in_array, lambda s: float(s.held[0])),
        "module in a list": ([hidden], in_hidden_module, lambda s: s.held[0].count),
    }


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("place", counters())
def test_numbers_in_odd_places_are_seen_and_put_back(place: str, inplace: bool) -> None:
    held, count, read = counters()[place]

    def forward(s: Any, x: Tensor) -> Tensor:
        count(s)
        y = s.c(x)
        return s.n(y.relu() if read(s) > 1 else y)

    model = prepared(OnTheClass(forward, c=conv(), n=norm(), held=held), dead=0.0)
    plan = bnfuse.plan(model, x(*IMAGE))
    assert read(model) == 0
    assert any("remembers" in text for text in plan.unseen)
    assert not plan.fused
    with pytest.warns(bnfuse.NothingFusedWarning):
        bnfuse.fuse(model, x(*IMAGE), inplace=inplace)
    assert read(model) == 0


# What somebody else holds -------------------------------------------------------------------------------------------


class Store:
    features: Any = None


CONTEXT: contextvars.ContextVar[Any] = contextvars.ContextVar("features")
GLOBAL: dict[str, Any] = {}


def keepers() -> dict[str, tuple[Callable[[Tensor], Any], Callable[[], Tensor]]]:
    """Places outside of the model: how a tensor gets there, and how it is read."""
    queue: collections.deque[Tensor] = collections.deque(maxlen=1)
    user: Any = collections.UserDict()
    space, store, entries = types.SimpleNamespace(), Store(), [None]
    return {
        "deque": (queue.append, lambda: queue[-1]),
        "user dict": (lambda y: user.update(f=y), lambda: user["f"]),
        "namespace": (lambda y: setattr(space, "f", y), lambda: space.f),
        "object": (lambda y: setattr(store, "features", y), lambda: store.features),
        "class": (lambda y: setattr(Store, "features", y), lambda: Store.features),
        "global": (lambda y: GLOBAL.update(f=y), lambda: GLOBAL["f"]),
        "list": (lambda y: entries.__setitem__(0, y), lambda: entries[0]),
        "context variable": (CONTEXT.set, CONTEXT.get),
    }


@pytest.mark.parametrize("place", keepers())
def test_what_is_kept_outside_of_the_model_stays_as_it_is(place: str) -> None:
    keep, read = keepers()[place]

    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.c(x)
        keep(y)
        return s.d(s.n(y).relu())

    model = prepared(Net(forward, c=conv(), n=norm(), d=conv(4, 2)), dead=0.0)
    fused = bnfuse.fuse(model, x(*IMAGE))
    assert not read().is_inference()
    assert bool(read().isfinite().all())
    with torch.no_grad():
        model(x(*IMAGE))
        expected = read()
        fused(x(*IMAGE))
    assert difference(expected, read()) <= EXACT


def test_the_list_of_the_caller_that_is_filled() -> None:
    def forward(s: Any, x: Tensor, found: list[Tensor]) -> Tensor:
        found.append(s.c(x))
        return s.n(found[-1]).relu()

    model = prepared(Net(forward, c=conv(), n=norm()), dead=0.0)
    fused = bnfuse.fuse(model, (x(*IMAGE), []))
    mine: list[Tensor] = []
    theirs: list[Tensor] = []
    assert difference(model(x(*IMAGE), mine), fused(x(*IMAGE), theirs)) <= EXACT
    assert difference(mine, theirs) <= EXACT


def test_a_run_leaves_no_tensor_of_inference_mode_behind() -> None:
    @functools.lru_cache
    def table(size: int) -> Tensor:
        return torch.arange(size, dtype=torch.float64)

    @functools.lru_cache
    def literal() -> Tensor:
        return torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64).view(1, 4, 1, 1)

    held: dict[int, Tensor] = {}

    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.n(s.c(x)) * table(x.shape[-1]) * literal()
        if 0 not in held:
            held[0] = torch.linspace(0, 1, x.shape[-1], dtype=torch.float64)
        return y + held[0]

    model = prepared(Net(forward, c=conv(), n=norm()))
    for made in (bnfuse.plan, bnfuse.fuse):
        made(model, x(*IMAGE))
        model.train()
        model(x(*IMAGE)).sum().backward()
        model.eval()


def test_plan_leaves_no_unwritten_memory_behind() -> None:
    store = Store()

    def forward(s: Any, x: Tensor) -> Tensor:
        store.features = s.c(x).sin()
        return s.n(store.features)

    model = prepared(Net(forward, c=conv(), n=norm()))
    bnfuse.plan(model, x(*IMAGE))
    torch.testing.assert_close(store.features, model.c(x(*IMAGE)).sin())


def test_options_are_checked() -> None:
    assert checked_options(None).infer_calls
    assert Problem.of(encoder(), x(*IMAGE), Options(infer_calls=False)).recording.runs


class LooksAtContents(nn.Module):
    """More operators than a small model has; the code looks at contents, and only rare calls return the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.n, self.d = conv(), norm(), conv(4, 4)

    def middle(self, x: Tensor) -> Tensor:
        if x.isnan().any():
            raise ValueError("not a number")
        y: Tensor = self.c(x)
        return y

    def forward(self, x: Tensor, middle: bool = False, last: Tensor | None = None) -> Tensor:
        y = self.middle(x)
        if middle:
            return y
        y = self.n(y)
        if last is not None:
            return y
        y = self.d(y)
        for _ in range(120):
            y = y.sin()
        return y

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        y = self.middle(x)
        return [y, self.n(y)]


@pytest.mark.parametrize("kwargs", [{"middle": True}, {"method": "forward_intermediates"}], ids=["flag", "method"])
def test_rare_calls_of_a_large_model_that_looks_at_contents(kwargs: dict[str, Any]) -> None:
    model = prepared(LooksAtContents(), dead=0.0)
    fused = bnfuse.fuse(model, x(*IMAGE))
    method = getattr(model, kwargs.get("method", "forward"))
    of_fused = getattr(fused, kwargs.pop("method", "forward"))
    assert difference(method(x(*IMAGE), **kwargs), of_fused(x(*IMAGE), **kwargs)) <= EXACT


class CutInTwo(nn.Module):
    """The second half may stop between a norm and the classifier that could take it."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.n, self.fc = conv(), nn.BatchNorm1d(4), nn.Linear(4, 5)

    def forward_features(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(x).relu()
        return y

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        y: Tensor = self.n(x.mean((2, 3)))
        return y if pre_logits else self.fc(y)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def test_methods_that_follow_one_another() -> None:
    model = prepared(CutInTwo(), dead=0.0)
    fused = bnfuse.fuse(model, x(*IMAGE), options=Options(infer_calls=False))
    assert isinstance(fused.n, nn.Identity)
    (decision,) = bnfuse.plan(model, x(*IMAGE)).decisions
    assert not decision.fused
    assert "output" in str(decision)


def head_in_place(s: Any, x: Tensor, pre_logits: bool) -> Tensor:
    y = s.n(x.relu_().mean((2, 3)))
    return y if pre_logits else s.fc(y)


def head_of_another_way(s: Any, x: Tensor, pre_logits: bool) -> Tensor:
    y = x.mean((2, 3))
    return s.fc(y.sin()) if pre_logits else s.fc(s.n(y))


def head_that_gives_its_input(s: Any, x: Tensor, pre_logits: bool) -> Tensor:
    return x if pre_logits else s.fc(s.n(x.mean((2, 3))))


@pytest.mark.parametrize("head", [head_in_place, head_of_another_way, head_that_gives_its_input])
def test_a_second_method_that_ends_early(head: Callable[..., Tensor]) -> None:
    class Cut(CutInTwo):
        def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
            return head(self, x, pre_logits)

    model = prepared(Cut(), dead=0.0)
    fused = bnfuse.fuse(model, x(*IMAGE))
    piped = PipedCall(Call(x(*IMAGE), method="forward_features"), "forward_head", pre_logits=True)
    agree(model, fused, Call(x(*IMAGE)), piped, piped)


@pytest.mark.parametrize("looks", [False, True])
def test_a_parameter_that_a_flag_lets_out_of_the_same_operators(looks: bool) -> None:
    class Shows(Net):
        def forward(self, x: Tensor, weights: bool = False) -> Any:
            y = self.c(x)
            z = self.n(y.reshape(-1, 4, *y.shape[2:]) if looks else y)
            return (z, self.c.weight) if weights else z

    model = prepared(Shows(with_flag, c=conv(), n=norm()), dead=0.0)
    agree(model, bnfuse.fuse(model, x(*IMAGE)), Call(x(*IMAGE), weights=True))


@pytest.mark.parametrize("looks", [False, True])
def test_a_tensor_that_a_flag_puts_aside_among_the_same_operators(looks: bool) -> None:
    kept: list[Tensor] = []

    def put_aside(y: Tensor) -> None:
        kept[:] = [y]

    class Keeps(Net):
        def forward(self, x: Tensor, keep: bool = False) -> Any:
            y = self.c(x)
            if keep:
                put_aside(y)
            shape = (y.shape[0], y.shape[2], -1, y.shape[1])
            z = y.permute(0, 2, 3, 1).flatten(0, 1).reshape(shape).permute(0, 3, 1, 2) if looks else y
            return self.n(z)

    model = prepared(Keeps(with_flag, c=conv(), n=norm()), dead=0.0)
    fused = bnfuse.fuse(model, x(*IMAGE))
    found = []
    with torch.no_grad():
        for net in (model, fused):
            net(x(*IMAGE), keep=True)
            found.append(kept[0].clone())
    assert difference(*found) <= EXACT


# Hooks that the model's own code puts on its layers


class Profiled(nn.Module):
    """A flag by which hooks count what every layer does (ultralytics and thop)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, profile: bool = False) -> Tensor:
        counts: list[int] = []
        hooks = []
        if profile:
            hooks = [self.conv.register_forward_hook(lambda module, args, output: counts.append(output.numel()))]
        y = self.norm(self.conv(x)).relu()
        for hook in hooks:
            hook.remove()
        return y


def test_hooks_of_a_call_that_nobody_asked_for() -> None:
    model, image = prepared(Profiled()), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    plan = bnfuse.plan(model, image)
    assert len(plan.fused) == 1
    assert any("profile=True puts hooks on layers" in text for text in plan.unseen)
    named = bnfuse.plan(model, image, calls=[Call(image, profile=True)])
    assert "a hook on conv (Conv2d) reads it" in reason(named, "norm")
