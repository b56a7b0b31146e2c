"""Dtypes, shapes and errors as messages name them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

_LISTED = 3


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype.

    >>> dtype_name(torch.float32)
    'float32'
    """
    return str(dtype).removeprefix("torch.")


def shape_text(shape: Iterable[int]) -> str:
    """A shape as it is read aloud.

    >>> shape_text((2, 3, 224, 224)), shape_text(())
    ('2x3x224x224', 'scalar')
    """
    return "x".join(map(str, shape)) or "scalar"


def first_line(error: BaseException) -> str:
    """The class of an error and the first line of its message: enough where the rest is a listing.

    >>> first_line(ValueError("too long\\n  got: 3")), first_line(KeyboardInterrupt())
    ('ValueError: too long', 'KeyboardInterrupt')
    """
    return _class_and(error, str(error).strip().partition("\n")[0])


def one_line(error: BaseException) -> str:
    """The class of an error and its whole message, in one line.

    >>> one_line(ValueError("too long\\n  got: 3"))
    'ValueError: too long got: 3'
    """
    return _class_and(error, " ".join(str(error).split()))


def _class_and(error: BaseException, text: str) -> str:
    name = type(error).__name__
    return f"{name}: {text}" if text else name


def first_few(names: Sequence[str]) -> str:
    """The first names of a list, and that there are more.

    >>> first_few(["a", "b", "c", "d"])
    'a, b, c, ...'
    """
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")


def installed_version() -> str | None:
    """The version of bnfuse, None where it runs from a folder of sources and is not installed."""
    try:
        return version("bnfuse")
    except PackageNotFoundError:
        return None
