"""The steps by which models of the zoos fuse themselves, before and after bnfuse."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import timm
import torch
from support import EXACT, assert_untouched, prepared, snapshot
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.fx.experimental import optimization
from torch.optim.swa_utils import AveragedModel

import bnfuse
from bnfuse.transaction import rewrite


def inputs(size: int = 8, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def same(first: nn.Module, second: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        expected, got = first(x), second(x)
    assert float(expected.norm()) > 0
    return float((got - expected).norm() / expected.norm()) < EXACT


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


# Conventions of the zoos ---------------------------------------------------------------------------------------------


class ConvNorm(nn.Module):
    """A step that gives a new layer, made of the weight and the norm alone (levit, tiny_vit, efficientvit)."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.c, self.bn = nn.Conv2d(width, 4, 3, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.c(x))

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        scale = self.bn.weight / (self.bn.running_var + self.bn.eps).sqrt()
        made = nn.Conv2d(self.c.in_channels, self.c.out_channels, 3, dtype=self.c.weight.dtype)
        made.weight.copy_(self.c.weight * scale[:, None, None, None])
        made.bias.copy_(self.bn.bias - self.bn.running_mean * scale)
        return made


class Branches(nn.Module):
    """A step in place that merges branches, each of which has a step of its own (RepVGG, MobileOne, RepViT)."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.first, self.second = ConvNorm(width), ConvNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.merged(x) if hasattr(self, "merged") else self.first(x) + self.second(x)

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        self.merged, other = self.first.fuse(), self.second.fuse()
        self.merged.weight += other.weight
        self.merged.bias += other.bias
        del self.first, self.second


class Conv(nn.Module):
    """Fused by a loop at the root, which deletes the norm and replaces the forward (ultralytics)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(width, 4, 3, bias=False), nn.BatchNorm2d(4), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class Detector(nn.Module):
    """The root."""

    asks = 0

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(Conv(3), Conv(4))
        self.head, self.norm = nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.head(self.model(x)))

    def is_fused(self) -> bool:
        return not any(isinstance(module, Conv) and hasattr(module, "bn") for module in self.modules())

    def fuse(self, verbose: bool = True) -> nn.Module:
        if not self.is_fused():
            for module in self.model.modules():
                if isinstance(module, Conv) and hasattr(module, "bn"):
                    module.conv = torch.nn.utils.fuse_conv_bn_eval(module.conv, module.bn)
                    delattr(module, "bn")
                    module.forward = module.forward_fuse
        self.asks += 1
        return self


def net(*layers: nn.Module) -> nn.Module:
    return prepared(nn.Sequential(*layers))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("block", [ConvNorm, Branches])
def test_steps_leave_a_fused_model_alone(block: type[nn.Module], inplace: bool) -> None:
    model, x = net(block(), nn.ReLU()), inputs()
    assert same(model, reparameterize_model(model), x)
    fused = bnfuse.fuse(copy.deepcopy(model), x, inplace=inplace)
    assert norms(model)
    assert not norms(fused)
    for deployed in (reparameterize_model(fused), reparameterize_model(copy.deepcopy(fused))):
        assert same(model, deployed, x)
        assert list(deployed.state_dict()) == list(fused.state_dict())
    step = ConvNorm.fuse if block is ConvNorm else Branches.switch_to_deploy
    with pytest.raises(AttributeError, match="weight"):  # which is what would happen
        step(fused[0])


def test_a_step_does_not_lose_a_bias() -> None:
    """The norm before the block goes forward into it, whose own norm stays: its step would drop what was added."""
    model, x = net(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3), ConvNorm(), nn.ReLU()), inputs()
    fused = bnfuse.fuse(model, x, keep="3.bn")
    assert norms(fused) == 1
    assert fused[3].c.bias is not None
    assert same(model, reparameterize_model(fused), x)
    fused[3] = ConvNorm.fuse(fused[3])
    assert not same(model, fused, x)


def test_a_step_that_still_has_work_does_it() -> None:
    model, x = net(ConvNorm(), nn.ReLU(), ConvNorm(4), nn.ReLU()), inputs()
    fused = bnfuse.fuse(model, x, keep="2.bn")
    deployed = reparameterize_model(fused)
    assert type(deployed[0]) is ConvNorm
    assert type(deployed[2]) is nn.Conv2d
    assert same(model, deployed, x)


