"""Tables on standard output: drawn by rich in a terminal, plain text in a pipe or without rich."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from bnfuse.report.tables import Table
from bnfuse.report.text import table_text

if TYPE_CHECKING:
    import rich.table


def show(table: Table) -> None:
    """Print a table, with an empty line behind it."""
    if table.rows and sys.stdout.isatty():
        try:
            from rich.console import Console
        except ModuleNotFoundError:
            print(
                "bnfuse: rich is not installed, so tables are plain text; run pip install 'bnfuse[cli]'",
                file=sys.stderr,
            )
        else:
            Console().print(rich_table(table), "")
            return
    print(table_text(table), end="\n\n")


def rich_table(table: Table) -> rich.table.Table:
    """The same table for rich, which folds the last column to the width of the terminal."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(title=Text(table.title, "bold"), title_justify="left", box=box.SIMPLE_HEAD)
    for column in table.columns:
        drawn.add_column(
            column.heading,
            justify="right" if column.number else "left",
            no_wrap=column is not table.columns[-1],
            overflow="fold",
        )
    for row in table.rows:
        drawn.add_row(*map(Text, row))  # Text, since a name such as [0] would be read as markup
    return drawn
