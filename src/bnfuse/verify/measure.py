"""Measuring how far outputs lie apart: computed in float64, added up piece by piece and batch by batch.

Sums are exact and rounded once: several processes that add up a part each come to the same numbers as one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from bnfuse.model.describe import dtype_name
from bnfuse.model.pytree import tensors
from bnfuse.verify.comparison import Accuracy, Comparison, OutputDifference, Summary

_LOGITS = re.compile(r"^(\.logits|\['logits'\])$")

_PIECE = 2**18
"""How many numbers are compared at a time: few enough to stay in the processor's cache in float64."""


def compare_outputs(before: object, after: object) -> Comparison:
    """Measure how far apart two outputs are, whatever two models returned for the same input.

    >>> print(compare_outputs(torch.ones(2), torch.ones(2)).outputs[0].max_abs)
    0.0
    """
    accumulator = Accumulator()
    accumulator.add(before, after, None)
    return accumulator.finish()


class Accumulator:
    """Adds up the differences of all outputs over batches, and the samples that each model classified correctly."""

    def __init__(self) -> None:
        self.outputs: dict[str, _OutputAccumulator] = {}
        self.batches = 0
        self.samples = 0
        self.labelled = 0
        self.classes = 0
        self.correct = [[0, 0], [0, 0]]  # for each model: label is the first class, is among the first five

    def add(self, before: object, after: object, labels: Tensor | None) -> None:
        """Add the outputs of both models for one batch."""
        first, second = dict(tensors(before)), dict(tensors(after))
        with torch.inference_mode():  # outside of it the tensors of a recorded run take no views
            for path in first | second:
                accumulator = self.outputs.setdefault(path, _OutputAccumulator(path))
                accumulator.add(first.get(path), second.get(path), self.batches)
        if labels is not None:
            self.samples += labels.shape[0]
        else:  # what has no axes, such as a loss, is of no sample
            self.samples += next((tensor.size(0) for tensor in first.values() if tensor.ndim), 0)
        self.batches += 1
        if labels is not None:
            self.classify(first, second, labels)

    def classify(self, first: dict[str, Tensor], second: dict[str, Tensor], labels: Tensor) -> None:
        """Count the correct samples in the output called logits, else in the first of shape (samples, classes)."""
        for path, logits in sorted(first.items(), key=lambda item: not _LOGITS.search(item[0])):
            other = second.get(path)
            if other is None or other.shape != logits.shape or not logits.is_floating_point():
                continue
            if logits.ndim == 2 and logits.shape[0] == labels.shape[0]:
                self.labelled += labels.shape[0]
                self.classes = logits.shape[1]
                for counts, scores in zip(self.correct, (logits, other), strict=True):
                    ranked = scores.topk(min(5, self.classes), dim=1).indices.cpu()
                    hits = ranked == labels.cpu()[:, None]
                    counts[0] += int(hits[:, :1].sum())
                    counts[1] += int(hits.sum())
                return

    def accuracy(self, model: int) -> Accuracy | None:
        """The accuracy of the first model (0) or the second (1); None if nothing had labels."""
        if not self.labelled:
            return None
        first, five = (count / self.labelled for count in self.correct[model])
        return Accuracy(first, five if self.classes >= 5 else None)

    def join(self, other: Accumulator) -> None:
        """Add what another has added up, as if its batches came after all that are here."""
        for path, output in other.outputs.items():
            self.outputs.setdefault(path, _OutputAccumulator(path)).join(output, self.batches)
        self.batches += other.batches
        self.samples += other.samples
        self.labelled += other.labelled
        self.classes = other.classes or self.classes
        for counts, more in zip(self.correct, other.correct, strict=True):
            counts[:] = [count + another for count, another in zip(counts, more, strict=True)]

    def finish(self) -> Comparison:
        outputs = tuple(output.finish() for output in self.outputs.values())
        return Comparison(outputs, self.batches, self.samples, self.accuracy(0), self.accuracy(1))


