"""The public verbs: what they accept, what they leave alone, what they raise."""

from __future__ import annotations

import gc
import json
import logging
import pickle
import random
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import assert_untouched, prepared, snapshot
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bnfuse
from bnfuse import rules
from bnfuse.changes import Replacement
from bnfuse.model.copying import copy_model
from bnfuse.transaction import rewrite
from bnfuse.units import Unit


class Block(nn.Module):
    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


NORMS = ["blocks.0.bn1", "blocks.0.bn2", "blocks.1.bn1", "blocks.1.bn2"]


@pytest.fixture
def model() -> nn.Module:
    return prepared(Model())


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 9, 9, dtype=torch.float64)


def norms_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]


def test_all_go_and_the_original_stays(model: nn.Module, x: Tensor) -> None:
    before, expected = snapshot(model), model(x)
    fused = bnfuse.fuse(model, x)
    assert_untouched(model, before)
    assert norms_of(fused) == []
    assert type(fused) is Model
    assert [name for name, _ in fused.named_modules()] == [name for name, _ in model.named_modules()]
    assert type(fused.get_submodule("blocks.0.bn1")) is nn.Identity
    torch.testing.assert_close(fused(x), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "dict", "none"])
def test_forms_of_inputs(model: nn.Module, x: Tensor, form: str) -> None:
    inputs = {"tensor": x, "tuple": (x,), "list": [x], "dict": {"x": x}, "none": None}[form]
    assert norms_of(bnfuse.fuse(model, inputs)) == []


def test_inplace_keeps_identities(model: nn.Module, x: Tensor) -> None:
    model.stem.weight.requires_grad_(False)
    model.to(memory_format=torch.channels_last)
    expected = model(x)
    parameters = {
        name: (id(p), p.requires_grad, p.stride()) for name, p in model.named_parameters() if "bn" not in name
    }
    assert bnfuse.fuse(model, x, inplace=True) is model
    after = {name: (id(p), p.requires_grad, p.stride()) for name, p in model.named_parameters()}
    assert all(after[name] == state for name, state in parameters.items())
    assert after.keys() - parameters.keys() == {f"blocks.{i}.conv{j}.bias" for i in (0, 1) for j in (1, 2)}
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)


def test_created_bias_is_trainable_as_its_weight_is(model: nn.Module, x: Tensor) -> None:
    model.blocks[0].conv1.weight.requires_grad_(False)
    fused = bnfuse.fuse(model, x)
    assert not fused.blocks[0].conv1.bias.requires_grad
    assert fused.blocks[0].conv2.bias.requires_grad
    fused(x).sum().backward()
    assert fused.blocks[0].conv2.bias.grad is not None


def test_training_mode(model: nn.Module, x: Tensor) -> None:
    expected = model(x)
    model.train()
    model.blocks[0].bn1.eval()
    before = snapshot(model)
    fused = bnfuse.fuse(model, x)
    assert_untouched(model, before)
    assert not fused.training
    torch.testing.assert_close(fused(x), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("keep", "left"), [("blocks.0.bn1", NORMS[:1]), ("blocks.1.*", NORMS[2:]), (["*"], NORMS), ((), [])]
)
def test_keep(model: nn.Module, x: Tensor, keep: Any, left: list[str]) -> None:
    assert norms_of(bnfuse.fuse(model, x, keep=keep)) == left
    plan = bnfuse.plan(model, x, keep=keep)
    assert [decision.norm for decision in plan.kept] == left
    assert all("asked to keep" in str(decision.reasons[0]) for decision in plan.kept)


