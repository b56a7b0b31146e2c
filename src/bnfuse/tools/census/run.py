"""A census of one zoo, from the command line: which models are due, the progress, and the end."""

from __future__ import annotations

import contextlib
import fnmatch
import itertools
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

from bnfuse.errors import InputError
from bnfuse.restructuring.kinds import KINDS
from bnfuse.tools import zoo
from bnfuse.tools.census.ledger import FAILURES, FUSED, OUTCOMES, RESTRUCTURED, Ledger, Row, read
from bnfuse.tools.census.sweep import Sweep, heading
from bnfuse.tools.census.worker import Job, Settings


def census(
    name: str,
    output: Path,
    settings: Settings,
    jobs: int,
    match: str = "*",
    again: Collection[str] = (),
    sample: bool = False,
) -> int:
    """Visit the models of a zoo that have no row yet, and put their rows into a file.

    Args:
        name: of the zoo.
        output: the file of rows, which is made or continued.
        settings: what a visit may cost.
        jobs: how many models at a time.
        match: a glob pattern for the names of models.
        again: outcomes; the models whose row has one of them are visited again.
        sample: visit only the smallest model of each family, of those in the file that were fused, as far as no other
            tool was run beside.

    Returns:
        How many rows of the file that match are failures of bnfuse.

    Raises:
        InputError: nothing matches, or the number of jobs makes no sense.
        BnFuseError: the file is none of a census, or the zoo is not installed.
    """
    names, chosen = _chosen(name, jobs, match)
    ledger = Ledger(output, heading(name, settings))
    try:
        if sample:
            smallest = sampled(ledger.rows)
            due = [model for model in chosen if model in smallest and not smallest[model].rivals]
        else:
            due = [model for model in chosen if model not in ledger.rows or ledger.rows[model].outcome in again]
        _sweep(name, ledger, settings, jobs, due, len(chosen))
    finally:
        ledger.close(names)
    return _summary(ledger, chosen, output)


def census_restructured(
    name: str,
    rows: Path,
    settings: Settings,
    jobs: int,
    match: str = "*",
    again: Collection[str] = (),
    sample: bool = False,
) -> int:
    """Visit the models of a census once more, with all kinds of restructuring, where these may do something.

    First comes the smallest model of each series. Then come those in which plain fusing leaves norms, and those of
    series in which a model was changed: where branches are merged, all norms may go in any case.

    Args:
        rows: the file of rows of the census; the new ones are in a file of the same name in the folder `RESTRUCTURED`
            beside it. Rows that were made when there were other kinds of restructuring are made again.
        name, settings, jobs, match, again: as for `census`.
        sample: visit only the smallest model of each series.

    Returns:
        How many of the new rows that match are failures of bnfuse.

    Raises:
        InputError, BnFuseError: as for `census`, or there are no rows.
    """
    names, chosen = _chosen(name, jobs, match)
    if not rows.exists():
        raise InputError(f"there is no {rows}: the same command without --restructure makes it")
    plain = {model: row for model, row in read(rows)[1].items() if model in set(chosen)}
    output = rows.parent / RESTRUCTURED / rows.name
    output.parent.mkdir(exist_ok=True)
    ledger = Ledger(output, heading(name, settings))

    def sweep(models: Collection[str]) -> bool:
        due = [model for model in models if _is_due(ledger.rows.get(model), again)]
        return _sweep(name, ledger, settings, jobs, due, len(models))

    models = list(sampled(plain, series))
    try:
        if sweep(models) and not sample:
            models += [model for model in promising(plain, ledger.rows) if model not in models]
            sweep(models)
    finally:
        ledger.close(names)
    return _summary(ledger, models, output)


def promising(plain: Mapping[str, Row], restructured: Mapping[str, Row]) -> list[str]:
    """The models in which norms stay, and those whose series has a model with steps; the smallest first."""
    changed = {series(row) for row in restructured.values() if row.restructured is not None and row.restructured.steps}
    found = [
        row for row in plain.values() if row.outcome == FUSED and row.executed and (row.kept or series(row) in changed)
    ]
    return [row.model for row in sorted(found, key=_cost)]


def _is_due(row: Row | None, again: Collection[str]) -> bool:
    """Whether a model has no row yet, or one that is to be made again."""
    if row is None or row.outcome in again:
        return True
    return row.restructured is not None and row.restructured.kinds != KINDS


def _chosen(name: str, jobs: int, match: str) -> tuple[list[str], list[str]]:
    """The models of the zoo, and those that match."""
    if jobs < 1:
        raise InputError(f"--jobs takes a number from 1 up; got {jobs}")
    names = zoo.names(name)
    chosen = [model for model in names if fnmatch.fnmatchcase(model, match)]
    if not chosen:
        raise InputError(f"no model of {name} matches {match!r}; they are named like {names[0]}")
    return names, chosen


