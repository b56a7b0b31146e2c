"""The report in a browser: what readers see, click, type and print."""

from __future__ import annotations

import base64
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import Browser, browser_or_skip, started
from synthetic import HOSTILE, Network, hostile, merged, network

from bnfuse.reporting.page import page

browser_or_skip()

SECONDS = 3.0
"""How long a network of 1,000 operators may take until it can be used."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reports")


@pytest.fixture(scope="module")
def started_browser(folder: Path) -> Iterator[Browser]:
    with started(folder / "profile") as browser:
        yield browser


@pytest.fixture
def browser(started_browser: Browser) -> Iterator[Browser]:
    """A browser that has complained about nothing, and must not during a test."""
    started_browser.window(1440)
    started_browser.errors()
    yield started_browser
    assert not started_browser.errors()


@pytest.fixture
def report(browser: Browser, folder: Path) -> Browser:
    """The report of a network of some 60 operators, opened."""
    browser.open(written(folder, "sixty", network(60)))
    return browser


def busy() -> float:
    """How many times longer things take than on a machine with nothing else to do; 1 if nothing else is done."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def written(folder: Path, name: str, facts: dict[str, Any]) -> Path:
    path = folder / f"{name}.html"
    path.write_text(page(facts), encoding="utf-8")
    return path


# The picture


def test_before_has_all_norms_and_after_those_that_stay(report: Browser) -> None:
    def norms(which: str) -> list[str]:
        return [box for box in report.boxes(which) if box.startswith("batch_norm")]

    assert report.run("return document.documentElement.dataset.state") == "ready"
    report.click('[aria-label^="Open every module"]')
    facts = network(60)
    assert len(norms("before")) == facts["summary"]["norms"]
    assert any("removed" in norm for norm in norms("before"))
    wires = len(report.all('[data-which="before"] .wire'))
    assert wires == len(facts["graph"]["edges"])

    report.click('.choice [data-value="after"]')
    assert len(norms("after")) == facts["summary"]["norms"] - facts["summary"]["removed"] > 0
    assert all("kept" in norm for norm in norms("after"))
    assert len(report.all('[data-which="after"] .wire')) == wires - facts["summary"]["removed"], "norms are passed by"
    assert not report.one('[data-which="before"]').is_displayed()
    assert not report.all('[data-which="after"] .arrow')

    report.click('.choice [data-value="both"]')
    assert report.one('[data-which="before"]').is_displayed()
    assert report.one('[data-which="after"]').is_displayed()
    report.click('.choice [data-value="before"]')
    assert not report.one('[data-which="after"]').is_displayed()


def test_no_boxes_overlap_and_no_header_is_too_narrow(report: Browser) -> None:
    report.click('[aria-label^="Open every module"]')
    overlaps = """
        const boxes = [...document.querySelectorAll("[data-which=before] .box:not(.open)")];
        const places = boxes.map((box) => box.querySelector(".body").getBoundingClientRect());
        return places.flatMap((one, place) => places.slice(0, place).map((other, number) =>
            one.left < other.right && other.left < one.right && one.top < other.bottom && other.top < one.bottom
                ? [boxes[place].getAttribute("aria-label"), boxes[number].getAttribute("aria-label")] : null)).filter(Boolean);
    """
    assert report.run(overlaps) == []
    headers = """
        return [...document.querySelectorAll("[data-which=before] .box.open")].map((box) => [
            Math.max(...[...box.querySelectorAll(":scope > .title, :scope > .note:not(.number)")].map((text) => text.getBoundingClientRect().right)),
            Math.min(...[...box.querySelectorAll(".sign")].map((sign) => sign.getBoundingClientRect().left)),
        ]);
    """
    found = report.run(headers)
    assert len(found) > 3
    assert all(text < sign for text, sign in found if sign is not None), "the texts of a header end before its signs"


