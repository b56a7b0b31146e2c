"""The process that `bnfuse.printing.waiting` starts: shows a text and the time until its standard input ends.

``python spinner.py TEXT SECONDS`` waits for that many seconds before it shows anything. It imports nothing of the
library, so that it starts at once.
"""

from __future__ import annotations

import contextlib
import sys
import threading


def main(text: str, seconds: float) -> None:
    """Show the text on standard error, once that many seconds have passed."""
    over = threading.Event()

    def listen() -> None:
        sys.stdin.buffer.read()
        over.set()

    threading.Thread(target=listen, daemon=True).start()
    if over.wait(seconds):
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        progress.add_task(text, total=None)
        over.wait()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):  # which the command itself answers
        main(sys.argv[1], float(sys.argv[2]))
