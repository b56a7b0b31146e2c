r"""A norm beside a layer: both read one tensor, and what they make is added up.

With ``n(x) = a*x + c`` and a layer that keeps the number of channels and of positions,

    w*x + b + n(x)  =  w*x + b + (a - 1)*x + c + x  =  (w + D)*x + (b + c) + x.

``D`` multiplies each channel by its ``a - 1``: it is 0 but where an output meets the input at its own channel and its
own position. So the norm can go whatever surrounds the two; the units of all tensors stay as they are, but for what
lies between the layer and the sum, which nothing else reads. Where the sum is ``k*(w*x + b) + m*n(x)``, the layer
takes ``m/k`` times as much.

Weight axes: convolution (out, in/groups, *kernel); transposed (in, out/groups, *kernel); linear (out, in);
``x @ w`` (in, out). With as many inputs as outputs the place of channel i is the same in all of them: row i, and the
place of i in its group. Along a kernel the tap that reads the position itself is ``padding/dilation``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bnfuse import reasons
from bnfuse.graph.graph import Kind, Node, Value
from bnfuse.graph.norms import Site
from bnfuse.rules.identity import HANDED_ON
from bnfuse.rules.layers import UNDEFORMED, Layer, layer_of
from bnfuse.rules.norm_statistics import FARTHEST, magnitudes
from bnfuse.rules.padding import PADDINGS, margins_of
from bnfuse.rules.registry import FAMILIES, Family, Trial
from bnfuse.rules.shapes import is_rearrangement
from bnfuse.rules.sums import linear_terms
from bnfuse.units import Entries, Unit, channel_vector


@dataclass(frozen=True)
class Sibling:
    """A layer that reads what a norm reads, and whose output is added to the norm's.

    Attributes:
        factor: what the norm's output counts in the sum, if the layer's counts 1.
        padding: the operator that pads for the layer, if there is one.
        sums: the operators that lead to the sum.
    """

    node: Node
    layer: Layer
    factor: float
    padding: Node | None
    sums: tuple[Node, ...]


def siblings(site: Site, removed: Collection[Node]) -> Iterator[Sibling]:
    """The layers beside a norm.

    Args:
        removed: the operators of the norms that are gone.
    """
    if any(map(is_rearrangement, site.nodes)):
        return
    origin = _origin(site.x, removed)
    value, factor, sums = site.y, 1.0, []
    while value.pinned is None and len(value.consumers) == 1:
        node = value.consumers[0]
        if _handed_on(node, removed) is None:
            terms = _terms(node)
            if terms is None or value not in terms:
                return
            sums.append(node)
            factor *= terms[value]
            for other in terms:
                if other is not value:
                    yield from _layers(other, terms[other], factor, tuple(sums), origin, removed)
        value = node.outputs[0]


def _layers(
    value: Value, count: float, factor: float, sums: tuple[Node, ...], origin: Value, removed: Collection[Node]
) -> Iterator[Sibling]:
    """The layers among what a value is the sum of, which nothing else reads."""
    waiting = [(value, count, sums)]
    while waiting:
        value, count, sums = waiting.pop()
        node = value.producer
        if node is None or value.pinned is not None or len(value.consumers) != 1:
            continue
        before = _handed_on(node, removed)
        if before is not None:
            waiting.append((before, count, sums))
        elif (terms := _terms(node)) is not None:
            waiting += [(term, count * terms[term], (*sums, node)) for term in reversed(terms)]
        elif node.operator in UNDEFORMED and (layer := layer_of(node)) is not None and layer.factor != 0:
            padding = layer.x.producer
            if padding is None or padding.operator not in PADDINGS:
                padding = None
            if _origin(layer.x if padding is None else padding.inputs[0], removed) is origin:
                yield Sibling(node, layer, factor / count, padding, sums)


def _handed_on(node: Node, removed: Collection[Node]) -> Value | None:
    """What an operator hands on as it is, None if it does something to it."""
    if node in removed:
        return node.data
    if node.operator not in HANDED_ON or node.argument("train", False):
        return None
    x, y = node.inputs[0], node.outputs[0]
    return x if (x.dtype, x.shape) == (y.dtype, y.shape) else None


def _origin(value: Value, removed: Collection[Node]) -> Value:
    """The first tensor with the contents of this one."""
    while value.producer is not None and value.pinned is None:
        before = _handed_on(value.producer, removed)
        if before is None:
            break
        value = before
    return value


def _terms(node: Node) -> dict[Value, float] | None:
    """What a sum counts each of its operands that have its own shape; None if it is no sum."""
    terms = linear_terms(node) if FAMILIES.get(node.operator) is Family.SUM else None
    if terms is None or terms[0][0] is terms[1][0] or not all(factor for _, factor in terms):
        return None
    z = node.outputs[0]
    return {
        term: factor
        for term, factor in terms
        if isinstance(term, Value) and (term.shape, term.dtype) == (z.shape, z.dtype)
    }


def absorb(sibling: Sibling, site: Site, a: Tensor, c: Tensor, trial: Trial) -> None:
    """Ask for the edits of the layer that take up the norm; refuses if it cannot."""
    node, layer = sibling.node, sibling.layer
    varying = {axis for part in (a, c) for axis, size in enumerate(part.shape) if size != 1} - {layer.axis}
    if varying:
        trial.refuse(node, reasons.WEIGHT_HAS_NO_AXIS, axis=min(varying), side="input")
    if layer.w.kind is not Kind.PARAMETER or not layer.w.dtype.is_floating_point:
        trial.refuse(node, reasons.WEIGHT_IS_MADE)
    taps = _taps(sibling, trial)
    for other in sibling.sums:
        if other.argument("alpha") is not None:
            trial.assume(other)
    size, spread = magnitudes(site.nodes[0], trial)
    added = float(((a - 1).abs() * size).max())
    if not added <= FARTHEST.get(site.x.dtype, 0.0) * float((a * spread).square().mean().sqrt()):
        trial.refuse(node, reasons.ADDS_MORE_THAN_NORM)

    channels = layer.channels_in
    factor = sibling.factor
    own = torch.arange(channels, device="cpu")
    places = (own, own % (channels // layer.groups), *(torch.full_like(own, tap) for tap in taps))
    values = channel_vector((a - 1) * (factor / layer.factor), layer.axis, channels, 0.0)
    if bool(values.any()):
        trial.edit(node, layer.w, Unit(entries=Entries(places, values)))
    shift = channel_vector(c * factor, layer.axis, channels, 0.0)
    if not bool(shift.any()):
        return
    if layer.b is None:
        trial.refuse_shift(node, reasons.NO_BIAS)
    trial.edit(node, layer.b, Unit(None, shift))


def _taps(sibling: Sibling, trial: Trial) -> tuple[int, ...]:
    """Along each axis of the kernel, the tap that reads the position itself."""
    node, layer, padding = sibling.node, sibling.layer, sibling.padding
    kernel = layer.w.shape[2:]
    count = len(kernel)
    if not node.call.is_standard or padding is not None:
        trial.assume(node)  # that its own code pads the same at every size
    margins = {}
    if padding is not None:
        trial.assume(padding)
        margins = margins_of(padding)
    if any(step != 1 for step in _each(node.argument("stride", 1), count)):
        trial.refuse(node, reasons.SKIPS_POSITIONS)
    dilation = _each(node.argument("dilation", 1), count)
    given = node.argument("padding", 0)
    before: list[int] = []
    if given == "same":
        before = [step * (size - 1) // 2 for step, size in zip(dilation, kernel, strict=True)]
    else:
        before = _each(0 if given == "valid" else given, count)
    taps = []
    for place, (size, step) in enumerate(zip(kernel, dilation, strict=True)):
        reach = before[place] + margins.pop(len(layer.x.shape) - count + place, (0, 0))[0]
        if reach % step or not 0 <= reach // step < size:
            trial.refuse(node, reasons.NO_TAP_AT_POSITION)
        taps.append(reach // step)
    if margins:
        trial.refuse(node, reasons.NO_TAP_AT_POSITION)
    return tuple(taps)


def _each(numbers: int | list[int], count: int) -> list[int]:
    """An argument that is one number for all axes, or one for each."""
    given = [numbers] if isinstance(numbers, int) else list(numbers)
    return given * count if len(given) == 1 else given