def test_keep_with_a_typo(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(bnfuse.InputError, match=r"matches no batch norm.*blocks\.0\.bn1"):
        bnfuse.fuse(model, x, keep="block.0.bn1")


def test_no_norm() -> None:
    model = nn.Linear(2, 2)
    with pytest.warns(bnfuse.NothingFusedWarning, match="Linear holds no batch norm, so nothing was fused"):
        fused = bnfuse.fuse(model)
    assert fused is not model
    assert torch.equal(fused.weight, model.weight)
    plan = bnfuse.plan(model)
    assert str(plan) == "Linear: no batch norm"
    assert plan.to_dict()["norms"] == 0
    assert torch.equal(plan.apply(model).weight, model.weight)


@pytest.mark.parametrize("inplace", [False, True])
def test_fusing_twice_is_harmless(model: nn.Module, x: Tensor, inplace: bool) -> None:
    fused = bnfuse.fuse(model, x)
    before = fused.state_dict()
    with pytest.warns(bnfuse.NothingFusedWarning, match="Model holds no batch norm"):
        again = bnfuse.fuse(fused, x, inplace=inplace)
    assert (again is fused) == inplace
    assert again.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())


def test_not_a_module(model: nn.Module) -> None:
    with pytest.raises(bnfuse.InputError, match=r"must be a torch\.nn\.Module; got OrderedDict\. A state dict"):
        bnfuse.fuse(model.state_dict())


@pytest.mark.parametrize("inplace", [False, True])
def test_wrong_shape(model: nn.Module, inplace: bool) -> None:
    model.train()
    before = snapshot(model)
    with pytest.raises(bnfuse.InputError, match=r"Model does not run on the inputs \(2x4x9x9 float64\): RuntimeError"):
        bnfuse.fuse(model, torch.randn(2, 4, 9, 9, dtype=torch.float64), inplace=inplace)
    assert_untouched(model, before)


def test_no_inputs_can_be_inferred() -> None:
    class Odd(Model):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[-1] != 77:
                raise ValueError("77 or nothing")
            return super().forward(x)

    with pytest.raises(
        bnfuse.InputError,
        match=r"(?s)No inputs for Odd.*Tried:.*2x3x224x224.*77 or nothing.*example_inputs: bnfuse\.fuse\(",
    ) as caught:
        bnfuse.fuse(Odd())
    lines = str(caught.value).splitlines()
    assert sum("77 or nothing" in line for line in lines) == 1  # tries that failed alike are one entry
    assert " and " in "".join(lines[1:-1])
    assert max(map(len, lines[1:-1])) <= 80


