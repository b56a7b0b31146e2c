"""Judging whether a difference between a model and its fused copy is rounding or a mistake, in up to three steps.

1. Outputs that agree within `TOLERANCE` in the model's own precision are equal.
2. An ill-conditioned network amplifies rounding: a correct fusion may differ by 1e-2 in float32.  So the plan
   is applied to a float64 copy, which amplifies 1e-16 instead of 1e-7, and three things are asked:

   - *algebra*: both float64 outputs agree to 1e-9;
   - *rounding*: every parameter of the fused model is the float64 one, rounded;
   - *precision*: the fused model strays from the float64 output no more than `PRECISION_FACTOR` times as
     far as the original does in its own precision.

   A model that casts to float32 by itself is run with those casts widened to float64 (`InFloat64`).

   A model that decides (which box is best, which class wins) is not continuous: where two scores nearly tie, the
   last bit says which comes first, and whole rows of the output change places.  No limit on errors fits that, and
   the original need not flip the same tie.  So where the outputs differ by more, algebra and precision are asked
   again *on one path*: the original is run in float64 and its decisions are written down, and the fused model and
   the original in its own precision follow them (`bnfuse.verify.discrete_choices`).
   On that path the model is continuous; the limits are the same and hold for the outputs and for every number that a
   decision was taken from, and no flip is allowed.  If all of these are as near to float64 as the original's, up to
   `PRECISION_FACTOR`, then the fused model decides otherwise only where a rounding of this size does; a loss of
   precision or a mistake shows in them.
3. Where float64 cannot be had, the difference is held against what rounding alone does to the original: its
   parameters are moved by one unit in the last place, a few times, at random.  Rounding a folded parameter
   is a perturbation of the same kind and size, so a correct fusion stays within `NOISE_FACTOR` of it
   (backward error analysis; Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 1.5).
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bnfuse.model.copying import copy_model
from bnfuse.model.describe import first_line, name_of
from bnfuse.model.pytree import map_tensors, tensors
from bnfuse.model.sandbox import Mode, is_writable, run
from bnfuse.verify.comparison import TOLERANCE, Comparison, compare_outputs, describe, tolerance_of
from bnfuse.verify.discrete_choices import Decisions

_log = logging.getLogger(__name__)

PRECISION_FACTOR = 10.0
"""How much further than the original a fused model may stray from the float64 output.

