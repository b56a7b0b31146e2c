"""Comparing two models: `compare` runs them, `compare_outputs` measures how far their outputs lie apart."""

import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnfuse.errors import InputError
from bnfuse.model.describe import name_of
from bnfuse.model.pytree import map_tensors, tensors
from bnfuse.model.sandbox import run

_log = logging.getLogger(__name__)

TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 1e-9,
    torch.float32: 2e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
"""The relative error, by precision, up to which outputs are equal without a closer look.

Of float32 about 170 units in the last place; of the half precisions one, since there a mistake hides easily
and the closer look costs little beside a wrong answer.
"""


@dataclass(frozen=True)
class Summary:
    """Smallest, mean and largest finite value of a tensor (of the magnitude, for complex numbers)."""

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
    """How far one output tensor of two models lies apart; all errors are computed in float64.

    Where NaN or an infinity stands in one output it must stand in the other: then that element is left out,
    else every error is infinite.

    Attributes:
        path: where the tensor stands in the output, as `bnfuse.model.tree.tensors` writes it.
        shape: of the first batch.
        dtype: of the first model's output.
        before: summary of the first model's output.
        after: summary of the second model's output.
        max_abs: largest absolute difference.
        where: index of the largest difference, None for an empty tensor.
        batch: number of the batch in which it lies.
        expected: the first model's value there (the magnitude, for complex numbers).
        got: the second model's value there.
        relative_l2: ``‖after - before‖ / ‖before‖``.
        relative_max: ``max|after - before| / max|before|``.
        mse: mean squared difference.
        differing: share of elements, 0 to 1, that are not exactly equal.
        argmax_agreement: share, 0 to 1, of positions with the same arg-max along axis 1.  None where that
            means nothing: fewer than two axes, a single class, whole numbers, booleans and complex numbers.
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
        """Whether the tensor holds whole numbers or booleans, which are compared exactly."""
        return not (self.dtype.is_floating_point or self.dtype.is_complex)

    def within(self, tolerance: float) -> bool:
        """Whether the relative errors stay within ``tolerance`` (whole numbers: whether all are the same)."""
        if self.problem or self.exact:
            return not self.problem and self.differing == 0
        return self.relative_l2 <= tolerance and self.relative_max <= tolerance


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured: one entry per output tensor, and accuracies where labels were given.

    Attributes:
        outputs: one difference per output tensor.
        batches: how many batches were compared.
        samples: the length of the first output's first axis, summed over the batches.
        accuracy_before: of the first model; None without labels, or without an output (samples, classes).
        accuracy_after: of the second model.
    """

    outputs: tuple[OutputDifference, ...]
    batches: int = 1
    samples: int = 0
    accuracy_before: Accuracy | None = None
    accuracy_after: Accuracy | None = None

    @property
    def argmax_agreement(self) -> float | None:
        """Share of samples with the same arg-max, in the first output that has classes."""
        return next((o.argmax_agreement for o in self.outputs if o.argmax_agreement is not None), None)

    @property
    def worst(self) -> OutputDifference | None:
        """The output furthest from being equal."""
        return max(
            self.outputs,
            key=lambda o: (not o.within(tolerance_of(o.dtype)), max(o.relative_l2, o.relative_max)),
            default=None,
        )

    def within_tolerance(self) -> bool:
        """Whether every output is equal within `TOLERANCE`; no output tensor at all is not equal."""
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
    """The entry of `TOLERANCE` for ``dtype``; a complex number counts as its parts, whole numbers as 0."""
    if dtype.is_complex:
        dtype = dtype.to_real()
    if not dtype.is_floating_point:
        return 0.0
    return TOLERANCE.get(dtype, torch.finfo(dtype).eps)


# ---------------------------------------------------------------- measuring


