"""How Sphinx makes the site of these pages: `make docs`. A page asks for nothing from anywhere, a broken link fails."""

import re
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

project = "manyshot"
author = "the manyshot contributors"
version = release = installed("manyshot")

extensions = ["myst_parser"]
# a study's tables are parts of its report
exclude_patterns = ["generate*.py", "**/tables"]
highlight_language = "text"  # of blocks that name none: commands, formulas, trees
myst_heading_anchors = 3
myst_fence_as_directive: list[str] = []
# a formula's underscores and a path's dots are what they look like
smartquotes = False

html_theme = "furo"
html_title = "manyshot"
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True, "footer_icons": []}

LINK = re.compile(r"\[([^\]]+)\]\(([\w./-]+)\)")


def name_folders(app: Any, name: str, source: list[str]) -> None:
    """A link to a folder, which leads somewhere in the repository, is its name alone: a site has no listings."""
    here = (Path(app.srcdir) / name).parent
    source[0] = LINK.sub(lambda link: link[1] if (here / link[2]).is_dir() else link[0], source[0])


def setup(app: Any) -> None:
    app.connect("source-read", name_folders)
