"""Tables as plain text with aligned columns, for ``print``, logs and pipes; nothing here needs a package."""

from __future__ import annotations

from collections.abc import Sequence

from bnfuse.changes import Decision
from bnfuse.report.tables import Table, decisions_table

_GAP = "  "


def decisions_text(model: str, decisions: Sequence[Decision]) -> str:
    """A line with the counts, then one line for each norm."""
    return table_text(decisions_table(model, decisions))


def table_text(table: Table) -> str:
    """Draw a table: title, headings, a rule, rows; a last column of words is as long as each of them is.

    Without rows there is only the title.
    """
    if not table.rows:
        return table.title
    headings = tuple(column.heading for column in table.columns)
    widths = [max(map(len, cells)) for cells in zip(headings, *table.rows, strict=True)]
    if not table.columns[-1].number:
        widths[-1] = len(headings[-1])
    rule = tuple("-" * width for width in widths)
    lines = [table.title]
    for row in (headings, rule, *table.rows):
        cells = [
            cell.rjust(width) if column.number else cell.ljust(width)
            for cell, width, column in zip(row, widths, table.columns, strict=True)
        ]
        lines.append(_GAP.join(cells).rstrip())
    return "\n".join(lines)
