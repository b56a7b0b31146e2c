"""The report as a text: it holds all facts, needs nothing from outside, and no fact can break out of its place."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from importlib import resources
from typing import Any

import pytest
from synthetic import HOSTILE, hostile, network

from bnfuse.reporting import page as pages
from bnfuse.reporting.page import page

OUTSIDE = {"src", "href", "action", "data", "poster", "srcset", "background", "formaction"}
"""Attributes by which an element loads something, or leads somewhere."""


class Elements(HTMLParser):
    """What a browser finds in a page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.inside: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))
        if tag in ("script", "style", "title", "noscript"):
            self.inside.append(dict(attributes).get("id") or tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style", "title", "noscript"):
            self.inside.pop()

    def handle_data(self, data: str) -> None:
        for name in self.inside[-1:]:
            self.texts[name] = self.texts.get(name, "") + data


@pytest.mark.parametrize("facts", [network(60), network(60, "plan"), hostile()], ids=["fuse", "plan", "hostile"])
def test_all_facts_are_in_the_page(facts: dict[str, Any]) -> None:
    embedded = Elements(page(facts)).texts["facts"]
    assert json.loads(embedded) == facts
    assert not set("<>&") & set(embedded), "nothing in the data can end its element, open one, or be a reference"
    assert embedded.isascii()


def test_numbers_that_json_lacks_become_words() -> None:
    facts = {"errors": [{"relative": math.nan, "rounding": math.inf}, {"relative": -math.inf, "rounding": 0.5}]}
    assert json.loads(Elements(page(facts)).texts["facts"])["errors"] == [
        {"relative": "NaN", "rounding": "Infinity"},
        {"relative": "-Infinity", "rounding": 0.5},
    ]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_makes_an_element(text: str) -> None:
    facts = network(20)
    tags = [tag for tag, _ in Elements(page(facts)).found]
    facts.update(model=text, spec=text, machine=text)
    facts["summary"].update(warning=text)
    facts["summary"]["difference"]["text"] = text
    facts["summary"]["rows"][0].update(name=text, unit=text, before=text)
    found = Elements(page(facts))
    assert len(found.found) == len(tags) + 1, "the warning is one paragraph more in the summary without scripts"
    assert sorted(tag for tag, _ in found.found) == sorted([*tags, "p"])
    assert not any(name.startswith("on") for _, attributes in found.found for name in attributes)


def test_nothing_comes_from_outside() -> None:
    text = page(network(60))
    found = Elements(text)
    led = {value for _, attributes in found.found for name, value in attributes.items() if name in OUTSIDE}
    assert led == {"#summary", "#network", "#decisions", "#errors", "#ranges"}
    assert not {"link", "iframe", "img", "object", "embed", "base", "form"} & {tag for tag, _ in found.found}
    assert not re.search(r"@import|url\(", found.texts["style"])
    script = found.texts["script"]
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|EventSource|sendBeacon|import)\s*\(", script)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", script)


def test_only_the_scripts_and_styles_of_the_page_may_run() -> None:
    found = Elements(page(hostile()))
    [policy] = [attributes["content"] for _, attributes in found.found if attributes.get("http-equiv")]
    rules = dict(rule.strip().split(" ", 1) for rule in str(policy).split(";"))
    assert rules["default-src"] == "'none'"

    def hashed(name: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(found.texts[name].encode()).digest()).decode()}'"

    assert rules["script-src"] == f"{hashed('script')} blob:"
    assert rules["style-src"] == hashed("style")
    assert "unsafe" not in str(policy)


def test_the_layout_library_travels_whole_and_with_its_licence() -> None:
    vendor = resources.files("bnfuse.reporting").joinpath("assets", "vendor")
    packed = Elements(page(network(10))).texts["layout-library"]
    assert gzip.decompress(base64.b64decode(packed)) == vendor.joinpath("elk-worker.min.js").read_bytes()
    assert "Eclipse Public License" in vendor.joinpath("elkjs-LICENSE.md").read_text()


def test_every_script_is_joined() -> None:
    scripts = resources.files("bnfuse.reporting").joinpath("assets", "scripts")
    assert {script.name for script in scripts.iterdir()} == set(pages.SCRIPTS)


def test_a_page_of_a_thousand_operators_is_small() -> None:
    assert len(page(network(1000))) < 2_500_000


def test_without_scripts_the_summary_is_still_there() -> None:
    facts = network(60)
    text = Elements(page(facts)).texts["noscript"]
    norms, removed = facts["summary"]["norms"], facts["summary"]["removed"]
    assert f"{removed} of {norms} batch norms were removed." in text
    for row in facts["summary"]["rows"]:
        assert row["name"] in text
        assert str(row["before"]) in text
    assert "where 5.07123 became 5.07124" in text
    assert "batch norms would be removed." in Elements(page(network(60, "plan"))).texts["noscript"]


def test_facts_that_are_absent_are_left_out() -> None:
    assert json.loads(Elements(page({})).texts["facts"]) == {}
    assert "batch norms" not in Elements(page({})).texts["noscript"]
