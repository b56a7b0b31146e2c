"""Operators that hand every element on as it is, and those that read nothing but a shape."""

from __future__ import annotations

from bnfuse.graph.graph import Node
from bnfuse.reasons import DROPS_AT_RANDOM, MAKES_CONSTANT
from bnfuse.rules.registry import Family, Trial, link, rule, same

HANDED_ON = (
    "alias", "clone", "contiguous", "detach", "lift_fresh", "to", "_to_copy", "type_as", "dropout", "feature_dropout",
)  # fmt: skip


ZEROS = ("zeros", "zeros_like", "new_zeros")


@rule(*HANDED_ON, family=Family.REARRANGEMENT)
def pass_all(node: Node, trial: Trial) -> None:
    """Any units, between floating dtypes: elements stay what they are. Dropout, in evaluation."""
    if node.operator.endswith("dropout") and node.argument("train"):
        trial.refuse(node, DROPS_AT_RANDOM)
    link(trial, node.inputs[0], node.outputs[0], same, same)


@rule("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "zeros", "new_zeros",
      "new_ones", "new_empty", "new_full", "sym_size", "size")  # fmt: skip
def shape_only(node: Node, trial: Trial) -> None:
    """Any units of the input, of which only the shape is read.

    On the output a scale of zeros (0 stays 0), else nothing.
    """
    for value in node.outputs:
        unit = trial.unit(value)
        if unit is not None and not (unit.is_identity or (node.operator in ZEROS and unit.shift is None)):
            trial.refuse_unit(node, unit, MAKES_CONSTANT)