def _sweep(name: str, ledger: Ledger, settings: Settings, jobs: int, due: Collection[str], total: int) -> bool:
    """Visit what is due of so many models; False if it was interrupted."""
    todo = [Job(f"{name}:{model}", zoo.family(f"{name}:{model}")) for model in due]
    with progress(name, total, total - len(todo)) as report, _interruptible() as interrupted:
        Sweep(name, ledger, settings, jobs, report, interrupted.is_set).run(interleaved(todo))
    if interrupted.is_set():
        print("interrupted: the same command continues", file=sys.stderr)
    return not interrupted.is_set()


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set; in the background a shell has Ctrl-C ignored, and it stays so.

    An exception raised from a signal would be lost when it arrives in a finalizer, and could break a row in two.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {
        number: handler
        for number in (signal.SIGINT, signal.SIGTERM)
        if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None)
    }
    for number in before:
        signal.signal(number, lambda *_: event.set())
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interleaved(jobs: Iterable[Job]) -> list[Job]:
    """The first model of each family, then the second, and so on: a census that is interrupted has seen every family.

    >>> [job.spec for job in interleaved([Job("a1", "a"), Job("a2", "a"), Job("b1", "b")])]
    ['a1', 'b1', 'a2']
    """
    families: dict[str, list[Job]] = {}
    for job in jobs:
        families.setdefault(job.family, []).append(job)
    return [job for turn in itertools.zip_longest(*families.values()) for job in turn if job is not None]


def series(row: Row) -> str:
    """The models of a family whose names begin with the same letters: one file of timm holds RepVGG and MobileOne.

    >>> series(Row("repvgg_a0", "byobnet", FUSED))
    'byobnet repvgg'
    """
    letters = itertools.takewhile(str.isalpha, row.model)
    return f"{row.family} {''.join(letters)}"


def _family(row: Row) -> str:
    return row.family


def sampled(rows: Mapping[str, Row], group: Callable[[Row], str] = _family) -> dict[str, Row]:
    """The quickest row of each family, or other group, whose norms were fused, by the name of the model."""
    best: dict[str, Row] = {}
    for row in rows.values():
        if row.outcome == FUSED and row.executed:
            other = best.get(group(row))
            if other is None or _cost(row) < _cost(other):
                best[group(row)] = row
    return {row.model: row for row in best.values()}


def _cost(row: Row) -> tuple[int, str]:
    return row.parameters or 0, row.model


def _summary(ledger: Ledger, chosen: Collection[str], output: Path) -> int:
    rows = [ledger.rows[model] for model in chosen if model in ledger.rows]
    counts = Counter(row.outcome for row in rows)
    words = ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome])
    print(f"{len(rows)} of {len(chosen)} models: {words}; {output}")
    for row in rows:
        if row.outcome in FAILURES:
            print(f"{row.outcome}: {row.model}, {row.phase}: {row.error}")
    return sum(counts[outcome] for outcome in FAILURES)


@contextlib.contextmanager
def progress(name: str, total: int, done: int) -> Iterator[Callable[[Row], None]]:
    """Shows on standard error how far the census is: a bar in a terminal, else one line for each model."""
    if sys.stderr.isatty():
        with contextlib.suppress(ModuleNotFoundError):
            import rich.progress as bars
            from rich.console import Console

            columns = (
                bars.TextColumn("{task.description}"),
                bars.BarColumn(),
                bars.MofNCompleteColumn(),
                bars.TimeElapsedColumn(),
                bars.TextColumn("left"),
                bars.TimeRemainingColumn(),
                bars.TextColumn("{task.fields[last]}"),
            )
            with bars.Progress(*columns, console=Console(stderr=True), speed_estimate_period=600) as bar:
                task = bar.add_task(name, total=total, completed=done, last="")

                def advance(row: Row) -> None:
                    if row.outcome in FAILURES:
                        bar.console.print(_line(row), markup=False)
                    bar.update(task, advance=1, last=row.model)

                yield advance
            return
    start, before = time.monotonic(), done

    def write(row: Row) -> None:
        nonlocal done
        done += 1
        left = (time.monotonic() - start) / (done - before) * (total - done)
        print(f"{done}/{total}, {left / 60:.0f} min left: {_line(row)}", file=sys.stderr, flush=True)

    yield write


def _line(row: Row) -> str:
    norms = f", {row.removed} of {row.executed} norms removed" if row.executed is not None else ""
    error = f", {row.phase}: {row.error}" if row.error else f" {row.same_as}" if row.same_as else ""
    return f"{row.model}: {row.outcome}{error}{norms}, {row.seconds.get('total', 0):.1f} s"
