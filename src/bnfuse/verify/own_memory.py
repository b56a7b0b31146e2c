"""Whether a copy of a model runs on parameters of its own.

A copy shares with the original whatever ``copy.deepcopy`` takes for one: functions and the variables of their modules,
classes, caches. Where these hold layers of the original, the copy runs them, norms included, and nothing that is done
to the copy has an effect. The outputs are right all the same, so that only the memory that operators read tells.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from bnfuse.model import tree
from bnfuse.model.sandbox import Mode
from bnfuse.operators import memory_of


class MemoryWatch(Mode):
    """Ends the run of another model at the first operator that takes a parameter or buffer of this one.

    Attributes:
        seen: the name of that parameter or buffer, None if there was none.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.seen: str | None = None
        self._names = {memory_of(tensor): name for name, tensor in _held(model)}
        self._names.pop(None, None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for argument in (*args, *kwargs.values()) if kwargs else args:
            self._look(argument)
        return func(*args, **kwargs) if kwargs else func(*args)

    def _look(self, argument: Any) -> None:
        if isinstance(argument, Tensor):
            name = self._names.get(memory_of(argument))
            if name is not None:
                self.seen = name
                raise RuntimeError(f"{name} of another model is read")  # before anything is written to it
        elif isinstance(argument, (list, tuple)) and argument and not isinstance(argument[0], (int, float)):
            for item in argument:
                self._look(item)


def _held(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in tree.named_modules(model):
        for registry in (module._parameters, module._buffers):
            for place, tensor in registry.items():
                if tensor is not None:
                    yield f"{path}.{place}".lstrip("."), tensor
