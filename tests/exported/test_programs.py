"""Exported programs, before and after decomposition: as many norms go as from the model itself, and the rest stays."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support import EXACT, prepared
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.nn import functional

import bnfuse
from bnfuse.api import fuse_with_plan
from bnfuse.errors import FusionError, InputError, NothingFusedWarning, VerificationError
from bnfuse.exported import lifting
from bnfuse.model.sandbox import run
from bnfuse.tools.zoo.randomise import calibrate_
from bnfuse.verify.measure import compare_outputs

models = pytest.importorskip("torchvision.models")

IMAGES = (2, 3, 8, 8)


class Net(nn.Module):
    """Layers under names, and what is done with them."""

    def __init__(self, work: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.work = work
        for name, part in parts.items():
            if type(part) is Tensor:
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Any) -> Any:
        return self.work(self, x)


def conv(inputs: int = 3, outputs: int = 4, size: int = 3, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, bias=False, **settings)


def norm(channels: int = 4, **settings: Any) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, **settings)


def counting(m: Any, x: Tensor) -> Tensor:
    m.count.add_(1)
    return m.n(m.c(x)) * m.count


def tied() -> nn.Module:
    model = Net(lambda m, x: m.n(m.c(x)) + m.n(m.d(x)), c=conv(), d=conv(), n=norm())
    model.d.weight = model.c.weight
    return model


class Frozen(nn.Module):
    """A norm that is written as arithmetic."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.q(x) @ x.transpose(1, 2), -1) @ self.v(x)