def compare(before: nn.Module, after: nn.Module, inputs: object) -> Comparison:
    """Run two models on the same inputs in evaluation mode and measure how far their outputs lie apart.

    Both models see the same random state, each its own copy of the inputs, moved to the model's device, and
    both are left as they were.  Outputs are not kept from one batch to the next.

    Args:
        before: the model to compare with.
        after: the model to compare.
        inputs: a tensor (the only argument), a tuple (positional arguments) or a dict (keyword arguments) is
            ONE call.  Anything else that can be iterated, such as a list, a generator or a ``DataLoader``,
            gives BATCHES: each is again a tensor, a tuple or list of positional arguments, or a dict; a pair
            whose second member is an integer tensor of shape (N,), N being the length of the first member's
            first axis, is ``(inputs, labels)``.  One call that takes a list is written ``([a, b],)``.

    Raises:
        InputError: ``before`` or ``after`` is no module, ``inputs`` is of another form or gives no batch, or
            a model does not run on it.

    >>> model = nn.Linear(2, 3)
    >>> compare(model, model, torch.ones(4, 2)).within_tolerance()
    True
    """
    for name, model in (("before", before), ("after", after)):
        if not isinstance(model, nn.Module):
            raise InputError(f"compare() takes two modules\n  got:      {name} is a {type(model).__name__}")
    accumulator = _Accumulator()
    single = isinstance(inputs, (Tensor, tuple, Mapping))
    batches = [inputs] if single else inputs
    if not isinstance(batches, Iterable) or isinstance(batches, (str, bytes)):
        raise InputError(
            "compare() cannot read its inputs\n"
            "  expected: a tensor, a tuple of arguments, a dict of arguments, or an iterable of batches\n"
            f"  got:      {type(inputs).__name__}"
        )
    for number, batch in enumerate(batches):
        labels = None if single else _labels(batch)
        args, kwargs = _call(batch[0] if labels is not None else batch)
        outputs = []
        for name, model in (("before", before), ("after", after)):
            try:
                outputs.append(run(model, _on_device_of(model, args), _on_device_of(model, kwargs), number))
            except Exception as error:
                raise InputError(_not_running(name, model, number, single, args, kwargs, error)) from error
        accumulator.add(outputs[0], outputs[1], labels)
    if not accumulator.batches:
        raise InputError("compare() was given no batch: the iterable is empty, or it was used up before")
    return accumulator.finish()


def compare_outputs(before: object, after: object) -> Comparison:
    """Measure how far two outputs lie apart: whatever two models returned for the same input.

    >>> print(compare_outputs(torch.ones(2), torch.ones(2)).outputs[0].max_abs)
    0.0
    """
    accumulator = _Accumulator()
    accumulator.add(before, after, None)
    return accumulator.finish()


def _labels(batch: Any) -> Tensor | None:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        return None
    labels, first = batch[1], tensors(batch[0])
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    fits = bool(first) and first[0][1].ndim > 0 and labels.shape == first[0][1].shape[:1]
    return labels if whole and fits else None


def _call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})


def _on_device_of(model: nn.Module, inputs: Any) -> Any:
    parameter = next(model.parameters(), None)
    return inputs if parameter is None else map_tensors(inputs, lambda tensor: tensor.to(parameter.device))


def _not_running(
    name: str, model: nn.Module, number: int, single: bool, args: Any, kwargs: Any, error: Exception
) -> str:
    given = [*tensors(args), *tensors(kwargs)]
    shapes = ", ".join(f"{path} {tuple(tensor.shape)} {name_of(tensor.dtype)}" for path, tensor in given)
    hint = "" if single else "\n  a list is read as batches; pass a list that is one argument as ([a, b],)"
    place = "" if single else f" batch {number} of"
    return (
        f"compare() could not run `{name}` ({type(model).__name__}) on{place} the inputs\n"
        f"  inputs:   {shapes or 'no tensor'}\n"
        f"  error:    {type(error).__name__}: {str(error).strip()}{hint}"
    )


class _Accumulator:
    """Adds up the differences of all outputs over batches, and who classified what correctly."""

    def __init__(self) -> None:
        self.outputs: dict[str, _OutputAccumulator] = {}
        self.batches = 0
        self.samples = 0
        self.labelled = 0
        self.classes = 0
        self.correct = [[0, 0], [0, 0]]  # of each model: among the first, among the first five

    def add(self, before: object, after: object, labels: Tensor | None) -> None:
        first, second = dict(tensors(before)), dict(tensors(after))
        for path in first | second:
            accumulator = self.outputs.setdefault(path, _OutputAccumulator(path))
            accumulator.add(first.get(path), second.get(path), self.batches)
        if first and next(iter(first.values())).ndim:
            self.samples += next(iter(first.values())).shape[0]
        self.batches += 1
        if labels is not None:
            self.classify(first, second, labels)

    def classify(self, first: dict[str, Tensor], second: dict[str, Tensor], labels: Tensor) -> None:
        for path, logits in first.items():
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
        if not self.labelled:
            return None
        first, five = (count / self.labelled for count in self.correct[model])
        return Accuracy(first, five if self.classes >= 5 else None)

    def finish(self) -> Comparison:
        outputs = tuple(output.finish() for output in self.outputs.values())
        return Comparison(outputs, self.batches, self.samples, self.accuracy(0), self.accuracy(1))


