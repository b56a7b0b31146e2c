"""Trying a plan on the further calls: the fused model must give there what the original gives.

The plan was solved over all of them, so this is the proof and not the search. What is asked is whether it computes the
same, not how precisely: differences that rounding makes are looked through in float64, with the plan carried out there
(see :mod:`bnfuse.verify.equivalence`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from bnfuse.changes import Changes
from bnfuse.fusion_plan import Plan
from bnfuse.model.calls import Call
from bnfuse.planner.recorded_calls import FurtherCall
from bnfuse.transaction import InPlace, fused_copy, rewrite
from bnfuse.verify.equivalence import same_outputs
from bnfuse.verify.reference import Reference
from bnfuse.verify.several_calls import SeveralCalls
from bnfuse.verify.verdict import Verdict


class Trials:
    """Tries plans for one model; what the model itself gives is found out once for all of them."""

    def __init__(self, model: nn.Module, further: Sequence[FurtherCall]) -> None:
        """
        Args:
            model: the original.
            further: the calls.
        """
        self._model = model
        self._calls = list(further)
        self._references: list[tuple[FurtherCall, Reference]] | None = None

    @property
    def references(self) -> list[tuple[FurtherCall, Reference]]:
        """The calls that the model takes, with what is known of it there."""
        if self._references is None:
            made = ((call, self._reference(call)) for call in self._calls)
            self._references = [(call, reference) for call, reference in made if reference is not None]
        return self._references

    def _reference(self, further: FurtherCall) -> Reference | None:
        """What the model gives; None if it does not take the call after all, which had no arithmetic before."""
        inputs = ([call.inputs for call in further.calls],)
        reference = Reference(SeveralCalls(self._model, further.calls), inputs, {})
        if further.outputs is not None:
            reference.output = further.outputs
        try:
            reference.output  # noqa: B018 (kept there)
        except Exception:  # (whatever a model raises)
            if further.given:
                raise
            return None
        return reference

    def failure(
        self, plan: Changes, fused: nn.Module, change: InPlace | None = None
    ) -> tuple[FurtherCall, Verdict] | None:
        """The first call on which a fused model gives something else, with what was found; None if there is none.

        Args:
            change: where ``fused`` is the original, changed in place. Then it was asked for `references` before.
        """

        def fuse_in_float64(wide: nn.Module) -> nn.Module:
            assert isinstance(wide, SeveralCalls)
            rewrite(plan, wide.model)
            return wide

        for call, reference in self.references:

            def separate(calls: tuple[Call, ...] = call.calls) -> nn.Module:
                assert change is not None
                return SeveralCalls(change.separate(), calls)

            verdict = same_outputs(
                reference,
                SeveralCalls(fused, call.calls),
                fuse_in_float64,
                algebra_only=not call.given,
                separate=None if change is None else separate,
            )
            if change is not None:
                change.redo()
            if not (verdict.equal or verdict.nothing_compared):
                return call, verdict
        return None

    def holds(self, plan: Plan) -> bool:
        """True if the plan holds on all calls."""
        return not (plan.fused or plan.steps) or self.failure(plan, fused_copy(plan, self._model)) is None
