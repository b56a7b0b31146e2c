"""The documentation as a site: ``make docs`` builds it, and stops at any link that leads nowhere.

The pages are written to be read as files, too. A link to what is no page (a file of the source, a folder) leads nowhere
on the site, and becomes its name.
"""

from __future__ import annotations

import posixpath
import re
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

project = "bnfuse"
author = "bnfuse contributors"
release = version = version_of("bnfuse")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["census/*.md"]  # a part of the page of the census
myst_heading_anchors = 4
highlight_language = "none"  # blocks that name no language are output

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # else the fields of a dataclass are there twice
default_role = "py:obj"

html_theme = "furo"
html_title = "bnfuse"
html_static_path = ["static"]
html_css_files = ["extra.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

CONTENTS = {
    "Use": (
        *("Start <self>", "recipes", "report", "production", "restructuring", "command-line", "Promise <promise>"),
        *("extending", "api"),
    ),
    "How it works": ("how-it-works", "Removals <removals>", "Operators <operators>", "Reasons <reasons>"),
    "Measured": ("census", "beside", "speed", "precision", "adversary"),
    "The project": ("contributing", "changelog"),
}
"""The pages, in the order of the menu; one that is missing here stops the build."""

_LINK = re.compile(
    r"^```.*?^```$|`[^`\n]+`|\[(?P<words>[^\]]*)\]\((?P<target>(?!https?:|#)[^)#\s]+)(?:#[^)\s]*)?\)",
    re.DOTALL | re.MULTILINE,
)
"""Code, which is left alone, or a link to a file."""


def linked(text: str) -> str:
    """The text of a page with the names of files in the place of links to what is no page."""

    def replaced(found: re.Match[str]) -> str:
        words, target = found["words"], found["target"]
        if target is None:
            return re.sub(r"\n\n+```$", "\n```", found[0])  # an empty line ends the output of an example
        if target.endswith((".md", ".png")) or not (ROOT / "docs" / target).exists():
            return found[0]  # what leads nowhere stops the build
        path = posixpath.normpath(posixpath.join("docs", target))
        return words if "`" in words else f"{words} (`{path}`)"

    return _LINK.sub(replaced, text)


def _read(app: Any, name: str, source: list[str]) -> None:
    source[0] = linked(source[0])
    if name == "index":
        for caption, pages in CONTENTS.items():
            source[0] += "\n```{toctree}\n" + f":hidden:\n:caption: {caption}\n\n" + "\n".join(pages) + "\n```\n"


def setup(app: Any) -> None:
    """What Sphinx calls."""
    app.connect("source-read", _read)
