"""Tables as plain text with aligned columns, for ``print``, logs and pipes; nothing here needs a package."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

from bnfuse.changes import Decision
from bnfuse.printing.tables import Table, decisions_table, fused_table, kept_groups

WIDTH = 80
_GAP = "  "
_HANGING = 4
_NARROWEST = 12


def plan_text(
    model: str,
    decisions: Sequence[Decision],
    unseen: Sequence[str] = (),
    width: int = WIDTH,
    steps: Sequence[str] = (),
) -> str:
    """A line with the counts, the norms that go, those that stay grouped by why, and what was not seen.

    Args:
        model: the class of the model.
        decisions: one for each norm.
        unseen: what was not seen, in words.
        width: how many characters a line may have.
        steps: what changes in the structure, in words.
    """
    rest = notes_text(decisions, unseen, width, steps)
    return "\n".join(filter(None, [table_text(fused_table(model, decisions), width), rest]))


def notes_text(
    decisions: Sequence[Decision], unseen: Sequence[str] = (), width: int = WIDTH, steps: Sequence[str] = ()
) -> str:
    """What stands below the norms that go: what changes in the structure, the norms that stay, grouped by why, and what
    was not seen."""
    lines = [wrapped(text, width) for text in steps]
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
    return "\n".join(_lines(text.split(), max(width, _NARROWEST), " " * indent, hanging))


def message_text(text: str, width: int = WIDTH) -> str:
    """A message in lines of at most ``width`` characters, in which what is to be copied stays in one piece.

    >>> print(message_text("Fuse it in place: bnfuse.fuse(model, inputs, inplace=True).", 40))
    Fuse it in place:
        bnfuse.fuse(model, inputs, inplace=True).

    Args:
        text: words. Its own lines begin anew; what stands behind a label such as ``got:`` stays behind it. Quoted text,
            calls, commands, options with their values and words without spaces are not broken, also where they are
            longer than a line.
        width: how many characters a line may have.
    """
    lines: list[str] = []
    for line in text.split("\n"):
        if cells(line) <= width:
            lines.append(line)
            continue
        indent, label = (len(part) for part in _LABEL.match(line).groups())  # type: ignore[union-attr]
        first = line[: indent + label]
        hanging = indent + (label or (_HANGING // 2 if indent else _HANGING))
        lines += _lines(_pieces(line[len(first) :]), max(width, _NARROWEST), first, " " * hanging, breaking=False)
    return "\n".join(lines)


_LABEL = re.compile(r"( *)((?<= )[a-z ]{1,12}: +|)")
"""How a line begins: with spaces, and then perhaps a label."""

_ARGUMENTS = r"[^()]*"
for _ in range(4):
    _ARGUMENTS = rf"(?:[^()]|\({_ARGUMENTS}\))*"
_UNBROKEN = re.compile(
    rf"""
      (?<!\w)(?P<quote>['"`])[^'"`]*(?P=quote)     # quoted
    | [\w.]+\({_ARGUMENTS}\)                       # a call
    | --[\w-]+[ ](?:'[^']*'|[\w.:/=*-]*\d[\w.:/=*-]*|[A-Z]+\b)  # an option with its value
    | (?:pip[ ]install|python[ ]-m|bnfuse[ ](?:plan|fuse|census|demo))[ ][^,;]*  # a command, to the end of the sentence
    """,
    re.VERBOSE,
)


def _pieces(line: str) -> list[str]:
    """The words of a line; the spaces within what stays in one piece do not part them."""
    space = "\0"
    kept = _UNBROKEN.sub(lambda found: found[0].replace(" ", space), line)
    return [piece.replace(space, " ") for piece in kept.split()]


def _lines(words: Sequence[str], width: int, first: str, hanging: str, breaking: bool = True) -> Iterator[str]:
    """Words in lines; one that is longer than a line is broken, or left to be too long."""
    line, begun = first, False
    for word in words:
        rest = word
        longest = width - len(hanging)
        while begun and cells(line) + 1 + cells(rest) > width:
            room = width - cells(line) - 1
            if breaking and cells(rest) > longest and room > 0:
                cut = _fitting(rest, room)
                line, rest = f"{line} {rest[:cut]}", rest[cut:]
            yield line
            line, begun = hanging, False
        while breaking and not begun and cells(line) + cells(rest) > width:
            cut = _fitting(rest, width - cells(line))
            yield line + rest[:cut]
            line, rest = hanging, rest[cut:]
        line, begun = f"{line} {rest}" if begun else line + rest, True
    if begun:
        yield line


def cells(text: str) -> int:
    """How many columns of a terminal a text takes: two for a wide character, none for one that joins another.

    >>> cells("conv"), cells("卷积"), cells("e\u0301")
    (4, 4, 1)
    """
    return len(text) if text.isascii() else sum(map(_columns, text))


def _columns(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _fitting(text: str, width: int) -> int:
    """How many characters of a text fit into a width, at least one."""
    if text.isascii():
        return max(width, 1)
    taken = 0
    for count, character in enumerate(text):
        taken += _columns(character)
        if taken > width:
            return max(count, 1)
    return len(text)


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
        parts = [[cell] if width is None else folded(cell, room) for cell, room in zip(row, widths, strict=True)]
        for part in range(max(map(len, parts))):
            drawn = [
                _padded(text, room, column.number)
                for text, room, column in zip(
                    (cell[part] if part < len(cell) else "" for cell in parts), widths, table.columns, strict=True
                )
            ]
            lines.append(_GAP.join(drawn).rstrip())
    return "\n".join(lines)


def _padded(text: str, width: int, right: bool) -> str:
    space = " " * (width - cells(text))
    return space + text if right else text + space


def column_widths(table: Table, room: int | None = None) -> list[int]:
    """How wide each column is: as its longest cell; where there is not that much room, the widest ones give way.

    Args:
        table: with at least one row.
        room: how many characters a line has for all cells together; None for as many as it takes.
    """
    headings = [column.heading for column in table.columns]
    widths = [max(map(cells, column)) for column in zip(headings, *table.rows, strict=True)]
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
        if lines and cells(lines[-1]) + 1 + cells(word) <= width:
            lines[-1] += f" {word}"
            continue
        while cells(word) > width:
            most = _fitting(word, width)
            point = word.rfind(".", 0, most) + 1
            cut = point if point > most // 2 else most
            lines.append(word[:cut])
            word = word[cut:]
        lines.append(word)
    return lines
