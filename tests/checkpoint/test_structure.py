"""The structure of a fused model: what it says, and that a fresh model which gets it takes the fused weights."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from support import assert_untouched, snapshot
from torch import Tensor, nn

import bnfuse
from bnfuse import CheckpointError, restructure, structure
from bnfuse.model.marks import ATTRIBUTE
from bnfuse.tools.zoo import randomise_


class Block(nn.Module):
    """A residual block whose activation works in place behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.norm(self.conv(x)))


class Twice(nn.Module):
    """One convolution under two names, and one norm behind both."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Conv2d(4, 4, 1, bias=False)
        self.norm = self.again = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.second(self.norm(self.first(x))))


class OutOfPlace(nn.Module):
    """Without the norm, the activation would overwrite what is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return self.act(self.norm(y)), self.last(y)


class OutOfPlaceInside(nn.Module):
    """The activation that would do so is a part of the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(4, 4, 1), timm.layers.BatchNormAct2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return self.norm(y), self.last(y)


def with_activation() -> nn.Module:
    """A norm of timm's that holds an activation."""
    return nn.Sequential(nn.Conv2d(4, 6, 1, bias=False), timm.layers.BatchNormAct2d(6), nn.Conv2d(6, 2, 1))


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))


BUILDERS: list[Callable[[], nn.Module]] = [Block, Twice, OutOfPlace, OutOfPlaceInside, with_activation, plain]
X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def built(builder: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return randomise_(builder(), seed).eval()


def outputs(model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        made = model(X.to(next(model.parameters()).dtype))
    return list(made) if isinstance(made, tuple) else [made]


def assert_same_outputs(one: nn.Module, other: nn.Module) -> None:
    assert all(torch.equal(a, b) for a, b in zip(outputs(one), outputs(other), strict=True))


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_fresh_model_takes_the_fused_weights(builder: Callable[[], nn.Module], inplace: bool) -> None:
    fused = bnfuse.fuse(built(builder, 0), X, inplace=inplace, options=bnfuse.Options(infer_calls=False))
    said = json.loads(json.dumps(structure(fused).to_dict()))
    fresh = built(builder, 1)
    assert restructure(fresh, said) is fresh
    assert {name: type(module) for name, module in fresh.named_modules()} == {
        name: type(module) for name, module in fused.named_modules()
    }
    fresh.load_state_dict(fused.state_dict())
    assert_same_outputs(fused, fresh)
    assert structure(fresh) == structure(fused)
    assert restructure(fresh, said) is fresh  # a second time changes nothing


def test_what_it_says() -> None:
    said = structure(bnfuse.fuse(built(with_activation, 0), X))
    assert [(norm.names, norm.kind, norm.keep) for norm in said.removed] == [(("1",), "BatchNormAct2d", ("act",))]
    assert [(made.names, made.shape, made.dtype) for made in said.created] == [(("0.bias",), (6,), "float32")]
    assert said.model == "Sequential"
    out = structure(bnfuse.fuse(built(OutOfPlace, 0), X))
    assert [norm.names for norm in out.removed] == [("norm",)]
    assert out.out_of_place == ("act",)
    inside = structure(bnfuse.fuse(built(OutOfPlaceInside, 0), X))
    assert [(norm.names, norm.keep) for norm in inside.removed] == [(("norm",), ("act",))]
    assert inside.out_of_place == ("norm.act",)
    twice = structure(bnfuse.fuse(built(Twice, 0), X))
    assert [norm.names for norm in twice.removed] == [("norm", "again")]
    assert not structure(plain()).is_fused


def test_it_does_not_depend_on_weights() -> None:
    one, other = (bnfuse.fuse(built(plain, seed)) for seed in (0, 1))
    assert structure(one) == structure(other)
    with torch.no_grad():
        next(one.parameters()).mul_(2)
    assert structure(one) == structure(other)


@pytest.mark.parametrize(
    "handled",
    [
        lambda model: copy.deepcopy(model),
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: torch.optim.swa_utils.AveragedModel(model).module,
        lambda model: nn.DataParallel(model),
        lambda model: torch.compile(model),
        lambda model: model.half().float(),
    ],
    ids=["deepcopy", "pickle", "ema", "DataParallel", "compile", "half"],
)
def test_it_survives(handled: Callable[[nn.Module], Any]) -> None:
    fused = bnfuse.fuse(built(with_activation, 0), X)
    assert structure(handled(fused)) == structure(fused)


def test_parts_and_compositions_have_theirs() -> None:
    fused = bnfuse.fuse(built(plain, 0))
    assert [norm.names for norm in structure(nn.Sequential(*list(fused.children())[:3])).removed] == [("1",)]
    whole = nn.ModuleDict({"backbone": fused, "head": nn.Linear(2, 2)})
    assert [norm.names for norm in structure(whole).removed] == [("backbone.1",)]
    fresh = nn.ModuleDict({"backbone": built(plain, 1), "head": nn.Linear(2, 2)})
    restructure(fresh, structure(whole)).load_state_dict(whole.state_dict())


def test_an_activation_that_is_used_elsewhere_too() -> None:
    def builder() -> nn.Module:
        act = nn.ReLU()
        norm = timm.layers.BatchNormAct2d(6, act_layer=None)
        norm.act = act
        return nn.Sequential(nn.Conv2d(4, 6, 1), norm, nn.Conv2d(6, 6, 1), act)

    fused = bnfuse.fuse(built(builder, 0), X)
    said = structure(fused)
    assert [norm.names for norm in said.removed] == [("1",)]
    assert type(fused[1]) is nn.Sequential  # a mark on the activation would be about its other place as well
    assert fused[1][0] is fused[3]
    fresh = built(builder, 1)
    restructure(fresh, said).load_state_dict(fused.state_dict())
    assert_same_outputs(fused, fresh)


def test_undoing_takes_the_marks_away() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return (x.transpose(1, -1) @ (self.weight * self.weight)).transpose(1, -1)

    def wrong(layer: nn.Module, scale: Tensor, shift: Tensor) -> None:
        layer.bias = nn.Parameter(shift.float())

    parts = [nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), Own(), nn.BatchNorm2d(4)]
    model = randomise_(nn.Sequential(*parts)).eval()
    before = snapshot(model)
    with pytest.raises(bnfuse.VerificationError):
        bnfuse.fuse(model, X, inplace=True, options=bnfuse.Options(handlers={Own: wrong}))
    assert_untouched(model, before)
    assert not any(ATTRIBUTE in module.__dict__ for module in model.modules())


def test_scripting_and_exporting_go_on() -> None:
    fused = bnfuse.fuse(built(with_activation, 0), X)
    with torch.no_grad():
        exported = torch.export.export(fused, (X,)).module()
        assert torch.allclose(exported(X), fused(X))


# What does not fit -----------------------------------------------------------------------------------------------------


def other_stride() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))