def test_modules_open_and_close(report: Browser) -> None:
    report.click('[aria-label^="Close the innermost"]')
    report.click('[aria-label^="Close the innermost"]')
    before = report.boxes()
    [stage] = [box for box in before if box.startswith("module stages")]
    report.box("module stages").find_element("css selector", ".chevron").click()
    report.settled()
    assert len(report.boxes()) > len(before)
    assert report.box(stage).get_attribute("aria-expanded") == "true"

    report.run("arguments[0].focus()", report.box(stage))
    report.keys("Enter")
    assert report.boxes() == before
    assert report.box(stage).get_attribute("aria-expanded") == "false"
    assert report.focused("aria-label") == stage, "the focus stays where it was"

    report.click('[aria-label^="Open every module"]')
    assert len(report.boxes()) > len(before)


def lit(browser: Browser, selector: str = ".box.lit:not(.open)") -> list[str]:
    return list(
        browser.run(
            "return [...document.querySelectorAll(`[data-which=before] ${arguments[0]}`)].map((one) => one.getAttribute('aria-label') ?? one.dataset.decisions)",
            selector,
        )
    )


def test_hover_and_focus_light_the_way_of_a_norm(report: Browser) -> None:
    norm, conv = "batch_norm 64, stem.norm", "conv2d 64→64 3x3, stem.conv"
    assert not lit(report)
    for act in (lambda box: report.hover(box), lambda box: report.run("arguments[0].focus()", box)):
        act(report.box(norm))
        assert {text.split(", 1×")[0] for text in lit(report)} == {norm, conv}
        assert lit(report, ".arrow.lit") == [" 0 "]
        assert len(report.all('[data-which="before"] .wire.lit')) == 1
        faint = report.box("add, stages.0.blocks.0,")
        report.until(lambda faint=faint: float(faint.value_of_css_property("opacity")) < 0.6)
        report.run("document.activeElement.blur()")
        report.hover(report.one("h1"))
        assert not lit(report)
        report.until(lambda faint=faint: float(faint.value_of_css_property("opacity")) == 1)
    report.hover(report.box(norm))
    assert "taken up by stem.conv" in report.text("#tooltip")


def test_after_is_a_network_of_its_own_where_the_structure_changed(browser: Browser, folder: Path) -> None:
    browser.open(written(folder, "merged", merged()))
    assert "merge block: 2 layers and their sum (−104 parameters)" in browser.text("#summary")
    assert "no bake of last: it is computed" in browser.text("#summary")
    assert "2 layers of the original have no counterpart" in browser.text("#errors")
    browser.click('.choice [data-value="both"]')
    layers = [
        {box.split(", ")[1] for box in browser.boxes(which) if box.startswith("conv2d")}
        for which in ("before", "after")
    ]
    assert layers == [{"stem", "block.a", "block.b", "last"}, {"stem", "block.merged", "last"}]
    assert not [box for box in browser.boxes("after") if "batch_norm" in box]

    def lit_in(which: str) -> list[str]:
        boxes = "return [...document.querySelectorAll(`[data-which=${arguments[0]}] .box.lit:not(.open)`)].map((one) => one.getAttribute('aria-label').split(', ')[1])"
        return list(browser.run(boxes, which))

    browser.run("arguments[0].focus()", browser.box("block.na"))
    assert (lit_in("before"), lit_in("after")) == (["block.na"], ["block.merged"])
    browser.keys("Enter")
    assert "Went with a step: merge block" in browser.text(".details")
    assert "Its work is done, after, by block.merged" in browser.text(".details")
    browser.run("arguments[0].focus()", browser.box("stem.norm"))
    assert (lit_in("before"), lit_in("after")) == (["stem", "stem.norm"], ["stem"])
    browser.run("arguments[0].focus()", browser.box("block.merged", "after"))
    assert (sorted(lit_in("before")), lit_in("after")) == (["block.na", "block.nb"], ["block.merged"])

    for which in ("before", "after"):  # a module opens and closes in both
        chevron = browser.box("module block", which).find_element("css selector", ".chevron")
        browser.run("arguments[0].dispatchEvent(new MouseEvent('click', { bubbles: true }))", chevron)
        browser.settled()
        for other in ("before", "after"):
            closed = browser.box("module block", other).get_attribute("aria-expanded") == "false"
            assert closed == (which == "before")
    browser.run("arguments[0].click()", browser.one('.choice [data-value="before"]'))
    browser.settled()
    browser.run("arguments[0].click()", browser.all("#decisions td a")[-1])  # the layer that a norm went into
    browser.settled()
    assert "block.merged" in str(browser.focused("aria-label"))
    assert browser.one('[data-which="after"]').is_displayed()
    browser.run("const find = document.querySelector('#find'); find.focus()")
    browser.keys("block.m")
    assert browser.texts("#found [role=option]") == ["conv2d 64→64 3x3block.merged"]


