r"""Einstein sums of two tensors, one of which is made of parameters.

In ``y = sum x*w`` each axis has a letter. A scale of y along letters that w has is a scale of w; so is the inverse of
a scale of x along letters that w has. There is no bias: a shift ``q`` of x goes on as the inverse shift ``sum q*w`` of
y, and the output takes no other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bnfuse.graph import Node, Value
from bnfuse.rules.registry import Trial, absorber, rule
from bnfuse.units import IDENTITY, NotInvertibleError, Unit, add, multiply, scaled


def _operands(node: Node) -> tuple[Value, str, Value, str, str] | None:
    """(x, its letters, w, its letters, the letters of y); None where the rule does not apply."""
    equation = node.bound["equation"].replace(" ", "")
    given, arrow, result = equation.partition("->")
    letters = given.split(",")
    values = node.bound["tensors"]
    if not arrow or "." in equation or len(values) != 2 or any(len(set(part)) != len(part) for part in letters):
        return None
    pairs = sorted(zip(values, letters, strict=True), key=lambda pair: pair[0].independent)
    (x, of_x), (w, of_w) = pairs
    return (x, of_x, w, of_w, result) if w.independent and not x.independent else None


@rule("einsum")
def check(node: Node, trial: Trial) -> None:
    operands = _operands(node)
    if operands is None:
        for value in (*node.inputs, *node.outputs):
            if not (trial.unit(value) or IDENTITY).is_identity:
                trial.refuse(node, "it passes no change of units", scale=True)
        return
    x, of_x, _, of_w, of_y = operands
    for value, letters in ((x, of_x), (node.outputs[0], of_y)):
        unit = trial.unit(value) or IDENTITY
        if any(letters[axis] not in of_w for axis in unit.axes()):
            trial.refuse(node, "its parameter has no axis for the units", scale=True)
    of_input = trial.unit(x)
    if of_input is not None and of_input.shift is not None and trial.unit(node.outputs[0]) is None:
        carried = _carried(node, trial, of_input)
        trial.demand(node.outputs[0], Unit.of(None, carried, inverse=True))


def _carried(node: Node, trial: Trial, unit: Unit) -> Tensor | None:
    """``sum q*w`` for the shift q of x, as a tensor that broadcasts against y."""
    operands = _operands(node)
    assert operands is not None
    x, of_x, w, of_w, of_y = operands
    try:
        _, q = unit.inverted()
    except NotInvertibleError:
        trial.refuse(node, "it would have to undo a scale of (nearly) 0", scale=True)
    if q is None:
        return None
    if any(letter not in of_y and letter not in of_w for letter in of_x):
        trial.refuse(node, "it adds up a shift as often as there are elements")
    # Letters that x alone has are uniform, so one element stands for all.
    kept = [axis for axis, letter in enumerate(of_x) if letter in of_w]
    full = q.reshape([q.shape[axis] for axis in kept]).expand([x.shape[axis] for axis in kept])
    letters = "".join(of_x[axis] for axis in kept)
    result = "".join(letter for letter in of_y if letter in of_w)
    carried = torch.einsum(f"{letters},{of_w}->{result}", full, trial.content(w))
    sizes = dict(zip(result, carried.shape, strict=True))
    return carried.reshape([sizes.get(letter, 1) for letter in of_y])


@absorber("einsum")
def absorb(node: Node, trial: Trial) -> None:
    operands = _operands(node)
    if operands is None:
        return
    x, of_x, w, of_w, of_y = operands
    of_input, of_output = trial.unit(x) or IDENTITY, trial.unit(node.outputs[0]) or IDENTITY
    try:
        p, _ = of_input.inverted()
        s, t = of_output.direct()
    except NotInvertibleError:
        trial.refuse(node, "it would have to undo a scale of (nearly) 0", scale=True)
    rest = add(t, scaled(_carried(node, trial, of_input), s))
    if rest is not None and bool((rest.abs() > 1e-12 * (1.0 if t is None else float(t.abs().max()))).any()):
        trial.refuse(node, "it has no bias to take up a shift, and none can be added")
    scale = multiply(_on(p, of_x, of_w), _on(s, of_y, of_w))
    if scale is not None:
        trial.edit(node, w, Unit(scale))


def _on(scale: Tensor | None, letters: str, of_w: str) -> Tensor | None:
    """A scale of a tensor with the letters, as a factor of the parameter: shared letters full, others of size 1."""
    if scale is None:
        return None
    kept = [axis for axis, letter in enumerate(letters) if letter in of_w]
    tensor = scale.reshape([scale.shape[axis] for axis in kept])
    shared = [letters[axis] for axis in kept]
    order = sorted(range(len(shared)), key=lambda i: of_w.index(shared[i]))
    tensor = tensor.permute(order)
    sizes = dict(zip((shared[i] for i in order), tensor.shape, strict=True))
    return tensor.reshape([sizes.get(letter, 1) for letter in of_w])