_PIECE = 2**18
"""Numbers that are compared at a time: in float64 they fit into a cache."""


class _Statistics:
    """Running minimum, sum and maximum of finite values."""

    def __init__(self) -> None:
        self.minimum, self.total, self.maximum, self.count = math.inf, 0.0, -math.inf, 0

    def add(self, values: Tensor) -> bool:
        """Add a flat tensor, and tell whether all of it was finite."""
        total = float(values.sum())  # one pass, where looking for the finite ones takes several
        finite = math.isfinite(total)
        if not finite:
            values = values[values.isfinite()]
            total = float(values.sum())
        if values.numel():
            minimum, maximum = torch.aminmax(values)
            self.minimum = min(self.minimum, float(minimum))
            self.maximum = max(self.maximum, float(maximum))
            self.total += total
            self.count += values.numel()
        return finite

    def finish(self) -> Summary:
        if not self.count:
            return Summary(math.nan, math.nan, math.nan)
        return Summary(self.minimum, self.total / self.count, self.maximum)


class _OutputAccumulator:
    """Adds up the difference of one output tensor over batches."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.shape: tuple[int, ...] = ()
        self.dtype: torch.dtype | None = None
        self.problem = ""
        self.before, self.after = _Statistics(), _Statistics()
        self.count = self.differing = self.agreeing = self.positions = 0
        self.squares = self.reference_squares = self.reference_max = 0.0
        self.max_abs = -1.0
        self.where: tuple[int, ...] | None = None
        self.batch = 0
        self.expected = self.got = math.nan

    def add(self, before: Tensor | None, after: Tensor | None, batch: int) -> None:
        only = before if before is not None else after
        assert only is not None
        if self.dtype is None:
            self.shape, self.dtype = tuple(only.shape), only.dtype
        if before is None or after is None:
            who = "second" if after is None else "first"
            self.fail(only.numel(), f"the {who} model does not return this tensor")
            return
        if before.shape != after.shape:
            sizes = sorted((before.numel(), after.numel()))
            self.fail(sizes[1] - sizes[0], f"shape {tuple(before.shape)} became {tuple(after.shape)}")
            self.count += sizes[0]
            return
        if before.dtype != after.dtype:
            self.problem = self.problem or f"dtype {name_of(before.dtype)} became {name_of(after.dtype)}"
        self.measure(_strided(before), _strided(after), batch)

    def fail(self, differing: int, problem: str) -> None:
        self.problem = self.problem or problem
        self.differing += max(differing, 1)
        self.count += max(differing, 1)
        self.max_abs = self.squares = math.inf
        self.where = None

    def measure(self, before: Tensor, after: Tensor, batch: int) -> None:
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
            else:  # max, unlike argmax, runs at full speed along an inner axis; some dtypes have neither
                first, second = (t if t.itemsize > 1 else t.float() for t in (before, after))
                self.agreeing += int((first.max(dim=1).indices == second.max(dim=1).indices).sum())

    def measure_piece(self, before: Tensor, after: Tensor) -> int | None:
        """Add what flat tensors tell, and return where the largest difference so far is, if it is in them."""
        x, y = _widest(before), _widest(after)
        self.count += x.numel()
        finite = self.before.add(x.abs() if x.is_complex() else x) & self.after.add(y.abs() if y.is_complex() else y)
        whole = not (before.is_floating_point() or before.is_complex()) and before.dtype == after.dtype
        unequal = before != after if whole else x != y  # float64 does not hold every int64
        if finite:
            difference, reference = y - x, x
        else:
            both = x.isfinite() & y.isfinite()
            unequal &= ~(x.isnan() & y.isnan())
            difference = torch.where(both, y - x, torch.where(unequal, math.inf, 0.0))
            reference = torch.where(both, x, 0.0)
        self.differing += int(unequal.count_nonzero())
        difference, reference = difference.abs(), reference.abs()
        self.squares += float(difference.dot(difference))
        self.reference_squares += float(reference.dot(reference))
        self.reference_max = max(self.reference_max, float(reference.max()))
        largest, index = difference.max(dim=0)
        if float(largest) <= self.max_abs:
            return None
        self.max_abs = float(largest)
        self.expected, self.got = (float(v[index].abs() if v.is_complex() else v[index]) for v in (x, y))
        return int(index)

    def finish(self) -> OutputDifference:
        assert self.dtype is not None
        max_abs = max(self.max_abs, 0.0)
        return OutputDifference(
            path=self.path,
            shape=self.shape,
            dtype=self.dtype,
            before=self.before.finish(),
            after=self.after.finish(),
            max_abs=max_abs,
            where=self.where,
            batch=self.batch,
            expected=self.expected,
            got=self.got,
            relative_l2=_ratio(math.sqrt(self.squares), math.sqrt(self.reference_squares)),
            relative_max=_ratio(max_abs, self.reference_max),
            mse=self.squares / self.count if self.count else 0.0,
            differing=self.differing / self.count if self.count else 0.0,
            argmax_agreement=self.agreeing / self.positions if self.positions else None,
            problem=self.problem,
        )


def _ratio(error: float, reference: float) -> float:
    if error == 0:
        return 0.0
    return error / reference if reference else math.inf


def _strided(tensor: Tensor) -> Tensor:
    """The same values as an ordinary dense tensor on the CPU."""
    if tensor.is_nested:
        tensor = tensor.to_padded_tensor(0.0)
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    return tensor.detach().cpu()


def _widest(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


# ---------------------------------------------------------------- running


def _place_of(index: int, shape: Sequence[int]) -> tuple[int, ...]:
    """The indices along each axis of an element, by its place in the flattened tensor.

    ``torch.unravel_index`` does the same and loads sympy.

    >>> _place_of(7, (2, 2, 3))
    (1, 0, 1)
    """
    place = []
    for size in reversed(shape):
        index, along = divmod(index, size)
        place.append(along)
    return tuple(reversed(place))


# ---------------------------------------------------------------- judging


def _text(comparison: Comparison) -> str:
    lines = []
    if comparison.batches > 1:
        lines.append(f"{comparison.batches} batches, {comparison.samples} samples")
    for o in comparison.outputs:
        lines.append(f"output {o.path}".rstrip() + f": shape {o.shape}, {name_of(o.dtype)}")
        lines.append(f"  {'':8}{'minimum':>12} {'mean':>12} {'maximum':>12}")
        for name, s in (("before", o.before), ("after", o.after)):
            lines.append(f"  {name:8}{s.minimum:12.5g} {s.mean:12.5g} {s.maximum:12.5g}")
        lines.append(f"  {o.problem or describe(o)}")
        if o.argmax_agreement is not None:
            lines.append(f"  same arg-max {o.argmax_agreement:.2%}")
    for name, accuracy in (("before", comparison.accuracy_before), ("after", comparison.accuracy_after)):
        if accuracy:
            five = "" if accuracy.top5 is None else f", top-5 {accuracy.top5:.2%}"
            lines.append(f"accuracy {name:6} top-1 {accuracy.top1:.2%}{five}")
    equal = "equal within tolerance" if comparison.within_tolerance() else "NOT equal within tolerance"
    return "\n".join([*lines, equal if comparison.outputs else "no tensor to compare"])


def describe(output: OutputDifference) -> str:
    if output.exact:
        return f"{output.differing:.2%} of the elements differ"
    place = "" if output.where is None else f" at {list(output.where)}"
    place += f" of batch {output.batch}" if output.batch else ""
    values = f" ({output.expected:.6g} became {output.got:.6g})" if output.max_abs else ""
    return (
        f"relative L2 error {output.relative_l2:.2e}, mean squared error {output.mse:.2e}, "
        f"largest difference {output.max_abs:.2e}{place}{values}"
    )


def _plain_data(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_data(item) for item in value]
    if isinstance(value, torch.dtype):
        return name_of(value)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
