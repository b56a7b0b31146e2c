r"""What a norm does at present, and how its statistics lie: numbers that are computed from its parameters.

In evaluation a batch norm is ``y = a*x + c`` with ``a = weight/sqrt(var + eps)`` and ``c = bias - mean*a``. A norm that
is written as arithmetic takes several such steps in turn. All batch norms of a graph are computed together where they
can be, since they are many and small.

A mean that lies many standard deviations from 0 costs digits where a shift is moved on; :data:`FARTHEST` is how far it
may lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from bnfuse.graph.graph import Node, Value
from bnfuse.rules.registry import Contents
from bnfuse.units import Unit, channel_vector

CHANNELS = 1


def affine(node: Node, contents: Contents) -> tuple[Tensor, Tensor]:
    """(a, c) of ``y = a*x + c`` in float64, which broadcast against x.

    The node is a batch norm, or one step of a norm that is written as arithmetic: x times, divided by, plus or minus
    something that does not depend on the inputs of the model.
    """
    rank = len(node.outputs[0].shape)
    if node.operator == "batch_norm":
        weight, sigma, mean, bias = parts(node, contents)
        a = weight / sigma
        return _over_channels(rank, a), _over_channels(rank, bias - mean * a)
    contents.assume(node)
    left, right = node.bound["self"], node.bound["other"]
    swapped = not isinstance(left, Value) or left.independent
    other = left if swapped else right
    if isinstance(other, Value):
        k = contents.content(other).double()
    else:
        k = torch.tensor(float(other), dtype=torch.float64, device="cpu")
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
    eps = torch.tensor([node.bound["eps"] for node in nodes], dtype=torch.float64, device="cpu")
    return mean, torch.sqrt(variance + eps.repeat_interleave(torch.tensor(sizes, device="cpu"))), sizes


def offset(node: Node, contents: Contents) -> float:
    """The largest distance of a mean from 0, in standard deviations; 0 for a norm that is written as arithmetic."""
    if node.operator != "batch_norm":
        return 0.0
    return distance(node, contents, torch.zeros((), dtype=torch.float64, device="cpu"))


def distance(node: Node, contents: Contents, point: Tensor) -> float:
    """The largest distance of a mean of the input, in its present units, from a point, in standard deviations."""
    mean, sigma = _statistics(node, contents)
    far = (mean - point).abs() / sigma
    return float(far[sigma > 0].max()) if bool((sigma > 0).any()) else 0.0


def _statistics(node: Node, contents: Contents) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the input, in its present units."""
    _, sigma, mean, _ = parts(node, contents)
    x = node.bound["input"]
    scale, shift = (
        None if part is None else channel_vector(part, CHANNELS, x.shape[CHANNELS], 0.0) for part in contents.placed(x)
    )
    if scale is not None:
        mean, sigma = mean * scale, sigma * scale.abs()
    return mean if shift is None else mean + shift, sigma


def magnitudes(node: Node, contents: Contents) -> tuple[Tensor, Tensor]:
    """Root mean square and standard deviation of the input, in its present units, which broadcast against it.

    Both are 1 for a norm that is written as arithmetic.
    """
    if node.operator != "batch_norm":
        return (torch.ones((), dtype=torch.float64, device="cpu"),) * 2
    mean, sigma = _statistics(node, contents)
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


def parts(node: Node, contents: Contents) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight, standard deviation, mean and bias of a batch norm, each of shape (channels,)."""
    mean, variance = contents.content(node.bound["running_mean"]), contents.content(node.bound["running_var"])
    sigma = torch.sqrt(variance + node.bound["eps"])
    w, b = node.argument("weight"), node.argument("bias")
    weight = torch.ones_like(mean) if w is None else contents.content(w)
    bias = torch.zeros_like(mean) if b is None else contents.content(b)
    return weight, sigma, mean, bias
