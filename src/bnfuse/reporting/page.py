"""The report as one HTML file that needs nothing from outside.

The facts are embedded as JSON and drawn by the scripts in ``assets``; the picture of the network is laid out by ELK
(``assets/vendor``), which travels packed in the file. No text of a model is ever read as HTML: the JSON cannot end its
element, the scripts write text as text, and the page forbids every script and every style but its own, by their hashes.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from string import Template
from typing import Any

SCRIPTS = (
    "elements.js",
    "words.js",
    "tables.js",
    "network.js",
    "layout.js",
    "pane.js",
    "picture.js",
    "details.js",
    "summary.js",
    "decisions.js",
    "plots.js",
    "main.js",
)
"""The scripts in the order in which they are joined: each uses only what stands before it, and what runs later."""

LAYOUT_LIBRARY = "vendor/elk-worker.min.js"


def page(facts: Mapping[str, Any]) -> str:
    """Draw the facts of a plan or of a fused model.

    >>> text = page({"bnfuse": "0", "kind": "plan", "model": "</script>", "summary": {"norms": 2, "removed": 1}})
    >>> "\\\\u003c/script\\\\u003e" in text, text.count("</script>") == text.count("<script")
    (True, True)

    Args:
        facts: what can be said of the model, as JSON holds it; what is absent or None is left out of the report.
            Numbers that are not finite are shown as what they are.

    Returns:
        The text of an HTML file.
    """
    script = _script()
    style = _asset("style.css")
    return Template(_asset("template.html")).substitute(
        title=html.escape(f"{facts.get('model') or 'model'} · bnfuse report"),
        policy=_policy(script, style),
        style=style,
        summary=_summary(facts),
        facts=_embedded(facts),
        library=_packed_library(),
        script=script,
    )


def _policy(script: str, style: str) -> str:
    """What the page may load: its own script and style, and the layout library as a worker."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src '{_hash(script)}' blob:",
            "worker-src blob:",
            f"style-src '{_hash(style)}'",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _embedded(facts: Mapping[str, Any]) -> str:
    """JSON that cannot end the element in which it stands, nor open a comment in it."""
    text = json.dumps(_finite(facts), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    """The same value with words for numbers that JSON lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return value


def _summary(facts: Mapping[str, Any]) -> str:
    """The summary as plain HTML, for whoever runs no scripts."""
    summary = facts.get("summary") or {}
    lines = [f"<h1>{_text(facts.get('model'))}</h1>"]
    if summary.get("norms") is not None:
        will = "would be removed" if facts.get("kind") == "plan" else "were removed"
        lines.append(f"<p>{_text(summary.get('removed'))} of {_text(summary['norms'])} batch norms {will}.</p>")
    if summary.get("warning"):
        lines.append(f"<p>{_text(summary['warning'])}</p>")
    if rows := summary.get("rows"):
        lines.append("<table><tr><th></th><th>before</th><th>after</th><th>unit</th></tr>")
        lines += [
            "<tr>" + "".join(f"<td>{_text(row.get(key))}</td>" for key in ("name", "before", "after", "unit")) + "</tr>"
            for row in rows
        ]
        lines.append("</table>")
    if text := (summary.get("difference") or {}).get("text"):
        lines.append(f"<pre>{_text(text)}</pre>")
    return "\n".join(lines)


def _text(value: Any) -> str:
    return "" if value is None else html.escape(str(value))


def _asset(name: str) -> str:
    return resources.files("bnfuse.reporting").joinpath("assets", name).read_text(encoding="utf-8")


@cache
def _script() -> str:
    return '"use strict";\n(() => {\n' + "\n".join(_asset(f"scripts/{name}") for name in SCRIPTS) + "})();\n"


@cache
def _packed_library() -> str:
    return base64.b64encode(gzip.compress(_asset(LAYOUT_LIBRARY).encode(), 9, mtime=0)).decode()
