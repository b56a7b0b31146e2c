"""Code that takes gradients while the model runs: norms go inside of what is differentiated, and gradients stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rule_cases import Net
from support import prepared, reason
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bnfuse
from bnfuse.capture.run import capture
from bnfuse.model.sandbox import run, run_either_way
from bnfuse.rules import RULES
from bnfuse.verify.measure import compare_outputs
from bnfuse.verify.reference import Reference

WHY = "gradients are taken of it or by it, or it is one"


def gradient(of: Tensor, by: Tensor, **options: Any) -> Tensor:
    return torch.autograd.grad(of, by, **options)[0]


def network(function: Callable[..., Any], *more: str) -> nn.Module:
    layers: dict[str, nn.Module] = {"u": nn.Linear(4, 8), "n": nn.BatchNorm1d(8), "v": nn.Linear(8, 1)}
    others = {"w": nn.Linear(4, 8), "m": nn.BatchNorm1d(8)}
    return prepared(Net(function, **layers, **{name: others[name] for name in more}), dead=0.3)


def with_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a position by which it can take gradients, whether or not the caller tracks them."""

    def forward(m: nn.Module, x: Tensor) -> Any:
        with torch.enable_grad():
            return function(m, x.detach().requires_grad_())

    return forward


def energy(m: nn.Module, x: Tensor) -> Tensor:
    return m.v(torch.tanh(m.n(m.u(x)))).sum()  # type: ignore[no-any-return]


def checked(model: nn.Module, x: Tensor, inplace: bool = False) -> bnfuse.Plan:
    plan, expected = bnfuse.plan(model, x), model(x.clone())
    comparison = compare_outputs(expected, bnfuse.fuse(model, x, inplace=inplace)(x.clone()))
    assert comparison.outputs
    assert all(not output.problem and output.relative_l2 <= 1e-12 for output in comparison.outputs)
    return plan


def x() -> Tensor:
    return torch.randn(5, 4, dtype=torch.float64)


def force(m: nn.Module, x: Tensor) -> Any:
    e = energy(m, x)
    return e, -gradient(e, x, create_graph=m.training)


def backward(m: nn.Module, x: Tensor) -> Any:
    energy(m, x).backward()
    return x.grad


def laplacian(m: nn.Module, x: Tensor) -> Any:
    slope = gradient(energy(m, x), x, create_graph=True)
    return sum(gradient(slope[:, i].sum(), x, retain_graph=True)[:, i] for i in range(4))


def steps(m: nn.Module, x: Tensor) -> Any:
    for _ in range(3):
        x = (x - 0.1 * gradient(energy(m, x), x)).detach().requires_grad_()
    return x


def again(m: nn.Module, x: Tensor) -> Any:
    slope = gradient(energy(m, x), x, create_graph=True)
    value = torch.tanh(m.m(m.w(slope))).sum()
    return value, gradient(value, x)


def written(m: nn.Module, x: Tensor) -> Any:
    y = m.n(m.u(x))
    y.mul_(2)
    y[:, 0].add_(1)
    e = m.v(y).sin().sum()
    return e, gradient(e, x)


def recomputed(m: nn.Module, x: Tensor) -> Any:
    e = m.v(checkpoint(lambda x: m.n(m.u(x)), x, use_reentrant=False)).sin().sum()
    e.backward()
    return x.grad


def of_what_a_norm_made(m: nn.Module, x: Tensor) -> Any:
    y = m.n(m.u(x))
    return y * gradient(m.v(y.sigmoid()).sin().sum(), y)


GO: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "a force": (with_gradients(force), ()),
    "backward": (with_gradients(backward), ()),
    "a second derivative": (with_gradients(laplacian), ()),
    "several steps": (with_gradients(steps), ()),
    "a network of a gradient": (with_gradients(again), ("w", "m")),
    "work in place": (with_gradients(written), ()),
    "recomputed": (with_gradients(recomputed), ()),
    "of what a norm made": (with_gradients(of_what_a_norm_made), ()),
    "of an input": (lambda m, x: force(m, x.requires_grad_()), ()),
    "a Jacobian": (lambda m, x: torch.autograd.functional.jacobian(lambda x: m.v(m.n(m.u(x)).sin()).sum(1), x), ()),
    "a Hessian": (lambda m, x: torch.autograd.functional.hessian(lambda x: energy(m, x), x), ()),
    "a version": (lambda m, x: (m.v(m.n(y := m.u(x))), y._version)[0], ()),
    "a transform beside a norm": (
        lambda m, x: (m.v(m.n(m.u(x))), torch.func.grad(lambda x: m.w(x).sin().sum())(x)),
        ("w",),
    ),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("function", "more"), GO.values(), ids=GO)