class _OutputAccumulator:
    """Adds up the differences of one output tensor over batches."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.shape: tuple[int, ...] = ()
        self.dtype: torch.dtype | None = None
        self.problem = ""
        self.before, self.after = _Statistics(), _Statistics()
        self.count = self.differing = self.agreeing = self.positions = 0
        self.squares, self.reference_squares = _Sum(), _Sum()
        self.reference_max = 0.0
        self.max_abs = -1.0
        self.where: tuple[int, ...] | None = None
        self.batch: int | None = None
        self.expected = self.got = math.nan

    def add(self, before: Tensor | None, after: Tensor | None, batch: int) -> None:
        # One that is nested has no shape, unless it is padded.
        before, after = (None if tensor is None else _padded(tensor) for tensor in (before, after))
        only = before if before is not None else after
        assert only is not None
        if self.dtype is None:
            self.shape, self.dtype = tuple(only.shape), only.dtype
        if before is None or after is None:
            who = "second" if after is None else "first"
            self.fail(only.numel(), f"the {who} model does not return this tensor", batch)
            return
        if before.shape != after.shape:
            sizes = sorted((before.numel(), after.numel()))
            self.fail(sizes[1] - sizes[0], f"shape {tuple(before.shape)} became {tuple(after.shape)}", batch)
            self.count += sizes[0]
            return
        if before.dtype != after.dtype:
            self.problem = self.problem or f"dtype {dtype_name(before.dtype)} became {dtype_name(after.dtype)}"
        self.measure(_strided(before), _strided(after), batch)

    def fail(self, differing: int, problem: str, batch: int) -> None:
        """Note that tensors cannot be compared; ``differing`` of their elements count as different."""
        self.problem = self.problem or problem
        self.differing += max(differing, 1)
        self.count += max(differing, 1)
        self.squares.add(math.inf)
        if self.max_abs < math.inf:
            self.max_abs, self.where, self.batch = math.inf, None, batch
            self.expected = self.got = math.nan

    def measure(self, before: Tensor, after: Tensor, batch: int) -> None:
        """Add the difference of two dense tensors of the same shape."""
        differing = self.differing
        pieces = zip(before.reshape(-1).split(_PIECE), after.reshape(-1).split(_PIECE), strict=True)
        for number, (first, second) in enumerate(pieces if before.numel() else ()):
            where = self.measure_piece(first, second)
            if where is not None:
                self.batch, index = batch, number * _PIECE + where
                self.where = _place_of(index, before.shape)
        if before.is_floating_point() and before.ndim >= 2 and before.shape[1] > 1 and before.numel():
            positions = before.numel() // before.shape[1]
            self.positions += positions
            if self.differing == differing:
                self.agreeing += positions
            else:  # max is fast along an inner axis, argmax is not; one-byte floating dtypes have neither
                first, second = (t if t.itemsize > 1 else t.float() for t in (before, after))
                self.agreeing += int((first.max(dim=1).indices == second.max(dim=1).indices).sum())

    def measure_piece(self, before: Tensor, after: Tensor) -> int | None:
        """Add the difference of two flat tensors.

        Returns:
            The index of the largest difference so far if these tensors hold it, else None.
        """
        x, y = _widest(before), _widest(after)
        self.count += x.numel()
        finite = self.before.add(x.abs() if x.is_complex() else x) & self.after.add(y.abs() if y.is_complex() else y)
        whole = not (before.is_floating_point() or before.is_complex()) and before.dtype == after.dtype
        unequal = before != after if whole else x != y  # float64 cannot tell all int64 numbers apart
        if finite:
            difference, reference = y - x, x
        else:
            both = x.isfinite() & y.isfinite()
            unequal &= ~(x.isnan() & y.isnan())
            difference = torch.where(both, y - x, torch.where(unequal, math.inf, 0.0))
            reference = torch.where(both, x, 0.0)
        self.differing += int(unequal.count_nonzero())
        difference, reference = difference.abs(), reference.abs()
        self.squares.add(float(difference.dot(difference)))
        self.reference_squares.add(float(reference.dot(reference)))
        self.reference_max = max(self.reference_max, float(reference.max()))
        largest, index = difference.max(dim=0)
        if float(largest) <= self.max_abs:
            return None
        self.max_abs = float(largest)
        self.expected, self.got = (float(v[index].abs() if v.is_complex() else v[index]) for v in (x, y))
        return int(index)

    def join(self, other: _OutputAccumulator, batches: int) -> None:
        """Add what another has added up.

        Args:
            batches: how many batches came before its first one.
        """
        if self.dtype is None:
            self.shape, self.dtype = other.shape, other.dtype
        self.problem = self.problem or other.problem
        self.before.join(other.before)
        self.after.join(other.after)
        self.count += other.count
        self.differing += other.differing
        self.agreeing += other.agreeing
        self.positions += other.positions
        self.squares.join(other.squares)
        self.reference_squares.join(other.reference_squares)
        self.reference_max = max(self.reference_max, other.reference_max)
        if other.max_abs > self.max_abs:  # of equal ones the first counts
            self.max_abs, self.where, self.expected, self.got = other.max_abs, other.where, other.expected, other.got
            self.batch = None if other.batch is None else batches + other.batch

    def finish(self) -> OutputDifference:
        assert self.dtype is not None
        max_abs, squares = max(self.max_abs, 0.0), self.squares.rounded()
        return OutputDifference(
            path=self.path,
            shape=self.shape,
            dtype=self.dtype,
            before=self.before.finish(),
            after=self.after.finish(),
            max_abs=max_abs,
            where=self.where,
            batch=self.batch or 0,
            expected=self.expected,
            got=self.got,
            relative_l2=_ratio(math.sqrt(squares), math.sqrt(self.reference_squares.rounded())),
            relative_max=_ratio(max_abs, self.reference_max),
            mse=squares / self.count if self.count else 0.0,
            differing=self.differing / self.count if self.count else 0.0,
            argmax_agreement=self.agreeing / self.positions if self.positions else None,
            problem=self.problem,
        )


def _ratio(error: float, reference: float) -> float:
    """A relative error; 0 for no error, even relative to 0."""
    if error == 0:
        return 0.0
    return error / reference if reference else math.inf


def _strided(tensor: Tensor) -> Tensor:
    """The same values as a dense, strided tensor on the CPU."""
    with torch.inference_mode(tensor.is_inference()):  # some conversions write to the tensor
        if tensor.is_quantized:
            tensor = tensor.dequantize()
        if tensor.layout != torch.strided:
            tensor = tensor.to_dense()
        return tensor.data.cpu()  # else one of inference mode that was given ordinary memory (``.data``) takes no views


def _padded(tensor: Tensor) -> Tensor:
    """A nested tensor as a dense one."""
    with torch.inference_mode(tensor.is_inference()):
        return tensor.to_padded_tensor(0.0) if tensor.is_nested else tensor


def _widest(tensor: Tensor) -> Tensor:
    """The tensor in float64, or complex128 for complex numbers."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