Over fourteen common networks fusing multiplied the error by 0.2 to 2.9, by luck as much as by cause; a whole
decimal digit is a loss that the caller should hear of.
"""

NOISE_FACTOR = 4.0
"""How far a difference may exceed the largest of four that moving the parameters by a unit in the last place
makes.  The fusions of fourteen common networks stayed below 1.2."""

_NOISE_RUNS = 4
_FLIPS_WHEN_PROVEN = 0.1  # share of whole-number outputs that may flip, once the algebra is proven in float64
_FLIPS_WHEN_ESTIMATED = 0.01


@dataclass(frozen=True)
class Verdict:
    """What `judge` found.

    Attributes:
        equal: whether the fused model computes what the original computes.
        judged_in: the precision that decided, such as "float32" or "float64".
        message: one readable text; of a failed verdict what differs, where, and what to do.
        comparison: of the outputs in the model's own precision.
        in_float64: of the outputs in float64, where that was needed and possible.
    """

    equal: bool
    judged_in: str
    message: str
    comparison: Comparison
    in_float64: Comparison | None = None


def judge(
    comparison: Comparison,
    original: nn.Module,
    fused: nn.Module,
    fuse_in_float64: Callable[[nn.Module], nn.Module],
    args: Iterable[Any],
    kwargs: Mapping[str, Any],
    seed: int = 0,
) -> Verdict:
    """Decide whether a difference between a model and its fused copy is rounding or a mistake.

    See the top of this file for the steps and their reasons.  Neither model is changed.

    Args:
        comparison: of the outputs of ``original`` and ``fused`` on the inputs.
        original: the model before fusing.
        fused: the model after fusing.
        fuse_in_float64: applies the same plan to a float64 copy of ``original``, in place or not.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        seed: of the random generators during the call.

    Raises:
        Exception: what ``fuse_in_float64`` raises; a model that fails in float64 is judged without.
    """
    return judge_by(Reference(original, args, kwargs, seed), comparison, fused, fuse_in_float64)


def judge_by(
    reference: "Reference",
    comparison: Comparison,
    fused: nn.Module,
    fuse_in_float64: Callable[[nn.Module], nn.Module],
    algebra_only: bool = False,
) -> Verdict:
    """The same against what is known of the original.

    Args:
        reference: the original and the call.
        comparison, fused, fuse_in_float64: as for `judge`.
        algebra_only: leave out whether the fused model is as precise as the original.

    Raises:
        Exception: as `judge`.
    """
    original = reference.original
    if comparison.within_tolerance():
        return Verdict(True, name_of(_precision(original)), "The outputs agree.", comparison)
    if not comparison.outputs:
        text = (
            "The model returns no tensor, so that there is nothing to compare.\n"
            "  what to do: check the model yourself, then fuse(..., verify=False)"
        )
        return Verdict(False, name_of(_precision(original)), text, comparison)
    if any(o.problem.startswith("dtype") for o in comparison.outputs):  # float64 would hide it
        return _failed(comparison, None, name_of(_precision(original)), comparison, "the same dtype")
    return _Judge(comparison, reference, fused, algebra_only).decide(fuse_in_float64)


class Reference:
    """What is known of an original on one call: each is found out once, when it is asked for, and kept.

    Attributes:
        original: the model, which is not changed.
        inputs: (args, kwargs) of the call.
        seed: of the random generators during the call.
        in_float64: the mode under which a float64 model runs in float64 throughout.
    """

    def __init__(self, original: nn.Module, args: Iterable[Any], kwargs: Mapping[str, Any], seed: int = 0) -> None:
        self.original, self.inputs, self.seed = original, (tuple(args), dict(kwargs)), seed
        self.precision = _precision(original)
        self.in_float64 = InFloat64()
        self._path: _Path | None = None

    def run(self, model: nn.Module, decisions: Decisions | None = None) -> Any:
        """What a model gives on the call, while its decisions are watched or replaced."""
        args, kwargs = self.inputs
        return run(model, args, kwargs, self.seed, decisions)

    def run_in_float64(self, model: nn.Module, decisions: Decisions | None = None) -> Any:
        """The same of a float64 model, on the inputs in float64."""
        args, kwargs = map_tensors(self.inputs, _to_float64)
        self.in_float64.lifted = []
        return run(model, args, kwargs, self.seed, _both(self.in_float64, decisions))

    @cached_property
    def output(self) -> Any:
        """What the original gives in its own precision."""
        return self.run(self.original)

    @cached_property
    def exact(self) -> tuple[Any, list[float], str]:
        """What the original gives in float64, what its code lifted; or why it does not run there."""
        try:
            output = self.run_in_float64(double(self.original))
        except Exception as error:  # noqa: BLE001 - foreign code, most often a dtype that it insists on
            return None, [], first_line(error)
        return output, self.in_float64.lifted, ""

    @cached_property
    def exact_noise(self) -> list[Comparison]:
        """What rounding does to the original in float64."""
        return noise(double(self.original), self.exact[0], self.run_in_float64)

    @cached_property
    def own_error(self) -> Comparison:
        """How far the original in its own precision strays from float64."""
        return _compare_values(self.exact[0], self.output)

    @cached_property
    def own_noise(self) -> list[Comparison]:
        """How far it strays if its parameters are rounded otherwise."""
        return noise(copy_model(self.original), self.exact[0], self.run)

    @cached_property
    def noise(self) -> list[Comparison]:
        """What rounding does to the original in its own precision, without float64."""
        return noise(copy_model(self.original), self.output, self.run)

    @property
    def path(self) -> "_Path":
        """The way that the original takes in float64."""
        if self._path is None:
            decisions = Decisions()
            output = self.run_in_float64(double(self.original), decisions)
            self._path = _Path(decisions, output)
        return self._path

    def follow(self, run: Callable[[nn.Module, Decisions], Any], model: nn.Module) -> Comparison | None:
        """Compare a model with the original in float64 on the way that this takes; None if it cannot go there.

        Compared are the outputs, and whatever decisions are taken from.
        """
        decisions = Decisions(self.path.decisions)
        try:
            output = run(model, decisions)
        except Exception as error:  # noqa: BLE001 - foreign code, to which another's decisions may make no sense
            _log.debug("a model does not follow the decisions of the original: %s", first_line(error))
            return None
        if not decisions.followed_to_the_end:
            return None
        return _compare_values((self.path.output, self.path.decisions.given), (output, decisions.given))

    @cached_property
    def own_error_on_path(self) -> Comparison | None:
        """How far the original in its own precision strays from float64 when it takes the same way."""
        return self.follow(self.run, self.original)

    @cached_property
    def own_noise_on_path(self) -> list[Comparison]:
        """How far it strays there if its parameters are rounded otherwise."""
        return self._noise_on_path(self.run, copy_model(self.original))

    @cached_property
    def exact_noise_on_path(self) -> list[Comparison]:
        """What rounding does to the original in float64 on its own way."""
        return self._noise_on_path(self.run_in_float64, double(self.original))

    def _noise_on_path(self, run: Callable[[nn.Module, Decisions], Any], model: nn.Module) -> list[Comparison]:
        def run_on_path(model: nn.Module) -> Any:
            decisions = Decisions(self.path.decisions)
            return run(model, decisions), decisions.given

        return noise(model, (self.path.output, self.path.decisions.given), run_on_path)


@dataclass(frozen=True)
class _Path:
    """The decisions of a run, and its output."""

    decisions: Decisions
    output: Any


@contextmanager
def _both(first: AbstractContextManager[object], second: AbstractContextManager[object] | None) -> Iterator[None]:
    with first, second or nullcontext():
        yield


class _Judge:
    """The closer look of `judge`."""

    def __init__(self, comparison: Comparison, reference: Reference, fused: nn.Module, algebra_only: bool) -> None:
        self.comparison, self.reference, self.fused = comparison, reference, fused
        self.precision = reference.precision
        self.algebra_only = algebra_only

    def decide(self, fuse_in_float64: Callable[[nn.Module], nn.Module]) -> Verdict:
        reference = self.reference
        expected, lifted, failure = reference.exact
        if failure:
            return self.by_sensitivity(failure, "")
        model = fuse_in_float64(double(reference.original))
        rounding = _wrongly_rounded(self.fused, model)
        try:
            got = reference.run_in_float64(model)
        except Exception as error:  # noqa: BLE001 - foreign code, as above
            return self.by_sensitivity(first_line(error), rounding)
        in_float64 = compare_outputs(expected, got)
        del got
        if not in_float64.within_tolerance():
            if reference.in_float64.narrowed or reference.in_float64.lifted != lifted:  # constants stay the same
                return self.by_sensitivity("the model computes in a lower precision by itself", rounding)
            exact = TOLERANCE[torch.float64]
            if not self.agrees_on_one_path(model, in_float64):
                limit = f"a relative error of at most {exact:g}, computed in float64"
                return _failed(self.comparison, in_float64, "float64", in_float64, limit)
        del model
        if rounding:
            return _failed_rounding(rounding, self.comparison, in_float64)
        if self.algebra_only:
            return Verdict(True, "float64", "The outputs agree in float64.", self.comparison, in_float64)
        return self.of_precision(in_float64)

    def agrees_on_one_path(self, model: nn.Module, in_float64: Comparison) -> bool:
        """Whether two float64 models agree where both decide alike, or as far as rounding lets them."""
        reference, limits = self.reference, (NOISE_FACTOR, 0.0, TOLERANCE[torch.float64])
        followed = reference.follow(reference.run_in_float64, model) if reference.path.decisions.found else None
        if followed is None:
            return _explained(in_float64, reference.exact_noise, *limits)
        return followed.within_tolerance() or _explained(followed, reference.exact_noise_on_path, *limits)

    def of_precision(self, in_float64: Comparison) -> Verdict:
        """The algebra holds; is the fused model also as precise as the original?"""
        reference, low = self.reference, name_of(self.precision)
        limits = (PRECISION_FACTOR, _FLIPS_WHEN_PROVEN, tolerance_of(self.precision))
        fused = _compare_values(reference.exact[0], reference.run(self.fused))
        if _explained(fused, [reference.own_error], *limits):
            text = f"The outputs agree in float64; in {low} they differ by rounding."
            return Verdict(True, "float64", text, self.comparison, in_float64)
        if self.as_precise_on_one_path():
            text = f"The outputs agree in float64; in {low} they differ by near ties that rounding decides."
            return Verdict(True, "float64", text, self.comparison, in_float64)
        own = [reference.own_error, *reference.own_noise]  # one run may be right by luck
        if _explained(fused, own, *limits):
            text = f"The outputs agree in float64; in {low} they differ by rounding."
            return Verdict(True, "float64", text, self.comparison, in_float64)
        worst = fused.worst
        error = max((o.relative_l2 for c in own for o in c.outputs if worst and o.path == worst.path), default=0)
        limit = f"at most {PRECISION_FACTOR:g} times the original's own error in {low}, {error:.1e}"
        cause = f"The fused model is right in float64 but loses precision in {low}."
        return _failed(self.comparison, in_float64, "float64", fused, limit, cause, _WIDEN)

    def as_precise_on_one_path(self) -> bool:
        """Whether the fused model is as precise as the original when both decide as the original does in float64.

        A model without decisions has but one path, on which the answer is known already.
        """
        reference = self.reference
        if not reference.path.decisions.found:
            return False
        fused, own = reference.follow(reference.run, self.fused), reference.own_error_on_path
        if fused is None or own is None:
            return False
        limits = (PRECISION_FACTOR, 0.0, tolerance_of(self.precision))
        return _explained(fused, [own], *limits) or _explained(fused, [own, *reference.own_noise_on_path], *limits)

    def by_sensitivity(self, reason: str, rounding: str) -> Verdict:
        """Without float64: does the difference exceed what rounding does to the original?"""
        _log.debug("float64 cannot decide (%s); judging by the model's sensitivity to rounding", reason)
        if rounding:
            return _failed_rounding(rounding, self.comparison, None)
        judged_in = f"{name_of(self.precision)}, against the model's own sensitivity to rounding"
        floor = tolerance_of(self.precision)
        if _explained(self.comparison, self.reference.noise, NOISE_FACTOR, _FLIPS_WHEN_ESTIMATED, floor):
            text = f"The outputs differ by rounding, judged in {judged_in}, as float64 cannot decide: {reason}."
            return Verdict(True, judged_in, text, self.comparison)
        limit = f"at most {NOISE_FACTOR:g} times the original's sensitivity to rounding (no float64: {reason})"
        return _failed(self.comparison, None, judged_in, self.comparison, limit)


def _compare_values(expected: object, got: object) -> Comparison:
    """Compare outputs of different precisions."""
    return compare_outputs(map_tensors(expected, _to_float64), map_tensors(got, _to_float64))


def _explained(found: Comparison, references: list[Comparison], factor: float, flips: float, floor: float) -> bool:
    """Whether every difference found is small, or at most ``factor`` times the largest reference difference.

    ``floor`` is a relative error that always passes.  Of whole numbers, and of tensors whose length depends
    on the data (detections), a share of ``flips`` may differ.
    """
    for output in found.outputs:
        same = [o for reference in references for o in reference.outputs if o.path == output.path]
        if output.exact or output.problem:
            flipped = max((o.differing for o in same if o.exact or o.problem), default=0.0)
            if output.differing > max(flips, factor * flipped):
                return False
        elif not output.within(floor):
            mse = max((o.mse for o in same), default=0.0)
            max_abs = max((o.max_abs for o in same), default=0.0)
            if output.mse > factor**2 * mse or output.max_abs > factor * max_abs:
                return False
    return True


def noise(model: nn.Module, expected: object, run: Callable[[nn.Module], Any]) -> list[Comparison]:
    """Compare ``expected`` with outputs of a model whose parameters are moved by one unit in the last place.

    ``model`` is a copy that may be written to.  Whole numbers in buffers stay: they may be indices or masks.
    """
    generator = torch.Generator().manual_seed(0)
    both: list[Tensor] = [*model.parameters(), *model.buffers()]
    movable = [(t, t.detach().double()) for t in both if t.is_floating_point() and is_writable(t)]
    comparisons = []
    for _ in range(_NOISE_RUNS):
        for tensor, exact in movable:
            signs = torch.randint(0, 2, exact.shape, generator=generator).to(exact) * 2 - 1
            moved = exact * (1 + torch.finfo(tensor.dtype).eps * signs)
            if not isinstance(tensor, nn.Parameter):
                moved = torch.where(exact == exact.round(), exact, moved)
            with torch.no_grad():
                tensor.copy_(moved)
        comparisons.append(_compare_values(expected, run(model)))
    return comparisons


class InFloat64(Mode):
    """Runs a float64 model in float64 throughout, also where its code asks for float32 or less.

    Operators are given float64 for every narrower floating dtype and tensor, but not where they return a
    view of a tensor or write to it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.narrowed = False
        """Whether some operator was given float64 and still returned less."""
        self.lifted: list[float] = []
        """Sums of the narrower tensors that were made of numbers from outside, from Python or numpy."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload) or func is torch.ops.aten.view.dtype:
            return func(*args, **kwargs)
        aliased = {argument.name for argument in func._schema.arguments if argument.alias_info is not None}
        names = [argument.name for argument in func._schema.arguments]
        args = tuple(_widened(value, name not in aliased) for name, value in zip(names, args, strict=False))
        kwargs = {name: _widened(value, name not in aliased) for name, value in kwargs.items()}
        output = func(*args, **kwargs)
        given = tensors((args, kwargs))
        if func is torch.ops.aten.lift_fresh.default and output.dtype != _wide(output.dtype):
            self.lifted.append(float(output.sum().abs()))
            return _to_float64(output)
        if not given:
            return _widened(output, True)
        if any(tensor.dtype in (torch.float64, torch.complex128) for _, tensor in given):
            self.narrowed |= any(tensor.dtype != _wide(tensor.dtype) for _, tensor in tensors(output))
        return output


def _wide(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else dtype


def _widened(value: Any, and_tensors: bool) -> Any:
    if isinstance(value, torch.dtype):
        return _wide(value)
    if isinstance(value, Tensor):
        return _to_float64(value) if and_tensors else value
    return [_widened(item, and_tensors) for item in value] if isinstance(value, (list, tuple)) else value


def _to_float64(tensor: Tensor) -> Tensor:
    return tensor.to(_wide(tensor.dtype))


def double(model: nn.Module) -> nn.Module:
    """A float64 copy, with the tensors that modules hold as plain attributes."""
    model = copy_model(model).double()
    own = vars(nn.Module()).keys()
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if name not in own and tensors(value):
                vars(module)[name] = map_tensors(value, _to_float64)
    return model


def _wrongly_rounded(fused: nn.Module, in_float64: nn.Module) -> str:
    """Describe the first parameter that is not the float64 one rounded to its own dtype, or return "".

    Two units in the last place are allowed, and one of the smallest number.
    """
    values, exact = (dict(_rewritable(model)) for model in (fused, in_float64))
    if values.keys() != exact.keys():
        return f"  parameters of only one of the two: {', '.join(sorted(values.keys() ^ exact.keys()))}"
    for name, value in values.items():
        limits = torch.finfo(value.dtype)
        expected, got = exact[name].detach().double(), value.detach().double()
        if expected.shape != got.shape:
            shapes = tuple(expected.shape), tuple(got.shape)
            return f"  parameter: {name}\n  expected:  shape {shapes[0]}\n  got:       shape {shapes[1]}"
        allowed = 2 * limits.eps * expected.abs() + limits.tiny * limits.eps
        wrong = ~(((got - expected).abs() <= allowed) | (got == expected) | (got.isnan() & expected.isnan()))
        if wrong.any():
            index = tuple(wrong.nonzero()[0].tolist())
            return (
                f"  parameter: {name}, {name_of(value.dtype)}, at {list(index)}\n"
                f"  expected:  {float(expected[index])!r}\n"
                f"  got:       {float(got[index])!r}"
            )
    return ""


def _rewritable(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and the statistics of norms that stay."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        statistic = name.endswith(("running_mean", "running_var"))
        if tensor.is_floating_point() and (isinstance(tensor, nn.Parameter) or statistic):
            yield name, tensor


def _precision(model: nn.Module) -> torch.dtype:
    """The coarsest floating dtype among the parameters."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


