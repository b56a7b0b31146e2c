"""How far the outputs of two models lie apart, as data: one difference for each output tensor, and its text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bnfuse.model.describe import dtype_name
from bnfuse.printing.text import WIDTH, wrapped

TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 1e-9,
    torch.float32: 2e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
"""The largest relative error, by precision, at which outputs count as equal without a closer look.

For float32 it is about 170 units in the last place. For the half precisions it is one unit, since mistakes hide easily
there: better to look closer too often than to accept a wrong result.
"""


@dataclass(frozen=True)
class Summary:
    """Smallest, mean and largest finite value of a tensor; for complex numbers, of their magnitudes."""

    minimum: float
    mean: float
    maximum: float


@dataclass(frozen=True)
class Accuracy:
    """Shares of samples, 0 to 1, whose label is the first or among the first five classes.

    ``top5`` is None with fewer than five classes.
    """

    top1: float
    top5: float | None


@dataclass(frozen=True)
class OutputDifference:
    """How far one output tensor of two models lies apart. All errors are computed in float64.

    NaN and infinities must stand at the same places in both outputs. Such elements are left out of the errors; where
    only one output has one, the errors are infinite.

    Attributes:
        path: where the tensor is found in the output, as `bnfuse.model.pytree.tensors` writes it.
        shape: shape of the tensor in the first batch.
        dtype: dtype of the first model's output.
        before: summary of the first model's output.
        after: summary of the second model's output.
        max_abs: largest absolute difference.
        where: index of the largest difference; None for an empty tensor.
        batch: number of the batch that has the largest difference.
        expected: the first model's value at the largest difference (its magnitude, for complex numbers).
        got: the second model's value there.
        relative_l2: ``‖after - before‖ / ‖before‖``.
        relative_max: ``max|after - before| / max|before|``.
        mse: mean squared difference.
        differing: share of elements, 0 to 1, that are not exactly equal.
        argmax_agreement: share of positions, 0 to 1, with the same arg-max along axis 1; None where an arg-max means
            nothing (fewer than two axes, a single class, integers, booleans, complex numbers).
        problem: why the tensors cannot be equal whatever their values (shape, dtype, missing), or "".
    """

    path: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    before: Summary
    after: Summary
    max_abs: float
    where: tuple[int, ...] | None
    batch: int
    expected: float
    got: float
    relative_l2: float
    relative_max: float
    mse: float
    differing: float
    argmax_agreement: float | None
    problem: str = ""

    @property
    def exact(self) -> bool:
        """Whether the tensor holds integers or booleans, which are compared exactly."""
        return not (self.dtype.is_floating_point or self.dtype.is_complex)

    def within(self, tolerance: float) -> bool:
        """Whether both relative errors are at most ``tolerance``; integers and booleans must be the same."""
        if self.problem or self.exact:
            return not self.problem and self.differing == 0
        return self.relative_l2 <= tolerance and self.relative_max <= tolerance

    def __str__(self) -> str:
        """The problem or the errors, in one line."""
        return self.problem or ", ".join(self.errors)

    @property
    def errors(self) -> tuple[str, ...]:
        """The errors in words: over all elements, and the largest one."""
        if self.exact:
            return (f"{self.differing:.2%} of the elements differ",)
        place = "" if self.where is None else f" at {list(self.where)}"
        place += f" of batch {self.batch}" if self.batch else ""
        expected, got = _apart(self.expected, self.got, 6)
        values = f" ({expected} became {got})" if self.max_abs else ""
        return (
            f"relative L2 error {self.relative_l2:.2e}, mean squared error {self.mse:.2e}",
            f"largest difference {self.max_abs:.2e}{place}{values}",
        )


@dataclass(frozen=True)
class Comparison:
    """How far the outputs of two models lie apart, and the accuracy of both where labels were given.

    Attributes:
        outputs: one difference for each output tensor.
        batches: how many batches were compared.
        samples: how many labels there were; for a batch without, the length of the first axis of the first output that
            has one.
        accuracy_before: accuracy of the first model; None without labels, or without an output (samples, classes). Of
            several such outputs the one called logits counts, else the first.
        accuracy_after: accuracy of the second model.
    """

    outputs: tuple[OutputDifference, ...]
    batches: int = 1
    samples: int = 0
    accuracy_before: Accuracy | None = None
    accuracy_after: Accuracy | None = None

    @property
    def argmax_agreement(self) -> float | None:
        """Share of samples with the same arg-max, in the first output that has classes; None if none has."""
        return next((o.argmax_agreement for o in self.outputs if o.argmax_agreement is not None), None)

    @property
    def worst(self) -> OutputDifference | None:
        """The output furthest from being equal; None without outputs."""
        return max(
            self.outputs,
            key=lambda o: (not o.within(tolerance_of(o.dtype)), max(o.relative_l2, o.relative_max)),
            default=None,
        )

    def within_tolerance(self) -> bool:
        """Whether every output is equal within `TOLERANCE`. Without any output tensor, nothing is known to be equal."""
        return bool(self.outputs) and all(o.within(tolerance_of(o.dtype)) for o in self.outputs)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that `json.dumps` takes; infinite and undefined numbers become strings."""
        data = _plain_data(dataclasses.asdict(self))
        assert isinstance(data, dict)
        return data | {
            "argmax_agreement": self.argmax_agreement,
            "within_tolerance": self.within_tolerance(),
        }

    def __str__(self) -> str:
        return _text(self)


