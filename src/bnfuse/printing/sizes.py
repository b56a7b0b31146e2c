"""What a model holds before and after: batch norms, parameters, buffers, bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from bnfuse.printing.tables import Column, Table

_MEGABYTE = 10**6


@dataclass(frozen=True)
class Holding:
    """What a model holds.

    Attributes:
        norms: how many batch norms.
        parameters: how many numbers in parameters.
        buffers: how many numbers in buffers.
        size: parameters and buffers in bytes.
    """

    norms: int
    parameters: int
    buffers: int
    size: int

    @staticmethod
    def of(model: nn.Module, norms: int) -> Holding:
        """Count what a model holds; a tensor that is shared counts once.

        Args:
            model: any module.
            norms: how many batch norms it has.
        """
        parameters, buffers = list(model.parameters()), list(model.buffers())
        return Holding(
            norms,
            sum(tensor.numel() for tensor in parameters),
            sum(tensor.numel() for tensor in buffers),
            sum(tensor.numel() * tensor.element_size() for tensor in (*parameters, *buffers)),
        )


def holdings_table(
    title: str, before: Holding, after: Holding, files: Sequence[tuple[str, int | None, int | None]] = ()
) -> Table:
    """A row for each count, before and after, with the difference.

    Args:
        title: one line above it.
        before, after: what is compared.
        files: names of files and their sizes in bytes before and after, None where there is none.
    """
    rows = [
        (what, f"{one:,}", f"{other:,}", f"{other - one:+,}")
        for what, one, other in (
            ("batch norms", before.norms, after.norms),
            ("parameters", before.parameters, after.parameters),
            ("buffers", before.buffers, after.buffers),
        )
    ]
    for what, one, other in (("size", before.size, after.size), *files):
        change = None if one is None or other is None else other - one
        rows.append((f"{what} (MB)", _megabytes(one), _megabytes(other), _megabytes(change, "+")))
    columns = (Column(""), Column("before", True), Column("after", True), Column("difference", True))
    return Table(title, columns, tuple(rows))


def _megabytes(size: int | None, sign: str = "") -> str:
    return "" if size is None else format(size / _MEGABYTE, f"{sign},.3f")
