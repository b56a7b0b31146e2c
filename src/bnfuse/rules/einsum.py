r"""Einstein sums of two tensors, one of which is made of parameters, and products of matrices, which are such sums.

In ``y = sum x*w`` each axis has a letter. A scale of y along letters that w has is a scale of w; so is the inverse of
a scale of x along letters that w has. There is no bias: a shift ``q`` of x goes on as the inverse shift ``sum q*w`` of
y, and the output takes no other.

A product of matrices has the letters of its batch axes, of the rows, of what is summed and of the columns; an axis of
size 1 that is broadcast has a letter of its own.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bnfuse import reasons
from bnfuse.graph.graph import Node, Value
from bnfuse.rules.registry import Trial, absorber, forbid, rule
from bnfuse.units import Unit, add, multiply, scaled


@dataclass(frozen=True)
class Operands:
    """``y = sum x*w`` with w made of parameters, and the letters of the axes of each."""

    x: Value
    of_x: str
    w: Value
    of_w: str
    y: Value
    of_y: str

    def absorbs(self, trial: Trial) -> bool:
        """True if w has an axis for all units that x and y have now."""
        given = ((trial.unit(self.x), self.of_x), (trial.unit(self.y), self.of_y))
        return all(letters[axis] in self.of_w for unit, letters in given if unit for axis in unit.axes())


def operands(node: Node) -> Operands | None:
    """The parts of a sum of two tensors, one of which is made of parameters; None if it is no such sum."""
    y = node.outputs[0]
    if node.operator == "einsum":
        values = list(node.bound["tensors"])
        *letters, of_y = written_out(node.bound["equation"], [len(value.shape) for value in values])
    else:
        values = list(node.inputs)
        *letters, of_y = _of_matrices([value.shape for value in values], y.shape)
    if len(values) != 2 or any(len(set(part)) != len(part) for part in letters):
        return None
    sizes: dict[str, int] = {}
    for value, part in zip((y, *values), (of_y, *letters), strict=True):
        if any(sizes.setdefault(letter, size) != size for letter, size in zip(part, value.shape, strict=True)):
            return None  # it is broadcast
    (x, of_x), (w, of_w) = sorted(zip(values, letters, strict=True), key=lambda pair: pair[0].independent)
    return Operands(x, of_x, w, of_w, y, of_y) if w.independent and not x.independent else None


def written_out(equation: str, ranks: Sequence[int]) -> list[str]:
    """The letters of the operands and of the result, with letters for an ellipsis and for a result that is left out.

    >>> written_out("...ij, jk -> ...ik", [4, 2])
    ['abij', 'jk', 'abik']
    >>> written_out("ij,jk", [2, 2])
    ['ij', 'jk', 'ik']
    """
    given, arrow, result = equation.replace(" ", "").partition("->")
    parts = given.split(",")
    hidden = [rank - len(part.replace("...", "")) for part, rank in zip(parts, ranks, strict=True)]
    free = [letter for letter in string.ascii_letters if letter not in equation][: max(hidden)]
    if not arrow:
        letters = given.replace(",", "").replace(".", "")
        result = "..." * ("..." in given) + "".join(sorted(x for x in set(letters) if letters.count(x) == 1))
    own = ["".join(free[len(free) - count :]) for count in hidden]
    return [
        *(part.replace("...", more) for part, more in zip(parts, own, strict=True)),
        result.replace("...", "".join(free)),
    ]


def _of_matrices(shapes: Sequence[Sequence[int]], result: Sequence[int]) -> list[str]:
    """The letters of two factors and of their product: batch axes a, b, ..., rows r, summed s, columns c."""
    batch = string.ascii_lowercase[: len(result) - sum(len(shape) > 1 for shape in shapes)]
    letters = []
    for shape, matrix in zip(shapes, ("rs", "sc"), strict=True):
        own = batch[len(batch) - len(shape) + 2 :] if len(shape) > 2 else ""
        sizes = result[len(batch) - len(own) : len(batch)]
        spread = "".join(
            letter if size == full else letter.upper() for letter, size, full in zip(own, shape, sizes, strict=False)
        )
        letters.append(spread + (matrix if len(shape) > 1 else "s"))
    rows, columns = ("r" if "r" in letters[0] else ""), ("c" if "c" in letters[1] else "")
    return [*letters, batch + rows + columns]


@rule("einsum")
def check(node: Node, trial: Trial) -> None:
    """A tensor and a parameter: a scale along the letters that the parameter has.

    In ``sum x*w`` the factor of a letter is a factor of w along it. A shift of the input goes on to the output. No
    letter is repeated, nothing is broadcast by an ellipsis, and for a shift no letter of the tensor alone is
    summed.
    """
    parts = operands(node)
    if parts is None:
        forbid(node, trial, (*node.inputs, *node.outputs), reasons.NOTHING_PASSES)
        return
    if not parts.absorbs(trial):
        trial.refuse(node, reasons.EINSUM_PARAMETER_HAS_NO_AXIS)
    of_input = trial.unit(parts.x)
    if of_input is not None and of_input.shift is not None and trial.unit(parts.y) is None:
        trial.demand(parts.y, Unit.of(None, _carried(node, parts, trial, of_input), inverse=True))


def _carried(node: Node, parts: Operands, trial: Trial, unit: Unit) -> Tensor | None:
    """``sum q*w`` for the shift q of x, as a tensor that broadcasts against y."""
    _, q = unit.inverted()
    if q is None:
        return None
    if any(letter not in parts.of_y and letter not in parts.of_w for letter in parts.of_x):
        trial.refuse_shift(node, reasons.COUNTS_SHIFTS)
    # Letters that x alone has are uniform, so one element stands for all.
    kept = [axis for axis, letter in enumerate(parts.of_x) if letter in parts.of_w]
    full = q.reshape([q.shape[axis] for axis in kept]).expand([parts.x.shape[axis] for axis in kept])
    letters = "".join(parts.of_x[axis] for axis in kept)
    result = "".join(letter for letter in parts.of_y if letter in parts.of_w)
    carried = torch.einsum(f"{letters},{parts.of_w}->{result}", full, trial.content(parts.w))
    sizes = dict(zip(result, carried.shape, strict=True))
    return carried.reshape([sizes.get(letter, 1) for letter in parts.of_y])


@absorber("einsum")
def absorb(node: Node, trial: Trial) -> None:
    parts = operands(node)
    if parts is None:
        return
    of_input, of_output = trial.unit_or_identity(parts.x), trial.unit_or_identity(parts.y)
    p, _ = of_input.inverted()
    s, t = of_output.direct()
    rest = add(t, scaled(_carried(node, parts, trial, of_input), s))
    if rest is not None and bool((rest.abs() > 1e-12 * (1.0 if t is None else float(t.abs().max()))).any()):
        trial.refuse_shift(node, reasons.NO_BIAS)
    scale = multiply(_on(p, parts.of_x, parts.of_w), _on(s, parts.of_y, parts.of_w))
    trial.edit(node, parts.w, Unit(scale))


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