@pytest.mark.parametrize("keep", [(), "model.1.*"])
def test_a_step_that_asks_is_told(keep: Any) -> None:
    model, x = prepared(Detector()), inputs()
    fused = bnfuse.fuse(model, x, keep=keep)
    assert (model.is_fused(), fused.is_fused()) == (False, True)
    assert fused.fuse(verbose=False) is fused
    assert fused.asks == 1  # it has run
    assert same(model, fused, x)
    del vars(fused)["is_fused"]
    with pytest.raises(AttributeError, match="running_mean"):  # which is what would happen
        fused.fuse()


def test_a_model_that_has_fused_itself_is_fused_to_the_end() -> None:
    model, x = prepared(Detector()), inputs()
    own = copy.deepcopy(model).fuse()
    before = snapshot(own)
    assert norms(own) == 1
    fused = bnfuse.fuse(own, x)
    assert not norms(fused)
    assert same(model, fused, x)
    assert_untouched(own, before)
    fused.model[0].conv.weight.data.zero_()  # the forward that was replaced is that of the copy
    assert same(model, own, x)
    assert not same(model, fused, x)
    with pytest.warns(bnfuse.NothingFusedWarning, match="holds no batch norm"):
        bnfuse.fuse(bnfuse.fuse(own, x), x)


# Copies, files, compilers ----------------------------------------------------------------------------------------------


def by_pickle(model: nn.Module) -> nn.Module:
    """It is loaded where bnfuse is not installed."""
    needed = set()

    class Loader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            needed.add(module.partition(".")[0])
            return super().find_class(module, name)

    made = Loader(io.BytesIO(pickle.dumps(model))).load()
    assert {"torch", "functools"} <= needed
    assert "bnfuse" not in needed
    return made


def by_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_average(model: nn.Module) -> nn.Module:
    return AveragedModel(model).module


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_file, by_average, bnfuse.fuse])
@pytest.mark.filterwarnings("ignore::bnfuse.NothingFusedWarning")
def test_copies_answer_for_themselves(copied: Any) -> None:
    x = inputs()
    for model in (net(ConvNorm(), nn.ReLU()), prepared(Detector())):
        fused = bnfuse.fuse(model, x)
        names = list(fused.state_dict())
        other = copied(fused, x) if copied is bnfuse.fuse else copied(fused)
        assert other is not fused
        assert list(other.state_dict()) == names
        if isinstance(model, Detector):
            assert other.fuse() is other
        else:
            assert other[0].fuse() is other[0]
        assert same(model, other, x)


def test_undoing_shows_the_steps_again() -> None:
    model, x = net(Branches(), nn.ReLU()), inputs()
    before = snapshot(model)
    plan = bnfuse.plan(model, x)
    undo = rewrite(plan, model)
    assert "switch_to_deploy" in vars(model[0])
    undo()
    assert_untouched(model, before)
    assert same(plan.apply(model), reparameterize_model(model), x)


def test_going_back_shows_them_too() -> None:
    model, x = net(ConvNorm(), nn.ReLU(), Branches(4)), inputs()
    once = bnfuse.fuse(model, x, keep="2.*")
    twice = bnfuse.fuse(once, x, options=bnfuse.Options(reversible=True))
    back = bnfuse.unfuse(twice)
    assert [name in vars(back[place]) for place, name in ((0, "fuse"), (2, "switch_to_deploy"))] == [True, False]
    assert same(model, reparameterize_model(back), x)
    whole = bnfuse.fuse(model, x, options=bnfuse.Options(reversible=True))
    back = bnfuse.unfuse(whole)
    assert [sorted(vars(module)) for module in back.modules()] == [sorted(vars(module)) for module in model.modules()]


def test_a_rebuilt_model_is_left_alone_too() -> None:
    model, x = net(ConvNorm(), nn.ReLU()), inputs()
    fused = bnfuse.fuse(model, x)
    fresh = bnfuse.restructure(net(ConvNorm(), nn.ReLU()), bnfuse.structure(fused))
    fresh.load_state_dict(fused.state_dict())
    assert same(model, reparameterize_model(fresh), x)


