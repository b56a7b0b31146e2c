"""The text of a comparison: no line is longer than 80 columns, whatever the numbers, shapes and names."""

import math
import random
from typing import Any

import pytest
import torch

from bnfuse.printing.text import cells
from bnfuse.verify.comparison import Comparison, OutputDifference, Summary
from bnfuse.verify.measure import compare_outputs

NUMBERS = (0.0, 1 / 3, -2 / 3 * 1e300, -1.2345678901234567e-308, 1e16 / 3, math.inf, -math.inf, math.nan)


def widest(comparison: Comparison) -> int:
    return max(map(cells, str(comparison).splitlines()))


def difference(**given: Any) -> OutputDifference:
    """A difference of hostile numbers, and what is given."""
    draw = random.Random(0)

    def number() -> float:
        return draw.choice(NUMBERS)

    before = Summary(number(), number(), number())
    after = Summary(*(math.nextafter(value, math.inf) for value in vars(before).values()))
    fields: dict[str, Any] = {"path": "", "shape": (2, 3), "dtype": torch.float32, "where": (0, 1), "batch": 0}
    fields |= {"before": before, "after": after, "max_abs": 1.0, "expected": 1 / 3, "got": math.nextafter(1 / 3, 1)}
    fields |= {"relative_l2": 1.0, "relative_max": 1.0, "mse": 1.0, "differing": 0.5, "argmax_agreement": 0.5}
    return OutputDifference(**fields | given)


@pytest.mark.parametrize(
    "given",
    [
        {"path": "['" + "x" * 300 + "']"},
        {"path": "['" + "层" * 100 + "']"},
        {"path": "[0]" * 100},
        {"shape": tuple(range(10**9, 10**9 + 60)), "where": tuple(range(10**9, 10**9 + 60)), "batch": 10**12},
        {"max_abs": math.inf, "mse": 1e300, "relative_l2": math.inf},
        {"problem": "its shape is " + "9" * 200 + " " + "in words " * 30},
        {"dtype": torch.int64},
        {"dtype": torch.complex128},
    ],
    ids=lambda given: ",".join(given),
)
def test_no_line_is_too_long(given: dict[str, Any]) -> None:
    assert widest(Comparison((difference(**given),), batches=10**12, samples=10**15)) <= 80


def test_numbers_that_differ_in_the_last_digit_are_shown_whole() -> None:
    values = [-1.2345678901234567e-300, -1.1234567890123457e-300, -1.0123456789012346e-300]
    before, after = Summary(*values), Summary(*(math.nextafter(value, 0) for value in values))
    text = str(Comparison((difference(before=before, after=after),)))
    assert widest(Comparison((difference(before=before, after=after),))) <= 80
    [heading] = [line.split() for line in text.splitlines() if "before" in line]
    assert heading == ["before", "after"]  # on its side: three such numbers beside each other are 84 columns
    for name in ("minimum", "mean", "maximum"):
        [row] = [line.split()[1:] for line in text.splitlines() if line.startswith(f"  {name}")]
        assert len(set(row)) == 2
        assert [float(cell) for cell in row] == pytest.approx([getattr(before, name), getattr(after, name)], 1e-14)


def test_all_hostile_numbers_together() -> None:
    draw = random.Random(1)
    for _ in range(300):
        numbers = [draw.choice(NUMBERS) for _ in range(6)]
        one, other = Summary(*numbers[:3]), Summary(*numbers[3:])
        assert widest(Comparison((difference(before=one, after=other, expected=numbers[0], got=numbers[3]),))) <= 80


def test_real_outputs_of_many_axes() -> None:
    x = torch.rand((1,) * 40 + (2,), dtype=torch.float64) * 1e-300
    outputs = {"a name of an output that goes on and on " * 5: x}
    other = {name: value * (1 + 2**-52) for name, value in outputs.items()}
    assert widest(compare_outputs(outputs, other)) <= 80
