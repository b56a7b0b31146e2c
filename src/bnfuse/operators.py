"""What is known of PyTorch's operators: names, arguments, what they write to, what they are made of."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Operators that write running statistics without saying so in their schema, with the flag that makes them do it.
_SILENT_WRITERS = {
    "batch_norm": "training",
    "instance_norm": "use_input_stats",
    "native_batch_norm": "training",
}

# Operators made of others whose results are new memory all the same.
_FRESH = {"conv1d", "conv2d", "conv3d", "batch_norm", "layer_norm"}


_DYNAMIC = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


@dataclass(frozen=True, slots=True)
class Operator:
    """What the recorder needs of an operator's schema, looked up once.

    Attributes:
        writes_if: the argument that makes it write running statistics, which the schema does not say; "" for none.
        fresh: its results share memory with none of its arguments.
        needs_contents: it returns something other than tensors, or the shape of its result depends on the contents of
            tensors, or it is no operator of ATen, of which nothing is known.
    """

    name: str
    arguments: tuple[str, ...]
    written: tuple[str, ...]
    writes_if: str
    fresh: bool
    needs_contents: bool


_SAME_WORK = {
    "_native_batch_norm_legit_no_training": "batch_norm",
    "_native_batch_norm_legit": "batch_norm",
    "native_batch_norm": "batch_norm",
    "native_layer_norm": "layer_norm",
    "native_group_norm": "group_norm",
    "_softmax": "softmax",
    "_adaptive_avg_pool2d": "adaptive_avg_pool2d",
    "_adaptive_avg_pool3d": "adaptive_avg_pool3d",
}
"""The operators that PyTorch takes others apart into, with those others. Results beyond the first are statistics."""


def known_as(operator: Operator, bound: Mapping[str, Any]) -> str:
    """The name of an operator with these arguments: one that does the work of another has the other's name.

    The names of the arguments that matter are the same. An instance norm that does not take its statistics from the
    input is a batch norm, and ``convolution`` is a convolution over as many axes as its weight has beyond two.
    """
    if operator.name == "instance_norm" and bound.get("use_input_stats") is False:
        return "batch_norm"
    if operator.name == "convolution":
        kind = "conv_transpose" if bound["transposed"] else "conv"
        return f"{kind}{len(bound['weight'].shape) - 2}d"
    return _SAME_WORK.get(operator.name, operator.name)


def _sparse_product(term: Tensor, mat1: Tensor, mat2: Tensor, beta: Any, alpha: Any) -> Tensor:
    """What ``torch.sparse.mm`` computes, where ``term`` stands for nothing, and ``torch.sparse.addmm``."""
    product = torch.matmul(mat1, mat2)
    product = product if alpha == 1 else torch.mul(product, alpha)
    return product if beta == 0 else torch.add(product, torch.mul(term, beta))


_SUMS_AND_PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "addcmul": lambda self, tensor1, tensor2, value=1: torch.add(self, torch.mul(tensor1, tensor2), alpha=value),
    "addcdiv": lambda self, tensor1, tensor2, value=1: torch.add(self, torch.div(tensor1, tensor2), alpha=value),
    "lerp": lambda self, end, weight: torch.add(self, torch.mul(torch.sub(end, self), weight)),
    "_sparse_addmm": lambda self, mat1, mat2, beta=1, alpha=1: _sparse_product(self, mat1, mat2, beta, alpha),
    "baddbmm": lambda self, batch1, batch2, beta=1, alpha=1: torch.add(
        torch.mul(self, beta), torch.bmm(batch1, batch2), alpha=alpha
    ),
}
"""Operators that are sums and products of others, though PyTorch has no decomposition that says so.

The arguments have the names of the operators' schemas.
"""


@functools.cache
def parts_of(func: Any) -> Callable[..., Any] | None:
    """A function that computes the same by several operators, None if there is none."""
    if func._can_decompose():
        return lambda *args, **kwargs: func.decompose(*args, **kwargs)
    return _SUMS_AND_PRODUCTS.get(operator_of(func).name)


@functools.cache
def operator_of(func: Any) -> Operator:
    """Name, arguments and written arguments of an operator that the dispatcher has seen."""
    schema = func._schema
    namespace, name = schema.name.split("::")
    written = tuple(
        argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write
    )
    if schema.name == "aten::view" and schema.overload_name == "dtype":
        name = "view.dtype"
    if schema.overload_name == "Sequence":
        name = f"{name}.Sequence"  # of several tensors, each by itself
    if schema.name == "aten::detach_":
        written = ()  # it changes what is known of the tensor's history, and no element
    if namespace != "aten":
        name = schema.name
    elif name.endswith("_") and (written or name == "detach_") and not name.startswith("_"):
        name = name[:-1]
    elif written:
        name = schema.name  # out= variants and silent writers: known to no rule
    aliased = any(result.alias_info for result in schema.returns)
    composite = func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)  # of any views
    fresh = namespace == "aten" and not written and not aliased and (not composite or name in _FRESH)
    arguments = tuple(argument.name for argument in schema.arguments)
    tensors = any("Tensor" in str(result.type) for result in schema.returns)
    needs_contents = namespace != "aten" or not tensors or any(tag in func.tags for tag in _DYNAMIC)
    return Operator(name, arguments, written, _SILENT_WRITERS.get(name, ""), fresh, needs_contents)


def memory_of(tensor: Tensor) -> int | None:
    """A number for the memory of a tensor, the same for all tensors that share it; None if it has no storage."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None  # a sparse tensor, for one


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor has one size along each axis and a place in memory for each element."""
    return tensor.layout == torch.strided and not tensor.is_nested


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The sizes of a tensor; of a nested one that keeps no table of them, the number of its parts and nothing else."""
    if tensor.is_nested and tensor.layout == torch.strided:
        return (tensor.size(0),)
    return tuple(tensor.shape)
