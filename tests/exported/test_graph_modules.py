"""Graph modules: of ``torch.fx``, whose norms are modules or functions, and of ``torch.export``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import EXACT, assert_untouched, fresh, prepared, snapshot
from torch import Tensor, fx, nn
from torch.nn import functional

import bnfuse
from bnfuse.api import fuse_with_plan
from bnfuse.errors import InputError, VerificationError
from bnfuse.exported import lifting
from bnfuse.model.copying import copy_model
from bnfuse.model.sandbox import run
from bnfuse.verify.measure import compare_outputs

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Functions(nn.Module):
    """Norms and layers that are modules, and others that are functions; two functions share one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.other, self.own = nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.kernel = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.gain = nn.Parameter(torch.randn(4))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("variance", torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.own(self.other(self.scaled(self.conv(x)).relu()))
        return self.scaled(functional.conv2d(x.relu(), self.kernel))

    def scaled(self, x: Tensor) -> Tensor:
        return functional.batch_norm(x, self.mean, self.variance, weight=self.gain, training=self.training, eps=1e-2)


def traced(model: nn.Module) -> fx.GraphModule:
    return fx.symbolic_trace(model)


def exported(model: nn.Module) -> fx.GraphModule:
    return torch.export.export(model, (X,)).module()


def assert_equal(before: nn.Module, after: nn.Module, x: Tensor) -> None:
    (output,) = compare_outputs(run(before, (x,), {}), run(after, (x,), {})).outputs
    assert not output.problem, output
    assert output.relative_l2 <= EXACT, output


def test_norms_that_are_functions_are_taken_out() -> None:
    model = prepared(Functions())
    graph = traced(model)
    before, code = snapshot(graph), graph.code
    fused, plan = fuse_with_plan(graph, X)
    assert_untouched(graph, before)
    assert graph.code == code
    assert [(d.norm, d.into) for d in plan.fused] == [
        ("own", ("other",)),
        ("batch_norm", ("conv", "kernel", "conv2d_bias")),
    ]
    assert "batch_norm" not in fused.code
    assert {name for name, _ in fused.named_parameters()} == {
        "conv.weight", "conv.bias", "other.weight", "other.bias", "kernel", "conv2d_bias",
    }  # fmt: skip
    assert not list(fused.buffers())
    assert type(fused).__name__ == type(graph).__name__ == "Functions"
    (other,) = fresh((X,), batch=2)
    assert_equal(graph, fused, other)


def test_inputs_are_inferred() -> None:
    image = prepared(Functions())
    fused, plan = fuse_with_plan(traced(image))
    assert len(plan.fused) == 2
    assert_equal(image, fused, X)
    fused, plan = fuse_with_plan(exported(image))
    assert len(plan.fused) == 2
    assert_equal(image, fused, X)


@pytest.mark.parametrize("make", [traced, exported])
def test_in_place_parameters_keep_their_identity(make: Any) -> None:
    graph = make(prepared(Functions()))
    original = copy_model(graph)
    held = dict(graph.named_parameters())
    assert bnfuse.fuse(graph, X, inplace=True) is graph
    after = dict(graph.named_parameters())
    assert held.keys() - after.keys() == {"gain", "own.weight", "own.bias"} - ({"own.weight", "own.bias"} - held.keys())
    assert all(after[name] is held[name] for name in held.keys() & after.keys())
    assert "batch_norm" not in graph.code
    assert_equal(original, graph, X)


def test_a_plan_is_carried_out_in_place() -> None:
    graph = exported(prepared(Functions()))
    original = copy_model(graph)
    plan = bnfuse.plan(graph)
    assert plan.apply(graph, inplace=True) is graph
    assert "batch_norm" not in graph.code
    assert_equal(original, graph, X)


def test_a_mistake_in_place_is_found_and_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = traced(prepared(Functions()))
    before, code = snapshot(graph), graph.code
    right = lifting.BatchNorm.__init__
    monkeypatch.setattr(lifting.BatchNorm, "__init__", lambda self, eps, momentum: right(self, 0.5, momentum))
    with pytest.raises(VerificationError):
        bnfuse.fuse(graph, X, inplace=True)
    assert_untouched(graph, before)
    assert graph.code == code


def test_a_norm_that_stays_is_as_it_was() -> None:
    graph = exported(prepared(Functions()))
    fused, plan = fuse_with_plan(graph, keep="own")
    assert [d.norm for d in plan.kept] == ["own"]
    assert fused.code.count("batch_norm.default(") == 1
    for name in ("weight", "bias", "running_mean", "running_var"):
        new, old = getattr(fused.own, name), getattr(graph.own, name)
        assert new is not old
        assert torch.equal(new, old)
    assert type(fused.own) is nn.Module


def test_what_hangs_on_the_graph_stays() -> None:
    graph = exported(prepared(Functions()))
    seen: list[str] = []
    graph.register_forward_pre_hook(lambda module, args: seen.append("hook"))
    graph.note = {"text": "of the caller"}
    graph.meta["more"] = 1
    fused = bnfuse.fuse(graph, verify=False)
    seen.clear()
    fused(X)
    assert seen == ["hook"]
    assert fused.note == graph.note
    assert fused.note is not graph.note
    assert fused.meta["more"] == 1
    with pytest.raises(NotImplementedError, match="train"):  # as PyTorch has it for what it exports
        fused.train()
    with pytest.raises(ValueError, match="input"):
        fused(X, X)
    with pytest.raises(AssertionError, match="Guard failed"):
        fused(X[:, :, 1:])


def test_a_graph_traced_in_training_mode_is_refused() -> None:
    with pytest.raises(InputError, match=r"(?s)Functions was made in training mode: batch_norm.*model\.eval\(\) first"):
        bnfuse.fuse(traced(Functions().train()), X)


def test_statistics_that_are_computed_keep_their_norm() -> None:
    class Computed(Functions):
        def scaled(self, x: Tensor) -> Tensor:
            return functional.batch_norm(x, self.mean + 1, self.variance, self.gain)

    graph = exported(prepared(Computed()))
    fused, plan = fuse_with_plan(graph, X)
    assert [d.norm for d in plan.fused] == ["own"]
    assert [d.reasons[0].code for d in plan.kept] == ["is-function-call"] * 2
    assert fused.code.count("batch_norm.default(") == 2
    assert_equal(graph, fused, X)


def test_a_copy_of_a_graph_is_complete() -> None:
    """``copy.deepcopy`` loses hooks and attributes, and makes buffers of constants."""
    model = prepared(Functions())
    model.constant = torch.ones(1, dtype=torch.float64)
    model.forward = lambda x: Functions.forward(model, x) * model.constant  # type: ignore[method-assign]
    graph = exported(model)
    graph.register_forward_hook(lambda module, args, output: output + 1)
    copied = copy_model(graph)
    assert isinstance(copied, fx.GraphModule)
    assert copied.state_dict().keys() == graph.state_dict().keys()
    assert "constant" not in copied.state_dict()
    assert copied.constant is not graph.constant
    assert copied.graph is not graph.graph
    assert copied.graph.owning_module is copied
    assert torch.equal(copied(X), graph(X))
    assert type(copied).__name__ == type(graph).__name__
    with torch.no_grad():
        copied.kernel.zero_()
    assert bool(graph.kernel.any())
