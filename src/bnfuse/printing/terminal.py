"""Tables on standard output: drawn by rich in a terminal, plain text in a pipe or without rich."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from bnfuse.changes import Decision
from bnfuse.printing.tables import Table, fused_table
from bnfuse.printing.text import (
    WIDTH,
    column_widths,
    folded,
    message_text,
    notes_text,
    plan_text,
    table_text,
    wrapped,
)

if TYPE_CHECKING:
    import rich.console
    import rich.table


_BESIDE_A_CELL = 3  # what rich draws: a space on either side, and a line


def show(table: Table, width: int | None = None) -> None:
    """Print a table, with an empty line behind it.

    Args:
        table: what to print.
        width: of plain text, as `table_text` takes it; where rich draws, the width of the terminal counts.
    """
    console = _console() if table.rows else None
    if console is None:
        print(table_text(table, width), end="\n\n")
    else:
        console.print(rich_table(table, console.width), "")


def show_plan(model: str, decisions: Sequence[Decision], unseen: Sequence[str] = (), steps: Sequence[str] = ()) -> None:
    """Print a plan: the norms that go as a table, those that stay grouped by why, and what was not seen.

    Args:
        model: the class of the model.
        decisions: one for each norm.
        unseen: what was not seen, in words.
        steps: what changes in the structure, in words.
    """
    table, width = fused_table(model, decisions), line_width()
    console = _console() if table.rows else None
    if console is None:
        print(plan_text(model, decisions, unseen, width, steps), end="\n\n")
        return
    console.print(rich_table(table, console.width), "")
    if notes := notes_text(decisions, unseen, width, steps):
        print(notes, end="\n\n")


def show_unseen(unseen: Sequence[str]) -> None:
    """Print what was not seen, a text each."""
    for text in unseen:
        print(wrapped(f"not seen: {text}", line_width()))


def show_restructuring(steps: Sequence[str]) -> None:
    """Print what changes in the structure, a text each."""
    for text in steps:
        print(wrapped(text, line_width()))


def say(text: str) -> None:
    """Print a message on standard error, with the name of the program before it, in lines that fit."""
    print(message_text(f"bnfuse: {text}", line_width(sys.stderr)), file=sys.stderr)


def line_width(stream: TextIO | None = None) -> int:
    """How many characters a line may have: those of the terminal, in a pipe 80.

    Args:
        stream: where it is written; None stands for standard output.
    """
    return shutil.get_terminal_size((WIDTH, 24)).columns if (stream or sys.stdout).isatty() else WIDTH


def _console() -> rich.console.Console | None:
    """What draws in a terminal; None in a pipe, or without rich."""
    if not sys.stdout.isatty():
        return None
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        say("rich is not installed, so tables are plain text; run pip install 'bnfuse[cli]'")
        return None
    return Console()


def rich_table(table: Table, width: int) -> rich.table.Table:
    """The same table for rich.

    Args:
        table: with at least one row.
        width: how many characters a line may have. Cells are folded as in plain text, since rich breaks names anywhere.
    """
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(title=Text(table.title, "bold"), title_justify="left", box=box.SIMPLE_HEAD)
    for column in table.columns:
        drawn.add_column(
            column.heading,
            justify="right" if column.number else "left",
            no_wrap=column.number,
            overflow="fold",
        )
    widths = column_widths(table, width - _BESIDE_A_CELL * len(table.columns) - 1)
    for row in table.rows:
        cells = ("\n".join(folded(cell, room)) for cell, room in zip(row, widths, strict=True))
        drawn.add_row(*map(Text, cells))  # Text, since a name such as [0] would be read as markup
    return drawn
