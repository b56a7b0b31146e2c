"""Runs in which the code takes gradients: a force that is the gradient of an energy, a term that is a Jacobian.

Under inference mode no gradient can be taken, so such a run goes with gradients. PyTorch then takes composite operators
apart before a dispatch mode sees them. Therefore every function of PyTorch's is called below the layer that tracks
gradients: the recorder sees the operator whole, and calls it with that layer in place.

What PyTorch does to compute a gradient is not recorded. A gradient depends on what is differentiated, by what, and on
the function between them; and fusing leaves functions as they are between tensors that keep their units. So the
tensors on both sides are pinned, and so is the gradient. A function with a gradient of the code's own
(``torch.autograd.Function``) is an exception: it may do something else in other units, so then all tensors are pinned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode

from bnfuse.capture.module_calls import ModuleCalls
from bnfuse.capture.recorder import Recorder
from bnfuse.capture.values import Values
from bnfuse.model import pytree
from bnfuse.reasons import IS_DIFFERENTIATED

_GET_GRAD = torch.Tensor.grad.__get__  # type: ignore[union-attr]
_SET_REQUIRES_GRAD = torch.Tensor.requires_grad.__set__  # type: ignore[attr-defined]

ASKS_FOR_GRADIENTS = frozenset({torch.Tensor.requires_grad_, _SET_REQUIRES_GRAD})
"""Functions by which code says that it is going to take gradients."""

_TAKES_GRADIENTS = frozenset({torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward})

_SHOWS_GRADIENTS = frozenset(
    {
        _GET_GRAD,
        torch.Tensor.retain_grad,
        torch.Tensor.register_hook,
        torch.Tensor.register_post_accumulate_grad_hook,
    }
)
"""Functions by which code gets at the gradient of the tensor that they are given."""


class Gradients(TorchFunctionMode):
    """Lets a recorder see whole operators while PyTorch tracks gradients, and pins what gradients are taken of."""

    def __init__(self, recorder: Recorder, values: Values, calls: ModuleCalls) -> None:
        super().__init__()
        self._recorder = recorder
        recorder.tracks_gradients = True
        self._values = values
        self._calls = calls

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _TAKES_GRADIENTS:
            return self._differentiate(func, args, kwargs)
        if func in _SHOWS_GRADIENTS:
            result = func(*args, **kwargs)
            self._pin((args[0], result))
            return result
        with self._recorder.below_autograd():
            return func(*args, **kwargs)

    def _differentiate(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = pytree.tensors((args, kwargs))
        self._pin((args, kwargs))
        if _has_own_gradient(tensor for _, tensor in given):
            self._recorder.pin_all(IS_DIFFERENTIATED)
        with self._recorder.paused(), self._calls.paused():
            result = func(*args, **kwargs)
        self._pin(result)
        return result

    def _pin(self, structure: Any) -> None:
        with torch._C.DisableTorchFunction():
            for _, tensor in pytree.tensors(structure):
                self._values.add_unrecorded(tensor)
            self._values.expose(structure, IS_DIFFERENTIATED)


def _has_own_gradient(tensors: Iterable[Tensor]) -> bool:
    """Whether a function whose gradient the code itself computes is among those that made the tensors."""
    waiting: list[Any] = [tensor.grad_fn for tensor in tensors]
    seen: set[Any] = set()
    while waiting:
        function = waiting.pop()
        if function is not None and function not in seen:
            if isinstance(function, BackwardCFunction):
                return True
            seen.add(function)
            waiting += [before for before, _ in function.next_functions]
    return False
