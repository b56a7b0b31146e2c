"""Operators without their arithmetic, for runs that only record which operators a model runs on which shapes.

A result that depends on the model's input is memory of the right shape, strides and dtype that nothing is written to,
which takes next to no time. The slowest operators are known here. All others run as they are, on whatever numbers the
memory holds. What does not depend on the input (weights that are computed, tables, masks) is computed for real.

A model that looks at the contents of such a tensor cannot run like this. Then :class:`NeedsContentsError` is raised.
Any other error may come from the meaningless numbers too. In both cases the model has to run for real.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bnfuse.operators import Operator, is_dense


class NeedsContentsError(BaseException):
    """The model looks at contents. Not an ``Exception``, so that no ``except`` in the model catches it."""


class FixedSizeError(RuntimeError):
    """A tensor that depends on the input does not fit one that does not, such as a parameter."""


def compute(
    func: Any, operator: Operator, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Sequence[Tensor]
) -> Any:
    """What an operator returns on arguments that depend on the input, without contents if the operator is known here.

    Arguments that do not fit together are left to the operator itself, which raises an error.

    Args:
        tensors: those among the arguments.

    Raises:
        NeedsContentsError: the result, or its shape, depends on the contents of tensors.
    """
    name = operator.name
    if operator.needs_contents or (name == "index" and _masked(args[1])):
        raise NeedsContentsError(func._schema.name)
    make = _MADE.get(name)
    if make is None or not all(map(is_dense, tensors)):
        return func(*args, **kwargs)
    if not operator.written:
        made = make(*args, **kwargs)
        return func(*args, **kwargs) if made is None else made
    return args[0] if name in _IN_PLACE and isinstance(args[0], Tensor) else func(*args, **kwargs)


def _masked(indices: Sequence[Tensor | None]) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _dense(x: Tensor) -> torch.memory_format | None:
    """The memory format in which the tensor is dense, None if there is none."""
    if x.is_contiguous():
        return torch.contiguous_format
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return None


def _like(x: Tensor, *_: Any, **options: Any) -> Tensor | None:
    return torch.empty_like(x) if _dense(x) is not None and not options.get("out") else None


def _like_both(x: Any, y: Any, *_: Any, **options: Any) -> Tensor | None:
    """For two operands: the result has the memory format of the one that is not broadcast."""
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        tensor = x if isinstance(x, Tensor) else y
        number = y if isinstance(x, Tensor) else x
        fits = tensor.is_floating_point() and isinstance(number, (int, float))
        return _like(tensor) if fits and "rounding_mode" not in options else None
    if x.dtype != y.dtype or not x.is_floating_point() or "rounding_mode" in options:
        return None
    shape = _broadcast(x.shape, y.shape)
    full = [tensor for tensor in (x, y) if tensor.shape == shape]
    if not full or (len(full) == 2 and x.stride() != y.stride()):
        return None
    return _like(full[0])


def _broadcast(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...] | None:
    """``torch.broadcast_shapes``, without the compiler that it loads; None for shapes that do not fit."""
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    padded = (*[1] * (len(longer) - len(shorter)), *shorter)
    if not all(m == n or m == 1 or n == 1 for m, n in zip(longer, padded, strict=True)):
        return None
    return tuple(n if m == 1 else m for m, n in zip(longer, padded, strict=True))


def _batch_norm(
    x: Tensor, weight: Any, bias: Any, mean: Tensor | None, var: Any, training: bool, *_: Any
) -> Tensor | None:
    form = _dense(x)
    if training or form is None or x.dim() < 2 or mean is None or mean.numel() != x.shape[1]:
        return None
    return torch.empty_like(x, memory_format=form)


def _layer_norm(x: Tensor, shape: Sequence[int], *_: Any) -> Tensor | None:
    return _like(x) if x.is_contiguous() and list(x.shape[x.dim() - len(shape) :]) == list(shape) else None


def _group_norm(x: Tensor, groups: int, weight: Tensor | None = None, *_: Any) -> Tensor | None:
    fits = weight is not None and weight.numel() == x.shape[1] and x.shape[1] % groups == 0
    return _like(x) if fits and x.is_contiguous() else None


def _softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor | None:
    return _like(x) if dtype is None and x.is_floating_point() and -x.dim() <= dim < x.dim() else None


def _convolved(spatial: int) -> Callable[..., Tensor | None]:
    def shape(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor | None:
        form = _dense(x)
        if x.dim() != spatial + 2 or form is None or not weight.is_contiguous():
            return None
        if x.dtype != weight.dtype or x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
            return None
        strides, pads, steps = (
            [given] * spatial if isinstance(given, int) else list(given) * (spatial // len(given))
            for given in (stride, 0 if isinstance(padding, str) else padding, dilation)
        )
        sizes = [
            (size + 2 * pad - step * (kernel - 1) - 1) // by + 1
            for size, pad, step, kernel, by in zip(x.shape[2:], pads, steps, weight.shape[2:], strides, strict=True)
        ]
        if padding == "same":
            sizes = list(x.shape[2:])
        if min(sizes) <= 0 or (padding == "same" and strides != [1] * spatial):
            return None
        return torch.empty((x.shape[0], weight.shape[0], *sizes), dtype=x.dtype, device=x.device, memory_format=form)

    return shape


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if weight.dim() != 2 or x.dim() < 2 or x.dtype != weight.dtype or x.shape[-1] != weight.shape[1]:
        return None
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _product(x: Tensor, y: Tensor) -> Tensor | None:
    if x.dim() < 2 or y.dim() < 2 or x.dtype != y.dtype or x.shape[-1] != y.shape[-2]:
        return None
    batch = _broadcast(x.shape[:-2], y.shape[:-2])
    return None if batch is None else x.new_empty((*batch, x.shape[-2], y.shape[-1]))


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    first = tensors[0]
    forms = {_dense(tensor) for tensor in tensors}
    same = all(tensor.dtype == first.dtype and tensor.dim() == first.dim() for tensor in tensors)
    if not same or forms != {torch.contiguous_format}:
        return None
    dim %= first.dim()
    if any(
        a != b for tensor in tensors for i, (a, b) in enumerate(zip(tensor.shape, first.shape, strict=True)) if i != dim
    ):
        return None
    shape = list(first.shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return first.new_empty(shape)


_ELEMENTWISE = (
    "relu", "relu6", "silu", "gelu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "hardtanh", "leaky_relu", "elu",
    "celu", "selu", "mish", "softplus", "clamp", "clamp_min", "clamp_max", "exp", "sqrt", "rsqrt", "neg", "abs",
)  # fmt: skip
_BINARY = ("add", "sub", "mul", "div")

_MADE: dict[str, Callable[..., Tensor | None]] = {
    **dict.fromkeys(_ELEMENTWISE, _like),
    **dict.fromkeys(_BINARY, _like_both),
    "batch_norm": _batch_norm,
    "softmax": _softmax,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "conv1d": _convolved(1),
    "conv2d": _convolved(2),
    "conv3d": _convolved(3),
    "linear": _linear,
    "matmul": _product,
    "bmm": _product,
    "cat": _joined,
}

_IN_PLACE = frozenset({*_ELEMENTWISE, *_BINARY})
