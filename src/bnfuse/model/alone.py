"""One thread at a time.

Running a model so that no trace is left means to change for a while what all threads share: the training flags of its
modules, its attributes, the random generators, the hooks of all modules. Two threads that do so at once would each put
back what the other has set.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_LOCK = threading.RLock()


def one_at_a_time(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Make a function wait until no other thread is in any function made so."""

    @functools.wraps(function)
    def waiting(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with _LOCK:
            return function(*args, **kwargs)

    return waiting
