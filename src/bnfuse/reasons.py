"""Why a norm stays."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """Why a norm stays: what refused, and where.

    Attributes:
        text: the reason in words.
        operator: the operator that refused, None if it was no operator.
        module: the module that ran it.
        direction: "backward", "forward" or "beside", the way that was tried; None if none was.
    """

    text: str
    operator: str | None = None
    module: str | None = None
    direction: str | None = None

    def __str__(self) -> str:
        where = " in ".join(part for part in (self.operator, self.module) if part)
        text = f"{where}: {self.text}" if where else self.text
        return f"{self.direction}: {text}" if self.direction else text
