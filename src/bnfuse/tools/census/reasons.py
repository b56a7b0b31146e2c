"""Reasons in the words of the table *Reading a reason* of ``docs/how-it-works.md``, which explains every one.

A message of that table has ``…`` in place of what differs; where that stands at the end behind a colon, another reason
follows, which has a line of its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from bnfuse.errors import BnFuseError

TITLE = "Reading a reason"


@dataclass(frozen=True)
class Message:
    """A line of the table: the message, what it means, and what one can do. Rows have ``…`` for its numbers."""

    text: str
    meaning: str
    advice: str

    @property
    def leads(self) -> bool:
        """Whether another reason follows."""
        return self.text.endswith(": …")

    @property
    def pattern(self) -> re.Pattern[str]:
        """Matches the reasons that it stands for; its last group is the reason that follows."""
        text = self.text.removesuffix("…") if self.leads else self.text
        parts = [re.sub(r"\d+", r"(?:\g<0>|…)", re.escape(part)) for part in text.split("…")]
        return re.compile(".+?".join(parts) + ("(.+)" if self.leads else ""))


def messages(page: str) -> list[Message]:
    """The lines of the table in the text of the page; a line with several messages counts for each of them."""
    if f"## {TITLE}\n" not in page:
        raise BnFuseError(f"the page has no section {TITLE!r}, which explains the reasons")
    found = []
    for line in page.split(f"## {TITLE}\n")[1].split("\n## ")[0].splitlines():
        cells = line.strip("| ").split(" | ")
        if line.startswith("| `") and len(cells) == 3:
            texts = re.findall("`([^`]*)`", cells[0])
            found += [Message(text, *cells[1:]) for text in texts]
    return sorted(found, key=lambda message: -len(message.text))


def read(text: str, known: list[Message]) -> list[Message]:
    """The messages that a reason consists of, in turn.

    Raises:
        BnFuseError: no message fits.
    """
    for message in known:
        found = message.pattern.fullmatch(text)
        if found:
            return [message, *(read(found[1], known) if message.leads else ())]
    raise BnFuseError(f"no line of the table {TITLE!r} explains {text!r}")