@dataclass(frozen=True)
class Case:
    """A network, the shape of its input, how many norms go and how many nodes of others stay.

    The graph is also decomposed, unless its operators are those of other cases.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = IMAGES
    fused: int = 1
    left: int = 0
    decomposed: bool = True


CASES = {
    "one norm": Case(lambda: Net(lambda m, x: m.n(m.c(x)), c=conv(), n=norm())),
    "a convolution twice, two norms": Case(
        lambda: Net(lambda m, x: (m.n(m.c(x)), m.o(m.c(x))), c=conv(), n=norm(), o=norm()), left=1, decomposed=False
    ),
    "a norm twice": Case(
        lambda: Net(lambda m, x: m.n(m.c(x)) + m.n(m.d(x)), c=conv(), d=conv(), n=norm()), decomposed=False
    ),
    "both twice": Case(
        lambda: Net(lambda m, x: m.n(m.c(m.n(m.c(x)).relu())), c=conv(4, 4, 1), n=norm()),
        (2, 4, 8, 8),
        decomposed=False,
    ),
    "a weight tied": Case(tied, decomposed=False),
    "also returned": Case(
        lambda: Net(lambda m, x: (lambda y: (m.n(y), y))(m.c(x)), c=conv(), n=norm()), fused=0, left=1, decomposed=False
    ),
    "statistics returned": Case(
        lambda: Net(lambda m, x: (m.n(m.c(x)), m.n.running_mean + 1), c=conv(), n=norm()),
        fused=0,
        left=1,
        decomposed=False,
    ),
    "a buffer that is written to": Case(lambda: Net(counting, c=conv(), n=norm(), count=torch.ones(1))),
    "transposed": Case(
        lambda: Net(
            lambda m, x: m.o(m.d(m.n(m.c(x)).relu())),
            c=nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False),
            n=norm(6),
            d=nn.ConvTranspose2d(6, 4, 2, stride=2, bias=False),
            o=norm(),
        ),
        (2, 4, 5, 5),
        fused=2,
    ),
    "linear over tokens": Case(
        lambda: Net(lambda m, x: m.n(m.l(x).transpose(1, 2)), l=nn.Linear(5, 6, bias=False), n=nn.BatchNorm1d(6)),
        (2, 7, 5),
    ),
    "forward into linear": Case(
        lambda: Net(
            lambda m, x: m.k(m.n(torch.sigmoid(m.l(x)))),
            l=nn.Linear(5, 6, bias=False),
            n=nn.BatchNorm1d(6),
            k=nn.Linear(6, 3, bias=False),
        ),
        (2, 5),
    ),
    "without affine": Case(
        lambda: Net(
            lambda m, x: m.o(functional.silu(m.n(m.c(x)))), c=conv(), n=norm(affine=False), o=norm(affine=False)
        ),
        left=1,
        decomposed=False,
    ),
    "a norm takes another up": Case(
        lambda: Net(lambda m, x: m.n(functional.avg_pool2d(m.o(x), 2)), n=norm(3), o=norm(3, affine=False)),
        left=1,
        decomposed=False,
    ),
    "a norm gets a weight, for two calls": Case(
        lambda: Net(
            lambda m, x: m.n(functional.avg_pool2d(m.o(x), 2)) + m.n(functional.avg_pool2d(m.o(x), 2)),
            n=norm(3, affine=False),
            o=norm(3),
        ),
        left=2,
        decomposed=False,
    ),
    "a weight that is computed": Case(
        lambda: Net(lambda m, x: m.n(m.c(x)), c=nn.utils.parametrizations.weight_norm(conv()), n=norm())
    ),
    "one axis, padded": Case(
        lambda: Net(lambda m, x: m.n(m.c(x)), c=nn.Conv1d(3, 4, 3, padding="same", bias=False), n=nn.BatchNorm1d(4)),
        (2, 3, 9),
    ),
    "attention": Case(
        lambda: Net(
            lambda m, x: m.n(m.t(m.e(x)).transpose(1, 2)), e=nn.Linear(8, 8), t=Attention(), n=nn.BatchNorm1d(8)
        ),
        (2, 5, 8),
    ),
    "other norms": Case(
        lambda: Net(
            lambda m, x: m.n(functional.adaptive_avg_pool2d(m.g(m.c(x)), 3)), c=conv(), g=nn.GroupNorm(2, 4), n=norm()
        )
    ),
    "written as arithmetic": Case(
        lambda: Net(lambda m, x: m.n(m.c(x)) + m.o(m.d(x).sigmoid()), c=conv(), d=conv(), n=Frozen(), o=Frozen())
    ),
    "written as arithmetic, twice": Case(
        lambda: Net(lambda m, x: m.n(m.c(x)) + m.n(m.d(x)), c=conv(), d=conv(), n=Frozen()), decomposed=False
    ),
    "an instance norm with statistics": Case(
        lambda: Net(lambda m, x: m.n(m.c(x)), c=conv(), n=nn.InstanceNorm2d(4, affine=True, track_running_stats=True))
    ),
    "an activation in place, of what others read": Case(
        lambda: Net(
            lambda m, x: (lambda y: (m.r(m.n(y)), m.d(y)))(m.c(x)),
            c=conv(),
            n=norm(),
            r=nn.LeakyReLU(0.1, inplace=True),
            d=conv(4, 4, 1),
        ),
        decomposed=False,
    ),
    "statistics of the batch": Case(
        lambda: Net(lambda m, x: m.n(m.c(x)), c=conv(), n=norm(track_running_stats=False)), fused=0, left=1
    ),
}


def batch(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def runnable(program: Any) -> nn.Module:
    return program.module() if isinstance(program, ExportedProgram) else program


def error(before: nn.Module, after: nn.Module, x: Tensor) -> float:
    """The largest relative error of what one model gives compared with another."""
    comparison = compare_outputs(run(before, (x,), {}), run(after, (x,), {}))
    assert comparison.outputs, "no tensors"
    assert not any(output.problem for output in comparison.outputs)
    return max(output.relative_l2 for output in comparison.outputs)


def norms_in(graph: fx.Graph) -> int:
    return sum("batch_norm" in str(node.target) for node in graph.nodes if node.op == "call_function")


@pytest.mark.filterwarnings("ignore::bnfuse.NothingFusedWarning")
@pytest.mark.parametrize("name", CASES)
def test_as_many_norms_go_as_from_the_model(name: str) -> None:
    case = CASES[name]
    program = export(prepared(case.make(), dead=0.0), (batch(case.shape),))
    for given in (program, *([program.run_decompositions().module()] if case.decomposed else [])):
        text = str(given.graph)
        result, plan = fuse_with_plan(given)
        assert (len(plan.fused), norms_in(result.graph)) == (case.fused, case.left), plan
        assert error(runnable(given), runnable(result), batch(case.shape, 1)) < EXACT
        assert str(given.graph) == text
        assert type(result).__name__ == type(given).__name__


NETWORKS: dict[str, tuple[Callable[[], nn.Module], bool, bool]] = {
    "resnet18": (models.resnet18, True, False),
    "mobilenet_v2": (
        lambda: models.MobileNetV2(inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2]]),
        True,
        True,
    ),
    "efficientnet_b0": (
        lambda: models.EfficientNet(
            [models.efficientnet.MBConvConfig(*row, 1.0, 1.0) for row in ((1, 3, 1, 32, 16, 1), (6, 5, 2, 16, 24, 2))],
            0.2,
            last_channel=64,
        ),
        True,
        False,
    ),
    "densenet121": (lambda: models.DenseNet(8, (2, 3, 2), 16), False, True),
}
"""Networks of torchvision, cut down where exporting takes long; whether all norms go, and whether it is decomposed."""


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_torchvision(name: str) -> None:
    make, all_go, decomposed = NETWORKS[name]
    torch.manual_seed(0)
    model = prepared(make(), dead=0.0)
    x = batch((2, 3, 64, 64))
    calibrate_(model, batch((8, 3, 64, 64), 2))
    _, direct = fuse_with_plan(model, x)
    assert bool(direct.kept) is not all_go
    program = export(model, (x,))
    fused, plan = fuse_with_plan(program.run_decompositions() if decomposed else program)
    assert sorted(d.norm for d in plan.fused) == sorted(d.norm for d in direct.fused)
    assert norms_in(fused.graph) == len(direct.kept)
    assert error(model, fused.module(), batch(x.shape, 1)) < EXACT


# The form of what comes back ----------------------------------------------------------------------------------------


class Model(nn.Module):
    """A bit of everything that a program keeps apart: parameters, buffers of both kinds, a constant, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(), norm(), nn.ReLU(inplace=True))
        self.last, self.end = conv(4, 4, 1), norm()
        self.register_buffer("gain", torch.ones(1))
        self.register_buffer("hidden", torch.ones(1), persistent=False)
        self.constant = torch.full((4, 1, 1), 2.0, dtype=torch.float64)

    def forward(self, x: Tensor, *, flag: bool = True) -> dict[str, Tensor]:
        y = self.end(self.last(self.body(x) * self.constant))
        return {"y": y * self.hidden + self.gain, "mean": y.mean((1, 2, 3))}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return prepared(Model(), dead=0.0)


