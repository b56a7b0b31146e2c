"""The page ``docs/census.md``, made from the rows: nothing on it is written by hand but the derivations.

    python -m bnfuse.tools.census.page docs
    python -m bnfuse.tools.census.page docs --draw 30

The first reads ``docs/census/*.jsonl`` (or ``.jsonl.gz``) and those of the same names in ``restructured/``, takes the
words for the reasons from :mod:`bnfuse.reasons`, adds ``docs/census/derivations.md``, and writes ``docs/census.md``.
The second prints so many norms that stay, drawn at random from all of them, for the derivations.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bnfuse.errors import BnFuseError
from bnfuse.reasons import CAUSES
from bnfuse.tools.census import calls
from bnfuse.tools.census.calls import EXACT as EXACT_CALLS
from bnfuse.tools.census.calls import Calls
from bnfuse.tools.census.ledger import (
    CRASHED,
    FAILURES,
    FUSED,
    NO_NORMS,
    NOT_BUILT,
    NOT_RUN,
    OUTCOMES,
    RESTRUCTURED,
    SAME,
    TOO_LARGE,
    WRONG,
    Kept,
    KeptReason,
    Restructured,
    Row,
    read,
)

RIVAL = "torch.fx"
RIVAL_EXACT = 1e-6
"""Relative error up to which a rival's outputs count as right, in float64."""

_CASES = 40
_EXAMPLES = 3

_WAYS = ("backward", "forward", "beside")
"""A norm that was not tried has one reason, which stands in the first column."""


@dataclass(frozen=True)
class Zoo:
    """The rows of one zoo.

    Attributes:
        kinds: the kinds of restructuring that there were in the last pass in which the structure could change.
        restructured: the rows of that pass, by the name of the model.
    """

    name: str
    heading: Mapping[str, Any]
    rows: Sequence[Row]
    kinds: Sequence[str] = ()
    restructured: Mapping[str, Row] = field(default_factory=dict)

    @property
    def fused(self) -> list[Row]:
        return [row for row in self.rows if row.outcome == FUSED]

    @property
    def sample(self) -> list[Row]:
        """The rows of models that torch.fx was tried on."""
        return [row for row in self.fused if RIVAL in row.rivals]


def main(arguments: Sequence[str]) -> int:
    """Write the page into the folder of the documentation, or print norms to derive by hand."""
    parser = argparse.ArgumentParser(prog="python -m bnfuse.tools.census.page", description="Write docs/census.md.")
    parser.add_argument("docs", type=Path, help="the folder that holds how-it-works.md and census/")
    parser.add_argument("--draw", type=int, metavar="COUNT", help="print so many norms that stay, drawn at random")
    options = parser.parse_args(arguments)
    if options.draw is None:
        (options.docs / "census.md").write_text(page(options.docs))
    else:
        for name, row, kept in drawn(zoos_in(options.docs), options.draw):
            print(f"{name}:{row.model}, {kept.norm}\n  {kept.full}\n")
    return 0


def drawn(zoos: Sequence[Zoo], count: int, seed: int = 0) -> list[tuple[str, Row, Kept]]:
    """Norms that stay, drawn at random: each norm is as likely as any other, and a group is drawn once.

    Each group draws its lot by itself, so that rows which are added or made again change the lots of no others: those
    with the largest of ``log(u)/size`` are drawn, for u between 0 and 1 (P. S. Efraimidis and P. G. Spirakis, Weighted
    random sampling with a reservoir, 2006).
    """

    def lot(group: tuple[str, Row, Kept]) -> float:
        name, row, kept = group
        digest = hashlib.sha256(f"{seed} {name}:{row.model} {kept.norm}".encode()).digest()
        return math.log((int.from_bytes(digest[:8], "big") + 1) / 2**64) / kept.count

    groups = [(zoo.name, row, kept) for zoo in zoos for row in zoo.fused for kept in row.kept]
    return sorted(groups, key=lot, reverse=True)[:count]