def wider() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 9, 3, bias=False), nn.BatchNorm2d(9), nn.ReLU(), nn.Conv2d(9, 2, 1))


def with_a_bias() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))


def longer() -> nn.Module:
    return nn.Sequential(*plain().children(), nn.ReLU())


def other_activation() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 2, 1))


@pytest.mark.parametrize(
    ("builder", "said"),
    [
        (other_stride, "1 with other settings or shapes: 0 (Conv2d)"),
        (wider, "with other settings or shapes: 0 (Conv2d), 3 (Conv2d)"),
        (longer, "1 not in the structure: 4 (ReLU)"),
        (other_activation, "2 (ReLU in the structure, GELU in the model)"),
        (Block, "the model itself (Sequential in the structure, Block in the model)"),
        (with_a_bias, "0.bias should be an empty place for a parameter"),
        (lambda: bnfuse.fuse(built(wider, 0)), "is fused already, with another structure: give a freshly built model"),
    ],
)
def test_another_model_is_refused_and_as_it_was(builder: Callable[[], nn.Module], said: str) -> None:
    wanted = structure(bnfuse.fuse(built(plain, 0)))
    model = builder()
    before = snapshot(model)
    with pytest.raises(CheckpointError) as error:
        restructure(model, wanted)
    assert said in str(error.value)
    assert_untouched(model, before)


GOOD = structure(bnfuse.fuse(built(plain, 0))).to_dict()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "the structure is a list"),
        (None, "the structure is a NoneType"),
        ({}, "format None"),
        (GOOD | {"format": 3}, "install a newer bnfuse"),
        (GOOD | {"format": "1"}, "the file is damaged"),
        (GOOD | {"removed": {}}, "removed is a dict"),
        (GOOD | {"removed": [{"names": [], "kind": "", "keep": []}]}, "names is empty"),
        (GOOD | {"removed": [{"names": ["__class__"], "kind": "", "keep": []}], "modules": {}}, "no module __class__"),
        (GOOD | {"removed": [{"names": ["1"], "kind": "", "keep": ["__init__"]}], "modules": {}}, "another model"),
        (GOOD | {"removed": [{"names": ["1", "3"], "kind": "", "keep": []}], "modules": {}}, "are not one"),
        (GOOD | {"created": [{"names": ["0.bias"], "shape": [10**12], "dtype": "float32"}]}, "fits no such layer"),
        (GOOD | {"created": [{"names": ["0.bias"], "shape": [-1], "dtype": "float32"}]}, "is no shape"),
        (GOOD | {"created": [{"names": ["0.bias"], "shape": [8], "dtype": "load"}]}, "is no dtype"),
        (GOOD | {"out_of_place": ["2"], "modules": {"": "x"}}, "another model"),
        (GOOD | {"out_of_place": ["0"]}, "0 has no setting inplace"),
        (GOOD | {"modules": {"": 3}}, "modules is a int"),
    ],
)
def test_damaged_structures_are_refused(data: Any, said: str) -> None:
    model = plain()
    before = snapshot(model)
    with pytest.raises(CheckpointError) as error:
        restructure(model, data)
    assert said in str(error.value)
    assert_untouched(model, before)