def test_a_wrong_rule_is_caught(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verification can fail, and then nothing has changed."""
    correct = rules.ABSORBERS["conv2d"]

    def without_shift(node: Any, trial: Any) -> None:
        unit = trial.units.get(node.outputs[0])
        if unit is not None:
            trial.units[node.outputs[0]] = Unit(unit.scale, None, unit.inverse)
        correct(node, trial)

    monkeypatch.setitem(rules.ABSORBERS, "conv2d", without_shift)
    model.train()
    before = snapshot(model)
    for inplace in (False, True):
        with pytest.raises(bnfuse.VerificationError, match="does not compute what the original computes"):
            bnfuse.fuse(model, x, inplace=inplace)
        assert_untouched(model, before)
    assert norms_of(bnfuse.fuse(model, x, verify=False)) == []


def test_a_failed_rewrite_restores_everything(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    made = bnfuse.plan(model, x)
    before = snapshot(model)
    broken = replace(made, replacements=(*made.replacements, Replacement(("blocks.7.bn1",))))
    with pytest.raises(bnfuse.FusionError, match=r"holds no module blocks\.7"):
        broken.apply(model, inplace=True)
    assert_untouched(model, before)


def test_overflow_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)).half().eval()
    model[1].weight.data.fill_(6e4)
    model[1].running_var.fill_(0.001)
    plan = bnfuse.plan(model, torch.randn(1, 1, 2, 2).half())
    assert "would leave the range of torch.float16" in str(plan.kept[0].reasons[0])


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(number: float) -> None:
    model = prepared(nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)))
    model[1].running_mean[0] = number
    plan = bnfuse.plan(model)
    assert "not finite" in str(plan.kept[0].reasons[0])
    assert [decision.norm for decision in plan.fused] == ["3"]


def test_plan_is_data(model: nn.Module, x: Tensor) -> None:
    made = bnfuse.plan(model, x, keep="blocks.0.bn1")
    data = json.loads(json.dumps(made.to_dict()))
    assert (data["norms"], data["fused"], data["kept"]) == (4, 3, 1)
    assert data["decisions"][1] == {
        "norm": "blocks.0.bn2", "kind": "BatchNorm2d", "channels": 4, "fused": True,
        "direction": "backward", "into": ["blocks.0.conv2"], "reasons": [],
    }  # fmt: skip
    lines = made.table().splitlines()
    assert sum("blocks." in line for line in lines) == 4
    assert any("blocks.0.bn1" in line and "asked to keep" in line for line in lines)


def test_plan_apply(model: nn.Module, x: Tensor) -> None:
    before, expected = snapshot(model), model(x)
    made = bnfuse.plan(model, x)
    assert_untouched(model, before)
    fused = made.apply(model)
    assert_untouched(model, before)
    torch.testing.assert_close(fused(x), expected, rtol=1e-11, atol=1e-11)
    assert made.apply(model, inplace=True) is model
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)


def test_plan_of_another_state(model: nn.Module, x: Tensor) -> None:
    made = bnfuse.plan(model, x)
    model.blocks[0].bn1.running_mean.add_(1)
    with pytest.raises(bnfuse.FusionError, match=r"blocks\.0\.bn1\.running_mean has changed\.\nMake a new plan"):
        made.apply(model)
    with pytest.raises(bnfuse.FusionError, match=r"(?s)another model.*got:      Linear"):
        made.apply(nn.Linear(1, 1))


def test_log_has_one_line_for_each_norm(
    model: nn.Module, x: Tensor, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, "bnfuse"):
        bnfuse.fuse(model, x, keep="blocks.1.bn2")
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if line.startswith("blocks.0.bn1")] == [
        "blocks.0.bn1: fused backward into blocks.0.conv1"
    ]
    assert sum(line.startswith("blocks.") for line in lines) == 4
    assert capfd.readouterr() == ("", "")


def test_data_parallel(model: nn.Module, x: Tensor) -> None:
    wrapped = nn.DataParallel(model)
    fused = bnfuse.fuse(wrapped, x)
    assert type(fused) is nn.DataParallel
    assert fused is not wrapped
    assert norms_of(fused) == []
    assert bnfuse.fuse(wrapped, x, inplace=True) is wrapped
    assert norms_of(wrapped) == []


def test_compiled(model: nn.Module, x: Tensor) -> None:
    compiled = torch.compile(model, backend="eager")
    fused = bnfuse.fuse(compiled, x)
    assert type(fused) is type(compiled)
    assert norms_of(fused) == []
    assert len(norms_of(compiled)) == 4
    torch.testing.assert_close(fused(x), model(x), rtol=1e-11, atol=1e-11)


def test_distributed(model: nn.Module, x: Tensor, tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        fused = bnfuse.fuse(wrapped, x)
        assert type(fused) is type(wrapped)
        assert norms_of(fused) == []
    finally:
        torch.distributed.destroy_process_group()


def test_leaves_no_trace() -> None:
    """Caches, counters, buffers written in place and random states are as before."""

    class Busy(Model):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))
            self.cache: dict[int, Tensor] = {}
            self.seen: list[int] = []

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            self.cache.setdefault(x.shape[-1], self.head.weight.sum(1) * 2)
            self.seen.append(x.shape[0])
            self.last = x.mean()
            self.head.weight.data.clamp_(-5, 5)
            random.random()
            return super().forward(x + 0 * torch.rand(())) + self.cache[x.shape[-1]]

    model = prepared(Busy())
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    state, python_state, before = torch.get_rng_state(), random.getstate(), snapshot(model)
    made = bnfuse.plan(model, x)
    assert len(made.fused) == 4
    fused = bnfuse.fuse(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python_state
    assert_untouched(model, before)
    for kept in (model, fused):
        assert kept.cache == {}
        assert kept.seen == []
        assert not hasattr(kept, "last")
        assert float(kept.count) == 0
    bnfuse.fuse(model, x, inplace=True)
    model.train()
    model(x).sum().backward()  # no inference tensor was left behind


def test_inputs_are_not_written_to(model: nn.Module) -> None:
    model.stem.register_forward_pre_hook(lambda module, args: (args[0].mul_(2),))
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    copy = x.clone()
    bnfuse.fuse(model, x)
    assert torch.equal(x, copy)


def test_activation_takes_the_place_of_its_norm() -> None:
    model = prepared(
        nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4), nn.Conv2d(4, 4, 1), BatchNormAct2d(4, apply_act=False))
    )
    fused = bnfuse.fuse(model)
    assert type(fused[1]) is nn.ReLU
    assert type(fused[3]) is nn.Identity


def test_scripted_models_are_refused(model: nn.Module, x: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, x)
    with pytest.raises(bnfuse.InputError, match="fuse the original, then compile it"):
        bnfuse.fuse(traced, x)
    part = nn.Sequential(traced, nn.Linear(5, 5).double(), nn.BatchNorm1d(5).double()).eval()
    plan = bnfuse.plan(part, x)
    assert [decision.norm for decision in plan.fused] == ["2"]


def test_models_without_numbers_are_refused(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(bnfuse.InputError, match="meta device"):
        bnfuse.fuse(model.to("meta"), x)


def test_result_can_be_pickled_scripted_and_exported(model: nn.Module, x: Tensor) -> None:
    expected, fused = model(x), bnfuse.fuse(model, x)
    torch.testing.assert_close(pickle.loads(pickle.dumps(fused))(x), expected)
    torch.testing.assert_close(torch.export.export(fused, (x,)).module()(x), expected)


def test_fused_in_inference_mode_is_trainable(model: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        fused = bnfuse.fuse(model, x.clone())
    fused(x).sum().backward()
    assert fused.blocks[0].conv1.bias.grad is not None


def test_training_goes_on_after_work_in_place() -> None:
    """Without the norm the activation would overwrite what the other branch keeps for its gradient."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c0, self.c1, self.n = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.act, self.head = nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.c0(x)
            branch = self.c1(x)
            return self.head(branch + self.act(self.n(x)))

    model = prepared(Branches(), dead=0.0)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    plan = bnfuse.plan(model, x)
    assert plan.out_of_place == ("act",)
    fused = plan.apply(model)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-11, atol=1e-11)
    fused(x).sum().backward()