def tolerance_of(dtype: torch.dtype) -> float:
    """The relative error allowed for a dtype: that of `TOLERANCE`, for complex numbers that of their parts.

    It is 0 for integers and booleans, and the unit in the last place for a dtype that `TOLERANCE` does not name.
    """
    if dtype.is_complex:
        dtype = dtype.to_real()
    if not dtype.is_floating_point:
        return 0.0
    return TOLERANCE.get(dtype, torch.finfo(dtype).eps)


def _text(comparison: Comparison) -> str:
    lines = []
    if comparison.batches > 1:
        lines.append(wrapped(f"{comparison.batches} batches, {comparison.samples} samples"))
    for o in sorted(comparison.outputs, key=lambda o: not o.problem):
        name = f"output {o.path}".rstrip()
        if o.problem:
            lines.append(wrapped(f"{name}: {o.problem}"))
        else:
            lines.append(wrapped(f"{name}: shape {o.shape}, {dtype_name(o.dtype)}"))
        if not o.problem or math.isfinite(o.max_abs):
            lines += [*_summaries(o), *(wrapped(error, indent=2) for error in o.errors)]
        if o.argmax_agreement is not None:
            lines.append(f"  same arg-max {o.argmax_agreement:.2%}")
    for name, accuracy in (("before", comparison.accuracy_before), ("after", comparison.accuracy_after)):
        if accuracy:
            five = "" if accuracy.top5 is None else f", top-5 {accuracy.top5:.2%}"
            lines.append(f"accuracy {name:6} top-1 {accuracy.top1:.2%}{five}")
    equal = "equal within tolerance" if comparison.within_tolerance() else "NOT equal within tolerance"
    return "\n".join([*lines, equal if comparison.outputs else "no tensor to compare"])


def _summaries(difference: OutputDifference) -> list[str]:
    """The smallest, mean and largest values before and after, as a table; on its side where that is what fits."""
    table = [("", "before", "after")]
    for name in ("minimum", "mean", "maximum"):
        before, after = getattr(difference.before, name), getattr(difference.after, name)
        table.append((name, *_apart(before, after, 5)))
    lines = _aligned(list(zip(*table, strict=True)))
    return lines if max(map(len, lines)) <= WIDTH else _aligned(table)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    _, *columns = zip(*rows, strict=True)
    widths = [max(12, *map(len, column)) for column in columns]
    return [
        f"  {name:8}" + " ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        for name, *cells in rows
    ]


_MOST_DIGITS = 17  # tell any two float64 numbers apart


def _apart(one: float, other: float, digits: int) -> tuple[str, str]:
    """Two numbers with as many digits as it takes to see that they differ, and at least ``digits``.

    >>> _apart(10.00461, 10.00462, 6), _apart(1.0, 1.0, 6)
    (('10.00461', '10.00462'), ('1', '1'))
    """
    texts = f"{one:.{digits}g}", f"{other:.{digits}g}"
    while texts[0] == texts[1] and one != other and digits < _MOST_DIGITS:
        digits += 1
        texts = f"{one:.{digits}g}", f"{other:.{digits}g}"
    return texts


def _plain_data(value: Any) -> Any:
    """The value in lists, dicts, numbers and texts that strict JSON knows."""
    if isinstance(value, dict):
        return {key: _plain_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_data(item) for item in value]
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
