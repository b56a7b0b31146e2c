"""Tables as plain text with aligned columns, for ``print``, logs and pipes; nothing here needs a package."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from bnfuse.changes import Decision
from bnfuse.printing.tables import Table, decisions_table, fused_table, kept_groups

WIDTH = 80
_GAP = "  "
_HANGING = 4
_NARROWEST = 12


def plan_text(model: str, decisions: Sequence[Decision], unseen: Sequence[str] = (), width: int = WIDTH) -> str:
    """A line with the counts, the norms that go, those that stay grouped by why, and what was not seen.

    Args:
        model: the class of the model.
        decisions: one for each norm.
        unseen: what was not seen, in words.
        width: how many characters a line may have.
    """
    rest = notes_text(decisions, unseen, width)
    return "\n".join(filter(None, [table_text(fused_table(model, decisions), width), rest]))


def notes_text(decisions: Sequence[Decision], unseen: Sequence[str] = (), width: int = WIDTH) -> str:
    """What stands below the norms that go: those that stay, grouped by why, and what was not seen."""
    lines = []
    for group in kept_groups(decisions):
        lines.append(wrapped(group.heading, width))
        lines += [wrapped(reason, width, indent=2) for reason in group.reasons]
    lines += [wrapped(f"not seen: {text}", width) for text in unseen]
    return "\n".join(lines)


def all_text(model: str, decisions: Sequence[Decision]) -> str:
    """A line with the counts, then one line for each norm, as long as it takes."""
    return table_text(decisions_table(model, decisions))


def wrapped(text: str, width: int = WIDTH, indent: int = 0) -> str:
    """A text in lines of at most ``width`` characters; all but the first are indented further.

    >>> print(wrapped("not seen: mode was never given", 16))
    not seen: mode
        was never
        given

    Args:
        text: one line of words; a word that is longer than a line is broken.
        width: how many characters a line may have.
        indent: how many spaces stand before the first line.
    """
    hanging = " " * (indent + (_HANGING if indent == 0 else indent))
    return textwrap.fill(
        text, max(width, _NARROWEST), initial_indent=" " * indent, subsequent_indent=hanging, break_on_hyphens=False
    )


def table_text(table: Table, width: int | None = None) -> str:
    """Draw a table: title, headings, a rule, rows. Without rows there is only the title.

    Args:
        table: what to draw.
        width: how many characters a line may have: the widest columns of words are narrowed, and what does not fit in
            them goes on below. None makes every cell one line, a last column of words as long as each of them is.
    """
    title = table.title if width is None else wrapped(table.title, width)
    if not table.rows:
        return title
    headings = tuple(column.heading for column in table.columns)
    widths = column_widths(table, None if width is None else width - len(_GAP) * (len(headings) - 1))
    rules = list(widths)
    if not table.columns[-1].number:
        rules[-1] = len(headings[-1])
    lines = [title]
    for row in (headings, tuple("-" * rule for rule in rules), *table.rows):
        cells = [[cell] if width is None else folded(cell, room) for cell, room in zip(row, widths, strict=True)]
        for part in range(max(map(len, cells))):
            drawn = [
                text.rjust(room) if column.number else text.ljust(room)
                for text, room, column in zip(
                    (cell[part] if part < len(cell) else "" for cell in cells), widths, table.columns, strict=True
                )
            ]
            lines.append(_GAP.join(drawn).rstrip())
    return "\n".join(lines)


def column_widths(table: Table, room: int | None = None) -> list[int]:
    """How wide each column is: as its longest cell; where there is not that much room, the widest ones give way.

    Args:
        table: with at least one row.
        room: how many characters a line has for all cells together; None for as many as it takes.
    """
    headings = [column.heading for column in table.columns]
    widths = [max(map(len, cells)) for cells in zip(headings, *table.rows, strict=True)]
    words = [place for place, column in enumerate(table.columns) if not column.number]
    for _ in range(0 if room is None else max(sum(widths) - room, 0)):
        widest = max(words, key=widths.__getitem__, default=None)
        if widest is None or widths[widest] <= max(_NARROWEST, len(headings[widest])):
            break
        widths[widest] -= 1
    return widths


def folded(cell: str, width: int) -> list[str]:
    """The lines of a cell; names are broken behind a point where that helps."""
    lines: list[str] = []
    for word in cell.split(" "):
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += f" {word}"
            continue
        while len(word) > width:
            point = word.rfind(".", 0, width) + 1
            cut = point if point > width // 2 else width
            lines.append(word[:cut])
            word = word[cut:]
        lines.append(word)
    return lines