# ---------------------------------------------------------------- text


_KEEP = (
    "  what to do: the model was left as it was.  print(bnfuse.plan(model, inputs)) shows every fusion, and\n"
    "              fuse(model, inputs, keep=[...]) leaves norms alone.\n"
)
_REPORT = _KEEP + "              Please report the model: this is a mistake of bnfuse."
_WIDEN = _KEEP + "              Or fuse before the model is converted: fuse(model.float(), inputs)."


def _failed(
    comparison: Comparison,
    in_float64: Comparison | None,
    judged_in: str,
    shown: Comparison,
    limit: str,
    cause: str = "The fused model does not compute what the original computes.",
    advice: str = _REPORT,
) -> Verdict:
    worst = shown.worst
    assert worst is not None
    found = worst.problem or describe(worst)
    text = (
        f"{cause}\n"
        f"  output:     {worst.path or 'the tensor'}, shape {worst.shape}, {name_of(worst.dtype)}\n"
        f"  expected:   {limit}\n"
        f"  got:        {found}\n{advice}"
    )
    return Verdict(False, judged_in, text, comparison, in_float64)


def _failed_rounding(rounding: str, comparison: Comparison, in_float64: Comparison | None) -> Verdict:
    cause = "A parameter of the fused model is not the rounded value of the same fusion in float64."
    return Verdict(False, "float64", f"{cause}\n{rounding}\n{_REPORT}", comparison, in_float64)