def test_compilers_take_the_fused_model() -> None:
    model, x = net(ConvNorm(), nn.ReLU(), ConvNorm(4)), inputs()
    fused = bnfuse.fuse(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated
        assert same(model, torch.jit.script(fused), x)
        assert same(model, torch.jit.trace(fused, x), x)
        assert same(model, torch.export.export(fused, (x,)).module(), x)
        assert same(model, optimization.fuse(fused), x)
    assert same(model, torch.compile(fused, backend="eager"), x)


# What is no such step ---------------------------------------------------------------------------------------------------


class Others(nn.Module):
    """Methods of the same names that are something else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.merge_kernel = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fuse(self.merge_kernel(self.norm(self.conv(x))))

    def fuse(self, x: Tensor | None = None, y: float = 1.0) -> Any:
        return x if x is None else x + y

    def fuse_model(self, prompt: Tensor | None = None) -> Any:
        return prompt

    def merge_bn(self, other: Any) -> Any:
        return other

    @property
    def fuse_bn(self) -> str:
        return "a setting"

    @staticmethod
    def fold_bn() -> str:
        return "a helper"


def test_other_methods_are_left_alone() -> None:
    model, x = prepared(Others()), inputs()
    fused = bnfuse.fuse(model, x)
    assert not norms(fused)
    assert vars(fused).keys() == vars(model).keys()
    assert same(model, fused, x)


# A model inside an object -----------------------------------------------------------------------------------------------


class Predictor(nn.Module):
    """A module that cannot be called as one: it has no forward (YOLO)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.loss = model, nn.CrossEntropyLoss(weight=torch.ones(5))
        self.settings, self.last, self.lasts = {"size": 8}, model[-1], [model[-1]]

    def __call__(self, image: Tensor) -> Tensor:
        return self.model(image).amax((2, 3))

    def train(self, epochs: int = 1) -> nn.Module:
        raise AssertionError("nobody asked for training")

    def __getattr__(self, name: str) -> Any:
        return self._modules["model"] if name == "model" else getattr(self.model, name)


@pytest.mark.parametrize("inplace", [False, True])
def test_the_model_inside_is_fused(inplace: bool) -> None:
    model, x = net(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), inputs()
    model[0].also, model[2].also = model[0].weight, model[0].weight  # shared
    around, before = Predictor(copy.deepcopy(model)), snapshot(model)
    inside = around.model
    assert bnfuse.plan(around, x).model == "Sequential"
    fused = bnfuse.fuse(around, x, inplace=inplace)
    assert type(fused) is Predictor
    assert (fused is around, fused.model is inside) == (inplace, inplace)
    assert not norms(fused)
    assert same(model, fused.model, x)
    assert torch.allclose(fused(x), model(x).amax((2, 3)))
    assert fused._modules["last"] is fused.lasts[0] is fused.model[-1]
    assert fused.settings == around.settings
    assert (fused.settings is around.settings) == inplace
    if not inplace:
        assert norms(around) == 1
        assert same(model, around.model, x)
        assert not norms(bnfuse.plan(around, x).apply(around))
    assert_untouched(model, before)


def test_a_choice_of_models_is_not_made() -> None:
    model, x = nn.ModuleDict({"student": net(ConvNorm()), "teacher": net(ConvNorm())}), inputs()
    with pytest.raises(bnfuse.InputError, match="forward"):
        bnfuse.fuse(model, x)


# timm -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "levit_128s"])
def test_timm_afterwards(name: str) -> None:
    options = {"img_size": 32} if name.startswith("levit") else {}
    model, x = prepared(timm.create_model(name, num_classes=5, **options)), inputs(32)
    fused = bnfuse.fuse(model, x, options=bnfuse.Options(infer_calls=False))
    deployed = reparameterize_model(fused)
    assert same(model, deployed, x)
    assert list(deployed.state_dict()) == list(fused.state_dict())
    assert norms(deployed) == norms(fused) < norms(model) / 10


def test_timm_first() -> None:
    model, x = prepared(timm.create_model("fastvit_t8", num_classes=5)), inputs(32)
    deployed = reparameterize_model(model)
    assert 0 < norms(deployed) < norms(model)
    fused = bnfuse.fuse(deployed, x, options=bnfuse.Options(infer_calls=False))
    assert not norms(fused)
    assert same(model, fused, x)
