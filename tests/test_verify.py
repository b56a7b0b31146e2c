"""Comparing models, and telling rounding from mistakes.  Every check here is also shown to fail."""

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bnfuse.errors import BnFuseError, InputError
from bnfuse.model.pytree import map_tensors
from bnfuse.model.sandbox import run
from bnfuse.verify.comparison import TOLERANCE, Comparison, compare, compare_outputs
from bnfuse.verify.discrete_choices import Decisions
from bnfuse.verify.judge import Verdict, judge

inf, nan = math.inf, math.nan


def only(comparison: Comparison) -> Any:
    assert len(comparison.outputs) == 1
    return comparison.outputs[0]


class Fixed(nn.Module):
    """Returns what a function makes of its arguments."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


# ---------------------------------------------------------------- compare_outputs


def test_numbers_of_a_difference() -> None:
    before = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    after = torch.tensor([[1.0, 2.0], [3.5, 3.0]])
    comparison = compare_outputs(before, after)
    output = only(comparison)
    assert (output.before.minimum, output.before.mean, output.before.maximum) == (1, 2.5, 4)
    assert (output.after.minimum, output.after.mean, output.after.maximum) == (1, 2.375, 3.5)
    assert (output.path, output.shape, output.dtype) == ("", (2, 2), torch.float32)
    assert (output.max_abs, output.where, output.expected, output.got) == (1.0, (1, 1), 4.0, 3.0)
    assert output.relative_l2 == pytest.approx(math.sqrt(1.25 / 30))
    assert output.relative_max == pytest.approx(1 / 4)
    assert output.mse == pytest.approx(1.25 / 4)
    assert output.differing == 0.5
    assert output.argmax_agreement == 0.5
    assert not comparison.within_tolerance()


def test_errors_are_computed_in_float64() -> None:
    before = torch.full((1000,), 1e30)
    assert only(compare_outputs(before, before * 2)).relative_l2 == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("before", "after", "max_abs", "equal"),
    [
        ([1.0, nan, inf, -inf], [1.0, nan, inf, -inf], 0.0, True),
        ([1.0, nan], [1.0, 2.0], inf, False),
        ([1.0, 2.0], [1.0, nan], inf, False),
        ([1.0, inf], [1.0, -inf], inf, False),
        ([1.0, inf], [1.0, nan], inf, False),
        ([1.0, 2.0], [1.0, inf], inf, False),
        ([2.0, nan], [1.0, nan], 1.0, False),
        ([0.0, 0.0], [0.0, 0.0], 0.0, True),
        ([0.0, 0.0], [0.0, 1e-30], 1e-30, False),
        ([], [], 0.0, True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_that_are_not_finite(
    before: list[float], after: list[float], max_abs: float, equal: bool, dtype: torch.dtype
) -> None:
    comparison = compare_outputs(torch.tensor(before, dtype=dtype), torch.tensor(after, dtype=dtype))
    output = only(comparison)
    assert output.max_abs == pytest.approx(max_abs, rel=1e-2)
    assert (output.relative_l2 == inf) == (max_abs == inf or before == [0.0, 0.0] != after)
    assert comparison.within_tolerance() is equal


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_tolerance_by_dtype(dtype: torch.dtype) -> None:
    before = torch.linspace(1, 2, 100, dtype=torch.float64)
    inside, outside = 1 + TOLERANCE[dtype] / 2, 1 + TOLERANCE[dtype] * 3
    low = before.to(dtype)
    assert compare_outputs(low, (low.double() * inside).to(dtype)).within_tolerance()
    assert not compare_outputs(low, (low.double() * outside).to(dtype)).within_tolerance()


def test_one_wrong_element_among_many_is_out_of_tolerance() -> None:
    before = torch.ones(1_000_000)
    after = before.clone()
    after[123_456] += 1e-3
    output = only(compare_outputs(before, after))
    assert output.relative_l2 < TOLERANCE[torch.float32]
    assert output.where == (123_456,)
    assert not compare_outputs(before, after).within_tolerance()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.int16])
def test_whole_numbers_are_compared_exactly(dtype: torch.dtype) -> None:
    before = torch.arange(100, dtype=dtype).reshape(10, 10)
    after = before.clone()
    assert compare_outputs(before, after).within_tolerance()
    after[3, 4] += 1
    output = only(compare_outputs(before, after))
    assert not compare_outputs(before, after).within_tolerance()
    assert (output.differing, output.where, output.argmax_agreement) == (0.01, (3, 4), None)


def test_neighbours_beyond_the_range_of_float64_and_booleans() -> None:
    before = torch.tensor([2**62])
    assert not compare_outputs(before, before + 1).within_tolerance()
    flags = torch.tensor([True, False])
    assert compare_outputs(flags, flags.clone()).within_tolerance()
    assert not compare_outputs(flags, ~flags).within_tolerance()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_numbers(dtype: torch.dtype) -> None:
    before = torch.tensor([[3 + 4j, 1j]], dtype=dtype)
    assert compare_outputs(before, before.clone()).within_tolerance()
    output = only(compare_outputs(before, before.conj()))
    assert (output.max_abs, output.before.maximum, output.argmax_agreement) == (8.0, 5.0, None)
    assert not compare_outputs(before, before.conj()).within_tolerance()


def test_sparse_tensors() -> None:
    before = torch.eye(3).to_sparse()
    assert compare_outputs(before, torch.eye(3).to_sparse()).within_tolerance()
    assert not compare_outputs(before, (torch.eye(3) * 2).to_sparse()).within_tolerance()


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        (torch.ones(2, 3), torch.ones(3, 2), "shape (2, 3) became (3, 2)"),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), "dtype float32 became float64"),
        ({"a": torch.ones(1), "b": torch.ones(1)}, {"a": torch.ones(1)}, "second model does not return"),
        ({"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)}, "first model does not return"),
        ((torch.ones(1),), [torch.ones(1), torch.ones(1)], "first model does not return"),
    ],
)
def test_different_structure_is_never_equal(before: Any, after: Any, problem: str) -> None:
    comparison = compare_outputs(before, after)
    assert not comparison.within_tolerance()
    assert comparison.worst is not None
    assert problem in comparison.worst.problem
    assert problem in str(comparison)


def test_no_tensor_is_not_equal() -> None:
    assert not compare_outputs(None, None).within_tolerance()
    assert "no tensor" in str(compare_outputs({}, {}))


@dataclass
class Detections:
    boxes: Tensor
    scores: Tensor | None = None


def test_dict_and_dataclass_outputs() -> None:
    before = {"out": torch.ones(2, 3), "aux": Detections(torch.ones(2))}
    after = {"out": torch.ones(2, 3), "aux": Detections(torch.ones(2) * 2)}
    comparison = compare_outputs(before, after)
    assert [output.path for output in comparison.outputs] == ["['out']", "['aux'].boxes"]
    assert [output.max_abs for output in comparison.outputs] == [0, 1]
    assert comparison.worst is comparison.outputs[1]


@pytest.mark.parametrize("shape", [(4,), (), (4, 1)])
def test_arg_max_means_nothing_without_classes(shape: tuple[int, ...]) -> None:
    assert only(compare_outputs(torch.ones(shape), torch.ones(shape))).argmax_agreement is None


def test_to_dict_is_strict_json() -> None:
    comparison = compare_outputs(torch.tensor([1.0, nan]), torch.tensor([1.0, 2.0]))
    data = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert data["outputs"][0]["max_abs"] == "inf"
    assert data["outputs"][0]["dtype"] == "float32"
    assert data["outputs"][0]["where"] == [1]
    assert data["within_tolerance"] is False


# ---------------------------------------------------------------- compare and run


def classifier() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 6))


def test_a_tensor_a_tuple_and_a_dict_are_one_call() -> None:
    model = Fixed(lambda x, y=None: x if y is None else x + y)
    x = torch.ones(2, 3)
    for inputs in (x, (x,), (x, x), {"x": x}, {"x": x, "y": x}):
        comparison = compare(model, model, inputs)
        assert comparison.within_tolerance()
        assert (comparison.batches, comparison.samples) == (1, 2)


def batches() -> Iterator[Tensor]:
    yield from torch.randn(3, 2, 4)


@pytest.mark.parametrize(
    "inputs",
    [
        lambda: list(batches()),
        batches,
        lambda: [(x,) for x in batches()],
        lambda: [{"input": x} for x in batches()],
        lambda: DataLoader(TensorDataset(torch.randn(6, 4)), batch_size=2),
        lambda: DataLoader(TensorDataset(torch.randn(6, 4), torch.arange(6)), batch_size=2),
        lambda: [(x, torch.tensor([0, 1])) for x in batches()],
    ],
)
def test_anything_else_gives_batches(inputs: Callable[[], Any]) -> None:
    model = classifier()
    comparison = compare(model, model, inputs())
    assert comparison.within_tolerance()
    assert (comparison.batches, comparison.samples, comparison.argmax_agreement) == (3, 6, 1.0)


def test_batches_add_up_to_one_whole() -> None:
    x = torch.randn(12, 4)
    before, after = classifier(), classifier()
    after.get_submodule("4").register_parameter("bias", nn.Parameter(torch.randn(6)))
    whole = only(compare(before, after, x))
    parts = compare(before, after, list(x.split(5)))
    part = only(parts)
    assert (parts.batches, parts.samples) == (3, 12)
    for name in ("max_abs", "relative_l2", "relative_max", "mse", "argmax_agreement", "differing"):
        assert getattr(part, name) == pytest.approx(getattr(whole, name), rel=1e-6), name
    assert part.before.mean == pytest.approx(whole.before.mean, rel=1e-5)
    assert whole.where is not None
    assert (part.batch * 5 + part.where[0], part.where[1]) == whole.where


def test_top1_and_top5() -> None:
    labels = torch.arange(6).repeat(4)
    scores = nn.functional.one_hot(labels, 6).float()
    wrong = scores.clone()
    wrong[:6] = -scores[:6]  # the right class comes last
    wrong[6:12] = scores[6:12] + 2 * scores[6:12].roll(1, dims=1)  # the right class comes second
    loader = DataLoader(TensorDataset(torch.stack([scores, wrong], dim=1), labels), batch_size=5)
    before, after = Fixed(lambda x: x[:, 0]), Fixed(lambda x: x[:, 1])
    comparison = compare(before, after, loader)
    assert comparison.accuracy_before is not None
    assert comparison.accuracy_after is not None
    assert (comparison.accuracy_before.top1, comparison.accuracy_before.top5) == (1.0, 1.0)
    assert (comparison.accuracy_after.top1, comparison.accuracy_after.top5) == (0.5, 0.75)
    assert comparison.argmax_agreement == 0.5
    assert "top-1 50.00%, top-5 75.00%" in str(comparison)


def test_accuracy_needs_labels_and_classes() -> None:
    x, labels = torch.randn(4, 3), torch.arange(4)
    model = Fixed(lambda x: x)
    few = compare(model, model, [(x[:, :3], labels)])
    assert few.accuracy_before is not None
    assert few.accuracy_before.top5 is None
    assert compare(model, model, [x]).accuracy_before is None
    dense = Fixed(lambda x: x[:, :, None])
    assert compare(dense, dense, [(x, labels)]).accuracy_before is None
    two_arguments = Fixed(lambda x, y: x + y)
    assert compare(two_arguments, two_arguments, [(x, x)]).accuracy_before is None


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "no batch"),
        (iter(()), "no batch"),
        (3, "expected: a tensor"),
        ("text", "expected: a tensor"),
        (None, "expected: a tensor"),
        (torch.ones(2, 3), r"\[0\] \(2, 3\) float32"),
        ([torch.ones(2, 4), torch.ones(2, 5)], r"batch 1 of(.|\n)*\(\[a, b\],\)"),
    ],
)
def test_inputs_that_cannot_be_used(inputs: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare(classifier(), classifier(), inputs)


def test_only_modules_are_compared() -> None:
    with pytest.raises(BnFuseError, match="after is a function"):
        compare(nn.Identity(), lambda x: x, torch.ones(1))  # type: ignore[arg-type]


def test_a_model_in_training_mode_is_compared_in_evaluation_mode() -> None:
    model = classifier().train()
    norm = model.get_submodule("1")
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    assert compare(model, model, torch.randn(8, 4)).within_tolerance()
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items())


def test_a_difference_between_models_is_found() -> None:
    model, other = classifier(), classifier()
    with torch.no_grad():
        other.get_parameter("4.bias")[2] += 1e-3
    x = torch.randn(8, 4)
    assert compare(model, classifier(), x).within_tolerance()
    comparison = compare(model, other, x)
    assert not comparison.within_tolerance()
    assert only(comparison).where[1] == 2
    assert "NOT equal" in str(comparison)


def test_half_precision_models_are_compared() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        model, x = classifier().to(dtype), torch.randn(8, 4, dtype=dtype)
        assert only(compare(model, model, x)).dtype == dtype
        other = classifier().to(dtype)
        other.get_parameter("4.bias").data += 0.1
        assert not compare(model, other, x).within_tolerance()


def test_the_text_of_a_comparison() -> None:
    before = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert str(compare_outputs({"out": before}, {"out": before + 1})) == (
        "output ['out']: shape (2, 2), float32\n"
        "               minimum         mean      maximum\n"
        "  before             1          2.5            4\n"
        "  after              2          3.5            5\n"
        "  relative L2 error 3.65e-01, mean squared error 1.00e+00, "
        "largest difference 1.00e+00 at [0, 0] (1 became 2)\n"
        "  same arg-max 100.00%\n"
        "NOT equal within tolerance"
    )


# ---------------------------------------------------------------- judge


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
    return judge(comparison, original, fused, fuse_in_float64, (x,), {})


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


def decided(x: Tensor) -> tuple[Tensor, Tensor]:
    """Which classes win, and the rows that pass: whole numbers, and a length that depends on the data."""
    return x.argmax(dim=1), x[x[:, 0] > 0]


class Decision(Network):
    def forward(self, x: Tensor) -> Any:
        return decided(super().forward(x))


def test_decisions_that_flip_are_rounding() -> None:
    x = torch.randn(4000, 16, generator=torch.Generator().manual_seed(5))
    network = Decision(5, sine)
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
def test_a_loss_of_precision_is_rejected_whatever_is_decided_from_it(kind: type[Network]) -> None:
    network = kind(2, lambda x: x)
    found = verdict(network, moved_away(copy.deepcopy(network)), moved_away, rows_that_tie())
    assert not found.equal
    for part in ("right in float64 but loses precision in float32", "10 times", "got:", "model.float()"):
        assert part in found.message


def test_a_mistake_is_rejected_whatever_is_decided_from_it() -> None:
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


def decisions(values: Tensor) -> tuple[Any, ...]:
    first = values.clone().floor_()
    place = values.argmax()
    best = values.topk(2)
    return first, place, best.values, best.indices, values[values > 1], float(values.sum() > 3), values.max().item()


def test_a_run_takes_the_decisions_of_another() -> None:
    there, here = torch.tensor([1.0, 0.999999, 2.0, 1.999999]), torch.tensor([0.999999, 1.000001, 1.999999, 2.0])
    with torch.inference_mode():
        with Decisions() as path:
            expected = decisions(there.double())
        with Decisions(path) as followed:
            found = decisions(here)
        with Decisions(path) as same:
            decisions(there)
    assert followed.followed_to_the_end
    assert followed.changed
    assert same.followed_to_the_end
    comparison = compare_outputs(map_tensors(expected, torch.Tensor.double), map_tensors(found, torch.Tensor.double))
    assert comparison.outputs
    assert all(not output.problem and output.max_abs < 1e-5 for output in comparison.outputs), comparison
    assert found[-2:] == expected[-2:]
    given = [tensor for tensors in followed.given for tensor in tensors]
    assert any(torch.equal(tensor, here) for tensor in given)


def test_a_run_that_decides_other_things_is_lost() -> None:
    x = torch.randn(4)
    with torch.inference_mode():
        with Decisions() as path:
            x.argmax()
            x.argmin()
        with Decisions(path) as other:
            x.argmax()
            x.sort()
        with Decisions(path) as shorter:
            x.argmax()
    assert not other.followed_to_the_end
    assert not shorter.followed_to_the_end


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
    found = judge(compare_outputs(run(network, (x,), {}), after), network, network, fuse_in_place, (x,), {})
    assert not found.equal
    assert "dtype float32 became float64" in found.message


def test_nothing_to_compare_is_said() -> None:
    model = Fixed(lambda x: None)
    found = judge(compare_outputs(None, None), model, model, fuse_in_place, (torch.ones(1),), {})
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


@pytest.mark.parametrize("odd", [None, math.nan, math.inf])
def test_a_comparison_in_pieces_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch, odd: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(3, 5, 7, generator=generator)
    after = before + 1e-3 * torch.randn(before.shape, generator=generator)
    after[2, 3, 4] += 1
    if odd is not None:
        before[1, 1, 1] = after[1, 1, 1] = odd
    whole = compare_outputs(before, after).outputs[0]
    monkeypatch.setattr("bnfuse.verify.comparison._PIECE", 8)
    pieces = compare_outputs(before, after).outputs[0]
    assert pieces.where == whole.where == (2, 3, 4)
    exact = ("max_abs", "expected", "got", "differing", "argmax_agreement", "problem")
    assert [getattr(pieces, name) for name in exact] == [getattr(whole, name) for name in exact]
    assert pieces.relative_l2 == pytest.approx(whole.relative_l2, rel=1e-12)
    assert pieces.before.mean == pytest.approx(whole.before.mean, rel=1e-12)
    assert (pieces.after.minimum, pieces.after.maximum) == (whole.after.minimum, whole.after.maximum)
    finite = torch.isfinite(before)
    difference = (after.double() - before.double())[finite]
    assert whole.relative_l2 == pytest.approx(float(difference.norm() / before.double()[finite].norm()), rel=1e-12)
