"""What a judge of two models concludes, and the texts of failed verdicts."""

from __future__ import annotations

from dataclasses import dataclass

from bnfuse.model.describe import dtype_name
from bnfuse.verify.comparison import Comparison


@dataclass(frozen=True)
class Verdict:
    """Whether a fused model computes what the original computes.

    Attributes:
        equal: whether it does.
        judged_in: the precision that decided, such as "float32" or "float64".
        message: one readable text; for a failed verdict what differs, where, and what to do.
        comparison: the outputs compared in the model's own precision; without outputs if the fused model does not run.
        in_float64: the outputs compared in float64, where that was needed and possible.
        error: what the fused model raised, if it does not run.
    """

    equal: bool
    judged_in: str
    message: str
    comparison: Comparison
    in_float64: Comparison | None = None
    error: Exception | None = None

    @property
    def nothing_compared(self) -> bool:
        """Whether both models ran and neither returned a tensor."""
        return self.error is None and not self.comparison.outputs


_KEEP = (
    "  what to do: the model was left as it was.  print(bnfuse.plan(model, inputs)) shows every fusion, and\n"
    "              fuse(model, inputs, keep=[...]) leaves norms alone.\n"
)
_REPORT = _KEEP + "              Please report the model: this is a mistake of bnfuse."
_FUSE_IN_FLOAT32 = _KEEP + "              Or fuse before the model is converted: fuse(model.float(), inputs)."


def does_not_run(model: str, judged_in: str, error: Exception) -> Verdict:
    """The verdict on a fused model that raises where the original ran; ``model`` is the name of its class."""
    text = f"The fused {model} does not run: {type(error).__name__}: {error}. Please report this model."
    return Verdict(False, judged_in, text, Comparison(()), error=error)


def no_tensor(comparison: Comparison, judged_in: str) -> Verdict:
    """The verdict where neither model returns a tensor."""
    text = (
        "The model returns no tensor, so that there is nothing to compare.\n"
        "  what to do: check the model yourself, then fuse(..., verify=False)"
    )
    return Verdict(False, judged_in, text, comparison)


def outputs_differ(
    comparison: Comparison, judged_in: str, limit: str, shown: Comparison, in_float64: Comparison | None = None
) -> Verdict:
    """The verdict on outputs that are further apart than ``limit``, which the text repeats.

    Args:
        shown: the comparison that broke the limit.
    """
    cause = "The fused model does not compute what the original computes."
    text = f"{cause}\n{_worst(shown, limit)}\n{_REPORT}"
    return Verdict(False, judged_in, text, comparison, in_float64)


def loses_precision(
    comparison: Comparison, precision: str, limit: str, shown: Comparison, in_float64: Comparison
) -> Verdict:
    """The verdict on a fused model that is right in float64 and further than ``limit`` from it in its own precision."""
    cause = f"The fused model is right in float64 but loses precision in {precision}."
    text = f"{cause}\n{_worst(shown, limit)}\n{_FUSE_IN_FLOAT32}"
    return Verdict(False, "float64", text, comparison, in_float64)


def parameter_differs(rounding: str, comparison: Comparison, in_float64: Comparison | None = None) -> Verdict:
    """The verdict on a parameter that is wrongly rounded, as `bnfuse.verify.rounding.wrongly_rounded` describes it."""
    cause = "A parameter of the fused model is not the rounded value of the same fusion in float64."
    return Verdict(False, "float64", f"{cause}\n{rounding}\n{_REPORT}", comparison, in_float64)


def _worst(shown: Comparison, limit: str) -> str:
    worst = shown.worst
    assert worst is not None
    return (
        f"  output:     {worst.path or 'the tensor'}, shape {worst.shape}, {dtype_name(worst.dtype)}\n"
        f"  expected:   {limit}\n"
        f"  got:        {worst}"
    )
