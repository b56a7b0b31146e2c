"""The verb: fuse or plan, and write the page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from bnfuse.api import fuse_with_plan, plan_observed
from bnfuse.errors import InputError
from bnfuse.model.calls import Call
from bnfuse.planner.options import Options
from bnfuse.reporting.facts import Facts
from bnfuse.reporting.page import page
from bnfuse.verify.compare import compare


def report(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    path: str | os.PathLike[str] = "report.html",
    *,
    keep: str | Sequence[str] = (),
    calls: Sequence[Call] = (),
    restructure: bool | str | Sequence[str] = (),
    options: Options | None = None,
    apply: bool = True,
    measure: bool = True,
) -> Path:
    """Fuse a copy of a model, and write a page that shows what went where, what stayed and why, and what changed.

    The page is one HTML file that needs no network: the numbers before and after, the network as a picture, a table of
    the norms, and for each layer where error arises and which numbers occur. The model is left as it is, and the fused
    copy is thrown away; :func:`bnfuse.fuse` makes it again.

    Args:
        model, example_inputs, keep, calls, restructure, options: as for :func:`bnfuse.fuse`.
        path: of the file to write; one that is there is overwritten.
        apply: False for what :func:`bnfuse.plan` decides: nothing is fused or verified, and the numbers after are those
            that the plan foretells.
        measure: run the models to measure what a plan does not tell: latency, which takes about two seconds, errors and
            ranges. Numbers of layers are those of the first call.

    Returns:
        The path of the file.

    Raises:
        InputError: the file cannot be written there, which is found out first; or as for :func:`bnfuse.fuse`.
        FusionError, VerificationError: as for :func:`bnfuse.fuse`.

    >>> import tempfile, torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report(model, torch.randn(1, 3, 8, 8), f"{folder}/report.html").name
    'report.html'
    """
    target = checked_path(path)
    facts = Facts(measure=measure)
    if not apply:
        plan_observed(
            model, example_inputs, keep=keep, calls=calls, restructure=restructure, options=options, observer=facts
        )
    else:
        fused, _ = fuse_with_plan(
            model, example_inputs, keep=keep, calls=calls, restructure=restructure, options=options, observer=facts
        )
        facts.add_comparison(compare(model, fused, [facts.call, *calls]))
    write(facts, target)
    return target


def checked_path(path: str | os.PathLike[str]) -> Path:
    """The path of a file that can be written.

    Raises:
        InputError: it cannot.
    """
    target = Path(path)
    folder = target.parent
    problem = ""
    if target.is_dir():
        problem = "that is a folder"
    elif not folder.is_dir():
        problem = f"there is no folder {folder}"
    elif not os.access(target if target.exists() else folder, os.W_OK):
        problem = "you have no permission to write there"
    elif target.suffix.lower() not in (".html", ".htm"):
        problem = "a report is a page: write a name that ends in .html"
    if problem:
        raise InputError(f"The report cannot be written to {target}: {problem}.")
    return target


def write(facts: Facts, target: Path) -> None:
    """Write the page.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        target.write_text(page(facts.finished()), encoding="utf-8")
    except OSError as error:
        raise InputError(f"The report cannot be written to {target}: {error.strerror or error}.") from error
