r"""Batch norms: removed, or kept and re-expressed.

A norm in evaluation computes ``y = a*x + c`` with ``a = weight/sqrt(var + eps)``, ``c = bias - mean*a``. Removing it
gives its input and output the same new tensor (``torch.nn.utils.fusion`` has the two-layer case of this formula).

A norm that stays absorbs any units on both sides. With ``x_old = p*x_new + q`` and ``y_new = s*y_old + t``,

    y_new = s*(weight/sigma*(p*x_new + q - mean) + bias) + t,

which is the same norm, with the same statistics, for ``weight' = s*p*weight`` and
``bias' = s*bias + t + s*weight/sigma*(q + (p - 1)*mean)``.

Every norm whose statistics come from its input (layer norm, group norm, instance norm, rms norm, a batch norm that
uses the statistics of the batch) ends in ``weight*(...) + bias``, so it absorbs units of its output likewise; its
input must stay as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from bnfuse.graph import Node, Value
from bnfuse.rules.registry import Trial, absorber, rule
from bnfuse.units import IDENTITY, NotInvertibleError, Unit, add, channel_vector, multiply

_CHANNELS = 1


def affine(node: Node, trial: Trial) -> tuple[Tensor, Tensor]:
    """(a, c) of ``y = a*x + c`` in float64, which broadcast against x.

    The node is a batch norm, or one step of a norm that is written as arithmetic: x times, divided by, plus or minus
    something that does not depend on the inputs of the model.
    """
    rank = len(node.outputs[0].shape)
    if node.operator == "batch_norm":
        weight, sigma, mean, bias = _parts(node, trial)
        a = weight / sigma
        return _over_channels(rank, a), _over_channels(rank, bias - mean * a)
    trial.assume(node)
    left, right = node.bound["self"], node.bound["other"]
    swapped = not isinstance(left, Value) or left.independent
    other = left if swapped else right
    k = trial.content(other).double() if isinstance(other, Value) else torch.tensor(float(other)).double()
    k = k.reshape([1] * (rank - k.dim()) + list(k.shape))
    one, zero = torch.ones_like(k), torch.zeros_like(k)
    alpha = node.argument("alpha", 1)
    if node.operator == "mul":
        return k, zero
    if node.operator == "div":
        return 1 / k, zero
    if node.operator == "add":
        return (alpha * one, k) if swapped else (one, alpha * k)
    return (-alpha * one, k) if swapped else (one, -alpha * k)  # sub


def _over_channels(rank: int, vector: Tensor) -> Tensor:
    return vector.reshape([1, -1] + [1] * (rank - 2))


def affine_together(
    nodes: Iterable[Node], contents: Mapping[Value, Tensor]
) -> dict[Node, tuple[Tensor, Tensor, Unit | None]]:
    """The same as `affine` for all batch norms whose statistics and parameters are given, in a few operators.

    Args:
        nodes: of any kind.
        contents: in float64, by value.

    Returns:
        (a, c) for each of the norms, and the unit that they are, None if they are not finite.
    """
    found = _norms_with(("running_mean", "running_var", "weight", "bias"), nodes, contents)
    if not found:
        return {}
    mean, sigma, sizes = _statistics_together(found, contents)
    weight, bias = (torch.cat([contents[node.bound[place]] for node in found]) for place in ("weight", "bias"))
    a = weight / sigma
    c = bias - mean * a
    ranks = [len(node.outputs[0].shape) for node in found]
    scales, shifts = (
        [_over_channels(rank, part) for rank, part in zip(ranks, whole.split(sizes), strict=True)] for whole in (a, c)
    )
    return dict(zip(found, zip(scales, shifts, Unit.of_many(scales, shifts), strict=True), strict=True))


def offsets_together(nodes: Iterable[Node], contents: Mapping[Value, Tensor]) -> dict[Node, float]:
    """The same as `offset` for all batch norms whose statistics are given and whose input has its first units."""
    found = _norms_with(("running_mean", "running_var"), nodes, contents)
    if not found:
        return {}
    mean, sigma, sizes = _statistics_together(found, contents)
    distances = (mean.abs() / sigma).where(sigma > 0, 0.0).split(sizes)
    return {node: float(part.max()) if len(part) else 0.0 for node, part in zip(found, distances, strict=True)}


def _norms_with(places: Sequence[str], nodes: Iterable[Node], contents: Mapping[Value, Tensor]) -> list[Node]:
    return [
        node
        for node in nodes
        if node.operator == "batch_norm"
        and not node.argument("training")
        and all(node.argument(place) in contents for place in places)
    ]


def _statistics_together(nodes: Sequence[Node], contents: Mapping[Value, Tensor]) -> tuple[Tensor, Tensor, list[int]]:
    """Means, standard deviations, and how many belong to each norm."""
    mean, variance = (
        torch.cat([contents[node.bound[place]] for node in nodes]) for place in ("running_mean", "running_var")
    )
    sizes = [contents[node.bound["running_mean"]].numel() for node in nodes]
    eps = torch.tensor([node.bound["eps"] for node in nodes], dtype=torch.float64)
    return mean, torch.sqrt(variance + eps.repeat_interleave(torch.tensor(sizes))), sizes


def offset(node: Node, trial: Trial) -> float:
    """The largest distance of a mean from 0, in standard deviations; 0 for a norm that is written as arithmetic."""
    if node.operator != "batch_norm":
        return 0.0
    return _distance(node, trial, torch.zeros((), dtype=torch.float64))


def _distance(node: Node, trial: Trial, point: Tensor) -> float:
    """The largest distance of a mean of the input, in its present units, from a point, in standard deviations."""
    mean, sigma = _statistics(node, trial)
    distance = (mean - point).abs() / sigma
    return float(distance[sigma > 0].max()) if bool((sigma > 0).any()) else 0.0


def _statistics(node: Node, trial: Trial) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the input, in its present units."""
    _, sigma, mean, _ = _parts(node, trial)
    x = node.bound["input"]
    scale, shift = (
        None if part is None else channel_vector(part, _CHANNELS, x.shape[_CHANNELS], 0.0) for part in trial.placed(x)
    )
    if scale is not None:
        mean, sigma = mean * scale, sigma * scale.abs()
    return mean if shift is None else mean + shift, sigma


