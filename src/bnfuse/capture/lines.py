"""Which lines of a model's own code ran, so that a plan can say which did not."""

from __future__ import annotations

import contextlib
import linecache
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import Any

from torch import nn

_SHOWN = 3
"""So many places are named."""

_NEVER_COUNT = ("raise", "assert", "warnings.", '"""', "global ", "nonlocal ")
"""Lines that begin so do nothing to a result."""


class LineWatch:
    """Notes the lines that run in the functions of the classes of some modules, PyTorch's own left out."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        kinds = {base for kind in {type(module) for module in modules} for base in kind.__mro__}
        functions = [
            value
            for kind in kinds
            if kind.__module__.partition(".")[0] not in ("torch", "builtins")
            for value in vars(kind).values()
            if isinstance(value, types.FunctionType)
        ]
        self._codes = {function.__code__ for function in functions}
        self._seen: dict[types.CodeType, set[int]] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Note what runs inside, in this thread."""
        if sys.gettrace() is not None:  # a debugger, or the coverage of tests
            yield
            return
        sys.settrace(self._enter)
        try:
            yield
        finally:
            sys.settrace(None)

    def _enter(self, frame: types.FrameType, event: str, argument: Any) -> Any:
        if frame.f_code not in self._codes:
            return None
        seen = self._seen.setdefault(frame.f_code, set())

        def line(frame: types.FrameType, event: str, argument: Any) -> Any:
            seen.add(frame.f_lineno)
            return line

        return line

    def missed(self) -> list[tuple[str, int]]:
        """File and number of the lines that did not run in functions that did; of neighbours the first."""
        found = []
        for code, seen in self._seen.items():
            lines = sorted({line for _, _, line in code.co_lines() if line} - seen - {code.co_firstlineno})
            before = None
            for line in lines:
                text = linecache.getline(code.co_filename, line).strip()
                counts = bool(text) and not text.startswith((*_NEVER_COUNT, "def ", "@", "else:", ")", "]"))
                if counts and before != line - 1:
                    found.append((code.co_filename, line))
                before = line
        return found

    def __str__(self) -> str:
        """What did not run, in words; "" if everything did."""
        missed = self.missed()
        shown = ", ".join(f"{PurePath(file).name}:{line}" for file, line in missed[:_SHOWN])
        more = f" and {len(missed) - _SHOWN} more places" if len(missed) > _SHOWN else ""
        return f"branches of the code that did not run: {shown}{more}" if missed else ""
