"""What a plan remembers of its model: any change of contents, layers or ties is seen, and nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import prepared
from torch import Tensor, nn

import bnfuse
from bnfuse.model.witness import fingerprint

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.int64, torch.int8, torch.bool,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_and_its_place_counts(dtype: torch.dtype) -> None:
    """Of tensors that differ in one element, or in the order of elements, no two have the same fingerprint."""
    found = set()
    for length in (0, 1, 3, 8, 13):
        base = torch.zeros(length, dtype=dtype)
        found.add(fingerprint(base))
        for place in range(length):
            changed = base.clone()
            changed[place] = 1
            found.add(fingerprint(changed))
    assert len(found) == 5 + 0 + 1 + 3 + 8 + 13


def test_every_block_of_a_large_tensor_counts() -> None:
    base = torch.randn(300_001)
    seen = {fingerprint(base)}
    for place in (0, 1, 131_071, 131_072, 262_144, 300_000):
        changed = base.clone()
        changed[place] += 1e-3
        seen.add(fingerprint(changed))
    seen.add(fingerprint(base.roll(131_072)))
    seen.add(fingerprint(-base))
    assert len(seen) == 9


def test_no_order_of_equal_numbers_is_taken_for_another() -> None:
    orders = [torch.tensor(order) for order in itertools.permutations([1.0, 2.0, 3.0, 4.0, -1.0])]
    assert len({fingerprint(order) for order in orders}) == 120


@pytest.mark.parametrize(
    "other",
    [
        torch.arange(6.0).view(3, 2),
        torch.arange(6.0).view(2, 3).double(),
        torch.arange(6.0).view(2, 3).to(torch.complex64),
        torch.arange(6.0).view(2, 3).t(),
        torch.tensor([[0.0, 1, 2], [3, 4, float("nan")]]),
        torch.tensor([[-0.0, 1, 2], [3, 4, 5]]),
    ],
)
def test_dtype_shape_and_bits_count(other: Tensor) -> None:
    assert fingerprint(torch.arange(6.0).view(2, 3)) != fingerprint(other)


def test_which_nan_it_is_counts() -> None:
    quiet = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert fingerprint(quiet[:1]) != fingerprint(quiet[1:])
    assert fingerprint(quiet) == fingerprint(quiet.clone())


@pytest.mark.parametrize(
    ("tensor", "same"),
    [
        (torch.arange(7.0)[1:], torch.arange(1.0, 7.0)),
        (torch.arange(6.0).view(2, 3).t(), torch.tensor([[0.0, 3], [1, 4], [2, 5]])),
        (torch.ones(2, 3, 2, 2).to(memory_format=torch.channels_last), torch.ones(2, 3, 2, 2)),
        (torch.tensor(2.0).expand(3), torch.full((3,), 2.0)),
        (torch.tensor([1 + 2j]).conj(), torch.tensor([1 - 2j])),
        (nn.Parameter(torch.ones(2)), torch.ones(2)),
    ],
)
def test_where_it_lies_in_memory_does_not_count(tensor: Tensor, same: Tensor) -> None:
    assert fingerprint(tensor) == fingerprint(same)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda data: data.to_sparse(),
        lambda data: data.to_sparse_csr(),
        lambda data: torch.quantize_per_tensor(data, 0.5, 0, torch.qint8),
        lambda data: torch.nested.as_nested_tensor([data[0], data[1, :1]]),
    ],
)
def test_tensors_without_plain_memory(make: Callable[[Tensor], Tensor]) -> None:
    data = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    assert fingerprint(make(data)) == fingerprint(make(data.clone()))
    assert fingerprint(make(data)) != fingerprint(make(data.flip(0)))
    assert fingerprint(make(data)) != fingerprint(make(-data))


class Net(nn.Module):
    """A norm between convolutions, the second of which a third name is tied to; a constant outside the registries."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.n, self.act, self.d = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.LeakyReLU(), nn.Conv2d(4, 4, 1)
        self.e, self.idle = nn.Conv2d(4, 4, 1), nn.Linear(2, 2)
        self.e.weight = self.d.weight
        self.act.gain = nn.Parameter(torch.ones(()))
        self.table = {"gain": torch.rand(4, 1, 1, dtype=torch.float64)}
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.e(self.d(self.act(self.n(self.c(x)) * self.table["gain"]) * self.act.gain))


def flip(tensor: Tensor) -> None:
    tensor.data.copy_(tensor.data.flip(0))


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "statistics in another order": (lambda m: flip(m.n.running_var), r"n\.running_var has changed"),
    "signs of a gain": (lambda m: m.n.weight.data.neg_(), r"n\.weight has changed"),
    "channels of a convolution": (lambda m: flip(m.c.weight), r"c\.weight has changed"),
    "a weight behind": (lambda m: flip(m.d.weight), r"d\.weight has changed"),
    "a constant": (lambda m: flip(m.table["gain"]), r"table\['gain'\] has changed"),
    "precision": (lambda m: m.c.float(), r"c\.weight has changed"),
    "eps": (lambda m: setattr(m.n, "eps", 1e-3), r"(?s)n is another layer.*eps=0\.001.*eps=1e-05"),
    "slope": (lambda m: setattr(m.act, "negative_slope", 0.5), r"(?s)act is another layer.*slope=0\.5"),
    "class": (lambda m: setattr(m, "act", nn.Tanh()), r"(?s)act is another layer.*Tanh\(\).*LeakyReLU"),
    "a layer gone": (lambda m: delattr(m, "n"), r"(?s)n is another layer.*nothing.*BatchNorm2d"),
    "a tie cut": (
        lambda m: setattr(m.e, "weight", nn.Parameter(m.e.weight.detach().clone())),
        r"d\.weight and e\.weight are no longer one tensor",
    ),
    "a parameter gone": (lambda m: setattr(m.act, "gain", None), r"holds no act\.gain"),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_plan_is_not_applied_to_a_changed_model(what: str, inplace: bool) -> None:
    change, message = CHANGES[what]
    model = prepared(Net())
    plan = bnfuse.plan(model, torch.randn(2, 3, 4, 4, dtype=torch.float64))
    change(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(bnfuse.FusionError, match=message):
        plan.apply(model, inplace=inplace)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_takes_no_part_may_change() -> None:
    model = prepared(Net())
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    plan = bnfuse.plan(model, x)
    model.idle.weight.data.fill_(2)
    model.train()
    model.eval()
    expected = model(x)  # counts the call in a buffer
    model.to(memory_format=torch.channels_last)
    fused = plan.apply(model)
    torch.testing.assert_close(fused(x), expected, rtol=1e-11, atol=1e-11)


def test_a_plan_is_not_applied_twice() -> None:
    model = prepared(Net())
    plan = bnfuse.plan(model, torch.randn(2, 3, 4, 4, dtype=torch.float64))
    plan.apply(model, inplace=True)
    with pytest.raises(bnfuse.FusionError, match=r"(?s)n is another layer.*Identity\(\)"):
        plan.apply(model, inplace=True)
