"""Contents and sizes that leave PyTorch: the dispatcher sees no operator there, so a function mode watches.

Contents that leave must stay as they are. And code that reads a size or an element may do something else at another
size or for other contents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode, _push_mode
from torch.utils._python_dispatch import _disable_current_modes

from bnfuse.capture.gradients import ASKS_FOR_GRADIENTS
from bnfuse.capture.module_calls import ModuleCalls
from bnfuse.capture.shapes_only import NeedsContentsError
from bnfuse.capture.values import Values, is_masking
from bnfuse.model import pytree
from bnfuse.model.sandbox import SavedState
from bnfuse.reasons import IS_MULTIPLIED_IN, LEAVES_PYTORCH

_GET_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]

_ESCAPES: dict[Any, str] = {
    torch.Tensor.numpy: ".numpy()",
    torch.Tensor.tolist: ".tolist()",
    torch.Tensor.__array__: ".__array__()",
    torch.Tensor.__dlpack__: ".__dlpack__()",
    torch.Tensor.__deepcopy__: "copy.deepcopy",
    torch.Tensor.__reduce_ex__: "pickling",
    torch.Tensor.data_ptr: ".data_ptr()",
    torch.Tensor.storage: ".storage()",
    torch.Tensor.new_tensor: ".new_tensor()",
    torch.tensor: "torch.tensor",
    torch.as_tensor: "torch.as_tensor",
    torch.asarray: "torch.asarray",
    torch.utils.dlpack.to_dlpack: "to_dlpack",  # type: ignore[attr-defined]
    torch.Tensor.untyped_storage: ".untyped_storage()",
    _GET_DATA: ".data",
    _SET_DATA: ".data",
}
"""Functions by which a tensor's contents leave, with their name in a reason."""

READS_OF_SIZES = frozenset(
    {
        torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
        torch.Tensor.size,
        torch.Tensor.numel,
        torch.numel,
        torch._shape_as_tensor,
        torch.Tensor.storage,
        torch.Tensor.untyped_storage,
        torch.Tensor.nelement,
        torch.Tensor.nbytes.__get__,  # type: ignore[attr-defined]
        torch.Tensor.__len__,
    }
)
"""Functions that tell the code a size, on which it may then depend."""

READS_OF_LAYOUT = frozenset(
    {
        torch.Tensor.stride,
        torch.Tensor.is_contiguous,
        torch.Tensor.storage_offset,
        torch.Tensor.data_ptr,
        torch.Tensor.untyped_storage,
        torch.Tensor._base.__get__,  # type: ignore[union-attr]
        torch.Tensor._is_view,
    }
)
"""Functions that tell the code how a tensor lies in memory."""

READS_OF_MODES = frozenset(
    {
        torch.Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
        torch.Tensor.grad_fn.__get__,  # type: ignore[union-attr]
        torch.Tensor.is_leaf.__get__,  # type: ignore[attr-defined]
        torch.Tensor.is_inference,
    }
)
"""Functions that tell the code whether gradients are tracked."""

READS_OF_ELEMENTS = frozenset(
    {
        torch.Tensor.item,
        torch.Tensor.tolist,
        torch.Tensor.numpy,
        torch.Tensor.__bool__,
        torch.Tensor.__int__,
        torch.Tensor.__float__,
        torch.Tensor.__index__,
        torch.Tensor.__contains__,
        torch.Tensor.__array__,
        torch.Tensor.__format__,
        torch.Tensor.__repr__,
        torch.Tensor.__complex__,
        torch.Tensor.is_nonzero,
        torch.equal,
        torch.Tensor.equal,
        torch.allclose,
        torch.Tensor.allclose,
    }
)
"""Functions that tell the code an element, or something that depends on the elements."""

_FROM_NUMBERS = (torch.tensor, torch.as_tensor, torch.asarray)
"""Those of them that also make a tensor of numbers in the code."""

_FROM_A_TENSOR = (torch.as_tensor, torch.asarray)
"""Those that, given a tensor, use operators that the recorder sees. Given a list of tensors, they do not."""

_WATCHED = frozenset(
    {*_ESCAPES, *READS_OF_SIZES, *READS_OF_LAYOUT, *READS_OF_MODES, *READS_OF_ELEMENTS, *ASKS_FOR_GRADIENTS}
)


