"""A plan: what fusing a model would do, to be looked at, vetoed and applied."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn
from torch.export import ExportedProgram

from bnfuse.changes import Changes, Decision, Unchanged
from bnfuse.errors import FusionError
from bnfuse.exported.forms import graph_form
from bnfuse.model.alone import one_at_a_time
from bnfuse.model.witness import Witness
from bnfuse.model.wrappers import checked, unwrap
from bnfuse.printing.text import all_text, plan_text
from bnfuse.transaction import fused_copy, rewrite

AnyModel = TypeVar("AnyModel", bound=nn.Module | ExportedProgram)


@dataclass(frozen=True, kw_only=True)
class Plan(Changes):
    """Everything that fusing a model would do. Printing it shows the norms that go, and why the others stay.

    Attributes:
        model: the class of the model.
        decisions: one for each norm, in the order of the model.
        unseen: what the calls that it was made from did not show, in words: arguments that were never given, norms that
            did not run. On such calls nothing is promised.
        witness: what tells whether the model has changed since, None for a plan that was carried out at once.
        unchanged: what stays as it is of what ``restructure=`` asked for, and why.
    """

    model: str
    decisions: tuple[Decision, ...]
    unseen: tuple[str, ...] = ()
    witness: Witness | None = field(default=None, repr=False)
    unchanged: tuple[Unchanged, ...] = ()

    @property
    def fused(self) -> tuple[Decision, ...]:
        """The norms that go."""
        return tuple(decision for decision in self.decisions if decision.fused)

    @property
    def restructuring(self) -> tuple[str, ...]:
        """What changes in the structure of the model at which price, and what of it was asked for and cannot, in
        words."""
        return (*map(str, self.steps), *map(str, self.unchanged))

    @property
    def kept(self) -> tuple[Decision, ...]:
        """The norms that stay."""
        return tuple(decision for decision in self.decisions if not decision.fused)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, without the contents of the edits."""
        return {
            "model": self.model,
            "norms": len(self.decisions),
            "fused": len(self.fused),
            "kept": len(self.kept),
            "decisions": [decision.to_dict() for decision in self.decisions],
            "edits": [
                {"names": list(edit.names), "shape": list(edit.shape), "created": edit.created} for edit in self.edits
            ],
            "out_of_place": list(self.out_of_place),
            "steps": [step.to_dict() for step in self.steps],
            "unchanged": [one.to_dict() for one in self.unchanged],
            "unseen": list(self.unseen),
        }

    @one_at_a_time
    def apply(self, model: AnyModel, inplace: bool = False) -> AnyModel:
        """Carry the plan out on the model that it was made for, or on a copy of it.

        Args:
            model: the model that the plan was made for.
            inplace: change ``model`` itself instead of a copy.

        Returns:
            The fused model, in evaluation mode.

        Raises:
            FusionError: the model is not the one that the plan was made for, or its layers, or the contents of a
                parameter, buffer or constant that took part in the run, have changed since.
        """
        form = graph_form(model, inplace)
        result: Any = model
        if form is None:
            result = self._applied(model, inplace)
        elif inplace:
            self._check(form.module)
            form.change(self)
        else:
            result = form.put_back(self._applied(form.module, False))
        return result  # type: ignore[no-any-return]

    def _applied(self, model: Any, inplace: bool) -> Any:
        inner, wrap = unwrap(checked(model))
        self._check(inner)
        if inplace:
            rewrite(self, inner)
        target = inner if inplace else fused_copy(self, inner)
        target.eval()
        return model if inplace else wrap(target)

    def _check(self, model: nn.Module) -> None:
        if type(model).__name__ != self.model:
            raise FusionError(
                f"The plan was made for another model:\n  got:      {type(model).__name__}\n  expected: {self.model}"
            )
        change = "" if self.witness is None else self.witness.change(model)
        if change:
            raise FusionError(
                f"The model is not as it was when the plan was made. {change}\nMake a new plan for the model as it is."
            )

    def table(self) -> str:
        """One line for each norm, in the order of the model, as long as it takes: nothing is grouped or shortened.

        ``print(plan)`` says the same in 80 columns, with norms that stay for the same reason together.
        """
        return all_text(self.model, self.decisions)

    def __str__(self) -> str:
        return plan_text(self.model, self.decisions, self.unseen, steps=self.restructuring)