def test_a_kept_norm_shows_who_refused(report: Browser) -> None:
    report.click('[aria-label^="Open every module"]')
    report.run("arguments[0].focus()", report.box("blocks.2.right.norm"))
    assert [text.split(",")[0] for text in lit(report, ".box.refusing")] == ["max_pool2d"]
    report.keys("Enter")
    details = report.text(".details")
    assert "a maximum passes no negative scale" in details
    assert "What to do: Nothing, unless the pooling can run before the norm." in details
    report.run("arguments[0].click()", report.one(".details ul.refused a"))
    report.settled()
    assert str(report.focused("aria-label")).startswith("max_pool2d")


def test_search_jumps_to_what_it_finds(report: Browser) -> None:
    for _ in range(3):
        report.click('[aria-label^="Close the innermost"]')
    assert not [box for box in report.boxes() if "stages.0.blocks.3.mix" in box]
    report.keys("/")
    assert report.focused("id") == "find"
    report.keys("blocks.3.mix")
    assert report.texts("#found [role=option]") == ["conv2d 64→64 3x3stages.0.blocks.3.mix"]
    report.keys("Enter")
    report.until(lambda: "stages.0.blocks.3.mix" in str(report.focused("aria-label")))
    assert "stages.0.blocks.3.mix.weight" in report.text(".details")
    place = report.run(
        "const { x, y, width, height } = document.activeElement.getBoundingClientRect(); return [x + width / 2, y + height / 2]"
    )
    frame = report.run(
        "const { left, top, right, bottom } = document.querySelector('[data-which=before] .drawing').getBoundingClientRect(); return [left, top, right, bottom]"
    )
    assert frame[0] < place[0] < frame[2]
    assert frame[1] < place[1] < frame[3], "what was found is in sight"

    report.keys("/")
    report.run("const find = document.querySelector('#find'); find.value = ''; find.focus()")
    report.keys("no such thing")
    assert report.texts("#found li") == ["Nothing found."]
    report.keys("Escape")
    assert not report.texts("#found li")


def test_keys_follow_the_data(report: Browser) -> None:
    report.run("document.querySelector('#find').focus()")
    for _ in range(3):
        report.keys("Tab")
        if report.focused("data-key"):
            break
    assert str(report.focused("aria-label")).startswith("input x")
    report.keys("ArrowDown")
    assert "stem.conv" in str(report.focused("aria-label")) or "module stem" in str(report.focused("aria-label"))
    report.keys("ArrowUp", "End")
    assert str(report.focused("aria-label")).startswith("output")
    assert report.run("return document.activeElement.matches(':focus-visible')")
    report.keys("ArrowUp", "Enter")
    assert report.text(".details h3") == "linear 64→10"
    assert report.one('[aria-current="true"]').get_attribute("aria-label").startswith("linear")
    box = report.run("const { top, bottom } = document.activeElement.getBoundingClientRect(); return [top, bottom]")
    frame = report.run(
        "const { top, bottom } = document.querySelector('[data-which=before] .drawing').getBoundingClientRect(); return [top, bottom]"
    )
    assert frame[0] <= box[0] < box[1] <= frame[1], "the picture moved to what has the focus"


