"""What the code of a model says of itself: the arguments of its methods, words that may be names, numbers that it
compares with."""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import types
from collections.abc import Callable, Container, Iterator
from typing import Any

from torch import nn

from bnfuse.model.other_state import code_of

MOST = 8
"""So many names of keywords or keys, and so many numbers, are tried."""

_LARGEST = 2048
"""No larger size is tried for the sake of a number in the code."""

_REGROUPING = frozenset(
    {"view", "reshape", "unflatten", "split", "chunk", "tensor_split", "split_with_sizes", "rearrange", "reduce"}
)
"""Names of functions that take sizes apart by numbers."""

_MODES = frozenset({"is_grad_enabled", "is_inference_mode_enabled"})
"""Functions of PyTorch's that tell whether gradients are tracked."""

VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
"""The kinds of parameters that take any number of arguments."""


def parameters_of(method: Any) -> list[inspect.Parameter]:
    """The parameters of a method, none where Python does not know them."""
    try:
        return list(inspect.signature(method).parameters.values())
    except (TypeError, ValueError):
        return []


class ModelCode:
    """The code in which a model is written, read when something of it is asked for, and once.

    Attributes:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @functools.cached_property
    def words(self) -> list[str]:
        """The strings in the code of a model that could be names of arguments or keys."""
        codes = [function.__code__ for function, _ in self._functions]
        codes.reverse()  # those of the model itself are taken first
        found: dict[str, None] = {}
        while codes:
            for constant in codes.pop().co_consts:
                if isinstance(constant, types.CodeType):
                    codes.append(constant)
                elif isinstance(constant, str) and constant.isidentifier():
                    found[constant] = None
        return list(found)

    def words_but(self, known: Container[str]) -> list[str]:
        """Those of the words that are not known already."""
        return [word for word in self.words if word not in known]

    @functools.cached_property
    def thresholds(self) -> list[int]:
        """The whole numbers that the code of a model compares something with: constants and attributes."""
        return self._numbers_beside(lambda step: step.opname == "COMPARE_OP")

    @functools.cached_property
    def divisors(self) -> list[int]:
        """The whole numbers by which the code of a model may take sizes apart, as in ``x.unflatten(-1, (-1, 11))``."""
        return self._numbers_beside(lambda step: step.opname.startswith("LOAD_") and step.argval in _REGROUPING)

    def _numbers_beside(self, asked: Callable[[dis.Instruction], bool]) -> list[int]:
        """The numbers, constants and attributes, in the lines of code that have such an instruction."""
        found: set[int] = set()
        for function, modules in self._functions:
            lines: dict[int | None, list[dis.Instruction]] = {}
            line = None
            for step in dis.get_instructions(function):
                line = step.positions.lineno if step.positions is not None else line
                lines.setdefault(line, []).append(step)
            for steps in lines.values():
                if not any(map(asked, steps)):
                    continue
                for step in steps:
                    held = [step.argval] if step.opname in ("LOAD_CONST", "LOAD_SMALL_INT") else []
                    if step.opname == "LOAD_ATTR":
                        held = [vars(module).get(step.argval) for module in modules]
                    elif step.opname == "LOAD_GLOBAL":
                        held = [function.__globals__.get(step.argval)]
                    numbers = itertools.chain(*(value if type(value) is tuple else (value,) for value in held))
                    found.update(number for number in numbers if type(number) is int and 1 < number <= _LARGEST)
        return sorted(found)[:MOST]

    @functools.cached_property
    def compares_with_flags(self) -> bool:
        """Whether the code of a model compares something with True or False."""
        for function, _ in self._functions:
            if not any(isinstance(constant, bool) for constant in function.__code__.co_consts):
                continue
            for step, following in itertools.pairwise(dis.get_instructions(function)):
                compared = following.opname in ("COMPARE_OP", "IS_OP")
                if compared and step.opname == "LOAD_CONST" and isinstance(step.argval, bool):
                    return True
        return False

    @functools.cached_property
    def asks_for_modes(self) -> bool:
        """Whether the code of a model asks PyTorch if gradients are tracked, which is no function of a tensor."""
        codes = [function.__code__ for function, _ in self._functions]
        while codes:
            code = codes.pop()
            if not _MODES.isdisjoint(code.co_names):
                return True
            codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        return False

    @functools.cached_property
    def _functions(self) -> list[tuple[types.FunctionType, list[nn.Module]]]:
        return list(_functions(self.model))


def _functions(model: nn.Module) -> Iterator[tuple[types.FunctionType, list[nn.Module]]]:
    """The functions of the caller's in which a model is written, with the modules of their class.

    Those are the methods of its modules, the functions that modules hold, and those of the same file that they call.
    """
    holders: dict[type, list[nn.Module]] = {}
    for module in model.modules():
        holders.setdefault(type(module), []).append(module)
    seen: set[int] = set()
    for kind, modules in holders.items():
        waiting = list(code_of(kind))
        if waiting:
            held = [value for module in modules for value in vars(module).values()]
            waiting += [value for value in held if isinstance(value, types.FunctionType)]
        while waiting:
            function = waiting.pop(0)
            if id(function) in seen:
                continue
            seen.add(id(function))
            yield function, modules
            called = [function.__globals__.get(name) for name in function.__code__.co_names]
            waiting += [
                other
                for other in called
                if isinstance(other, types.FunctionType) and other.__module__ == function.__module__
            ]
