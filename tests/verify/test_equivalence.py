"""Telling rounding from mistakes. Every check is also shown to fail."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnfuse.model.sandbox import run
from bnfuse.verify.comparison import TOLERANCE
from bnfuse.verify.equivalence import judge, same_outputs
from bnfuse.verify.measure import compare_outputs
from bnfuse.verify.reference import Reference
from bnfuse.verify.verdict import Verdict

inf, nan = math.inf, math.nan


class Network(nn.Module):
    """Linear and batch norm, again and again, with ``between`` in between."""

    def __init__(self, depth: int, between: Callable[[Tensor], Tensor], width: int = 16) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.between = between
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(depth))
        with torch.no_grad():
            for tensor in (*self.parameters(), *self.buffers()):
                if tensor.is_floating_point():
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)
            for norm in self.norms:
                norm.get_buffer("running_var").abs_().add_(0.1)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = self.between(norm(layer(x)))
        return x


def sine(x: Tensor) -> Tensor:
    return torch.sin(12 * x)  # multiplies a small error by up to 12


def hard_cast(x: Tensor) -> Tensor:
    return sine(x.float()).to(torch.float32) + torch.zeros(16) * torch.tensor([1.0])


def insists_on_float32(x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        raise TypeError("only float32")
    return sine(x)


def through_numpy(x: Tensor) -> Tensor:
    return sine(torch.from_numpy(x.numpy().astype("float32")) * torch.tensor(0.9))


Mistake = Callable[[int, Tensor, Tensor], None]
"""Spoils the folded weight and bias of the layer with this number, in place."""


def correct(number: int, weight: Tensor, bias: Tensor) -> None:
    pass


def fuse_in_place(model: nn.Module, mistake: Mistake = correct, epsilon: float | None = None) -> nn.Module:
    assert isinstance(model, Network)
    with torch.no_grad():
        for number, layer in enumerate(model.layers):
            norm = model.norms[number]
            assert isinstance(layer, nn.Linear)
            assert isinstance(norm, nn.BatchNorm1d)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + (epsilon or norm.eps))
            weight = layer.weight.double() * scale[:, None]
            bias = (layer.bias.double() - norm.running_mean.double()) * scale + norm.bias.double()
            mistake(number, weight, bias)
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
            model.norms[number] = nn.Identity()
    return model


def verdict(
    original: nn.Module,
    fused: nn.Module,
    fuse_in_float64: Callable[[nn.Module], nn.Module] = fuse_in_place,
    x: Tensor | None = None,
) -> Verdict:
    dtype = next(original.parameters()).dtype
    if x is None:
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(3))
    x = x.to(dtype)
    comparison = compare_outputs(run(original, (x,), {}), run(fused, (x,), {}))
    return judge(Reference(original, (x,), {}), comparison, fused, fuse_in_float64)


def test_a_good_fusion_is_equal_at_once() -> None:
    found = verdict(Network(3, torch.relu), fuse_in_place(Network(3, torch.relu)))
    assert (found.equal, found.judged_in, found.in_float64) == (True, "float32", None)


@pytest.mark.parametrize("between", [sine, hard_cast])
def test_an_exact_fusion_of_an_ill_conditioned_network_is_accepted(
    between: Callable[[Tensor], Tensor],
) -> None:
    found = verdict(Network(5, between), fuse_in_place(Network(5, between)))
    assert found.comparison.outputs[0].relative_l2 > 1e-2
    assert (found.equal, found.judged_in) == (True, "float64")
    assert found.in_float64 is not None
    assert found.in_float64.outputs[0].relative_l2 < 1e-9


def test_cancellation_in_the_original_is_not_the_fused_models_fault() -> None:
    model = Network(1, torch.relu)
    model.layers[0].get_parameter("bias").data += 1e4
    model.norms[0].get_buffer("running_mean").add_(1e4)
    found = verdict(model, fuse_in_place(copy.deepcopy(model)))
    assert found.comparison.outputs[0].relative_l2 > 1e-5
    assert found.equal, found.message


def bias_of_one_channel(amount: float) -> Mistake:
    def mistake(number: int, weight: Tensor, bias: Tensor) -> None:
        if number == 0:
            bias[5] += amount

    return mistake


@pytest.mark.parametrize("between", [torch.relu, sine, hard_cast])
@pytest.mark.parametrize(
    "settings",
    [
        {"mistake": bias_of_one_channel(1e-3)},
        {"mistake": bias_of_one_channel(1e-6)},
        {"epsilon": 1e-3},
        {"epsilon": 1.1e-5},
    ],
    ids=["bias 1e-3", "bias 1e-6", "eps 1e-3", "eps 1.1e-5"],
)
def test_a_subtly_wrong_fusion_is_rejected(between: Callable[[Tensor], Tensor], settings: dict[str, Any]) -> None:
    network = Network(6, between)
    for norm in network.norms:
        norm.get_buffer("running_var").mul_(1e-2)

    def wrong(model: nn.Module) -> nn.Module:
        return fuse_in_place(model, **settings)

    found = verdict(network, wrong(copy.deepcopy(network)), wrong)
    if between is torch.relu and found.judged_in == "float32":
        assert found.comparison.outputs[0].relative_l2 < TOLERANCE[torch.float32]
        return  # below what float32 resolves
    assert not found.equal
    assert found.judged_in == "float64"
    assert found.message.startswith("The fused model does not compute what the original computes.")
    for part in ("output:", "shape (4, 16)", "expected:", "got:", "1e-09", " at [", "keep=["):
        assert part in found.message


def shifted_by_one_part_in(size: float) -> Callable[[nn.Module], nn.Module]:
    """A rewrite that goes wrong in the low precision only: the plan is right, so float64 cannot see it."""

    def rewrite(model: nn.Module) -> nn.Module:
        fuse_in_place(model)
        model.get_parameter("layers.2.weight").data[1, 2] *= 1 + 1 / size
        return model

    return rewrite


def test_a_parameter_that_is_not_the_rounded_one_is_rejected() -> None:
    found = verdict(Network(6, sine), shifted_by_one_part_in(1e6)(Network(6, sine)))
    assert not found.equal
    for part in ("layers.2.weight", "at [1, 2]", "expected:", "got:", "not the rounded value"):
        assert part in found.message


def test_folding_in_a_low_precision_is_rejected() -> None:
    def in_bfloat16(number: int, weight: Tensor, bias: Tensor) -> None:
        weight.copy_(weight.bfloat16())

    found = verdict(Network(6, sine), fuse_in_place(Network(6, sine), in_bfloat16))
    assert not found.equal
    assert "not the rounded value" in found.message


def test_a_parameter_too_many_is_rejected() -> None:
    fused = fuse_in_place(Network(6, sine))
    fused.layers[1].register_parameter("extra", nn.Parameter(torch.ones(1)))  # type: ignore[index, union-attr]
    found = verdict(Network(6, sine), fused)
    assert not found.equal
    assert "layers.1.extra" in found.message


def test_a_loss_of_precision_is_rejected() -> None:
    found = verdict(Network(2, lambda x: x), moved_away(Network(2, lambda x: x)), moved_away)
    assert found.in_float64 is not None
    assert found.in_float64.within_tolerance()
    assert not found.equal
    for part in ("right in float64 but loses precision in float32", "10 times", "got:", "model.float()"):
        assert part in found.message


@pytest.mark.parametrize("between", [insists_on_float32, through_numpy])
def test_without_float64_the_models_own_sensitivity_decides(between: Callable[[Tensor], Tensor]) -> None:
    found = verdict(Network(3, between), fuse_in_place(Network(3, between)))
    assert found.comparison.outputs[0].relative_l2 > TOLERANCE[torch.float32]
    assert found.equal, found.message
    if between is insists_on_float32:  # rounding to float32 in between may also come out the same each time
        assert "sensitivity" in found.judged_in

    def wrong(model: nn.Module) -> nn.Module:
        return fuse_in_place(model, bias_of_one_channel(1e-3))

    found = verdict(Network(3, between), wrong(Network(3, between)), wrong)
    assert not found.equal
    assert "sensitivity to rounding" in found.message


def test_without_float64_parameters_are_still_checked() -> None:
    fused = shifted_by_one_part_in(1e5)(Network(5, through_numpy))
    found = verdict(Network(5, through_numpy), fused)
    assert not found.equal
    assert "layers.2.weight" in found.message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("between", [torch.relu, sine, hard_cast])
def test_half_precision_is_judged_in_float64(dtype: torch.dtype, between: Callable[[Tensor], Tensor]) -> None:
    def like_its_input(x: Tensor) -> Tensor:
        return between(x).to(x.dtype)

    network = Network(6, like_its_input).to(dtype)
    found = verdict(network, fuse_in_place(copy.deepcopy(network)))
    assert found.equal, found.message
    assert between is torch.relu or found.judged_in == "float64"

    def wrong(model: nn.Module) -> nn.Module:
        return fuse_in_place(model, bias_of_one_channel(1e-2))

    found = verdict(network, wrong(copy.deepcopy(network)), wrong)
    assert not found.equal


def test_output_that_overflows_only_after_fusing_is_rejected() -> None:
    """float16 ends at 65504: the plan is exact, its float16 model is not."""

    def large(model: nn.Module) -> nn.Module:
        fuse_in_place(model)
        for name, factor in (("layers.0", 2.0**14), ("layers.1", 2.0**-14)):
            model.get_parameter(f"{name}.weight").data *= factor
        model.get_parameter("layers.0.bias").data *= 2.0**14
        return model

    network = Network(2, torch.relu).half()
    found = verdict(network, large(copy.deepcopy(network)), large, 4 * torch.randn(64, 16))
    assert not found.equal


def classes_and_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Which classes win, and the rows that pass: whole numbers, and a length that depends on the data."""
    return x.argmax(dim=1), x[x[:, 0] > 0]