class _Statistics:
    """Running minimum, sum and maximum of finite values."""

    def __init__(self) -> None:
        self.minimum, self.total, self.maximum, self.count = math.inf, _Sum(), -math.inf, 0

    def add(self, values: Tensor) -> bool:
        """Add the finite values of a flat tensor, and return whether all were finite."""
        total = float(values.sum())  # finite if all values are: one pass, where isfinite takes several
        finite = math.isfinite(total)
        if not finite:
            values = values[values.isfinite()]
            total = float(values.sum())
        if values.numel():
            minimum, maximum = torch.aminmax(values)
            self.minimum = min(self.minimum, float(minimum))
            self.maximum = max(self.maximum, float(maximum))
            self.total.add(total)
            self.count += values.numel()
        return finite

    def join(self, other: _Statistics) -> None:
        """Add what another has added up."""
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        self.total.join(other.total)
        self.count += other.count

    def finish(self) -> Summary:
        if not self.count:
            return Summary(math.nan, math.nan, math.nan)
        return Summary(self.minimum, self.total.rounded() / self.count, self.maximum)


class _Sum:
    """The exact sum of floating-point numbers: rounded once, whatever the order in which they were added.

    It is held as few numbers of which none reaches into the digits of another (J. R. Shewchuk, "Adaptive Precision
    Floating-Point Arithmetic", 1997).

    >>> total = _Sum()
    >>> for number in (1e16, 1.0, 1.0, -1e16):
    ...     total.add(number)
    >>> total.rounded(), 1e16 + 1.0 + 1.0 - 1e16
    (2.0, 0.0)
    """

    def __init__(self) -> None:
        self.parts: list[float] = []
        self.beyond = 0.0  # the sum of what is infinite

    def add(self, number: float) -> None:
        parts = []
        for part in self.parts:
            large, small = (part, number) if abs(part) > abs(number) else (number, part)
            number = large + small
            rest = small - (number - large)
            if rest and math.isfinite(rest):
                parts.append(rest)
        if math.isfinite(number):
            self.parts = [*parts, number] if number else parts
        else:
            self.beyond += number

    def join(self, other: _Sum) -> None:
        """Add what another has added up."""
        for part in other.parts:
            self.add(part)
        self.beyond += other.beyond

    def rounded(self) -> float:
        return self.beyond or math.fsum(self.parts)


def _place_of(index: int, shape: Sequence[int]) -> tuple[int, ...]:
    """The index along each axis of the element at ``index`` in the flattened tensor.

    ``torch.unravel_index`` does the same, but it loads sympy, which takes long.

    >>> _place_of(7, (2, 2, 3))
    (1, 0, 1)
    """
    place = []
    for size in reversed(shape):
        index, along = divmod(index, size)
        place.append(along)
    return tuple(reversed(place))
