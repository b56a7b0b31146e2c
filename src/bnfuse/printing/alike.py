"""Texts that say the same of different things, as one: their numbers where they differ become ``*``."""

from __future__ import annotations

import re
from collections.abc import Sequence

NUMBERED_NAMES = re.compile(r"(?<!int)(?<!float)(?<!\d)\d+(?![A-Za-z_\d])")
"""The numbers in names of modules: at the end of one part of a name, not those in ``conv2d``, ``BatchNorm2d``."""

NUMBERS = re.compile(r"\d+")
"""Every number, as in the shapes of an error message."""


def alike(texts: Sequence[str], numbers: re.Pattern[str] = NUMBERED_NAMES) -> list[tuple[str, list[int]]]:
    """Group texts that differ in nothing but numbers.

    >>> alike(["relu in blocks.0.act", "it is an output", "relu in blocks.1.act"])
    [('relu in blocks.*.act', [0, 2]), ('it is an output', [1])]

    Args:
        texts: what is said, one for each thing.
        numbers: which numbers may differ.

    Returns:
        For each group, in the order of first appearance: the text, with ``*`` for numbers that are not the same in all
        of the group, and the places of its texts.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for place, text in enumerate(texts):
        groups.setdefault(tuple(numbers.split(text)), []).append(place)
    found = []
    for parts, places in groups.items():
        columns = zip(*(numbers.findall(texts[place]) for place in places), strict=True)
        shown = [values[0] if len(set(values)) == 1 else "*" for values in columns]
        text = parts[0] + "".join(number + part for number, part in zip(shown, parts[1:], strict=True))
        found.append((text, places))
    return found


def shortened(names: Sequence[str], most: int) -> str:
    """A list of names, cut with the count of what is left out; at least two are left out, or none.

    >>> shortened(["a", "b", "c", "d"], 2), shortened(["a", "b", "c"], 2)
    ('a, b and 2 more', 'a, b, c')
    """
    if len(names) <= most + 1:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most} more"
