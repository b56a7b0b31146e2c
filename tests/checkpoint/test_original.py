"""Going back: a fused model becomes the original again, to the bit, and trains as that does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from support import assert_untouched, snapshot
from test_structure import BUILDERS, X, assert_same_outputs, built, plain
from torch import nn

import bnfuse
from bnfuse import FusionError, Options
from bnfuse.checkpoint.original import ATTRIBUTE
from bnfuse.model.marks import ATTRIBUTE as MARK

REVERSIBLE = Options(reversible=True, infer_calls=False)


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    """The same modules, settings and contents."""
    assert str(one) == str(other)
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    for (name, module), (_, same) in zip(one.named_modules(), other.named_modules(), strict=True):
        assert type(module) is type(same), name
        assert sorted(module.__dict__) == sorted(same.__dict__), name


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("inplace", [False, True])
def test_it_is_the_original_again(builder: Callable[[], nn.Module], inplace: bool) -> None:
    original = built(builder, 0)
    fused = bnfuse.fuse(copy.deepcopy(original), X, inplace=inplace, options=REVERSIBLE)
    assert fused.state_dict().keys() == bnfuse.fuse(original, X, options=Options(infer_calls=False)).state_dict().keys()
    before = snapshot(fused)
    restored = bnfuse.unfuse(fused)
    assert_untouched(fused, before)
    assert_equal(restored, original)
    assert_same_outputs(restored, original)
    again = bnfuse.unfuse(pickle.loads(pickle.dumps(fused)), inplace=True)
    assert_equal(again, original)


def test_it_trains_as_before() -> None:
    original = built(plain, 0)
    restored = bnfuse.unfuse(bnfuse.fuse(original, options=REVERSIBLE))
    for model in (original, restored):
        optimiser = torch.optim.SGD(model.train().parameters(), lr=0.1)
        for _ in range(3):
            optimiser.zero_grad()
            model(X).square().mean().backward()
            optimiser.step()
    assert_equal(restored, original)


def test_fusing_twice_goes_back_one_step() -> None:
    parts = [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)]
    first = bnfuse.fuse(bnfuse.tools.zoo.randomise_(nn.Sequential(*parts)), X, keep="4", options=REVERSIBLE)
    second = bnfuse.unfuse(bnfuse.fuse(first, X, options=REVERSIBLE))
    assert [type(module).__name__ for module in second] == [type(module).__name__ for module in first]
    assert bnfuse.structure(second) == bnfuse.structure(first)
    assert_same_outputs(first, second)


def test_what_cannot_go_back() -> None:
    original = built(plain, 0)
    with pytest.raises(FusionError, match="keeps nothing of the model"):
        bnfuse.unfuse(bnfuse.fuse(original))
    fused = bnfuse.fuse(original, options=REVERSIBLE)
    assert ATTRIBUTE in fused.__dict__
    assert MARK not in original[1].__dict__
    with torch.no_grad():
        fused[0].weight.mul_(2)
    before = snapshot(fused)
    with pytest.raises(FusionError, match=r"1 tensors have changed since Sequential was fused, such as 0\.weight"):
        bnfuse.unfuse(fused, inplace=True)
    assert_untouched(fused, before)
    with pytest.raises(bnfuse.InputError, match="reversible= says whether"):
        Options(reversible="yes")  # type: ignore[arg-type]


def test_subnormal_weights_become_zero_where_rounding_hides_them() -> None:
    model = built(plain, 0)
    with torch.no_grad():
        model[1].weight[:3] = 1e-39
        model[1].bias[:3] = 0.5
        expected = model(X)
    fused = bnfuse.fuse(model)
    tiny = torch.finfo(torch.float32).tiny
    assert not any(((it != 0) & (it.abs() < tiny)).any() for it in fused.parameters())
    assert not fused[0].weight[:3].any()
    with torch.no_grad():
        assert torch.allclose(fused(X), expected, atol=1e-5)


def test_subnormal_weights_stay_where_they_are_all_that_there_is() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)).eval()
    with torch.no_grad():
        model[1].weight.fill_(1e-39)
    fused = bnfuse.fuse(model)
    assert bool(fused[0].weight.any())
