"""Measuring how far outputs lie apart, and what a comparison says. Every check is also shown to fail."""

import functools
import json
import math
import operator
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from bnfuse.verify.comparison import TOLERANCE, Comparison
from bnfuse.verify.measure import Accumulator, _Sum, compare_outputs

inf, nan = math.inf, math.nan


def only(comparison: Comparison) -> Any:
    assert len(comparison.outputs) == 1
    return comparison.outputs[0]


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


def test_an_output_of_inference_mode_that_was_given_ordinary_memory() -> None:
    with torch.inference_mode():
        output = torch.ones(2, 3)
    output.data = 2 * torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="version counter"):
        output.reshape(-1)
    assert compare_outputs(output, 2 * torch.ones(2, 3)).within_tolerance()


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


@pytest.mark.parametrize("odd", [None, math.nan, math.inf])
def test_a_comparison_in_pieces_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch, odd: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(3, 5, 7, generator=generator)
    after = before + 1e-3 * torch.randn(before.shape, generator=generator)
    after[2, 3, 4] += 1
    if odd is not None:
        before[1, 1, 1] = after[1, 1, 1] = odd
    whole = compare_outputs(before, after).outputs[0]
    monkeypatch.setattr("bnfuse.verify.measure._PIECE", 8)
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


def test_the_text_of_a_comparison() -> None:
    before = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert str(compare_outputs({"out": before}, {"out": before + 1})) == (
        "output ['out']: shape (2, 2), float32\n"
        "               minimum         mean      maximum\n"
        "  before             1          2.5            4\n"
        "  after              2          3.5            5\n"
        "  relative L2 error 3.65e-01, mean squared error 1.00e+00\n"
        "  largest difference 1.00e+00 at [0, 0] (1 became 2)\n"
        "  same arg-max 100.00%\n"
        "NOT equal within tolerance"
    )


@pytest.mark.parametrize("step", [1e-2, 1e-5, 1e-9, 2e-15])
def test_numbers_that_differ_are_seen_to_differ(step: float) -> None:
    before = torch.tensor([[10.0046, -2.0], [3.0, 4.0]], dtype=torch.float64)
    lines = str(compare_outputs(before, before * (1 + step))).splitlines()
    assert max(map(len, lines)) <= 80
    [first, second] = (line.split()[1:] for line in lines[2:4])
    assert all(one != other for one, other in zip(first, second, strict=True))
    [found] = re.findall(r"\((\S+) became (\S+)\)", "\n".join(lines))
    assert found[0] != found[1]
    assert float(found[0]) == pytest.approx(10.0046, abs=1e-4)


def test_what_cannot_be_compared_comes_first_and_has_no_rows() -> None:
    x = torch.ones(2, 3)
    before, after = {"same": x, "shape": x, "dtype": x, "gone": x}, {"same": x, "shape": x[:1], "dtype": x.double()}
    lines = str(compare_outputs(before, after)).splitlines()
    assert lines[0] == "output ['shape']: shape (2, 3) became (1, 3)"
    assert lines[1] == "output ['dtype']: dtype float32 became float64"
    assert lines[3].split() == ["before", "1", "1", "1"]  # what another dtype holds can be compared
    assert "output ['gone']: the second model does not return this tensor" in lines
    assert lines.index("output ['same']: shape (2, 3), float32") > max(
        place for place, line in enumerate(lines) if line.startswith(("output ['shape", "output ['gone"))
    )
    assert "nan" not in "\n".join(lines)


@pytest.mark.parametrize("seed", range(5))
def test_sums_are_exact_in_any_order(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    magnitudes = 10.0 ** torch.randint(-18, 18, (60,), generator=generator)
    numbers = (torch.randn(60, generator=generator, dtype=torch.float64) * magnitudes).tolist()
    numbers += [-number for number in numbers if abs(number) > 1]  # what is left is lost where sums are rounded
    expected = float(sum(map(Fraction, numbers)))
    assert functools.reduce(operator.add, numbers) != expected, "these numbers do not tell"
    whole, first, second = _Sum(), _Sum(), _Sum()
    for place, number in enumerate(numbers):
        whole.add(number)
        (first if place % 3 else second).add(number)
    first.join(second)
    assert whole.rounded() == first.rounded() == expected


def test_sums_beyond_what_numbers_can_be() -> None:
    for numbers, expected in (([1e308, 1e308], inf), ([inf, 1.0], inf), ([-inf, 1.0], -inf), ([], 0.0)):
        total, other = _Sum(), _Sum()
        for number in numbers:
            total.add(number)
        other.join(total)
        assert total.rounded() == other.rounded() == expected
    total.add(inf)
    total.add(-inf)
    assert math.isnan(total.rounded())


def odd_batches() -> list[tuple[Any, Any, Tensor | None]]:
    """Outputs of two models for some batches, in which everything happens that can be noted."""
    torch.manual_seed(0)
    batches: list[tuple[Any, Any, Tensor | None]] = []
    for number in range(8):
        x, labels = torch.randn(4, 6), torch.randint(6, (4,))
        y = x + 0.1 * torch.randn(4, 6)
        before = {"x": x, "whole": torch.arange(3), "late": None if number < 4 else x[0], "none": x[:0]}
        batches.append(
            (before, before | {"x": y, "late": None if number < 6 else y[0]}, labels if number % 2 else None)
        )
    batches[2][0]["x"][1, 1] = batches[2][1]["x"][1, 1] = nan
    batches[3][1]["whole"] = torch.tensor([0, 1, 7])
    batches[5][1]["late"] = torch.ones(2, 2)  # another shape
    return batches


@pytest.mark.parametrize("infinite", [None, 1, 6])
def test_parts_that_are_joined_are_the_whole(infinite: int | None) -> None:
    """To the last bit, wherever the batches are divided."""
    batches = odd_batches()
    if infinite is not None:
        batches[infinite][1]["x"][3, 2] = inf
        batches[infinite][1]["late"] = None

    def added(first: int, last: int) -> Accumulator:
        accumulator = Accumulator()
        for batch in batches[first:last]:
            accumulator.add(*batch)
        return accumulator

    whole = repr(added(0, 8).finish())
    assert all(f"path=\"['{name}']\"" in whole for name in ("x", "whole", "late", "none"))
    for first in range(9):
        for second in range(first, 9):
            joined = Accumulator()
            for part in ((0, first), (first, second), (second, 8)):
                joined.join(added(*part))
            assert repr(joined.finish()) == whole, (first, second)
    assert repr(added(0, 7).finish()) != whole
