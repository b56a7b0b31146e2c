"""What is being done, shown on standard error while it lasts, where that is a terminal.

A process of its own draws it. A thread would count as one of the model's: what is made beside the recorded run is
judged with more care (`bnfuse.capture.values`), and a plan must not depend on whether somebody looks on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

SECONDS = 1.0
"""What takes less is not shown."""


@contextlib.contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show a text and how long it has taken; nothing in a pipe, without rich, or if it takes less than a second.

    Args:
        text: what is being done, such as "fusing resnet18".
    """
    if not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        yield
        return
    command = [sys.executable, str(Path(__file__).with_name("spinner.py")), text, str(SECONDS)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=sys.stderr, stdout=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        try:
            yield
        finally:
            process.stdin.close()
            process.wait()  # until the line is erased
