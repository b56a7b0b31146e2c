"""Sparse, nested, complex and quantised tensors: as inputs, as buffers, on the way and as outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rule_cases import Net
from support import prepared, reason
from torch import Tensor, nn

import bnfuse
from bnfuse.model.copying import copy_model
from bnfuse.verify.measure import compare_outputs

pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse CSR tensor support",
    "ignore:The PyTorch API of nested tensors",
    "ignore:Sparse BSR",
    "ignore:.*beta",
    "ignore:torch.quantize",
    "ignore:Sparse invariant",
)

EDGES = torch.tensor(
    [[0, 1, 0, 1, 0], [1, 0, 1, 0, 0], [0, 1, 0, 0, 1], [1, 0, 0, 0, 0], [0, 0, 1, 0, 2]], dtype=torch.float64
)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "coo": Tensor.to_sparse,
    "csr": Tensor.to_sparse_csr,
    "csc": Tensor.to_sparse_csc,
}


def nodes() -> Tensor:
    return torch.randn(5, 4, dtype=torch.float64)


def network(function: Callable[..., Any], **held: Any) -> nn.Module:
    """``u`` takes four features to six, ``v`` takes six to three."""
    layers = {"u": nn.Linear(4, 6, bias=False), "v": nn.Linear(6, 3), "n": nn.BatchNorm1d(6)}
    model = Net(function, **layers)
    model.b = nn.Parameter(torch.randn(6))
    for name, value in held.items():
        if isinstance(value, nn.Parameter):
            model.register_parameter(name, value)
        elif isinstance(value, Tensor):
            model.register_buffer(name, value)
        else:
            setattr(model, name, value)
    return prepared(model, dead=0.3)


def checked(model: nn.Module, *inputs: Tensor) -> bnfuse.Plan:
    """Fuse; the outputs agree outside of inference mode, too."""
    before = model(*inputs)
    plan, fused = bnfuse.plan(model, inputs), bnfuse.fuse(model, inputs)
    comparison = compare_outputs(before, fused(*inputs))
    assert comparison.outputs
    assert all(not output.problem and output.relative_l2 <= 1e-12 for output in comparison.outputs)
    return plan


@pytest.mark.parametrize("product", [torch.sparse.mm, torch.matmul])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_messages_along_edges(layout: Callable[[Tensor], Tensor], product: Callable[..., Tensor]) -> None:
    edges = layout(EDGES)
    by_input = network(lambda m, x, edges: m.v(m.n(product(edges, m.u(x)) + m.b).relu()))
    assert checked(by_input, nodes(), edges).fused[0].into == ("u", "b")
    by_buffer = network(lambda m, x: m.v(m.n(product(m.edges, m.u(x)) + m.b).relu()), edges=edges)
    assert checked(by_buffer, nodes()).fused[0].into == ("u", "b")
    by_attribute = network(lambda m, x: m.v(m.n(product(m.held[0], m.u(x)) + m.b).relu()), held=[edges])
    assert checked(by_attribute, nodes()).fused[0].into == ("u", "b")


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_no_shift_passes_a_sum_over_edges(layout: Callable[[Tensor], Tensor]) -> None:
    biased = network(lambda m, x, edges: m.n(torch.sparse.mm(edges, m.u(x) + m.b)))
    assert "no shift passes" in reason(checked(biased, nodes(), layout(EDGES)), "n")


KINDS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "made on the way": (lambda m, x: m.n(EDGES.to_sparse() @ m.u(x) + m.b), dict),
    "made by indices": (
        lambda m, x: m.n(
            torch.sparse_coo_tensor(torch.tensor([[0, 1, 2], [1, 2, 0]]), torch.ones(3, dtype=x.dtype), (5, 5)) @ m.u(x)
            + m.b
        ),
        dict,
    ),
    "transposed": (lambda m, x: m.n(EDGES.to_sparse().t() @ m.u(x) + m.b), dict),
    "a parameter": (
        lambda m, x: m.n(torch.sparse.mm(m.w, m.u(x)) + m.b),
        lambda: {"w": nn.Parameter(EDGES.to_sparse())},
    ),
    "with a term": (lambda m, x: m.n(torch.sparse.addmm(m.b.expand(5, 6), EDGES.to_sparse(), m.u(x))), dict),
    "with weights": (
        lambda m, x: m.n(torch.sparse.addmm(m.b.expand(5, 6), EDGES.to_sparse(), m.u(x), beta=0.5, alpha=2)),
        dict,
    ),
    "an output": (lambda m, x: m.n(m.u(x) + m.b).relu().to_sparse(), dict),
    "an output in rows": (lambda m, x: m.n(m.u(x) + m.b).relu().to_sparse_csr(), dict),
    "stored": (lambda m, x: (setattr(m, "kept", EDGES.to_sparse_csr()), m.n(m.kept @ m.u(x) + m.b))[1], dict),
    "sizes are read": (lambda m, x: m.n(EDGES.to_sparse() @ m.u(x) + m.b) / x.shape[-1], dict),
    "blocks": (
        lambda m, x: m.n(m.blocks @ m.u(x[:4]) + m.b),
        lambda: {"blocks": torch.eye(4).double().to_sparse_bsr((2, 2))},
    ),
    "nested": (
        lambda m, x: torch.nested.as_nested_tensor([*m.n(m.u(x) + m.b).split([3, 2])]).to_padded_tensor(0.0),
        dict,
    ),
    "nested output": (lambda m, x: m.v(torch.nested.as_nested_tensor([*m.n(m.u(x) + m.b).split([3, 2])])), dict),
    "nested, held": (
        lambda m, x: m.n(m.u(torch.cat(m.parts[0].unbind()) + x) + m.b),
        lambda: {"parts": [torch.nested.nested_tensor([torch.ones(3, 4), torch.ones(2, 4)], dtype=torch.float64)]},
    ),
    "jagged": (
        lambda m, x: torch.nested.as_nested_tensor(
            [*m.n(m.u(x) + m.b).split([3, 2])], layout=torch.jagged
        ).to_padded_tensor(0.0),
        dict,
    ),
    "complex": (lambda m, x: torch.fft.ifft(torch.fft.fft(m.n(m.u(x) + m.b)) * (1 + 2j)).real, dict),
    "complex weight": (
        lambda m, x: (m.n(m.u(x) + m.b).to(torch.complex128) @ m.w).abs(),
        lambda: {"w": nn.Parameter(torch.randn(6, 2, dtype=torch.complex128))},
    ),
    "quantised": (
        lambda m, x: torch.quantize_per_tensor(m.n(m.u(x) + m.b).float(), 1e-3, 0, torch.qint32).dequantize(),
        dict,
    ),
    "quantised weight": (
        lambda m, x: m.n(m.u(x) + m.b) @ m.w.dequantize().double(),
        lambda: {"w": torch.quantize_per_tensor(torch.randn(6, 2), 0.01, 0, torch.qint8)},
    ),
}


@pytest.mark.parametrize(("function", "held"), KINDS.values(), ids=KINDS)
def test_a_norm_goes_beside_tensors_of_other_kinds(
    function: Callable[..., Any], held: Callable[[], dict[str, Any]]
) -> None:
    assert checked(network(function, **held()), nodes()).fused


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_inputs(layout: torch.layout) -> None:
    parts = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)], dtype=torch.float64, layout=layout)
    separate = network(lambda m, x: m.n(torch.cat([m.u(part) for part in x.unbind()]) + m.b) / x.size(0))
    assert checked(separate, parts).fused
    through = network(lambda m, x: m.n(m.u(x).to_padded_tensor(0.0).flatten(0, 1) + m.b))
    assert not checked(through, parts).fused


def test_copies_of_tensors_that_are_not_dense() -> None:
    model = network(lambda m, x: x, w=nn.Parameter(EDGES.to_sparse(), requires_grad=False), c=EDGES.to_sparse_csr())
    copied = copy_model(model)
    assert type(copied.w) is nn.Parameter
    assert not copied.w.requires_grad
    assert copied.w is not model.w
    assert torch.equal(copied.w.to_dense(), EDGES)
    assert torch.equal(copied.c.to_dense(), EDGES)
    copied.c.values().zero_()
    assert torch.equal(model.c.to_dense(), EDGES)