def page(docs: Path) -> str:
    """The text of the page.

    Args:
        docs: the folder that holds ``census/``.

    Raises:
        BnFuseError: there are no rows, or nobody knows the code of a reason in them.
    """
    zoos = zoos_in(docs)
    derivations = docs / "census" / "derivations.md"
    parts = [
        _introduction(zoos),
        _summary(zoos),
        _beside(zoos),
        _other_calls(calls.lines(docs / "census" / "calls" / "timm.jsonl")),
        _restructured(zoos),
        _kept(zoos),
        derivations.read_text().strip() if derivations.exists() else "",
        _families(zoos),
        _left_out(zoos),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def zoos_in(docs: Path) -> list[Zoo]:
    """The rows of all zoos.

    Raises:
        BnFuseError: there are none.
    """
    files = sorted(path for path in (docs / "census").iterdir() if ".jsonl" in path.suffixes)
    if not files:
        raise BnFuseError(f"there is no file of rows in {docs / 'census'}: run bnfuse census ZOO --output FILE")
    return [_zoo(path) for path in files]


def _zoo(path: Path) -> Zoo:
    headings, rows, _ = read(path)
    if not headings:
        raise BnFuseError(f"{path} is no file of a census: it has no heading")
    kinds, others = _restructured_rows(path.parent / RESTRUCTURED / path.name)
    return Zoo(headings[-1]["census"], headings[-1], list(rows.values()), kinds, others)


def _restructured_rows(path: Path) -> tuple[list[str], dict[str, Row]]:
    """The kinds of restructuring, and the rows that were made with just these."""
    if not path.exists():
        return [], {}
    headings, rows, _ = read(path)
    kinds = headings[-1]["kinds"]
    return kinds, {
        name: row for name, row in rows.items() if row.restructured is None or list(row.restructured.kinds) == kinds
    }


# Words ---------------------------------------------------------------------------------------------------------------


def _introduction(zoos: Sequence[Zoo]) -> str:
    packages = ["bnfuse", "torch", *(zoo.name for zoo in zoos)]
    versions = {name: zoo.heading[name] for zoo in zoos for name in packages if name in zoo.heading}
    listed = ", ".join(f"{name} {number}" for name, number in versions.items())
    largest = max(zoo.heading["max_parameters"] for zoo in zoos)
    rows = [row for zoo in zoos for row in zoo.rows]
    failures = sum(row.outcome in FAILURES for row in rows)
    norms = sum(row.executed or 0 for row in rows if row.outcome == FUSED)
    removed = sum(row.removed or 0 for row in rows if row.outcome == FUSED)
    return f"""# The census

Every model of {_and(zoo.name for zoo in zoos)} with up to {_count(largest)} parameters: built, fused, verified, and
checked once more. {_count(len(rows))} names; {_count(removed)} of the {_count(norms)} batch norms that ran are gone
({_share(removed, norms)}); bnfuse failed on {failures}. Made with {listed}.

This page is made from the rows in [`census/`](census) by `make census`, which continues where the last run stopped;
`bnfuse census ZOO` makes such rows of one zoo, and `bnfuse census ZOO --match "resnet*"` of a part of it.

How a row comes about:

1. The model is built with random weights. Its norms get random weights (of both signs, none of them 0) and biases,
   every other parameter that a constructor leaves at one number (biases at 0, gains at 1) gets different ones, and the
   statistics come from a run, so that activations stay as large as in a trained network.
2. It is run on an image of 96 pixels if it takes one, else of the size that it declares: what counts is the structure.
   Models that take something else have [inputs of their own](../src/bnfuse/tools/zoo/inputs.py).
3. `fuse` does its work, with its verification, in float32. These rows were made when the recorded call alone counted;
   what it costs to hold for other calls too is [below](#what-other-calls-cost).
4. The same plan is carried out in float64, and both models are compared on other inputs: other values, another batch,
   another size as far as the model takes them. A relative L2 error above 1e-9 is *wrong*, unless a change of one unit
   in the last place of every parameter moves the original's own output about as far (to a quarter of it).
5. A model that runs the same operators on the same shapes in the same kinds of modules as an earlier one is *the same*
   and not done again; its norms are not counted again either.

Each model has a process of its own with a limit of {zoos[0].heading["seconds"]:g} s and
{zoos[0].heading["memory"] / 2**30:g} GiB; what goes past it is a *crash* of bnfuse, unless the model was only being
built or run."""


def _summary(zoos: Sequence[Zoo]) -> str:
    outcomes = _table(
        ["zoo", "names", *OUTCOMES],
        [[zoo.name, len(zoo.rows), *(_of(zoo.rows, outcome) for outcome in OUTCOMES)] for zoo in zoos],
    )
    norms = _table(
        ["zoo", "norms that ran", "removed", "", "models without any left", "float64 error", "float32 ratio"],
        [
            [
                zoo.name,
                _sum(zoo.fused, "executed"),
                _sum(zoo.fused, "removed"),
                _share(_sum(zoo.fused, "removed"), _sum(zoo.fused, "executed")),
                sum(row.removed == row.executed for row in zoo.fused),
                _largest(zoo.fused),
                _ratios(zoo.fused),
            ]
            for zoo in zoos
        ],
    )
    seconds = _table(
        ["zoo", "forward", "fuse", "verify", "whole visit", "all visits"],
        [
            [
                zoo.name,
                *(_seconds(zoo.fused, phase) for phase in ("forward", "fuse", "verify", "total")),
                f"{sum(row.seconds.get('total', 0.0) for row in zoo.rows) / 3600:.1f} h",
            ]
            for zoo in zoos
        ],
    )
    silent = [f"`{zoo.name}:{row.model}`" for zoo in zoos for row in zoo.fused if row.alive is False]
    widened = sum(row.widened for zoo in zoos for row in zoo.fused)
    return f"""## Summary

{outcomes}

*Cannot be built* and *does not run* are the zoos' own errors, [listed below](#what-was-left-out); *wrong* and
*crashed* are mistakes of bnfuse.

{norms}

*float64 error*: the largest relative L2 error of an output on the other inputs. *float32 ratio*: the error of the
fused model in float32 by the model's own rounding error in float32, both against float64: the median, and the largest.
In {widened} models, whose code casts to float32, casts were widened for the error in float64.
{_rough(zoos)}{_vacuous(silent)}
{seconds}

Seconds on one core: the median, and the largest. *forward* is one run on the other inputs in float32, *fuse* the
capture and the plan, *verify* the comparison that `fuse` makes."""


def _rough(zoos: Sequence[Zoo]) -> str:
    rough = [
        f"`{zoo.name}:{row.model}` ({row.error64:.0e}, and {row.noise64:.0e} by rounding alone)"
        for zoo in zoos
        for row in zoo.fused
        if row.noise64 is not None and row.error64 is not None
    ]
    return f"Models that multiply their own rounding beyond 1e-9: {', '.join(rough)}.\n" if rough else ""


def _vacuous(silent: Sequence[str]) -> str:
    if not silent:
        return ""
    names = ", ".join(silent)
    return f"\nThe outputs of {len(silent)} models tell nothing apart (no numbers, or none finite): {names}.\n"


def _beside(zoos: Sequence[Zoo]) -> str:
    if not any(zoo.sample for zoo in zoos):
        return ""
    rows = []
    for zoo in zoos:
        rivals = [row.rivals[RIVAL] for row in zoo.sample]
        right = [(row, rival) for row, rival in zip(zoo.sample, rivals, strict=True) if _verdict(row) == "right"]
        rows.append(
            [
                zoo.name,
                len(zoo.sample),
                _sum(zoo.sample, "executed"),
                _sum(zoo.sample, "removed"),
                sum(rival.removed or 0 for _, rival in right),
                sum(_verdict(row) == "wrong" for row in zoo.sample),
                sum(_verdict(row) == "failed" for row in zoo.sample),
                sum((rival.removed or 0) > (row.removed or 0) for row, rival in right),
            ]
        )
    heads = ["zoo", "models", "norms that ran", "bnfuse removed", f"{RIVAL} removed", "wrong", "failed", "removed more"]
    return f"""## Beside torch.fx

`torch.fx.experimental.optimization.fuse` on the smallest model of each family. *removed* counts the norms of the models
that it gets right; *wrong* are those whose outputs differ by more than {RIVAL_EXACT:.0e} in float64, *failed* those
that it cannot trace, *removed more* those that it gets right with more norms removed than bnfuse.

{_table(heads, rows)}"""


def _other_calls(found: Sequence[Calls]) -> str:
    """What it costs to hold for calls that nobody named."""
    if not found:
        return ""
    ran = [line for line in found if not line.failure]
    costly = sorted((line for line in ran if line.removed < line.alone), key=lambda line: line.removed - line.alone)
    checked = [
        [name, sum(name in line.errors for line in ran), sum(name in line.wrong for line in ran)]
        for name in dict.fromkeys(name for line in ran for name in line.errors)
    ]
    table = [[line.family, line.model, line.norms, line.alone, line.removed] for line in costly]
    passes = statistics.median(line.passes for line in ran)
    return f"""## What other calls cost

The smallest model of each family of timm (`python -m bnfuse.tools.census.calls docs`), fused as always and for the
recorded call alone (`Options(infer_calls=False)`): {len(ran)} models with {_count(sum(line.norms for line in ran))}
norms, of which {_count(sum(line.removed for line in ran))} go as always and
{_count(sum(line.alone for line in ran))} for the recorded call alone. Fusing took {passes:.1f} forward passes (the
median; the largest {max(line.passes for line in ran):.1f}), in float64, verification included. Each model was compared
with the original in float64 on the inputs that it was fused with and up to two others, by each method that it has:

{_table(["method", "models", f"wrong by more than {EXACT_CALLS:.0e}"], checked)}

The models that keep norms for other calls:

{_table(["family", "model", "norms", "removed for the recorded call", "removed as always"], table)}"""


# Restructured --------------------------------------------------------------------------------------------------------


def _restructured(zoos: Sequence[Zoo]) -> str:
    """What goes when the structure may change, too."""
    visited = [zoo for zoo in zoos if zoo.restructured]
    if not visited:
        return ""
    kinds = list(dict.fromkeys(kind for zoo in visited for kind in zoo.kinds))
    rows = [(zoo, row) for zoo in visited for row in zoo.restructured.values()]
    done = [(zoo, row, row.restructured) for zoo, row in rows if row.outcome == FUSED and row.restructured is not None]
    by_zoo = _table(
        [
            "zoo", "models", "with steps", "norms that ran", "stay", "stay restructured", *FAILURES, "float64 error",
            "float32 ratio",
        ],
        [_restructured_zoo(zoo) for zoo in visited],
    )  # fmt: skip
    by_kind = _table(
        ["kind", "models", "steps", "norms that go by them, and stay without"],
        [
            [
                f"`{kind}`" if kind else "several together",
                sum(kind in found.steps for _, _, found in done) if kind else "",
                sum(found.steps.get(kind, 0) for _, _, found in done) if kind else "",
                sum(found.gone.get(kind, 0) for _, _, found in done),
            ]
            for kind in (*kinds, *([""] if any("" in found.gone for _, _, found in done) else []))
        ],
    )
    families: dict[tuple[str, str], list[tuple[Row, Restructured]]] = {}
    for zoo, row, found in done:
        families.setdefault((zoo.name, row.family), []).append((row, found))
    by_family = _table(
        ["zoo", "family", "models", "norms that ran", "stay", "stay restructured", *kinds, "parameters", "such as"],
        [
            _restructured_family(name, family, members, kinds)
            for (name, family), members in families.items()
            if any(found.steps for _, found in members)
        ],
    )
    costs = sum(row.removed is not None and row.removed < found.plain for _, row, found in done)
    failed = [f"`{zoo.name}:{row.model}` ({row.phase}: {row.error})" for zoo, row in rows if row.outcome in FAILURES]
    return f"""## Restructured

The structure of a model may change as well with `restructure=True` ([restructuring](restructuring.md)): here
{_and(f"`{kind}`" for kind in kinds)}, all at once. `bnfuse census ZOO --restructure` visits models once more and checks
them as above: first the smallest of each series of names, then those in which norms stay, and those of series in which
a model was changed. {_progress(visited)}
Both numbers of norms that stay are of this pass.

{by_zoo}

{by_kind}

Steps of `merge` mostly make one layer of several whose norms go in any case. Norms stay that go without steps in
{costs} models.{f" Mistakes of bnfuse: {'; '.join(failed)}." if failed else ""}

The families in which the structure changes; *{", ".join(kinds)}* count steps, *parameters* is by how much the number of
parameters of the models changes:

{by_family}"""


def _progress(zoos: Sequence[Zoo]) -> str:
    """How many of the models in which norms stay were visited."""
    left = [(zoo, row) for zoo in zoos for row in zoo.fused if row.kept]
    visited = sum(row.model in zoo.restructured for zoo, row in left)
    rest = sum(len(zoo.restructured) for zoo in zoos) - visited
    shares = f"{_count(visited)} of the {_count(len(left))} models in which norms stay"
    return f"These were {shares}, and {_count(rest)} others."


def _restructured_zoo(zoo: Zoo) -> list[object]:
    rows = list(zoo.restructured.values())
    fused = [row for row in rows if row.outcome == FUSED]
    return [
        zoo.name,
        len(rows),
        sum(bool(row.restructured and row.restructured.steps) for row in fused),
        _sum(fused, "executed"),
        sum(_stay_plainly(row) for row in fused),
        _sum(fused, "executed") - _sum(fused, "removed"),
        *(_of(rows, outcome) for outcome in FAILURES),
        _largest(fused),
        _ratios(fused),
    ]


def _restructured_family(
    zoo: str, family: str, members: Sequence[tuple[Row, Restructured]], kinds: Sequence[str]
) -> list[object]:
    rows = [row for row, _ in members]
    such_as = min((row for row, found in members if found.steps), key=lambda row: (row.parameters or 0, row.model))
    grown = sum(found.grown for _, found in members)
    return [
        zoo,
        family,
        len(members),
        _sum(rows, "executed"),
        sum(map(_stay_plainly, rows)),
        _sum(rows, "executed") - _sum(rows, "removed"),
        *(sum(found.steps.get(kind, 0) for _, found in members) or "" for kind in kinds),
        f"{grown / _sum(rows, 'parameters'):+.1%}",
        f"`{such_as.model}`",
    ]


def _stay_plainly(row: Row) -> int:
    return (row.executed or 0) - (row.restructured.plain if row.restructured is not None else 0)


def _verdict(row: Row) -> str:
    """What torch.fx made of a model: right, wrong or failed; empty if it was not tried."""
    rival = row.rivals.get(RIVAL)
    if rival is None:
        return ""
    if rival.failure:
        return "failed"
    return "right" if rival.error is not None and rival.error <= RIVAL_EXACT else "wrong"


# Reasons -------------------------------------------------------------------------------------------------------------


def _words(code: str) -> str:
    """The text of a reason, with ``…`` for what differs.

    Raises:
        BnFuseError: the code is unknown.
    """
    if code not in CAUSES:
        raise BnFuseError(f"no cause has the code {code!r}, which stands in a row; make the rows again")
    return re.sub("{[^}]*}", "…", CAUSES[code].text)


def _why(reason: KeptReason) -> str:
    return f"`{reason.operator}`: {_words(reason.code)}" if reason.operator else _words(reason.code)


def _kept(zoos: Sequence[Zoo]) -> str:
    every = [(zoo, row, kept) for zoo in zoos for row in zoo.fused for kept in row.kept]
    if not every:
        return ""
    cases: dict[tuple[str, ...], list[tuple[Zoo, Row, Kept]]] = {}
    single: dict[str, list[tuple[Zoo, Row, Kept]]] = {}
    operators: dict[str, Counter[str]] = {}
    for zoo, row, kept in every:
        by_way = {reason.direction or _WAYS[0]: _why(reason) for reason in kept.reasons}
        cases.setdefault(tuple(by_way.get(way, "") for way in _WAYS), []).append((zoo, row, kept))
        for reason in kept.reasons:
            single.setdefault(reason.code, []).append((zoo, row, kept))
            operators.setdefault(reason.code, Counter())[reason.operator or ""] += kept.count
    order: Callable[[Any], Any] = lambda item: (-sum(kept.count for _, _, kept in item[1]), item[0])  # noqa: E731
    common = sorted(cases.items(), key=order)
    total = sum(kept.count for _, _, kept in every)
    shown = common[:_CASES]
    rest = sum(kept.count for _, found in common[_CASES:] for _, _, kept in found)
    overview = _table(
        ["norms", "models", *_WAYS, "such as"],
        [
            [
                sum(kept.count for _, _, kept in found),
                len({(zoo.name, row.model) for zoo, row, _ in found}),
                *reasons,
                _example(found),
            ]
            for reasons, found in shown
        ],
    )
    explained = "\n\n".join(
        _explanation(code, found, operators[code]) for code, found in sorted(single.items(), key=order)
    )
    more = f" The {len(common) - _CASES} rarer cases make up the remaining {_count(rest)}." if rest else ""
    return f"""## Norms that stay, and why

{_count(total)} norms ran and stayed. Each was tried *backward*, where the tensor before the norm takes the norm's
units, *forward*, where the tensor after it takes the inverse units ([how it works](how-it-works.md#units)), and,
where a layer reads what the norm reads and is added to what it gives, *beside*. Each way ended at an operator that
refused; the table shows where.{more}

{overview}

### Each reason

With `y = a*x + c` for the norm, and units `s*v + t` of a tensor `v`; the sentences are those of
[the reasons](reasons.md). A norm counts for each of its reasons.

{explained}"""


def _explanation(code: str, found: Sequence[tuple[Zoo, Row, Kept]], operators: Counter[str]) -> str:
    norms = sum(kept.count for _, _, kept in found)
    models = len({(zoo.name, row.model) for zoo, row, _ in found})
    where = ", ".join(f"`{operator}` ({_count(count)})" for operator, count in operators.most_common(6) if operator)
    at = f"; at {where}" if where else ""
    return f"""**`{_words(code)}`**: {_count(norms)} norms in {_count(models)} models{at}; such as {_example(found)}.
{CAUSES[code].meaning} *What to do*: {CAUSES[code].advice}"""


def _example(found: Sequence[tuple[Zoo, Row, Kept]]) -> str:
    zoo, row, kept = min(found, key=lambda item: (item[1].parameters or 0, item[1].model))
    return f"`{zoo.name}:{row.model}`, `{kept.norm}`"


# Families ------------------------------------------------------------------------------------------------------------


def _families(zoos: Sequence[Zoo]) -> str:
    parts = ["## Families"]
    parts.append(
        "The files of the zoos. *norms*, *removed* and *kept* count norms that ran, over the models that were fused "
        "and are not the same as another; the last columns are about the one model that "
        f"`{RIVAL}` was tried on. *restructured* are the norms that stay when the structure may change, where that was "
        "tried ([above](#restructured)): in brackets, of how many of the models in which norms stay."
    )
    heads = [
        "family", "models", FUSED, "same", "without norms", "other", "norms", "removed", "kept",
        "restructured", "float64 error", "float32 ratio", "sample", "its norms", "bnfuse", RIVAL,
    ]  # fmt: skip
    for zoo in zoos:
        families: dict[str, list[Row]] = {}
        for row in zoo.rows:
            families.setdefault(row.family, []).append(row)
        rows = [_family(name, found, zoo) for name, found in sorted(families.items())]
        parts.append(f"### {zoo.name}\n\n{_table(heads, rows)}")
    return "\n\n".join(parts)


def _family(name: str, rows: Sequence[Row], zoo: Zoo) -> list[object]:
    fused = [row for row in rows if row.outcome == FUSED]
    other = sum(row.outcome in (TOO_LARGE, NOT_BUILT, NOT_RUN, WRONG, CRASHED) for row in rows)
    sample: list[object] = ["", "", "", ""]
    for row in fused:
        if RIVAL in row.rivals:
            verdict = _verdict(row)
            removed = row.rivals[RIVAL].removed
            sample = [f"`{row.model}`", row.executed, row.removed, removed if verdict == "right" else verdict]
    norms, removed = _sum(fused, "executed"), _sum(fused, "removed")
    return [
        name, len(rows), len(fused), _of(rows, SAME), _of(rows, NO_NORMS), other, norms, removed, norms - removed,
        _kept_restructured(fused, zoo), _largest(fused), _ratios(fused), *sample,
    ]  # fmt: skip


def _kept_restructured(fused: Sequence[Row], zoo: Zoo) -> object:
    """The norms of a family that stay when the structure may change, of the models in which that was tried."""
    left = [row for row in fused if row.kept]
    tried = [zoo.restructured[row.model] for row in left if row.model in zoo.restructured]
    tried = [row for row in tried if row.outcome == FUSED]
    if not tried:
        return ""
    stay = _count(_sum(tried, "executed") - _sum(tried, "removed"))
    return stay if len(tried) == len(left) else f"{stay} ({len(tried)} of {len(left)})"


def _left_out(zoos: Sequence[Zoo]) -> str:
    parts = ["## What was left out"]
    for zoo in zoos:
        found = [row for row in zoo.rows if row.outcome in (*FAILURES, NOT_BUILT, NOT_RUN)]
        if found:
            rows = [[f"`{row.model}`", row.outcome, row.phase, row.error] for row in found]
            parts.append(f"### {zoo.name}: errors\n\n{_table(['model', 'outcome', 'phase', 'error'], rows)}")
        large = [row for row in zoo.rows if row.outcome == TOO_LARGE]
        if large:
            names = ", ".join(f"`{row.model}`" for row in large)
            parts.append(f"### {zoo.name}: too large\n\n{len(large)} models: {names}.")
    return "\n\n".join(parts) if len(parts) > 1 else ""


# Cells ---------------------------------------------------------------------------------------------------------------


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [list(heads), ["---"] * len(heads), *(list(map(_cell, row)) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(content: object) -> str:
    if isinstance(content, int):
        return _count(content)
    return "" if content is None else str(content).replace("|", "\\|")


def _count(number: int) -> str:
    return f"{number:,}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""


def _and(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _of(rows: Iterable[Row], outcome: str) -> int:
    return sum(row.outcome == outcome for row in rows)


def _sum(rows: Iterable[Row], name: str) -> int:
    return sum(getattr(row, name) or 0 for row in rows)


def _largest(rows: Iterable[Row]) -> str:
    errors = [row.error64 for row in rows if row.error64 is not None]
    return f"{max(errors):.0e}" if errors else ""


def _ratios(rows: Iterable[Row]) -> str:
    ratios = [row.error32 / row.own32 for row in rows if row.error32 is not None and row.own32]
    return f"{median(ratios):.2f}, {max(ratios):.1f}" if ratios else ""


def _seconds(rows: Iterable[Row], phase: str) -> str:
    seconds = [row.seconds[phase] for row in rows if phase in row.seconds]
    return f"{median(seconds):.2f}, {max(seconds):.0f}" if seconds else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
