"""What every section of the benchmarks takes and gives."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.timing import Clock, Effort
from bnfuse.printing.tables import Table


@dataclass(frozen=True)
class Settings:
    """What the caller asks for.

    Attributes:
        networks: a glob pattern of network names.
        repeat: how many rounds to measure; None leaves it to each section.
        threads: for PyTorch's operators.
        quick: small networks and few rounds, to see that everything runs.
    """

    networks: str = "*"
    repeat: int | None = None
    threads: int = 1
    quick: bool = False

    @property
    def clock(self) -> Clock:
        """Processor time on one thread, which other work of the machine hardly lengthens; else the time on the wall."""
        return time.process_time if self.threads == 1 else time.perf_counter

    def effort(self, seconds: float, least: int, most: int) -> Effort:
        if self.repeat is not None:
            return Effort.exactly(self.repeat)
        return Effort.exactly(min(3, least)) if self.quick else Effort(seconds, least, most)


@dataclass(frozen=True)
class Target:
    """A promise, and whether the measurements keep it; ``met`` is None where nothing could be measured."""

    text: str
    met: bool | None

    def __str__(self) -> str:
        return f"{self.text}: {'not measured' if self.met is None else 'met' if self.met else 'MISSED'}"

    def to_dict(self) -> dict[str, Any]:
        return {"text": self.text, "met": self.met}


@dataclass(frozen=True)
class Section:
    """What a section measured.

    Attributes:
        tables: to print.
        targets: to print below them.
        data: the same and more, for JSON.
    """

    tables: Sequence[Table]
    targets: Sequence[Target] = ()
    data: dict[str, Any] = field(default_factory=dict)


def at_most(what: str, limit: float, found: dict[str, float], *, form: str = ".2f") -> Target:
    """The target that every number stays within the limit: how many do, and the worst, written in a form.

    >>> print(at_most("fused/deleted", 1.02, {"resnet18": 1.0, "mixnet_s": 1.04}))
    fused/deleted at most 1.02: 1 of 2, worst mixnet_s 1.04: MISSED
    """
    text = f"{what} at most {limit:g}"
    if not found:
        return Target(text, None)
    kept = sum(number <= limit for number in found.values())
    worst = max(found, key=found.__getitem__)
    return Target(f"{text}: {kept} of {len(found)}, worst {worst} {found[worst]:{form}}", kept == len(found))


def progress(text: str) -> None:
    """One line for the person who waits."""
    print(text, file=sys.stderr, flush=True)