class Choosing(Network):
    def forward(self, x: Tensor) -> Any:
        return classes_and_rows(super().forward(x))


def test_choices_that_flip_are_rounding() -> None:
    x = torch.randn(4000, 16, generator=torch.Generator().manual_seed(5))
    network = Choosing(5, sine)
    found = verdict(network, fuse_in_place(copy.deepcopy(network)), x=x)
    assert not found.comparison.outputs[0].within(1.0)
    assert found.comparison.outputs[1].problem.startswith("shape")
    assert found.equal, found.message

    def wrong(model: nn.Module) -> nn.Module:
        return fuse_in_place(model, bias_of_one_channel(1e-4))

    found = verdict(network, wrong(copy.deepcopy(network)), wrong, x)
    assert not found.equal


class Ranked(Network):
    """Like a detector: the rows in the order of their first number."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y[y[:, 0].argsort()]


def rows_that_tie(seed: int = 0) -> Tensor:
    """Pairs of rows so near each other that float32 does not tell which comes first."""
    generator = torch.Generator().manual_seed(seed)
    x, other = torch.randn(2, 40, 16, generator=generator)
    return torch.cat([x, x + 1e-9 * other, x + 1e-7 * other])


@pytest.mark.parametrize("seed", range(4))
def test_rows_that_nearly_tie_may_change_places(seed: int) -> None:
    network = Ranked(3, torch.relu)
    x = rows_that_tie(seed)
    found = verdict(network, fuse_in_place(copy.deepcopy(network)), x=x)
    assert found.equal, found.message


def moved_away(model: nn.Module) -> nn.Module:
    """Adds a large number behind the first layer and takes it off again in the second: exact, and bad."""
    fuse_in_place(model)
    first, second = model.get_submodule("layers.0"), model.get_submodule("layers.1")
    with torch.no_grad():
        weight = second.get_parameter("weight").double()
        bias = second.get_parameter("bias").double() - 1e4 * weight.sum(dim=1)
        second.get_parameter("bias").copy_(bias)
        first.get_parameter("bias").copy_(first.get_parameter("bias").double() + 1e4)
    return model


@pytest.mark.parametrize("kind", [Network, Ranked])
def test_a_loss_of_precision_is_rejected_whatever_is_chosen_from_it(kind: type[Network]) -> None:
    network = kind(2, lambda x: x)
    found = verdict(network, moved_away(copy.deepcopy(network)), moved_away, rows_that_tie())
    assert not found.equal
    for part in ("right in float64 but loses precision in float32", "10 times", "got:", "model.float()"):
        assert part in found.message


def test_a_mistake_is_rejected_whatever_is_chosen_from_it() -> None:
    def wrong(model: nn.Module) -> nn.Module:
        return fuse_in_place(model, bias_of_one_channel(1e-6))

    network = Ranked(3, torch.relu)
    found = verdict(network, wrong(copy.deepcopy(network)), wrong, rows_that_tie())
    assert not found.equal
    assert "does not compute" in found.message


class Numbered(Network):
    """The numbers of the rows in the order of their first number."""

    def forward(self, x: Tensor) -> Tensor:
        order = super().forward(x)[:, 0].argsort()
        return torch.arange(len(x)).to(x)[order]


def test_rows_that_tie_even_in_float64_are_compared_on_one_path() -> None:
    x, other = torch.randn(2, 60, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = torch.cat([x, x + 1e-16 * other, x - 3e-16 * other])
    network = Numbered(3, torch.relu).double()
    found = verdict(network, fuse_in_place(copy.deepcopy(network)), x=x)
    assert not found.comparison.within_tolerance()
    assert found.equal, found.message

    def wrong(model: nn.Module) -> nn.Module:
        return fuse_in_place(model, bias_of_one_channel(1e-7))

    found = verdict(network, wrong(copy.deepcopy(network)), wrong, x)
    assert not found.equal


class Cancelling(Network):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return (x - x.mean(dim=1, keepdim=True)).mean(dim=1)  # zero, but for rounding


def test_an_output_that_is_nothing_but_rounding_is_accepted() -> None:
    found = verdict(Cancelling(3, torch.relu), fuse_in_place(Cancelling(3, torch.relu)))
    assert found.comparison.outputs[0].relative_l2 > 0.1
    assert found.in_float64 is not None
    assert found.in_float64.outputs[0].relative_l2 > 0.1
    assert found.equal, found.message


def test_a_wrong_dtype_is_not_hidden_by_float64() -> None:
    network = Network(2, torch.relu)
    x = torch.randn(2, 16)
    after = run(network, (x,), {}).double()
    comparison = compare_outputs(run(network, (x,), {}), after)
    found = judge(Reference(network, (x,), {}), comparison, network, fuse_in_place)
    assert not found.equal
    assert "dtype float32 became float64" in found.message


def test_nothing_to_compare_is_said() -> None:
    model = nn.Linear(1, 1)
    found = judge(Reference(model, (torch.ones(1),), {}), compare_outputs(None, None), model, fuse_in_place)
    assert not found.equal
    assert "verify=False" in found.message


def test_matching_nan_is_equal_and_others_are_not() -> None:
    def with_nan(x: Tensor) -> Tensor:
        return torch.where(x > 0.5, nan, sine(x))

    assert verdict(Network(1, with_nan), fuse_in_place(Network(1, with_nan))).equal

    def wrong(model: nn.Module) -> nn.Module:
        return fuse_in_place(model, bias_of_one_channel(1.0))

    found = verdict(Network(1, with_nan), wrong(Network(1, with_nan)), wrong)
    assert not found.equal
    assert "inf" in found.message


def test_an_error_of_the_plan_is_not_swallowed() -> None:
    def broken(model: nn.Module) -> nn.Module:
        raise KeyError("layer")

    with pytest.raises(KeyError, match="layer"):
        verdict(Network(6, sine), fuse_in_place(Network(6, sine)), broken)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_models_with_computed_attributes_can_be_judged_and_stay_untouched() -> None:
    network = Network(6, sine)
    network.layers[3] = nn.utils.weight_norm(nn.Linear(16, 16))
    network.scale = torch.full((16,), 1.5)  # a plain attribute, no buffer
    network.between = lambda x: sine(x) * network.scale
    network(torch.randn(2, 16))  # leaves a weight that has a history
    network.train()
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    def fuse_all_but_one(model: nn.Module) -> nn.Module:
        assert isinstance(model, Network)
        kept = model.layers[3], model.norms[3]
        dtype = model.get_parameter("layers.0.weight").dtype
        model.layers[3], model.norms[3] = nn.Linear(16, 16, dtype=dtype), nn.BatchNorm1d(16)
        fuse_in_place(model)
        model.layers[3], model.norms[3] = kept
        return model

    fused = fuse_all_but_one(Network(6, sine))
    assert isinstance(fused, Network)
    fused.layers[3], fused.norms[3] = network.layers[3], network.norms[3]
    fused.between = network.between
    found = verdict(network, fused, fuse_all_but_one)
    assert found.equal, found.message
    assert network.scale.dtype == torch.float32
    assert network.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert all(tensor.dtype == torch.float32 for tensor in network.parameters())


# ---------------------------------------------------------------- same_outputs


RUNS: list[int] = []


def note_run() -> None:
    """Called by the model: what its own code refers to is put back after every run, its class included."""
    RUNS.append(1)


class Counted(Network):
    """Counts its runs."""

    def forward(self, x: Tensor) -> Tensor:
        note_run()
        return super().forward(x)


def counted(between: Callable[[Tensor], Tensor], mistake: Mistake | None = None) -> Counted:
    """A network, fused if a mistake is given; runs are counted from now on."""
    network = Counted(5, between)
    if mistake is not None:
        fuse_in_place(network, mistake)
    RUNS.clear()
    return network


X = torch.randn(4, 16, generator=torch.Generator().manual_seed(3))


def test_a_known_output_is_not_computed_again() -> None:
    original = counted(torch.relu)
    output = run(original, (X,), {})
    fused = counted(torch.relu, correct)
    found = same_outputs(Reference(original, (X,), {}, output=output), fused, fuse_in_place)
    assert (found.equal, found.judged_in, len(RUNS)) == (True, "float32", 1)
    other = same_outputs(Reference(original, (X,), {}, output=output + 1), fused, fuse_in_place)
    assert other.comparison.outputs[0].max_abs == pytest.approx(1, rel=1e-5)


def test_a_fused_model_that_does_not_run_is_not_the_same() -> None:
    def fails(x: Tensor) -> Tensor:
        raise ValueError("no norm")

    found = same_outputs(Reference(Network(2, torch.relu), (X,), {}), Network(2, fails), fuse_in_place)
    assert (found.equal, found.nothing_compared) == (False, False)
    assert found.message == "The fused Network does not run: ValueError: no norm. Please report this model."
    assert isinstance(found.error, ValueError)


def test_models_without_tensors_are_not_compared() -> None:
    class Silent(Network):
        def forward(self, x: Tensor) -> None:
            pass

    found = same_outputs(Reference(Silent(1, torch.relu), (X,), {}), Silent(1, torch.relu), fuse_in_place)
    assert (found.equal, found.nothing_compared) == (False, True)


def gain_of_the_last_layer(number: int, weight: Tensor, bias: Tensor) -> None:
    if number == 4:
        weight *= 1.01


@pytest.mark.parametrize(("mistake", "equal"), [(correct, True), (gain_of_the_last_layer, False)])
@pytest.mark.parametrize("between", [torch.relu, sine])
def test_a_model_fused_in_place_is_judged_against_what_it_was(
    between: Callable[[Tensor], Tensor], mistake: Mistake, equal: bool
) -> None:
    model = Network(5, between)
    before, norms = copy.deepcopy(model.state_dict()), list(model.norms)
    output = run(model, (X,), {})

    def fuse(model: nn.Module) -> nn.Module:
        return fuse_in_place(model, mistake)

    fuse(model)
    separated = []

    def separate() -> nn.Module:
        fused = copy.deepcopy(model)
        model.norms = nn.ModuleList(norms)
        model.load_state_dict(before)
        separated.append(fused)
        return fused

    found = same_outputs(Reference(model, (X,), {}, output=output), model, fuse, separate=separate)
    assert found.equal is equal, found.message
    assert bool(separated) is not found.comparison.within_tolerance()
    assert separated or isinstance(model.norms[0], nn.Identity)


def test_whether_precision_counts() -> None:
    original, fused = Network(2, lambda x: x), moved_away(Network(2, lambda x: x))
    reference = Reference(original, (X,), {})
    assert not same_outputs(reference, fused, moved_away).equal
    assert same_outputs(reference, fused, moved_away, algebra_only=True).equal