def test_pan_and_zoom(report: Browser) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    def at() -> list[float]:
        text = report.one('[data-which="before"] .stage').get_attribute("transform")
        return [float(number) for number in re.findall(r"-?[\d.]+", text)]

    start = at()
    report.click('[aria-label="Zoom in"]')
    assert at()[2] == pytest.approx(start[2] * 1.25, rel=0.01)
    report.click('[aria-label="Show the whole network"]')
    whole = report.run(
        "const { width, height } = document.querySelector('[data-which=before] .stage').getBoundingClientRect(); return [width, height]"
    )
    room = report.run(
        "const { clientWidth, clientHeight } = document.querySelector('[data-which=before] .drawing'); return [clientWidth, clientHeight]"
    )
    assert whole[0] <= room[0]
    assert whole[1] <= room[1]
    fitted = at()
    ground = report.one('[data-which="before"] .drawing')
    ActionChains(report.driver).move_to_element_with_offset(
        ground, -room[0] // 2 + 200, 0
    ).click_and_hold().move_by_offset(40, 30).release().perform()
    assert at() == pytest.approx([fitted[0] + 40, fitted[1] + 30, fitted[2]], abs=1)
    report.click('[aria-label="Fill the window"]')
    assert report.run("return document.querySelector('.picture').getBoundingClientRect().height") == 1000
    report.keys("Escape")
    assert report.run("return document.querySelector('.picture').getBoundingClientRect().height") < 1000


# The tables


def column(browser: Browser, number: int) -> list[str]:
    return browser.texts(f"#decisions tbody td:nth-child({number})")


def test_decisions_are_sorted_and_filtered(report: Browser) -> None:
    facts = network(60)
    names = [decision["norm"] for decision in facts["decisions"]]
    kept = [decision["norm"] for decision in facts["decisions"] if not decision["removed"]]
    assert column(report, 1) == names

    heads = report.all("#decisions thead button")
    heads[3].click()
    assert (
        column(report, 4) == ["kept"] * len(kept) + ["removed"] * (len(names) - len(kept))
        or column(report, 4)[0] == "Kkept"
    )
    first = column(report, 4)
    heads[3].click()
    assert column(report, 4) == sorted(first, reverse=True) != first
    assert [head.get_attribute("aria-sort") for head in report.all("#decisions th")].count("descending") == 1
    heads[0].click()
    assert column(report, 1) == names

    report.click('#decisions [data-value="kept"]')
    assert column(report, 1) == kept
    assert report.text("#decisions .shown") == f"{len(kept)} of {len(names)} norms shown"
    report.one('#decisions input[type="search"]').send_keys("BLOCKS.2.RIGHT")
    assert column(report, 1) == [name for name in kept if "blocks.2.right" in name] != []
    report.one('#decisions input[type="search"]').send_keys("x")
    assert report.texts("#decisions tbody") == ["Nothing matches."]


def test_reasons_are_grouped_and_choose_rows(report: Browser) -> None:
    facts = network(60)
    codes: dict[str, list[str]] = {}
    for decision in facts["decisions"]:
        if decision["reason"]:
            codes.setdefault(decision["reason"]["code"], []).append(decision["norm"])
    assert len(codes) > 1
    groups = report.all("#decisions .group")
    assert sorted(group.find_element("css selector", ".times").text for group in groups) == sorted(
        f"{len(norms)} norm{'s' if len(norms) > 1 else ''}" for norms in codes.values()
    )
    groups[0].find_element("css selector", "summary").click()
    code = groups[0].find_element("css selector", ".code").text
    groups[0].find_element("css selector", "p button").click()
    assert column(report, 1) == codes[code]


def test_a_row_jumps_to_its_norm(report: Browser) -> None:
    for _ in range(3):
        report.click('[aria-label^="Close the innermost"]')
    report.one("#decisions tbody tr:last-child td:first-child a").click()
    last = network(60)["decisions"][-1]["norm"]
    report.until(lambda: last in str(report.focused("aria-label")))
    assert report.text(".details h3") == "batch_norm 64"
    assert report.run(
        "const { top, bottom } = document.activeElement.getBoundingClientRect(); return top > 0 && bottom < innerHeight"
    )


# The plots


