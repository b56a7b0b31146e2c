"""Judging whether a difference between a model and its fused copy is rounding or a mistake, in up to three steps.

1. Outputs that agree within `TOLERANCE` in the model's own precision are equal.
2. An ill-conditioned network amplifies rounding: a correct fusion may differ by 1e-2 in float32. So a float64 copy is
   fused in the same way, which amplifies 1e-16 instead of 1e-7, and three questions are asked:

   - *algebra*: do both float64 outputs agree to 1e-9?
   - *rounding*: is every parameter of the fused model the float64 one, rounded?
   - *precision*: is the fused model at most `PRECISION_FACTOR` times as far from the float64 output as the original is
     in its own precision?

   A model that casts to float32 by itself is run with those casts widened to float64 (`InFloat64`), and with the
   constants that it makes in its own precision (`Constants`), since the plan was made for these.

   A model that makes discrete choices (which box is best, which class wins) is not continuous: where two scores nearly
   tie, the last bit tells which comes first, and whole rows of the output change places. No limit on errors fits that,
   and the original need not flip the same tie. So where the outputs differ by more, algebra and precision are asked
   again *on one path*: the original is run in float64, its choices are recorded, and the fused model and the original
   in its own precision repeat them (`bnfuse.verify.discrete_choices`). On that path the model is continuous. The limits
   are the same, they hold for the outputs and for every number that a choice was made from, and no flip is allowed. If
   all of these are as near to float64 as the original's, up to `PRECISION_FACTOR`, then the fused model chooses
   otherwise only where a rounding of this size does. A loss of precision or a mistake shows in these numbers.
3. Where float64 cannot be had, the difference is compared with what rounding alone does to the original: its parameters
   are moved by one unit in the last place, a few times, at random. Rounding a folded parameter is a perturbation of the
   same kind and size, so a correct fusion stays within `NOISE_FACTOR` of it (backward error analysis; Higham, Accuracy
   and Stability of Numerical Algorithms, 2002, section 1.5).

How a model is fused is not known here: the caller gives a function that fuses a float64 copy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import nn

from bnfuse.errors import InputError
from bnfuse.model.describe import dtype_name, first_line
from bnfuse.model.sandbox import run
from bnfuse.verify import verdict
from bnfuse.verify.comparison import TOLERANCE, Comparison, tolerance_of
from bnfuse.verify.float64 import float64_copy
from bnfuse.verify.measure import compare_outputs
from bnfuse.verify.own_memory import MemoryWatch
from bnfuse.verify.reference import Reference, compare_in_float64
from bnfuse.verify.rounding import wrongly_rounded
from bnfuse.verify.verdict import Verdict

_log = logging.getLogger(__name__)

PRECISION_FACTOR = 10.0
"""How many times further than the original a fused model may be from the float64 output.

