"""Pictures of reports, to be looked at: wide and narrow, light and dark.

    python tests/reporting/screenshots.py FOLDER REPORT.html...

For each report: the whole page (FOLDER/NAME-1440-light.png, ...), the window with the picture while a norm is lit
(NAME-1440-light-network.png, ...), and its beginning for whoever has not seen one (NAME-report.png).
"""

from __future__ import annotations

import base64
import sys
import tempfile
from pathlib import Path

from browsing import Browser, started

WIDTHS = (1440, 800)
THEMES = ("light", "dark")


def picture(browser: Browser, path: Path, whole: bool) -> None:
    """Write what is seen, or all of the page."""
    data = browser.command("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
    path.write_bytes(base64.b64decode(data))


def main(folder: Path, reports: list[Path]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile, started(Path(profile)) as browser:
        for report in reports:
            for width in WIDTHS:
                for theme in THEMES:
                    browser.window(width, theme=theme)
                    name = f"{report.stem}-{width}-{theme}"
                    browser.open(report)
                    for norm in browser.all('[data-which="before"] .box.removed')[:1]:
                        norm.click()
                        browser.hover(norm)
                    browser.run("document.querySelector('#network').scrollIntoView()")
                    picture(browser, folder / f"{name}-network.png", whole=False)
                    browser.open(report)
                    picture(browser, folder / f"{name}.png", whole=True)
            browser.window(1440, 1440)
            browser.open(report)
            browser.click('.choice [data-value="both"]')
            for norm in browser.all('[data-which="before"] .box.removed')[:1]:
                browser.run("arguments[0].dispatchEvent(new MouseEvent('click', { bubbles: true }))", norm)
                browser.hover(norm)
            browser.run("scroll(0, 0); window.dispatchEvent(new Event('scroll'))")  # the words beside the norm go
            picture(browser, folder / f"{report.stem}-report.png", whole=False)
            print(report.stem, *browser.errors())


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