def test_norms_go_inside_of_what_is_differentiated(
    function: Callable[..., Any], more: tuple[str, ...], inplace: bool
) -> None:
    plan = checked(network(function, *more), x(), inplace)
    assert not plan.kept


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:  # type: ignore[override]
        return slope.clamp(-0.01, 0.01)


def own_gradient(m: nn.Module, x: Tensor) -> Any:
    return gradient(m.v(torch.tanh(m.n(Clipped.apply(m.u(x))))).sum(), x)  # type: ignore[no-untyped-call]


def hooked(m: nn.Module, x: Tensor) -> Any:
    y = m.u(x)
    y.register_hook(lambda slope: slope.clamp(-0.01, 0.01))
    return gradient(m.v(torch.tanh(m.n(y))).sum(), x)


def seen(m: nn.Module, x: Tensor) -> Any:
    y = m.u(x)
    y.retain_grad()
    m.v(torch.tanh(m.n(y))).sum().backward()
    return y.grad


def by_a_weight(m: nn.Module, x: Tensor) -> Any:
    return x @ gradient(energy(m, x), m.u.weight).t()


def in_a_weight(m: nn.Module, x: Tensor) -> Any:
    energy(m, x).backward()
    return x @ m.u.weight.grad.t()


def of_what_a_norm_reads(m: nn.Module, x: Tensor) -> Any:
    y = m.u(x)
    return y * gradient(m.v(torch.tanh(m.n(y))).sum(), y)


def recomputed_by_its_own_function(m: nn.Module, x: Tensor) -> Any:
    m.v(torch.tanh(checkpoint(lambda x: m.n(m.u(x)), x, use_reentrant=True))).sum().backward()
    return x.grad


STAY = {
    "a function with its own gradient": own_gradient,
    "a hook that changes a gradient": hooked,
    "a gradient that is kept": seen,
    "by a weight": by_a_weight,
    "in a weight": in_a_weight,
    "of what a norm reads": of_what_a_norm_reads,
    "recomputed by a function with its own gradient": recomputed_by_its_own_function,
}


@pytest.mark.parametrize("function", STAY.values(), ids=STAY)
def test_a_gradient_that_is_seen_keeps_its_units(function: Callable[..., Any]) -> None:
    assert WHY in reason(checked(network(with_gradients(function)), x()), "n")


def test_operators_are_recorded_whole_and_those_of_a_gradient_are_not() -> None:
    record = capture(network(with_gradients(force)), (x(),), {}, known=RULES)
    assert record.gradients
    names = [node.operator for node in record.graph.nodes]
    assert names == ["detach", "linear", "batch_norm", "tanh", "linear", "sum", "neg"]
    assert not any(tensor.requires_grad for tensor in record.output)


def test_a_run_with_gradients_leaves_no_trace() -> None:
    def forward(m: nn.Module, x: Tensor) -> Any:
        m.u.bias.requires_grad_(False)
        energy(m, x.requires_grad_()).backward()
        return x.grad

    model, given = network(forward), x()
    kept = model.u.weight.grad = torch.ones_like(model.u.weight)
    output, gradients = run_either_way(model, (given,), {})
    assert gradients
    assert model.u.weight.grad is kept
    assert bool((kept == 1).all())
    assert model.v.weight.grad is None
    assert model.u.bias.requires_grad
    assert not given.requires_grad
    assert torch.equal(output, run(model, (given,), {}, gradients=True))
    with pytest.raises(RuntimeError, match="does not require grad"):
        run(model, (given,), {}, gradients=False)
    with torch.inference_mode():
        assert torch.equal(output, run(model, (given.clone(),), {}))


def test_the_first_error_is_the_one_that_is_told() -> None:
    model = network(lambda m, x: m.n(m.u(x[:, :3])))
    for call in (lambda: run(model, (x(),), {}), lambda: bnfuse.fuse(model, x())):
        with pytest.raises((RuntimeError, bnfuse.BnFuseError), match="shapes cannot be multiplied"):
            call()


def test_a_reference_finds_out_whether_gradients_are_tracked() -> None:
    model, given = network(lambda m, x: force(m, x.requires_grad_())), x()
    reference = Reference(model, (given,), {})
    energies = [reference.run(model)[0], reference.exact[0][0], reference.output[0]]
    assert reference.gradients
    assert torch.equal(energies[0], energies[2])
    assert torch.equal(energies[1], energies[2])


def test_a_force_in_float32() -> None:
    model, given = network(with_gradients(force)).float(), x().float()
    plan, fused = bnfuse.plan(model, given), bnfuse.fuse(model, given)
    assert plan.fused
    torch.testing.assert_close(fused(given), model(given), rtol=1e-4, atol=1e-4)
