"""Fresh processes: for what only the first call in a process shows."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import IO


class Child:
    """A process that runs a module of this package and answers in lines."""

    def __init__(self, process: subprocess.Popen[str], log: IO[str]) -> None:
        self.process = process
        self.log = log

    def ask(self, question: str = "") -> str:
        """Send a line, unless it is empty, and return the next line of the answer.

        Raises:
            RuntimeError: the process has ended; the message is the last that it said.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        answer = ""
        with contextlib.suppress(BrokenPipeError):
            if question:
                print(question, file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        if not answer:
            status = self.process.wait()
            self.log.seek(0)
            said = self.log.read().strip().splitlines()
            raise RuntimeError(said[-1] if said else f"the process ended with status {status}")
        return answer.strip()


@contextlib.contextmanager
def child(module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Iterator[Child]:
    """Start ``python -m module arguments``; the end of its input ends it when this ends."""
    # The same packages as here, also where they are found through the path of this process alone.
    search_path = os.pathsep.join(path for path in sys.path if path)
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log,
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env={**os.environ, "PYTHONPATH": search_path, "PYTHONWARNINGS": "ignore", **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,  # no pipe: nobody reads it, and a full one would stop the process
            text=True,
        ) as process,
    ):
        try:
            yield Child(process, log)
        except BaseException:
            process.kill()
            raise
