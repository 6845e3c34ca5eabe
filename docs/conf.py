"""How `make docs` makes the site: the pages as they lie here, and the API from docstrings."""

import re
from typing import Any

import triton_instance_loss

project = "triton_instance_loss"
release = version = triton_instance_loss.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"triton instance loss {version}"
html_show_copyright = False
myst_heading_anchors = 3  # links to headings, as GitHub makes them
default_role = "code"  # `name`, as the docstrings write it
napoleon_custom_sections = ["Source"]
autodoc_typehints = "none"  # signatures hold them
html_show_sourcelink = False
html_copy_source = False


def _plain(app: Any, what: str, name: str, about: Any, options: Any, lines: list[str]) -> None:
    """A star or a bar in our docstrings is mathematics or Python, and no markup."""
    for number, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            lines[number] = re.sub(r"(`[^`]*`)|([*|])", lambda found: found[1] or "\\" + found[2], line)


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _plain, priority=400)  # before Google's sections become markup