Over fourteen common networks fusing multiplied the error by 0.2 to 2.9, as much by chance as by cause. A whole decimal
digit is a loss that the caller should hear of.
"""

NOISE_FACTOR = 4.0
"""How many times larger a difference may be than the largest of four that come from moving the parameters by one unit
in the last place. The fusions of fourteen common networks stayed below 1.2."""

_FLIPS_WHEN_PROVEN = 0.1
"""Share of integral outputs that may flip once the algebra is proven in float64."""

_FLIPS_WHEN_ESTIMATED = 0.01
"""Share of integral outputs that may flip where float64 cannot be had."""

FuseInFloat64 = Callable[[nn.Module], nn.Module]
"""Fuses a float64 copy of the original in the same way, in place or not, and returns the fused model."""


def same_outputs(
    reference: Reference,
    fused: nn.Module,
    fuse_in_float64: FuseInFloat64,
    *,
    algebra_only: bool = False,
    traces: bool = True,
    writes: bool = True,
    separate: Callable[[], nn.Module] | None = None,
    copied: bool = False,
) -> Verdict:
    """Run a fused model and decide whether it computes what the original computes.

    Args:
        reference: the original and the call.
        fused: the model after fusing.
        fuse_in_float64: fuses a float64 copy of the original in the same way, in place or not.
        algebra_only: leave out whether the fused model is as precise as the original.
        traces, writes: as for `bnfuse.model.sandbox.run`, of ``fused``.
        separate: for a model fused in place, where ``fused`` is the original itself: turns it into the original again
            and returns a fused copy. Called only if the outputs need a closer look.
        copied: ``fused`` is a copy, which must run on parameters and buffers of its own.

    Raises:
        InputError: it runs on those of the original.
        Exception: what ``fuse_in_float64`` or ``separate`` raises. A model that raises is part of the verdict.
    """
    args, kwargs = reference.inputs
    watch = MemoryWatch(reference.original) if copied else None
    try:
        output = run(fused, args, kwargs, reference.seed, watch, traces, writes, reference.gradients)
    except Exception as error:  # noqa: BLE001 - whatever the model's own code raises
        _check_apart(watch, fused)
        return verdict.does_not_run(type(fused).__name__, dtype_name(reference.precision), error)
    _check_apart(watch, fused)
    comparison = compare_outputs(reference.output, output)
    if separate is not None and not comparison.within_tolerance():
        fused = separate()
    return judge(reference, comparison, fused, fuse_in_float64, algebra_only)


def _check_apart(watch: MemoryWatch | None, fused: nn.Module) -> None:
    if watch is not None and watch.seen is not None:
        raise InputError(
            f"A copy of {type(fused).__name__} still runs layers of the model itself: it reads {watch.seen} of the "
            f"original.\nA function that both share refers to the original: a forward that was replaced, a hook, a "
            f"method of the class, or a variable outside of the model.\nFuse it in place, "
            f"bnfuse.fuse(model, inputs, inplace=True); or undo the replacement first, as with del model.forward."
        )


def judge(
    reference: Reference,
    comparison: Comparison,
    fused: nn.Module,
    fuse_in_float64: FuseInFloat64,
    algebra_only: bool = False,
) -> Verdict:
    """Decide whether a difference between a model and its fused copy is rounding or a mistake.

    The steps and their reasons are at the top of this file. Neither model is changed.

    Args:
        reference: the original and the call.
        comparison: the outputs of the original and of ``fused`` on the call, compared.
        fused: the model after fusing.
        fuse_in_float64: fuses a float64 copy of the original in the same way, in place or not.
        algebra_only: leave out whether the fused model is as precise as the original.

    Raises:
        Exception: what ``fuse_in_float64`` raises. A model that does not run in float64 is judged without it.
    """
    precision = dtype_name(reference.precision)
    if comparison.within_tolerance():
        return Verdict(True, precision, "The outputs agree.", comparison)
    if not comparison.outputs:
        return verdict.no_tensor(comparison, precision)
    if any(o.problem.startswith("dtype") for o in comparison.outputs):  # float64 would hide it
        return verdict.outputs_differ(comparison, precision, "the same dtype", comparison)
    return _Judge(comparison, reference, fused, algebra_only).decide(fuse_in_float64)


class _Judge:
    """The closer look of `judge`."""

    def __init__(self, comparison: Comparison, reference: Reference, fused: nn.Module, algebra_only: bool) -> None:
        self.comparison, self.reference, self.fused = comparison, reference, fused
        self.precision = dtype_name(reference.precision)
        self.tolerance = tolerance_of(reference.precision)
        self.algebra_only = algebra_only

    def decide(self, fuse_in_float64: FuseInFloat64) -> Verdict:
        reference = self.reference
        expected, lifted, failure = reference.exact
        if failure:
            return self.by_sensitivity(failure, "")
        model = fuse_in_float64(float64_copy(reference.original))
        rounding = wrongly_rounded(self.fused, model)
        try:
            got = reference.run_in_float64(model)
        except Exception as error:  # noqa: BLE001 - the model's own code, which may insist on another dtype
            return self.by_sensitivity(first_line(error), rounding)
        in_float64 = compare_outputs(expected, got)
        del got
        if not in_float64.within_tolerance():
            # A number made outside torch is computed in less than float64, unless it is a constant.
            if reference.in_float64.narrowed or reference.in_float64.lifted != lifted:
                return self.by_sensitivity("the model computes in a lower precision by itself", rounding)
            if not self.agrees_on_one_path(model, in_float64):
                limit = f"a relative error of at most {TOLERANCE[torch.float64]:g}, computed in float64"
                return verdict.outputs_differ(self.comparison, "float64", limit, in_float64, in_float64)
        del model
        if rounding:
            return verdict.parameter_differs(rounding, self.comparison, in_float64)
        if self.algebra_only:
            return self.equal("The outputs agree in float64.", in_float64)
        return self.of_precision(in_float64)

    def equal(self, text: str, in_float64: Comparison) -> Verdict:
        return Verdict(True, "float64", text, self.comparison, in_float64)

    def agrees_on_one_path(self, model: nn.Module, in_float64: Comparison) -> bool:
        """Whether two float64 models agree if both make the same choices, or differ no more than rounding makes them.

        Args:
            model: the fused model in float64.
            in_float64: its outputs compared with the original's when each makes its own choices.
        """
        reference, limits = self.reference, (NOISE_FACTOR, 0.0, TOLERANCE[torch.float64])
        followed = reference.follow(reference.run_in_float64, model) if reference.path.choices.made else None
        if followed is None:
            return _explained(in_float64, reference.exact_noise, *limits)
        return followed.within_tolerance() or _explained(followed, reference.exact_noise_on_path, *limits)

    def of_precision(self, in_float64: Comparison) -> Verdict:
        """The algebra holds; is the fused model also as precise as the original?"""
        reference, limits = self.reference, (PRECISION_FACTOR, _FLIPS_WHEN_PROVEN, self.tolerance)
        fused = compare_in_float64(reference.exact[0], reference.run(self.fused))
        by_rounding = f"The outputs agree in float64; in {self.precision} they differ by rounding."
        if _explained(fused, [reference.own_error], *limits):
            return self.equal(by_rounding, in_float64)
        if self.as_precise_on_one_path():
            text = f"The outputs agree in float64; in {self.precision} they differ by near ties that rounding decides."
            return self.equal(text, in_float64)
        own = [reference.own_error, *reference.own_noise]  # the original may be precise by chance in a single run
        if _explained(fused, own, *limits):
            return self.equal(by_rounding, in_float64)
        worst = fused.worst
        error = max((o.relative_l2 for c in own for o in c.outputs if worst and o.path == worst.path), default=0)
        limit = f"at most {PRECISION_FACTOR:g} times the original's own error in {self.precision}, {error:.1e}"
        return verdict.loses_precision(self.comparison, self.precision, limit, fused, in_float64)

    def as_precise_on_one_path(self) -> bool:
        """Whether the fused model is as precise as the original if both make the original's choices in float64.

        False for a model without choices: it has only one path, on which it was not as precise.
        """
        reference = self.reference
        if not reference.path.choices.made:
            return False
        fused, own = reference.follow(reference.run, self.fused), reference.own_error_on_path
        if fused is None or own is None:
            return False
        limits = (PRECISION_FACTOR, 0.0, self.tolerance)
        return _explained(fused, [own], *limits) or _explained(fused, [own, *reference.own_noise_on_path], *limits)

    def by_sensitivity(self, reason: str, rounding: str) -> Verdict:
        """Without float64: is the difference larger than what rounding does to the original?

        Args:
            reason: why float64 cannot decide.
            rounding: what `wrongly_rounded` found.
        """
        _log.debug("float64 cannot decide (%s); judging by the model's sensitivity to rounding", reason)
        if rounding:
            return verdict.parameter_differs(rounding, self.comparison)
        judged_in = f"{self.precision}, against the model's own sensitivity to rounding"
        if _explained(self.comparison, self.reference.noise, NOISE_FACTOR, _FLIPS_WHEN_ESTIMATED, self.tolerance):
            text = f"The outputs differ by rounding, judged in {judged_in}, as float64 cannot decide: {reason}."
            return Verdict(True, judged_in, text, self.comparison)
        limit = f"at most {NOISE_FACTOR:g} times the original's sensitivity to rounding (no float64: {reason})"
        return verdict.outputs_differ(self.comparison, judged_in, limit, self.comparison)


def _explained(found: Comparison, references: list[Comparison], factor: float, flips: float, floor: float) -> bool:
    """Whether every difference found is small, or at most ``factor`` times the largest reference difference.

    Args:
        flips: share of the elements that may always differ, of integers and of tensors whose length depends on the data
            (detections).
        floor: relative error that is always allowed.
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
