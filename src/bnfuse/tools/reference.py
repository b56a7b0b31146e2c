"""The pages ``docs/reasons.md`` and ``docs/operators.md``, made from the causes and from the docstrings of the rules.

python -m bnfuse.tools.reference docs
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from bnfuse import rules
from bnfuse.reasons import CAUSES
from bnfuse.rules.registry import ABSORBERS, RULES, Rule

_MADE = "<!-- made by `python -m bnfuse.tools.reference docs`: do not edit -->"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages into a folder."""
    parser = argparse.ArgumentParser(prog="python -m bnfuse.tools.reference", description=__doc__.split("\n", 1)[0])
    parser.add_argument("docs", type=Path, help="the folder to write to")
    folder = parser.parse_args(arguments).docs
    for name, text in pages().items():
        (folder / name).write_text(text)
    return 0


def pages() -> dict[str, str]:
    """The text of each page, by the name of its file."""
    return {"reasons.md": _reasons(), "operators.md": _operators()}


def _reasons() -> str:
    parts = [
        f"""# Why norms stay: the reasons

{_MADE}

A reason is read from left to right: the way that was tried, the operator that refused and the module that ran it, and
what is wrong. A norm `y = a*x + c` that goes leaves units `s*v + t` on the tensors around it; see
[how it works](how-it-works.md).

    forward: conv2d in u (Conv2d): it takes no shift of its input: it pads with zeros, which would not be shifted

`…` stands for what differs from case to case. "Nothing" as advice means that the norm stays unless the network becomes
another one; a norm that stays costs time and no exactness. The code is what `plan.to_dict()` gives; it stays the same
when the wording changes."""
    ]
    group = None
    for cause in CAUSES.values():
        if cause.group != group:
            group = cause.group
            parts.append(
                f"## {group}\n\n| reason | what it means | what you can do | code |\n| --- | --- | --- | --- |"
            )
        text = re.sub("{[^}]*}", "…", cause.text)
        parts[-1] += f"\n| {text} | {_cell(cause.meaning)} | {_cell(cause.advice)} | `{cause.code}` |"
    return "\n\n".join(parts) + "\n"


def _operators() -> str:
    parts = [
        f"""# The operators and their rules

{_MADE}

What passes through each operator: which scale and which shift of each channel (*units*) its inputs and outputs can
have. "Any units" is any scale and any shift. The names are those of PyTorch's own operators, as they stand in a reason;
an in-place form follows the rule of its plain form. An operator that is not here is looked at as the operators that it
is made of, where PyTorch knows them: `hstack` as `cat`, `addcmul` and `lerp` as their products and sums. Any other
operator lets nothing pass: the tensors at all its sides stay as they are.

Each heading is a file of [`src/bnfuse/rules`](../src/bnfuse/rules); what follows it is its derivation."""
    ]
    listed: dict[str, dict[Rule, list[str]]] = {}
    for operator, rule in RULES.items():
        if rule.__module__.startswith(f"{rules.__name__}."):
            listed.setdefault(rule.__module__, {}).setdefault(rule, []).append(operator)
    for module, found in sorted(listed.items()):
        derivation = _paragraphs(inspect.getdoc(sys.modules[module]) or "")
        table = ["| operators | what passes |", "| --- | --- |"]
        for rule, operators in found.items():
            names = " ".join(f"`{operator}`" for operator in operators)
            absorbs = " (absorbs)" if operators[0] in ABSORBERS else ""
            table.append(f"| {names}{absorbs} | {_cell(_code(' '.join((inspect.getdoc(rule) or '').split())))} |")
        parts.append(f"## {module.rpartition('.')[2]}\n\n" + derivation + "\n\n" + "\n".join(table))
    return "\n\n".join(parts) + "\n"


def _paragraphs(text: str) -> str:
    """A docstring as Markdown; what is indented stays a block of code."""
    return "\n\n".join(
        part if part.startswith("    ") else _code(" ".join(part.split())) for part in text.split("\n\n")
    )


def _code(text: str) -> str:
    text = re.sub(r":mod:`([^`]*)`", r"`\1`", text)
    return text.replace("``", "`")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
