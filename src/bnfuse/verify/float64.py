"""Running a model in float64 throughout, also where its own code asks for less."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator

from bnfuse.model.copying import copy_model
from bnfuse.model.pytree import map_tensors, tensors
from bnfuse.model.sandbox import Mode


class InFloat64(Mode):
    """Runs a float64 model in float64 throughout, also where its code asks for float32 or less.

    Operators get float64 in place of every narrower floating dtype and tensor. Arguments that an operator writes to, or
    returns a view of, are left as they are: a widened copy would not be the caller's memory.

    Attributes:
        narrowed: whether some operator read float64 and still returned less.
        lifted: the sum of each narrower tensor that was made from Python or numpy numbers, without its sign.
    """

    def __init__(self) -> None:
        super().__init__()
        self.narrowed = False
        self.lifted: list[float] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return self.unrolled(func, args, kwargs)
        if not isinstance(func, torch._ops.OpOverload) or func is torch.ops.aten.view.dtype:
            return func(*args, **kwargs)
        aliased = {argument.name for argument in func._schema.arguments if argument.alias_info is not None}
        names = [argument.name for argument in func._schema.arguments]
        args = tuple(_widened(value, name not in aliased) for name, value in zip(names, args, strict=False))
        kwargs = {name: _widened(value, name not in aliased) for name, value in kwargs.items()}
        output = func(*args, **kwargs)
        given = tensors((args, kwargs))
        if func is torch.ops.aten.lift_fresh.default and output.dtype != _wide(output.dtype):
            self.lifted.append(float(output.sum().abs()))
            return to_float64(output)
        if not given:
            return _widened(output, True)
        if any(tensor.dtype in (torch.float64, torch.complex128) for _, tensor in given):
            self.narrowed |= any(tensor.dtype != _wide(tensor.dtype) for _, tensor in tensors(output))
        return output


def to_float64(tensor: Tensor) -> Tensor:
    """A floating tensor in float64, a complex one in complex128, any other as it is."""
    return tensor.to(_wide(tensor.dtype))


def float64_copy(model: nn.Module) -> nn.Module:
    """A copy of a model in float64, including the tensors that its modules hold as plain attributes."""
    model = copy_model(model).double()
    own = vars(nn.Module()).keys()
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if name not in own and tensors(value):
                vars(module)[name] = map_tensors(value, to_float64)
    return model


def _wide(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else dtype


def _widened(value: Any, tensors_too: bool) -> Any:
    """An operator's argument with its dtypes widened, and its tensors if ``tensors_too``."""
    if isinstance(value, torch.dtype):
        return _wide(value)
    if isinstance(value, Tensor):
        return to_float64(value) if tensors_too else value
    return [_widened(item, tensors_too) for item in value] if isinstance(value, (list, tuple)) else value
