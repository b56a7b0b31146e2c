"""What the tests share: randomised norms, and one check that a fused model is right and its original untouched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import bnfuse
from bnfuse.model import pytree
from bnfuse.model.copying import copy_model
from bnfuse.model.inputs import normalise
from bnfuse.model.sandbox import run
from bnfuse.tools.zoo.randomise import randomise_
from bnfuse.verify.measure import compare_outputs

EXACT = 1e-9
"""Relative error allowed in float64."""


def prepared(model: nn.Module, seed: int = 0, dead: float = 0.02) -> nn.Module:
    """The model in float64 and evaluation mode, its norms far from the identity, a share of their channels dead."""
    torch.manual_seed(seed)
    randomise_(model.double(), seed, dead)
    return model.eval()


def fresh(structure: Any, batch: int = 0, seed: int = 1) -> Any:
    """Other inputs of the same form, with ``batch`` more samples."""
    generator = torch.Generator().manual_seed(seed)

    def other(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        shape = (tensor.shape[0] + batch, *tensor.shape[1:]) if tensor.dim() else tensor.shape
        return torch.randn(shape, generator=generator, dtype=tensor.dtype)

    return pytree.map_tensors(structure, other)


def snapshot(model: nn.Module) -> list[tuple[str, Any]]:
    """Everything about a model that fusing must leave alone."""
    state: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        state.append((name, (id(module), type(module), module.training, sorted(module.__dict__))))
        for kind in (module._parameters, module._buffers):
            for place, tensor in kind.items():
                content = None if tensor is None else (id(tensor), tensor.detach().clone(), tensor.requires_grad)
                state.append((f"{name}.{place}", content))
    return state


def assert_untouched(model: nn.Module, before: list[tuple[str, Any]]) -> None:
    after = snapshot(model)
    assert [name for name, _ in after] == [name for name, _ in before]
    for (name, old), (_, new) in zip(before, after, strict=True):
        if isinstance(old, tuple) and len(old) == 3 and isinstance(old[1], Tensor):
            assert (old[0], old[2]) == (new[0], new[2]), name
            assert torch.equal(old[1], new[1]) or old[1].isnan().any(), name
        else:
            assert old == new, name


def fused_and_checked(model: nn.Module, inputs: Any, batch: int = 1, **options: Any) -> tuple[bnfuse.Plan, nn.Module]:
    """Fuse; check the output in float64 on fresh inputs, the class, and that the original is as it was."""
    args, kwargs = normalise(inputs)
    before = snapshot(model)
    plan = bnfuse.plan(model, inputs, **options)
    assert_untouched(model, before)
    fused = bnfuse.fuse(model, inputs, **options)
    assert_untouched(model, before)
    assert type(fused) is type(model)
    assert not any(module.training for module in fused.modules())
    original = copy_model(model)
    for more in {0, batch}:
        new_args, new_kwargs = fresh((args, kwargs), more)
        comparison = compare_outputs(run(original, new_args, new_kwargs), run(fused, new_args, new_kwargs))
        assert comparison.outputs, "the model returns no tensors"
        for output in comparison.outputs:
            assert not output.problem, output
            assert output.relative_l2 <= EXACT, output
    return plan, fused


def reason(plan: bnfuse.Plan, norm: str) -> str:
    """Every reason why a norm stays, in one string."""
    decision = next(decision for decision in plan.decisions if decision.norm == norm)
    return "; ".join(map(str, decision.reasons))