@pytest.fixture(scope="module")
def program(model: nn.Module) -> ExportedProgram:
    return export(model, (batch(IMAGES),), dynamic_shapes=({0: Dim("batch", min=2, max=64)},))


@pytest.fixture(scope="module")
def fused(program: ExportedProgram) -> ExportedProgram:
    return bnfuse.fuse(program)


X5 = batch((5, 3, 8, 8), 3)


def test_the_program_is_left_as_it_was(model: nn.Module) -> None:
    program = export(model, (batch(IMAGES),))
    held = {**program.state_dict, **program.constants}
    text, contents = str(program), {name: tensor.clone() for name, tensor in held.items()}
    fused = bnfuse.fuse(program)
    assert str(program) == text
    assert all(torch.equal(held[name], contents[name]) for name in held)
    memory = {tensor.untyped_storage()._cdata for tensor in held.values()}
    assert memory.isdisjoint(
        tensor.untyped_storage()._cdata for tensor in (*fused.state_dict.values(), *fused.constants.values())
    )


def test_the_state_holds_what_the_graph_reads(program: ExportedProgram, fused: ExportedProgram) -> None:
    assert list(fused.state_dict) == ["body.0.weight", "last.weight", "gain", "body.0.bias", "last.bias"]
    assert set(fused.graph_signature.parameters) == {"body.0.weight", "last.weight", "body.0.bias", "last.bias"}
    assert fused.graph_signature.buffers == ("gain", "hidden")
    assert set(fused.constants) == {"hidden", "constant"}
    assert fused.range_constraints == program.range_constraints
    assert not norms_in(fused.graph)
    fused.validate()


def test_it_is_saved_loaded_lowered_and_taken_apart(model: nn.Module, fused: ExportedProgram) -> None:
    file = io.BytesIO()
    torch.export.save(fused, file)
    file.seek(0)
    loaded = torch.export.load(file)
    ways = (fused.module(), loaded.module(), torch.export.unflatten(fused), fused.run_decompositions().module())
    for way in ways:
        assert error(model, way, X5) < EXACT
    with pytest.raises(AssertionError, match="Guard failed"):
        fused.module()(torch.cat([X5, X5], 2))


