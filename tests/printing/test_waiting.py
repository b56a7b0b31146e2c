"""What is being done is shown in a terminal, by another process, and nowhere else."""

import os
import pty
import subprocess
import sys
import threading
import time

import pytest

from bnfuse.printing import waiting as module
from bnfuse.printing.waiting import waiting


def read(terminal: int, until: bytes, seconds: float = 20) -> bytes:
    """What a terminal was sent, until a text appears in it."""
    os.set_blocking(terminal, False)
    found, end = b"", time.monotonic() + seconds
    while until not in found and time.monotonic() < end:
        try:
            found += os.read(terminal, 4096)
        except BlockingIOError:
            time.sleep(0.01)
    return found


def test_a_terminal_is_told_and_no_thread_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.0)
    terminal, end = pty.openpty()
    try:
        with os.fdopen(end, "w") as stderr:
            monkeypatch.setattr(sys, "stderr", stderr)
            threads = threading.active_count()
            with waiting("fusing [red]x"):
                assert b"fusing [red]x" in read(terminal, b"fusing [red]x")
                assert threading.active_count() == threads
            assert read(terminal, b"\x1b[2K").endswith(b"\x1b[2K")  # the line is erased
    finally:
        os.close(terminal)


def test_what_is_quick_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 60.0)
    terminal, end = pty.openpty()
    try:
        with os.fdopen(end, "w") as stderr:
            monkeypatch.setattr(sys, "stderr", stderr)
            started = time.monotonic()
            with pytest.raises(ValueError, match="mistake"), waiting("fusing"):
                raise ValueError("mistake")
            assert time.monotonic() - started < 30
            assert read(terminal, b"fusing", 0.1) == b""
    finally:
        os.close(terminal)


def test_a_pipe_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    with waiting("fusing"):
        pass
