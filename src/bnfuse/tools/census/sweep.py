"""One process for each model, so that a crash, a hang or a lack of memory is a row and not the end.

The processes are forked from a server that has imported the zoo and has run nothing, which costs milliseconds where
starting anew would cost seconds.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import platform
import resource
import signal
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

import torch

from bnfuse.restructuring.kinds import KINDS
from bnfuse.tools.census.ledger import CRASHED, FUSED, Ledger, Row
from bnfuse.tools.census.worker import NOT_OURS, Job, Settings, visit

_PRELOADED = {"torchvision": "torchvision.models", "timm": "timm", "pytorchcv": "pytorchcv.model_provider"}
_POLL = 0.5
_GRACE = 10.0
_ATTEMPTS = 3
_SERVER_LOST = 255  # what multiprocessing says of a process whose server ended


def heading(zoo: str, settings: Settings) -> dict[str, Any]:
    """The versions of everything that takes part, and the limits; the first line of a file of rows."""
    return {
        "census": zoo,
        "bnfuse": version("bnfuse"),
        "torch": torch.__version__,
        zoo: version(zoo),
        "python": platform.python_version(),
        "max_parameters": settings.max_parameters,
        "seconds": settings.seconds,
        "memory": settings.memory,
        **({"kinds": list(KINDS)} if settings.restructure else {}),
    }


@dataclass
class _Visit:
    """A model at work."""

    job: Job
    process: ForkServerProcess
    connection: Connection
    started: float
    phase: str = "build"
    row: Row | None = None


class Sweep:
    """Visits models, several at a time, and puts a row of each into a ledger.

    Args:
        zoo: the zoo to import beforehand, empty for none.
        ledger: where the rows go.
        settings: what a visit may cost.
        jobs: how many models are at work at a time.
        report: is called with each row.
        interrupted: says when to stop.
    """

    def __init__(
        self,
        zoo: str,
        ledger: Ledger,
        settings: Settings,
        jobs: int,
        report: Callable[[Row], None],
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.ledger, self.settings, self.jobs, self.report = ledger, settings, jobs, report
        self.interrupted = interrupted
        self.context: ForkServerContext = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["bnfuse.tools.census.worker", *filter(None, [_PRELOADED.get(zoo)])])
        self.fingerprints: dict[str, str] = {
            row.fingerprint: name
            for name, row in ledger.rows.items()
            if row.fingerprint is not None and row.outcome == FUSED
        }
        self.working: list[_Visit] = []
        self.waiting: deque[Job] = deque()
        self.lost: Counter[Job] = Counter()

    def run(self, todo: Sequence[Job]) -> None:
        """Visit every model, until interrupted; then those at work are dropped."""
        self.waiting.extend(todo)
        try:
            with _one_thread():
                while (self.waiting or self.working) and not self.interrupted():
                    while self.waiting and len(self.working) < self.jobs:
                        self.working.append(self._start(self.waiting.popleft()))
                    self._listen()
        finally:
            for visit in self.working:
                visit.process.kill()
                visit.process.join()

    def _start(self, job: Job) -> _Visit:
        for attempt in range(_ATTEMPTS):
            ours, theirs = self.context.Pipe()
            process = self.context.Process(target=_work, args=(theirs, job, self.settings), daemon=True)
            try:
                process.start()
            except (EOFError, OSError):  # the server, or the new process, ended before it answered
                ours.close()
                if attempt == _ATTEMPTS - 1:
                    raise
                continue
            finally:
                theirs.close()
            return _Visit(job, process, ours, time.monotonic())
        raise AssertionError

    def _listen(self) -> None:
        by_connection = {visit.connection: visit for visit in self.working}
        for connection in wait(list(by_connection), _POLL):
            assert isinstance(connection, Connection)
            visit = by_connection[connection]
            try:
                kind, content = connection.recv()
            except (EOFError, ConnectionError):
                self._finish(visit)
                continue
            if kind == "phase":
                visit.phase = content
            elif kind == "known":
                other = self.fingerprints.get(content)
                with contextlib.suppress(ConnectionError):  # it has just died, which is noticed next
                    connection.send(None if other == visit.job.name else other)
            else:
                visit.row = content
                self._finish(visit)
        for visit in list(self.working):
            if time.monotonic() - visit.started > self.settings.seconds:
                visit.process.kill()
                self._finish(visit, f"it took more than {self.settings.seconds:g} s")

    def _finish(self, visit: _Visit, failure: str = "") -> None:
        visit.connection.close()
        visit.process.join()
        self.working.remove(visit)
        row, job = visit.row, visit.job
        if row is None:
            code = visit.process.exitcode
            if code == _SERVER_LOST and not failure and self.lost[job] < _ATTEMPTS - 1:
                self.lost[job] += 1
                self.waiting.appendleft(job)
                return
            failure = failure or (_signal(-code) if code is not None and code < 0 else f"it ended with status {code}")
            outcome = NOT_OURS.get(visit.phase, CRASHED)
            seconds = {"total": round(time.monotonic() - visit.started, 3)}
            row = Row(job.name, job.family, outcome, seconds=seconds, phase=visit.phase, error=failure)
        if row.fingerprint is not None and row.outcome == FUSED:
            self.fingerprints[row.fingerprint] = row.model
        self.ledger.add(row)
        self.report(row)


def _signal(number: int) -> str:
    try:
        return f"it was ended by {signal.Signals(number).name}"
    except ValueError:
        return f"it was ended by signal {number}"


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Libraries that the server imports start no threads of their own: forking needs a process with one thread."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _work(connection: Connection, job: Job, settings: Settings) -> None:
    """The process of one model."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it, and if that is gone, an alarm does
    signal.setitimer(signal.ITIMER_REAL, settings.seconds + _GRACE)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_DATA, (settings.memory, settings.memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # what constructors print
    os.dup2(nowhere, 2)

    def known(fingerprint: str) -> str | None:
        connection.send(("known", fingerprint))
        answer: str | None = connection.recv()
        return answer

    try:
        row = visit(job, settings, lambda phase: connection.send(("phase", phase)), known)
        connection.send(("row", row))
    except ConnectionError:  # the parent is gone
        return
