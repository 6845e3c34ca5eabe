"""How `make docs` makes the API page from the docstrings."""

import re
from typing import Any

project = "triton_instance_loss"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "api"
include_patterns = ["api.rst"]  # the other pages are Markdown, to be read where they lie
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
