"""Configuration of Sphinx: the pages are Markdown, the reference is made of docstrings, every warning is an error."""

import re
from importlib.metadata import version as version_of
from typing import Any

project = "attnplan"
version = release = version_of("attnplan")
author = "the authors of attnplan"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "README.md"]
html_theme = "alabaster"
html_theme_options = {
    "description": "A compiler for attention",
    "fixed_sidebar": True,
    "page_width": "1080px",
    "sidebar_width": "230px",
    "font_family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif",
    "code_font_family": "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace",
}
html_sidebars = {"**": ["about.html", "searchfield.html", "navigation.html"]}
html_show_sourcelink = False
html_copy_source = False
pygments_style = "friendly"

myst_heading_anchors = 4
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = False
napoleon_numpy_docstring = True
napoleon_use_rtype = False
add_module_names = False


def without_links_out(app: Any, name: str, source: list[str]) -> None:
    """Leave of links that lead out of this folder their text: the site does not hold what they lead to."""
    source[0] = re.sub(r"\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", source[0])


def setup(app: Any) -> None:
    """Connect to Sphinx."""
    app.connect("source-read", without_links_out)
