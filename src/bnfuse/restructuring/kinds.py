"""The kinds of restructuring that can be asked for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from bnfuse.errors import InputError

ALL = "all"
BAKE, UNTIE, MERGE, CLIP = "bake", "untie", "merge", "clip"

KINDS = (BAKE, UNTIE, MERGE, CLIP)
"""In the order in which they are carried out."""


def checked_kinds(given: Any) -> tuple[str, ...]:
    """The kinds that a caller asks for, in the order in which they are carried out.

    >>> checked_kinds(["untie", "bake"])
    ('bake', 'untie')

    Args:
        given: a kind, several, True or "all" for all, or None or False for none.

    Raises:
        InputError: it is something else.
    """
    if given is None or isinstance(given, bool):
        return KINDS if given else ()
    asked = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else [given]
    if ALL in asked:
        asked = [*KINDS, *(kind for kind in asked if kind != ALL)]
    for kind in asked:
        if kind not in KINDS:
            near = difflib.get_close_matches(str(kind), KINDS, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise InputError(
                f"restructure= names kinds of restructuring.{hint}\n  got:      {kind!r}\n"
                f"  expected: {', '.join(map(repr, KINDS))}, several of them in a list, or True for all"
            )
    return tuple(kind for kind in KINDS if kind in asked)