def test_plots_say_their_numbers_and_jump(report: Browser) -> None:
    errors = network(60)["errors"]
    places = report.all("#errors .place")
    assert len(places) == len(errors)
    assert places[1].get_attribute("aria-label") == f"{errors[1]['module']}, difference 1.0e-7, rounding 2.0e-7 (0.5×)"
    assert "the same bits" in places[0].get_attribute("aria-label")
    report.hover(places[1])
    assert "difference 1.0e-7" in report.text("#tooltip")
    report.run("arguments[0].focus()", places[0])
    report.keys("ArrowRight")
    assert report.focused("data-place") == "1"
    report.keys("Enter")
    report.until(lambda: errors[1]["module"] in str(report.focused("aria-label")) and report.focused("data-key"))

    def marks() -> str:
        return str(report.run("return document.querySelector('#ranges .sheet').innerHTML"))

    layers = network(60)["ranges"]
    assert len(report.all("#ranges .plot:first-of-type .place")) == len(layers)
    weights = marks()
    report.click('#ranges [data-value="activation"]')
    activations = marks()
    report.click('#ranges [data-value="linear"]')
    assert len({weights, activations, marks()}) == 3
    report.one("#ranges details summary").click()
    report.until(lambda: len(report.texts("#ranges tbody tr")) == len(layers))


def test_a_change_within_the_spread_of_the_calls_is_none(browser: Browser, folder: Path) -> None:
    facts = network(20)
    [latency] = [row for row in facts["summary"]["rows"] if row["name"] == "latency"]
    browser.open(written(folder, "clear", facts))
    assert "Latency−12 %91.20 ms → 80.10 ms" in browser.texts(".tile")
    assert "within the spread" not in browser.text("#summary")
    latency["quartiles"]["before"] = [0.0802, 0.0922]
    browser.open(written(folder, "unclear", facts))
    [tile] = [text for text in browser.texts(".tile") if text.startswith("Latency")]
    assert tile == "Latencyno clear change91.20 ms → 80.10 ms; the calls of one model differ by 12.00 ms"
    assert "within the spread of the calls" in browser.text("#summary table")


def test_the_largest_difference_is_said_in_words(browser: Browser, folder: Path) -> None:
    facts = network(20)
    browser.open(written(folder, "equal", facts))
    assert browser.text(".tile:nth-child(2)") == (
        "Outputs, before and after✓equallargest difference 7.1e-6, relative 1.4e-6, 0.7 times what rounding alone makes"
    )
    facts["summary"]["difference"].update(equal=False, largest=math.inf, relative=math.nan)
    browser.open(written(folder, "different", facts))
    assert browser.text(".tile.bad") == "Outputs, before and after!differentlargest difference Infinity, relative NaN"


def test_loud_layers_have_a_shape_of_their_own(browser: Browser, folder: Path) -> None:
    facts = network(40)
    facts["errors"][2].update(relative=1e-3)
    facts["errors"][3].update(relative=math.nan)
    browser.open(written(folder, "loud", facts))
    assert len(browser.all("#errors .place .loud")) == 2
    assert "(2 layers)" in browser.text("#errors .legend")


# Large, hostile, empty


def test_a_thousand_operators_are_usable_at_once(browser: Browser, folder: Path) -> None:
    path = written(folder, "thousand", network(1000))
    times = []
    while len(times) < 3 and (not times or min(times) > SECONDS / 2):
        browser.open(path)
        times.append(browser.run("return performance.getEntriesByName('picture')[0].startTime") / 1000)
    assert min(times) < SECONDS * busy(), f"the picture was there after {times} s"
    assert 5 < len(browser.boxes()) < 60, "the first view can be taken in"
    opened = browser.run(
        """
        const start = performance.now();
        const before = document.querySelectorAll(".box").length;
        document.querySelector(".box.closed .chevron").dispatchEvent(new MouseEvent("click", { bubbles: true }));
        return new Promise((resolve) => {
            const look = () => document.querySelectorAll(".box").length > before ? resolve((performance.now() - start) / 1000) : setTimeout(look, 5);
            look();
        });
        """
    )
    assert opened < SECONDS * busy()
    browser.keys("/", "stages.5.blocks.3.mix", "Enter")
    browser.until(lambda: "stages.5.blocks.3.mix" in str(browser.focused("aria-label")))