class EscapeWatch(TorchFunctionMode):
    """Watches the few functions by which contents and sizes leave without an operator.

    Attributes:
        looks: True once the code has read a size of a tensor that depends on the input.
        reads_elements: True once it has read an element, or something that depends on the elements.
        reads_layout: True once it has read how such a tensor lies in memory.
        reads_modes: True once it has read whether gradients are tracked.
        gradients: True once it has asked for gradients.
    """

    def __init__(self, values: Values, calls: ModuleCalls, state: SavedState, shapes_only: bool) -> None:
        """
        Args:
            shapes_only: whether tensors that depend on the input have no contents.
        """
        super().__init__()
        self.looks = self.reads_elements = self.reads_layout = self.reads_modes = self.gradients = False
        self._values = values
        self._calls = calls
        self._state = state
        self._shapes_only = shapes_only
        self._paused = False

    def pause(self) -> None:
        """Watch nothing until `resume`, which makes every call of PyTorch's faster."""
        if _get_current_function_mode() is self:
            _pop_mode()
            self._paused = True

    def resume(self) -> None:
        if self._paused:
            _push_mode(self)
            self._paused = False

    def __exit__(self, *raised: Any) -> None:
        self.resume()
        super().__exit__(*raised)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func not in _WATCHED:
            return func(*args, **(kwargs or {}))
        if func in READS_OF_SIZES and not self.looks:
            by_pytorch = self._calls.current.is_standard  # which checks sizes, and does not go by them
            self.looks = not by_pytorch and self._depends(args)
        elif func in READS_OF_ELEMENTS and not self.reads_elements:
            self.reads_elements = self._depends(args)
        elif func in READS_OF_MODES and not self._calls.current.is_standard:
            self.reads_modes |= self._depends(args)
            if func is torch.Tensor.is_inference:
                return False  # as in a run of the caller's
        if func in READS_OF_LAYOUT and not self._calls.current.is_standard:
            self.reads_layout = self.reads_layout or self._depends(args)
            self.looks |= self.reads_layout
        if func == _GET_DATA:
            with _disable_current_modes():  # an alias is no operator
                data = func(*args)
            if self._values.add_alias(args[0], data):
                return data
        if func in ASKS_FOR_GRADIENTS:
            self.gradients |= bool((kwargs or {}).get("requires_grad", args[1] if len(args) > 1 else True))
        how = _ESCAPES.get(func)
        if how is None:
            return func(*args, **(kwargs or {}))
        if func == _SET_DATA and self._is_known_assignment(*args):
            with _disable_current_modes():
                self._state.save_memory(args[0])
                return func(*args)
        given = pytree.tensors((args, kwargs) if kwargs else args)
        recorded = func in _FROM_A_TENSOR and isinstance(args[0] if args else (kwargs or {}).get("data"), Tensor)
        if not recorded:
            for _, tensor in given:
                self._escape(tensor, how)
            if func == _SET_DATA:
                self._state.save_memory(args[0])
        self._values.in_literal = func in _FROM_NUMBERS and not given
        try:
            if self._values.in_literal:  # somebody may keep it, and tensors of inference mode cannot be trained with
                with torch.inference_mode(False), torch.no_grad():
                    return func(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))
        finally:
            self._values.in_literal = False

    def _depends(self, args: tuple[Any, ...]) -> bool:
        """True if one of the arguments depends on the input."""
        tensors = [argument for argument in args if isinstance(argument, Tensor)]
        return any((value := self._values.known(tensor)) is None or not value.independent for tensor in tensors)

    def _is_known_assignment(self, tensor: Tensor, other: Tensor) -> bool:
        """True if a parameter is given what it holds (the end of ``weight.data *= mask``), or itself times a mask."""
        before, after = self._values.known(tensor), self._values.known(other)
        if before is None or after is None or before is after:
            return before is after is not None
        node = after.producer
        if node is None or node.operator != "mul" or node.written or before not in node.inputs:
            return False
        if (after.shape, after.dtype, after.pinned) != (before.shape, before.dtype, None):
            return False
        [mask] = [value for value in node.inputs if value is not before] or [before]
        with _disable_current_modes():
            masks = is_masking(before, mask)
        if masks:
            mask.pin(IS_MULTIPLIED_IN)
            self._values.assign(tensor, after)
        return masks

    def _escape(self, tensor: Tensor, how: str) -> None:
        value = self._values.known(tensor)
        if value is None:
            return
        self._values.exposed.append(value.index)
        self._values.escaped |= not value.independent
        if value.dtype.is_floating_point or not value.independent:  # an index has no units that could change
            value.pin(LEAVES_PYTORCH, how=how)
        if self._shapes_only and not value.independent and how != ".data":
            raise NeedsContentsError(how)
