"""Nodes of a graph that apply a batch norm, or a layer that may have a bias: what they are given, by name."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional

_ATEN = torch.ops.aten
_MM = _ATEN.mm.default

_BUILT_IN: dict[Any, Any] = {
    torch.batch_norm: _ATEN.batch_norm.default,
    torch.instance_norm: _ATEN.instance_norm.default,
    functional.linear: _ATEN.linear.default,
    torch.convolution: _ATEN.convolution.default,
    **{getattr(functional, f"conv{n}d"): getattr(_ATEN, f"conv{n}d").default for n in (1, 2, 3)},
    functional.conv_transpose1d: _ATEN.conv_transpose1d.default,
    functional.conv_transpose2d: _ATEN.conv_transpose2d.input,
    functional.conv_transpose3d: _ATEN.conv_transpose3d.input,
}
"""Functions that say nothing of their arguments, with the operators that have the same ones."""

_NORMS = frozenset(
    {
        "batch_norm", "instance_norm", "native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm",
        "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit_functional",
        "_batch_norm_no_update", "_batch_norm_with_update", "_batch_norm_with_update_functional",
    }
)  # fmt: skip
"""The names of operators that are batch norms, or may be."""

_TRAINS = frozenset({"_batch_norm_with_update", "_batch_norm_with_update_functional"})
"""Those that always use the statistics of the batch."""

_LAYERS = frozenset({"linear", "convolution", *(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3))})

TENSORS = ("weight", "bias", "running_mean", "running_var")
"""What a norm is given beside its input."""


def name_of(node: fx.Node) -> str:
    """The name of the operator that a node calls, without namespace and overload; "" if it calls none."""
    target = _BUILT_IN.get(node.target, node.target) if node.op == "call_function" else None
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.removeprefix("aten::")
    return target.__name__ if target in (functional.batch_norm, functional.instance_norm) else ""


@functools.cache
def _names(target: Callable[..., Any]) -> tuple[str, ...]:
    """The names of what a function is given."""
    target = _BUILT_IN.get(target, target)
    if isinstance(target, torch._ops.OpOverload):
        return tuple(argument.name for argument in target._schema.arguments)
    return tuple(inspect.signature(target).parameters)


def arguments(node: fx.Node) -> dict[str, Any]:
    """What a node of an operator is given, by name. What is left at its default is left out."""
    assert callable(node.target)
    return {**dict(zip(_names(node.target), node.args, strict=False)), **node.kwargs}


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Give a node of an operator something else."""
    assert callable(node.target)
    place = _names(node.target).index(name)
    if place < len(node.args):
        node.update_arg(place, value)
    elif place == len(node.args):
        node.args = (*node.args, value)
    else:
        node.update_kwarg(name, value)


@dataclass(frozen=True)
class Norm:
    """A node that applies a batch norm.

    Attributes:
        x: the node that it normalises.
        given: the nodes that give its tensors, None for one that it does without; by the names in `TENSORS`.
        training: whether it uses the statistics of the batch.
        results: the nodes that have what it makes: itself, or those that take the first of several results.
        others: nodes that take further results, the statistics.
        unpacked: whether it makes several results, which its users take apart.
    """

    node: fx.Node
    x: fx.Node
    given: dict[str, Any]
    eps: float
    momentum: float
    training: bool
    results: tuple[fx.Node, ...]
    others: tuple[fx.Node, ...]
    unpacked: bool


def norm_of(node: fx.Node) -> Norm | None:
    """A node as a batch norm, None if it is none. An instance norm with running statistics in evaluation is one."""
    name = name_of(node)
    if name not in _NORMS:
        return None
    found = arguments(node)
    training = found.get("training", found.get("use_input_stats", name == "instance_norm")) or name in _TRAINS
    if name == "instance_norm" and training:
        return None
    results: tuple[fx.Node, ...] = (node,)
    others: tuple[fx.Node, ...] = ()
    unpacked = name not in ("batch_norm", "instance_norm")
    if unpacked:
        parts = tuple(node.users)
        first = tuple(part for part in parts if part.target is operator.getitem and part.args[1] == 0)
        results, others = first, tuple(part for part in parts if part not in first and part.users)
    return Norm(
        node,
        found["input"],
        {place: found.get(place) for place in TENSORS},
        float(found.get("eps", found.get("epsilon", 1e-5))),
        float(found.get("momentum", found.get("exponential_average_factor", 0.1)) or 0.0),
        bool(training),
        results,
        others,
        unpacked,
    )


def missing_bias(node: fx.Node, shape: Callable[[fx.Node], tuple[int, ...] | None]) -> tuple[fx.Node, int] | None:
    """The node that gives the weight of a layer without a bias, and its number of channels; None for anything else.

    Args:
        shape: of what a node gives, None if that depends on the input or is not known.
    """
    name = name_of(node)
    if node.target is not _MM and name not in _LAYERS:
        return None
    found = arguments(node)
    weight = found["mat2" if node.target is _MM else "weight"]
    sizes = shape(weight)
    if sizes is None or len(sizes) < 2 or found.get("bias") is not None:
        return None
    if node.target is _MM:
        return weight, sizes[1]
    if "transpose" in name or found.get("transposed"):
        return weight, sizes[1] * int(found.get("groups", 1))
    return weight, sizes[0]


def give_bias(node: fx.Node, bias: fx.Node) -> None:
    """Add a bias to what a layer makes."""
    if node.target is _MM:
        node.target, node.args = _ATEN.addmm.default, (bias, *node.args)
    else:
        set_argument(node, "bias", bias)


def without_writing(node: fx.Node) -> Any:
    """The operator that does without writing to its input what a node does in place; None if the node does otherwise.

    It reads one tensor, which is none of the model's, and gives it back.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or len(node.all_input_nodes) != 1 or not node.args:
        return None
    if node.all_input_nodes[0].op == "get_attr":
        return None
    namespace, name = target._schema.name.split("::")
    first = target._schema.arguments[0].alias_info
    if namespace != "aten" or not name.endswith("_") or first is None or not first.is_write:
        return None
    other = getattr(_ATEN, name[:-1], None)
    return getattr(other, target._overloadname, None) if isinstance(node.args[0], fx.Node) else None