def test_a_mean_far_from_zero_is_not_folded_forward() -> None:
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 4)).eval()
    model[0].running_mean.fill_(1e5)
    plan = bnfuse.plan(model, 1e5 + torch.randn(4, 8))
    assert "100000 standard deviations" in "; ".join(map(str, plan.kept[0].reasons))
    assert bnfuse.plan(model.double(), 1e5 + torch.randn(4, 8).double()).fused


def test_assigned_data_is_put_back(model: nn.Module, x: Tensor) -> None:
    class Renormed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.01)
            return super().forward(x)

    net = prepared(nn.Sequential(model, Renormed(5, 5), nn.BatchNorm1d(5)))
    before = snapshot(net)
    bnfuse.plan(net, x)
    assert_untouched(net, before)


def test_a_tiny_gain_is_not_inverted() -> None:
    """Undone in one place and applied in another, a factor of 1e11 would cost most of the digits."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c1, self.c3, self.n = nn.Conv1d(6, 6, 1), nn.Conv1d(6, 2, 1), nn.BatchNorm1d(8)
            self.gain = nn.Parameter(torch.rand(1, 8, 1) + 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.c1(x)
            return self.n(torch.cat([y, self.c3(y)], 1) / self.gain)

    model = prepared(Net(), dead=0.0)
    model.n.weight.data[2] = 1e-11
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    with pytest.warns(bnfuse.NothingFusedWarning, match="undo a scale of"):
        fused = bnfuse.fuse(model, x, verify=False)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-11, atol=1e-11)


def test_lazy_layers_are_refused() -> None:
    with pytest.raises(bnfuse.InputError, match="not initialised yet"):
        bnfuse.fuse(nn.Sequential(nn.LazyConv2d(3, 1), nn.LazyBatchNorm2d()), torch.randn(1, 2, 3, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision(dtype: torch.dtype) -> None:
    """The parameters are the float64 result, rounded once."""
    model = prepared(Model())
    low = prepared(Model()).to(dtype)
    model.load_state_dict({name: tensor.double() for name, tensor in low.state_dict().items()})
    x = torch.randn(2, 3, 9, 9).to(dtype)
    fused, exact = bnfuse.fuse(low, x), bnfuse.fuse(model, x.double())
    assert norms_of(fused) == []
    for name, parameter in fused.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, exact.get_parameter(name).to(dtype)), name


class OwnCopy(nn.Sequential):
    """Copies itself by building itself anew."""

    def __deepcopy__(self, memo: dict[int, object]) -> nn.Module:
        new = OwnCopy(*(type(layer)(*size) for layer, size in zip(self, ((3, 4, 1), (4,)), strict=True)))
        new.load_state_dict(self.state_dict())
        return new.to(torch.float64).eval()


def test_a_copy_of_its_own_making() -> None:
    model = prepared(OwnCopy(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    fused = bnfuse.fuse(model, x, verify=False)
    assert type(fused[1]) is nn.Identity
    torch.testing.assert_close(fused(x), model(x), rtol=1e-11, atol=1e-11)


class Stateful(nn.Module):
    """Hands out a state that it makes for the occasion, and holds containers of numbers."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.number, self.indices, self.names, self.known = number, [number] * 1000, {"a", "b"}, {"n": number}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cache": {"number": [self.number, [self.number]]}}

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(self.conv(x))
        return normed + self.indices[0]


