"""Which module call runs each operator, and what the hooks of others get to see."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import _disable_current_modes

from bnfuse.capture.values import Values
from bnfuse.graph.graph import Kind, ModuleCall
from bnfuse.model import pytree
from bnfuse.operators import is_dense
from bnfuse.reasons import HOOK_READS, IS_READ_IN_A_THREAD

_OWN_HOOKS: set[int] = set()
"""The global hooks that this file has registered; all others are the caller's."""

_FEW = 64
"""So many whole numbers (indices, sizes) are kept with the arguments of a call."""


class ModuleCalls:
    """The module calls of one run.

    Attributes:
        current: the innermost call that is running.
        ended: the calls that have returned, in the order of returning.
        hooks: True once a module ran on which the model's own code has put a hook since the run began.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Module]],
        values: Values,
        ended: list[ModuleCall] | None = None,
        hooks_may_see: bool = False,
    ) -> None:
        """
        Args:
            named: every module of the model under each of its names; the first is the model itself.
            ended: is added to.
            hooks_may_see: whether the caller's own hooks may see other numbers.
        """
        self._hooks_may_see = hooks_may_see
        self.current = ModuleCall("", named[0][1], None)
        self.ended: list[ModuleCall] = [] if ended is None else ended
        self.hooks = False
        self._paths = {id(module): name for name, module in reversed(named)}
        self._hooked = {id(module) for _, module in named if has_own_hooks(module)}
        self._values = values
        self._thread = threading.get_ident()
        self._paused = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Follow no calls."""
        outer, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = outer

    @contextlib.contextmanager
    def recorded(self, pause: Callable[[], None], resume: Callable[[], None]) -> Iterator[None]:
        """Follow the calls of all modules, and pin what the caller's own hooks get to see.

        Args:
            pause, resume: called before and after a layer of PyTorch's own that holds no others.
        """
        hooked = _has_global_hooks()
        values = self._values

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self._paused or threading.get_ident() != self._thread:
                self._pin_in_thread(module, (args, module._parameters, module._buffers))
                return
            call = ModuleCall(self._paths.get(id(module)), module, self.current, [], [], values.inside(args))
            self.current = call
            if hooked or has_own_hooks(module):
                if not self._hooks_may_see:
                    values.expose(args, HOOK_READS, owner=call.label)
                self.hooks |= not hooked and id(module) not in self._hooked
            elif not module._modules and call.is_standard:
                pause()  # it reads sizes only to check them, and no contents

        def after(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
            if self._paused or threading.get_ident() != self._thread:
                self._pin_in_thread(module, rest)
                return
            call = self.current
            while call.module is not module and call.parent is not None:
                call = call.parent  # calls inside raised an exception that the model caught
            if call.parent is None:
                return
            self.current = call.parent
            resume()
            if len(rest) < 2:
                return  # it raised an exception
            kwargs, output = rest
            if not self._hooks_may_see and (hooked or has_own_hooks(module)):
                values.expose((args, kwargs, output), HOOK_READS, owner=call.label)
            given = args if not kwargs else (*args, *kwargs.values()) if kwargs.keys() == {"input"} else ()
            call.plain = len(given) == 1 and isinstance(given[0], Tensor) and isinstance(output, Tensor)
            if not call.plain and any(place in module._parameters for place in ("weight", "bias")):
                with _disable_current_modes():  # what is noted here is no operator
                    call.arguments = pytree.map_tensors((args, kwargs), _without_contents)
            if kwargs:
                call.inputs += values.inside(kwargs)
            call.outputs = values.inside(output)
            self.ended.append(call)
            call.parent.children.append(call)

        handles = [
            module_hooks.register_module_forward_pre_hook(before),
            module_hooks.register_module_forward_hook(after, with_kwargs=True, always_call=True),
        ]
        _OWN_HOOKS.update(handle.id for handle in handles)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
                _OWN_HOOKS.discard(handle.id)
                # RemovableHandle forgets these registries, which would leave every later call on the slow path.
                module_hooks._global_forward_hooks_with_kwargs.pop(handle.id, None)
                module_hooks._global_forward_hooks_always_called.pop(handle.id, None)

    def _pin_in_thread(self, module: nn.Module, seen: Any) -> None:
        """Pin what a module reads and makes in another thread, whose operators are not recorded."""
        if threading.get_ident() == self._thread:
            return
        for _, tensor in pytree.tensors(seen):
            value = self._values.of(tensor)
            value.pin(IS_READ_IN_A_THREAD, owner=ModuleCall(self._paths.get(id(module)), module, None).label)
            value.independent &= value.kind is Kind.PARAMETER


def has_hooks(module: nn.Module) -> bool:
    """True if a hook of the caller's runs before or after the module's forward.

    PyTorch's own hooks that recompute a weight (weight_norm, spectral_norm, pruning), or that check the sizes of what
    an exported graph is given, read no activations.
    """
    return _has_global_hooks() or has_own_hooks(module)


def has_own_hooks(module: nn.Module) -> bool:
    """True if the caller has registered a hook on the module itself."""
    if not module._forward_pre_hooks and not module._forward_hooks:
        return False
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return not all(map(_is_harmless, hooks))


def _is_harmless(hook: Any) -> bool:
    if (getattr(hook, "__module__", None) or "").startswith("torch.export."):
        return True
    return type(getattr(hook, "__self__", hook)).__module__.startswith("torch.nn.utils.")


def _has_global_hooks() -> bool:
    registries = (module_hooks._global_forward_pre_hooks, module_hooks._global_forward_hooks)
    return any(not _OWN_HOOKS.issuperset(registry) for registry in registries)


def _without_contents(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and dtype that keeps no memory alive; a few whole numbers are copied, as is what is
    sparse or nested."""
    if not is_dense(tensor) or (tensor.numel() <= _FEW and not tensor.is_floating_point()):
        return tensor.detach().clone()
    return torch.empty_like(tensor, device="meta")
