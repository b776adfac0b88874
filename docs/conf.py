"""How Sphinx makes the site of these pages: `make docs`. A page asks for nothing from anywhere, a broken link fails."""

from importlib.metadata import version as installed

project = "manyshot"
author = "the manyshot contributors"
version = release = installed("manyshot")

extensions = ["myst_parser"]
exclude_patterns = ["generate*.py"]
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