def test_every_module_is_copied_with_its_own_state() -> None:
    model = nn.Sequential(*(Stateful(number) for number in range(20))).eval()
    copied = copy_model(model)
    for number, (old, new) in enumerate(zip(model, copied, strict=True)):
        assert new.cache == {"number": [number, [number]]}
        for name in ("indices", "names", "known"):
            assert getattr(new, name) == getattr(old, name)
            assert getattr(new, name) is not getattr(old, name)


class Interrupting(TorchDispatchMode):
    """An interrupt, as by Ctrl-C, at the n-th operator."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.left = n

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("undoable", [True, False])
def test_an_interrupt_while_writing(model: nn.Module, x: Tensor, undoable: bool) -> None:
    """Every weight is written or none, wherever it comes."""
    made = bnfuse.plan(model, x)
    expected = model(x)
    for n in range(1, 10_000):
        copied = copy_model(model)
        before = snapshot(copied)
        try:
            with Interrupting(n):
                rewrite(made, copied, undoable=undoable)
        except KeyboardInterrupt:
            if norms_of(copied):
                assert_untouched(copied, before)
            else:
                assert not undoable
                torch.testing.assert_close(copied(x), expected, rtol=1e-11, atol=1e-11)
        else:
            break
    assert 20 < n < 9_999
    assert not norms_of(copied)


class Stream(nn.Module):
    """Norms that read one tensor, to which what is behind them is added."""

    def __init__(self, norms: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(norms))
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(norms))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = x + conv(norm(x))
        return self.head(x)


def test_norms_that_are_edited_before_they_go() -> None:
    model = prepared(Stream(4), dead=0.0)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for inplace in (False, True):
        expected = model(x)
        fused = bnfuse.fuse(model, x, inplace=inplace)
        assert norms_of(fused) == []
        torch.testing.assert_close(fused(x), expected, rtol=1e-11, atol=1e-11)
    plan = bnfuse.plan(prepared(Stream(4), dead=0.0), x)
    assert not any("norms" in name for edit in plan.edits for name in edit.names)


def test_what_was_recorded_is_freed_at_once() -> None:
    """The garbage collector has next to nothing to find."""
    layers = [layer for _ in range(30) for layer in (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())]
    model, x = prepared(nn.Sequential(*layers)), torch.randn(1, 4, 4, 4, dtype=torch.float64)
    bnfuse.fuse(model, x)
    gc.collect()
    gc.disable()
    try:
        bnfuse.fuse(model, x)
        assert gc.collect() < len(layers)
    finally:
        gc.enable()