def magnitudes(node: Node, trial: Trial) -> tuple[Tensor, Tensor]:
    """Root mean square and standard deviation of the input, in its present units, which broadcast against it.

    Both are 1 for a norm that is written as arithmetic.
    """
    if node.operator != "batch_norm":
        return torch.ones((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    mean, sigma = _statistics(node, trial)
    shape = [1, -1] + [1] * (len(node.outputs[0].shape) - 2)
    return torch.hypot(mean, sigma).reshape(shape), sigma.reshape(shape)


FARTHEST = {torch.float64: 1e6, torch.float32: 300.0, torch.float16: 30.0, torch.bfloat16: 30.0}
"""How many standard deviations a mean may lie from 0, by precision.

A norm takes the mean away before anything is rounded. If it is folded into what comes after it, the mean goes through
the next layer and is taken away from its output, whose rounding error it has multiplied by about this number. If it
stays and its input takes units with a large shift, the same happens to its input.
"""


def is_step(node: Node) -> bool:
    """True for arithmetic that :func:`affine` can read."""
    if node.operator not in ("mul", "div", "add", "sub") or node.argument("rounding_mode") is not None:
        return False
    left, right = node.bound["self"], node.bound["other"]
    depends = [isinstance(value, Value) and not value.independent for value in (left, right)]
    numbers = all(isinstance(value, (Value, int, float)) for value in (left, right))
    return numbers and sum(depends) == 1 and not (node.operator == "div" and depends[1])


def _parts(node: Node, trial: Trial) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, variance = trial.content(node.bound["running_mean"]), trial.content(node.bound["running_var"])
    sigma = torch.sqrt(variance + node.bound["eps"])
    w, b = node.argument("weight"), node.argument("bias")
    weight = torch.ones_like(mean) if w is None else trial.content(w)
    bias = torch.zeros_like(mean) if b is None else trial.content(b)
    return weight, sigma, mean, bias


@rule("batch_norm")
def batch_norm(node: Node, trial: Trial) -> None:
    if node.argument("training"):
        norm_of_input(node, trial)
        return
    for value in (node.bound["input"], node.outputs[0]):
        unit = trial.unit(value) or IDENTITY
        if not unit.uniform_outside(_CHANNELS):
            trial.refuse(node, "it has one gain and bias per channel", scale=unit.scale is not None)
    # What it cannot undo is better known now than when it absorbs.
    (trial.unit(node.bound["input"]) or IDENTITY).inverted()
    (trial.unit(node.outputs[0]) or IDENTITY).direct()


@absorber("batch_norm")
def absorb_batch_norm(node: Node, trial: Trial) -> None:
    x, y = node.bound["input"], node.outputs[0]
    if node.argument("training"):
        absorb_output(node, trial)
        return
    try:
        p, q = (trial.unit(x) or IDENTITY).inverted()
        s, t = (trial.unit(y) or IDENTITY).direct()
    except NotInvertibleError:
        trial.refuse(node, "it would have to undo a scale of (nearly) 0", scale=True)
    if p is None and q is None and s is None and t is None:
        _edit(node, trial, None, None, None)
        return
    weight, sigma, mean, _ = _parts(node, trial)

    def vector(tensor: Tensor | None, default: float) -> Tensor | None:
        return None if tensor is None else channel_vector(tensor, _CHANNELS, x.shape[_CHANNELS], default)

    if q is not None:
        far = _distance(node, trial, channel_vector(q, _CHANNELS, x.shape[_CHANNELS], 0.0))
        if far > max(FARTHEST.get(x.dtype, 0.0), offset(node, trial)):
            trial.refuse(node, f"a mean would lie {far:.0f} standard deviations from 0, which costs precision")
    gain, ratio, moved, shift = vector(s, 1.0), vector(p, 1.0), vector(q, 0.0), vector(t, 0.0)
    if ratio is not None:
        moved = add(moved, (ratio - 1) * mean)
    if moved is not None:
        shift = add(shift, multiply(moved * weight / sigma, gain))
    _edit(node, trial, multiply(gain, ratio), gain, shift)


def _edit(node: Node, trial: Trial, gain: Tensor | None, bias_gain: Tensor | None, shift: Tensor | None) -> None:
    for name, unit in (("weight", Unit(gain)), ("bias", Unit(bias_gain, shift))):
        value = node.argument(name)
        if value is not None:
            trial.edit(node, value, unit)
        elif name == "weight" and gain is not None:
            trial.refuse(node, "it has no weight to take up a scale, and none can be added", scale=True)
        elif shift is not None:
            trial.refuse(node, "it has no bias to take up a shift, and none can be added")


@rule("layer_norm", "group_norm", "instance_norm", "rms_norm")
def norm_of_input(node: Node, trial: Trial) -> None:
    x, y = node.inputs[0], node.outputs[0]
    if not (trial.unit(x) or IDENTITY).is_identity:
        trial.refuse(node, "its statistics come from its input, which must stay as it is", scale=True)
    unit = trial.unit(y) or IDENTITY
    if not unit.axes() <= set(_parameter_axes(node)):
        trial.refuse(node, "its gain and bias have no axis for the units", scale=unit.scale is not None)


@absorber("layer_norm", "group_norm", "instance_norm", "rms_norm")
def absorb_output(node: Node, trial: Trial) -> None:
    y = node.outputs[0]
    unit = trial.unit(y) or IDENTITY
    if unit.is_identity:
        _edit(node, trial, None, None, None)
        return
    axes = _parameter_axes(node)
    shape = [y.shape[axis] for axis in axes]

    def on_parameter(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        squeezed = tensor.reshape([tensor.shape[axis] for axis in axes])
        return squeezed.expand(shape)

    try:
        s, t = unit.direct()
    except NotInvertibleError:
        trial.refuse(node, "it would have to undo a scale of (nearly) 0", scale=True)
    _edit(node, trial, on_parameter(s), on_parameter(s), on_parameter(t))


def _parameter_axes(node: Node) -> list[int]:
    """The axes of the output along which the gain and bias vary."""
    if "normalized_shape" in node.bound:
        rank = len(node.outputs[0].shape)
        return list(range(rank - len(node.bound["normalized_shape"]), rank))
    return [_CHANNELS]
