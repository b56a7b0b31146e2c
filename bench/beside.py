"""Other tools on the models of the census: how many norms each leaves, and whether the outputs stay what they were.

The models are the smallest of each family of torchvision and timm whose norms bnfuse fuses, by the rows in
``docs/census``, with random norms whose statistics come from a run. Every tool gets a copy of the model and the inputs
that it is judged on, in float64 (ONNX Runtime in float32). A tool is *wrong* on a model where an output differs by more
than 1 % (relative L2), which no rounding explains, and *fails* where it raises, or where a model takes longer than its
limit; there all norms count as left. Tools that are not installed are left out.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.networks import matches
from bench.other_tools import TOOLS
from bench.section import Section, Settings, Target, progress
from bnfuse.printing.tables import Column, Table
from bnfuse.tools.census.ledger import read
from bnfuse.tools.census.run import sampled

ROWS = Path(__file__).parents[1] / "docs" / "census"
ZOOS = ("torchvision", "timm")
SECONDS = 600
"""Of processor time, for all tools on one model."""

_PATIENCE = 10
"""So many times as long may they take by the clock."""

RIGHT, WRONG, FAILS = "right", "wrong", "fails"
BNFUSE = "bnfuse"
OURS = (BNFUSE, "bnfuse, restructured")


@dataclass(frozen=True)
class Finding:
    """What a tool did to a model.

    Attributes:
        spec: the model.
        tool: its name.
        norms: that run in the original.
        left: that run in what the tool gives; all of them where it is wrong or fails.
        verdict: `RIGHT`, `WRONG` or `FAILS`.
        why: the error, or how far the outputs differ.
    """

    spec: str
    tool: str
    norms: int
    left: int
    verdict: str
    why: str = ""


def run(settings: Settings) -> Section:
    """Run every tool that is installed on every model."""
    models = list(_models(settings))
    found: list[Finding] = []
    for place, (spec, family) in enumerate(models, 1):
        found += examined(spec, family)
        progress(f"beside [{place}/{len(models)}] {spec}: " + ", ".join(
            f"{f.tool} {f.left if f.verdict == RIGHT else f.verdict}" for f in found if f.spec == spec
        ))  # fmt: skip
    return report(found) if found else Section([])


def _models(settings: Settings) -> Iterator[tuple[str, str]]:
    for zoo in ZOOS:
        rows = sampled(read(ROWS / f"{zoo}.jsonl.gz")[1])
        names = [name for name in sorted(rows) if matches(settings.networks, f"{zoo}:{name}")]
        for name in names[:1] if settings.quick else names:
            yield f"{zoo}:{name}", rows[name].family


def examined(spec: str, family: str) -> list[Finding]:
    """Every tool on one model, in a process of its own: some end it."""
    command = [sys.executable, "-m", "bench.other_tools", spec, family, str(SECONDS)]
    limit = SECONDS * _PATIENCE
    try:
        said = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=limit).stdout
        how = "ended the process"
    except subprocess.TimeoutExpired as late:
        said, how = late.stdout or b"", "took too long"
    found = [Finding(spec, **json.loads(line)) for line in said.decode().splitlines() if line.startswith("{")]
    if not found:
        progress(f"beside: {spec} cannot be built or does not run here")
        return []
    missing = [name for name, tool in TOOLS.items() if tool.version()][len(found) :]
    return found + [
        Finding(
            spec, name, found[0].norms, found[0].norms, FAILS, how if place == 0 else f"not tried: {missing[0]} {how}"
        )
        for place, name in enumerate(missing)
    ]


def report(found: Sequence[Finding]) -> Section:
    """The table, the targets and the data.

    Args:
        found: for every model every tool.
    """
    columns = ("tool", "version", "models", "right", "wrong", "fails", "norms", "left")
    rows = []
    for name in dict.fromkeys(finding.tool for finding in found):
        mine = [finding for finding in found if finding.tool == name]
        verdicts = [finding.verdict for finding in mine]
        rows.append((
            name, TOOLS[name].version() if name in TOOLS else "", str(len(mine)),
            *(str(verdicts.count(verdict)) for verdict in (RIGHT, WRONG, FAILS)),
            f"{sum(finding.norms for finding in mine):,}", f"{sum(finding.left for finding in mine):,}",
        ))  # fmt: skip
    table = Table(
        "Norms left, of those that ran, and outputs that are wrong",
        tuple(Column(column, number=place > 1) for place, column in enumerate(columns)),
        tuple(rows),
    )
    ours = [finding for finding in found if finding.tool in OURS]
    worse = _worse(found)
    targets = [
        Target("bnfuse is wrong or fails on no model", all(finding.verdict == RIGHT for finding in ours)),
        Target(f"no tool that is right leaves fewer norms of a model than bnfuse{worse}", not worse),
    ]
    return Section([table], targets, {"findings": [vars(finding) for finding in found]})


def _worse(found: Sequence[Finding]) -> str:
    left = {finding.spec: finding.left for finding in found if finding.tool == BNFUSE}
    better = [f for f in found if f.tool not in OURS and f.verdict == RIGHT and f.left < left.get(f.spec, 0)]
    return f" ({', '.join(f'{f.tool} on {f.spec}: {f.left} and {left[f.spec]}' for f in better)})" if better else ""
