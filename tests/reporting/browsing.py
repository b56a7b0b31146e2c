"""A headless browser that opens reports from disk."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)

T = TypeVar("T")


def missing() -> str:
    """What keeps the browser from starting here, empty if nothing does."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        return "there is no chromium here; apt-get install chromium chromium-driver brings it"
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "there is no selenium here; the extra named test brings it"
    return ""


@contextmanager
def started(folder: Path) -> Iterator[Browser]:
    """A browser with an empty profile.

    Args:
        folder: where the profile goes.
    """
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (*FLAGS, f"--user-data-dir={folder}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


class Browser:
    """What a reader does, and what the reader sees."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def command(self, name: str, **values: Any) -> Any:
        """A command of the protocol of Chromium's developer tools."""
        return self.driver.execute_cdp_cmd(name, values)

    def window(self, width: int, height: int = 1000, theme: str = "light", **features: str) -> None:
        """Set the size of the window, and what the reader prefers."""
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        wanted = {"prefers-color-scheme": theme, "prefers-reduced-motion": "reduce", **features}
        self.command(
            "Emulation.setEmulatedMedia", features=[{"name": name, "value": value} for name, value in wanted.items()]
        )

    def open(self, path: Path) -> None:
        """Open a report, and wait until all of it is drawn."""
        self.driver.get(path.as_uri())
        self.until(lambda: self.run("return document.documentElement.dataset.state"))

    def run(self, script: str, *values: Any) -> Any:
        return self.driver.execute_script(script, *values)

    def until(self, condition: Callable[[], T], seconds: float = 30) -> T:
        """Wait until something holds.

        Returns:
            What the condition gave.
        """
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, "it did not come about in time"
            time.sleep(0.02)
        return found

    def settled(self) -> None:
        """Wait until no picture is being laid out."""
        self.until(
            lambda: self.run(
                "return [...document.querySelectorAll('.waiting')].every((note) => note.hidden || !note.offsetParent)"
            )
        )

    def all(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements("css selector", selector))

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0]).textContent", selector))

    def texts(self, selector: str) -> list[str]:
        """The texts of all that is seen of a selector."""
        return list(
            self.run(
                "return [...document.querySelectorAll(arguments[0])].filter((one) => one.getClientRects().length).map((one) => one.textContent)",
                selector,
            )
        )

    def click(self, selector: str) -> None:
        self.one(selector).click()
        self.settled()

    def hover(self, element: Any) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).move_to_element(element).perform()

    def keys(self, *keys: str) -> None:
        """Press keys wherever the focus is; names as ``ArrowDown`` or single letters."""
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.keys import Keys

        named = {
            "ArrowDown": Keys.ARROW_DOWN,
            "ArrowUp": Keys.ARROW_UP,
            "ArrowRight": Keys.ARROW_RIGHT,
            "Enter": Keys.ENTER,
            "Tab": Keys.TAB,
            "Escape": Keys.ESCAPE,
            "End": Keys.END,
            "Home": Keys.HOME,
        }
        for key in keys:
            ActionChains(self.driver).send_keys(named.get(key, key)).perform()
        self.settled()

    def focused(self, attribute: str) -> str | None:
        """An attribute of what has the focus."""
        return self.run("return document.activeElement && document.activeElement.getAttribute(arguments[0])", attribute)

    def box(self, label: str, which: str = "before") -> Any:
        """The box whose description contains a text."""
        [found] = self.all(f'.pane[data-which="{which}"] .box[aria-label*="{label}"]')
        return found

    def boxes(self, which: str = "before") -> list[str]:
        """The descriptions of the boxes that are drawn."""
        return list(
            self.run(
                "return [...document.querySelectorAll(`.pane[data-which='${arguments[0]}'] .box`)].map((box) => box.getAttribute('aria-label'))",
                which,
            )
        )

    def errors(self) -> list[str]:
        """What the browser complained about since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]


def browser_or_skip() -> None:
    """Skip a module's tests where no browser can start."""
    if why := missing():
        pytest.skip(why, allow_module_level=True)