def test_programs_are_compared(program: ExportedProgram, fused: ExportedProgram) -> None:
    assert bnfuse.compare(program, fused, X5).within_tolerance()
    other = export(prepared(Model(), seed=5), (batch(IMAGES),), dynamic_shapes=({0: Dim("batch", min=2, max=64)},))
    assert not bnfuse.compare(program, other, X5).within_tolerance()


def test_modules_whose_calls_are_noted(model: nn.Module) -> None:
    kept = ("body", "body.0", "body.1", "end")
    program = export(model, (batch(IMAGES),), preserve_module_call_signature=kept)
    fused = bnfuse.fuse(program)
    with pytest.warns(UserWarning, match="get_attr Node"):  # of PyTorch's, for any program of this kind
        apart = torch.export.unflatten(fused)
    assert error(model, apart, batch(IMAGES)) < EXACT


def test_fusing_twice_is_harmless(fused: ExportedProgram) -> None:
    with pytest.warns(NothingFusedWarning, match="ExportedProgram holds no batch norm"):
        again = bnfuse.fuse(fused)
    assert str(again) == str(fused)


def test_a_plan_is_carried_out_later(model: nn.Module, program: ExportedProgram) -> None:
    plan = bnfuse.plan(program, keep="end")
    assert str(plan).splitlines()[0] == "ExportedProgram: 2 batch norms, 1 fused, 1 kept"
    applied = plan.apply(program)
    assert isinstance(applied, ExportedProgram)
    assert norms_in(applied.graph) == 1
    assert error(model, applied.module(), X5) < EXACT
    other = prepared(Model(), seed=5)
    with pytest.raises(FusionError, match="has changed"):
        plan.apply(export(other, (batch(IMAGES),)))


def test_further_calls_count(program: ExportedProgram) -> None:
    _, plan = fuse_with_plan(program, calls=[bnfuse.Call(X5)])
    assert len(plan.fused) == 2
    with pytest.raises(InputError, match="does not run on the inputs"):
        bnfuse.fuse(program, X5[:, :2])


# What is refused ----------------------------------------------------------------------------------------------------


def test_a_graph_made_in_training_mode_is_refused(model: nn.Module) -> None:
    training = prepared(Model()).train()
    program = export(training, (batch(IMAGES),))
    for given in (program, program.run_decompositions()):
        with pytest.raises(InputError, match=r"(?s)made in training mode.*model\.eval\(\) first"):
            bnfuse.fuse(given)


def test_a_program_is_not_changed_in_place(program: ExportedProgram) -> None:
    with pytest.raises(InputError, match="not changed in place"):
        bnfuse.fuse(program, inplace=True)


def test_a_graph_that_rounds_is_refused() -> None:
    def rounding(m: Any, x: Tensor) -> Tensor:
        return m.n(torch.fake_quantize_per_tensor_affine(m.c(x), 0.1, 0, -128, 127))

    model = Net(rounding, c=conv(), n=norm()).eval()
    program = export(model, (torch.randn(IMAGES),))
    with pytest.raises(InputError, match=r"(?s)prepared for quantisation: it runs .*fake_quant.*fuse first"):
        bnfuse.fuse(program)


def test_an_inner_graph_keeps_its_norms_until_it_is_taken_apart() -> None:
    def part(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = m.n(m.c(x))
        return m.o(m.d(x))

    model = prepared(Net(part, c=conv(), n=norm(), d=conv(4, 4), o=norm()))
    program = export(model, (batch(IMAGES),))
    (kept,) = bnfuse.plan(program).kept
    assert [reason.code for reason in kept.reasons] == ["is-function-call"]
    assert "run_decompositions({})" in bnfuse.reasons.CAUSES["is-function-call"].advice
    assert not bnfuse.plan(program.run_decompositions({})).kept


def test_a_graph_laid_out_wrongly_is_found(program: ExportedProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes back is compared with what was given, not with the modules that it was laid out as."""
    right = lifting.BatchNorm.__init__
    monkeypatch.setattr(lifting.BatchNorm, "__init__", lambda self, eps, momentum: right(self, 0.5, momentum))
    with pytest.raises(VerificationError):
        bnfuse.fuse(program)