def test_a_thousand_operators_without_modules_are_cut_into_parts(browser: Browser, folder: Path) -> None:
    made = Network("Flat")
    x = made.node("input", "input", "")
    for _ in range(1000):
        x = made.node("relu", "operator", "", x)
    browser.open(written(folder, "flat", made.facts()))
    assert browser.run("return performance.getEntriesByName('picture')[0].startTime") / 1000 < SECONDS * busy()
    assert len(browser.boxes()) < 60
    assert "0 of 0" in browser.text(".tiles")


def test_hostile_texts_are_texts(browser: Browser, folder: Path) -> None:
    browser.open(written(folder, "hostile", hostile()))
    browser.click('[aria-label^="Open every module"]')
    browser.click('.choice [data-value="both"]')
    for box in browser.all('[data-which="before"] .box')[:6]:
        browser.run(
            "arguments[0].focus(); arguments[0].dispatchEvent(new PointerEvent('pointerover', { bubbles: true }))", box
        )
    for summary in browser.all("main details > summary"):
        browser.run("arguments[0].click()", summary)
    assert browser.run("return [window.broken ?? null, document.title.includes('script')]") == [None, True]
    assert browser.run("return document.querySelectorAll('main img, main script, main iframe').length") == 0
    shown = browser.text("main")
    for text in HOSTILE:
        seen = re.sub("[\u2028\u202c\u202e]", lambda found: f"\\u{ord(found[0]):04x}", text)
        assert shown.count(seen) > 5, text
    assert browser.text("h1") == HOSTILE[0]
    wide = browser.run("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert wide[0] <= wide[1], "no name makes the page wider than the window"


@pytest.mark.parametrize(
    "facts", [{}, {"kind": "plan", "model": "M", "graph": {"nodes": [], "edges": [], "modules": []}}]
)
def test_absent_facts_are_left_out(browser: Browser, folder: Path, facts: dict[str, Any]) -> None:
    browser.open(written(folder, "empty", facts))
    assert browser.run("return document.documentElement.dataset.state") == "ready"
    assert "Nothing was recorded." in browser.text("#network")
    assert "There is no batch norm." in browser.text("#decisions")


def test_facts_that_were_not_measured_are_left_out(browser: Browser, folder: Path) -> None:
    facts = network(40)
    for entry in facts["graph"]["nodes"]:
        entry.update(label=None, shape=None, dtype=None, parameters=None, created=None)
        entry["class"] = None
    for entry in facts["decisions"]:
        entry.update(channels=None, path=None, reason=None)
        entry["class"] = None
    facts["decisions"][0].update(into=None, into_nodes=None, norm_nodes=None)
    for entry in facts["errors"]:
        entry.update(relative=None, rounding=None)
    for entry in facts["ranges"]:
        entry["weight"].update(after=None)
        entry.update(activation={"before": None, "after": None})
        entry["weight"]["before"].update(channel_spread=None)
    facts["summary"].update(difference=None, assumed=None, unseen=None)
    for row in facts["summary"]["rows"]:
        row.update(after=None)
    browser.open(written(folder, "sparse", facts))
    assert browser.run("return document.documentElement.dataset.state") == "ready"
    browser.click('[aria-label^="Open every module"]')
    browser.click('.choice [data-value="both"]')
    browser.run(
        """
        for (const box of document.querySelectorAll("[data-which=before] .box")) {
            box.focus();
            box.dispatchEvent(new MouseEvent("click", { bubbles: true }));
        }
        """
    )
    browser.click('#ranges [data-value="activation"]')
    assert "Not measured." in browser.text("#ranges")
    seen = browser.text("main")
    assert not re.search(r"\b(null|undefined|NaN)\b|\[object", seen)


def test_a_layout_that_takes_long_can_be_stopped(browser: Browser, folder: Path) -> None:
    never = """
        const post = Worker.prototype.postMessage;
        let layouts = 0;
        Worker.prototype.postMessage = function (message) {
            if (message.cmd === "layout") layouts += 1;
            if (message.cmd !== "layout" || layouts !== 2) post.call(this, message);
        };
    """
    added = browser.command("Page.addScriptToEvaluateOnNewDocument", source=never)
    try:
        browser.open(written(folder, "stopped", network(150)))
        before = browser.boxes()
        browser.run(
            "document.querySelector('.box.closed .chevron').dispatchEvent(new MouseEvent('click', { bubbles: true }))"
        )
        browser.until(lambda: browser.texts(".waiting button") == ["Stop"])
        browser.click(".waiting button")
        assert browser.boxes() == before
        assert "stays as it was" in browser.text("#status")
        browser.run(
            "document.querySelector('.box.closed .chevron').dispatchEvent(new MouseEvent('click', { bubbles: true }))"
        )
        browser.until(lambda: len(browser.boxes()) > len(before))
    finally:
        browser.command("Page.removeScriptToEvaluateOnNewDocument", identifier=added["identifier"])


def test_without_workers_the_page_lays_out_itself(browser: Browser, folder: Path) -> None:
    added = browser.command(
        "Page.addScriptToEvaluateOnNewDocument",
        source="delete window.Worker; window.Worker = class { constructor() { throw new Error('none') } };",
    )
    try:
        browser.open(written(folder, "unthreaded", network(40)))
        assert browser.run("return document.documentElement.dataset.state") == "ready"
        assert len(browser.boxes()) > 5
    finally:
        browser.command("Page.removeScriptToEvaluateOnNewDocument", identifier=added["identifier"])


# For everyone


CONTRAST = """
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const channels = (color) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = color;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const light = ([red, green, blue]) => {
        const [r, g, b] = [red, green, blue].map((value) => value / 255).map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (element) => {
        if (element instanceof SVGElement && element.closest(".sign")) return getComputedStyle(element.closest(".sign").firstElementChild).fill;
        const body = element instanceof SVGElement && element.closest(".box")?.querySelector(".body");
        if (body && getComputedStyle(body).fill !== "rgba(0, 0, 0, 0)") return getComputedStyle(body).fill;
        for (let at = element; at; at = at.parentElement) {
            const color = getComputedStyle(at).backgroundColor;
            if (channels(color)[3] > 250) return color;
        }
        return "white";
    };
    const texts = [...document.querySelectorAll("body *")].filter((one) =>
        one.getClientRects().length && [...one.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim()));
    const found = texts.map((one) => {
        const style = getComputedStyle(one);
        const [a, b] = [light(channels(one instanceof SVGElement ? style.fill : style.color)), light(channels(ground(one)))];
        return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), `${one.tagName} ${one.getAttribute("class")} ${one.textContent.slice(0, 40)}`];
    });
    return [found.length, found.filter(([contrast]) => contrast < 4.5)];
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast(browser: Browser, folder: Path, theme: str) -> None:
    browser.window(1440, theme=theme)
    facts = network(40)
    facts["summary"].update(warning="Something to mind.")
    browser.open(written(folder, "contrast", facts))
    browser.run("arguments[0].focus()", browser.box("batch_norm 64, stem.norm"))
    browser.keys("Enter")
    browser.run("document.activeElement.blur()")
    number, poor = browser.run(CONTRAST)
    assert number > 150
    assert poor == []
    ground = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", ground)[0]) < 60) == (theme == "dark")

    browser.click("#theme")  # light, whatever the system wants
    assert int(re.findall(r"\d+", browser.run("return getComputedStyle(document.body).backgroundColor"))[0]) > 200
    browser.click("#theme")  # dark
    assert int(re.findall(r"\d+", browser.run("return getComputedStyle(document.body).backgroundColor"))[0]) < 60
    assert browser.run(CONTRAST)[1] == []


def test_decisions_differ_by_more_than_colour(report: Browser) -> None:
    report.click('[aria-label^="Open every module"]')
    signs = {}
    for name in ("removed", "kept", "changed"):
        sign = report.one(f'[data-which="before"] .box .sign.{name}')
        signs[name] = (
            sign.find_element("css selector", "text").text,
            report.run("return arguments[0].firstElementChild.outerHTML", sign),
        )
    assert [letter for letter, _ in signs.values()] == ["R", "K", "W"]
    assert len({outline for _, outline in signs.values()}) == 3
    dashes = {
        name: report.one(f".box.{name} .body").value_of_css_property("stroke-dasharray") for name in ("removed", "kept")
    }
    assert dashes["removed"] != dashes["kept"]


def test_everything_has_a_name_and_a_visible_focus(report: Browser) -> None:
    unnamed = """
        return [...document.querySelectorAll("button, input, select, [role=button], [tabindex='0']")].filter((one) =>
            !(one.getAttribute("aria-label") || one.textContent.trim() || one.title)).map((one) => one.outerHTML);
    """
    assert report.run(unnamed) == []
    report.click('.choice [data-value="both"]')
    stops = report.run("return document.querySelectorAll('.drawing [tabindex=\"0\"]').length")
    assert stops == 2, "each pane is one stop of the tabulator key"
    report.run("document.querySelector('.skip').focus()")
    for _ in range(12):
        report.keys("Tab")
        shown = report.run(
            """
            const one = document.activeElement;
            const style = getComputedStyle(one);
            const body = one.querySelector?.(".body");
            return style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2 || (body && parseFloat(getComputedStyle(body).strokeWidth) >= 4);
            """
        )
        assert shown, report.run("return document.activeElement.outerHTML")


def test_whoever_wants_calm_gets_it(report: Browser) -> None:
    report.click('[aria-label^="Close the innermost"]')
    assert not report.all(".drawing.moving")
    assert report.box("input x").value_of_css_property("transition-duration") in ("0s", "")
    report.window(1440, **{"prefers-reduced-motion": "no-preference"})
    report.click('[aria-label^="Open every module"]')
    assert report.all(".drawing.moving")


def test_a_narrow_window_needs_no_scrolling_sideways(report: Browser) -> None:
    report.window(800)
    wide = report.run("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert wide[0] <= wide[1]
    report.box("stem.conv")
    details = report.one(".details").rect
    assert details["y"] > report.one(".drawing").rect["y"] + 200, "what is selected stands below"


def test_print(report: Browser) -> None:
    facts = network(60)
    before = report.one('[data-which="before"] .stage').get_attribute("transform")
    paper = base64.b64decode(report.command("Page.printToPDF", printBackground=True)["data"])
    assert paper.startswith(b"%PDF")
    assert report.one('[data-which="before"] .stage').get_attribute("transform") == before, "the view comes back"
    assert not report.one('[data-which="before"] .drawing').get_attribute("viewBox")
    report.window(1440, theme="dark")
    report.command("Emulation.setEmulatedMedia", media="print")
    report.run("window.dispatchEvent(new Event('beforeprint'))")
    try:
        assert report.texts(".bar, .toolbar, .hint, .map") == []
        assert len(report.texts("#decisions tbody tr")) == len(facts["decisions"])
        cut = "return [...document.querySelectorAll('.table, .plot .scroll')].filter((one) => one.scrollHeight > one.clientHeight + 2 && getComputedStyle(one).overflow !== 'visible').length"
        assert report.run(cut) == 0
        assert report.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert all(report.run("return [...document.querySelectorAll('details.group')].map((group) => group.open)"))
        assert (
            max(report.run("return [...document.querySelectorAll('.sheet')].map((sheet) => sheet.clientWidth)")) <= 600
        )
        whole = report.run(
            "return [...document.querySelector('.drawing').viewBox.baseVal ? ['x', 'y', 'width', 'height'].map((name) => document.querySelector('.drawing').viewBox.baseVal[name]) : []]"
        )
        content = report.run(
            "const { width, height } = document.querySelector('.stage').getBBox(); return [width, height]"
        )
        assert whole[2] >= content[0]
        assert whole[3] >= content[1]
    finally:
        report.run("window.dispatchEvent(new Event('afterprint'))")
        report.command("Emulation.setEmulatedMedia", media="")
    assert not any(report.run("return [...document.querySelectorAll('details.group')].map((group) => group.open)"))
