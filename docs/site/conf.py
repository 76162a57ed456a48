"""Sphinx's configuration: the documentation site, from the Markdown of docs/ and from docstrings.

    sphinx-build -W --keep-going -c docs/site . OUTPUT

The source directory is the whole checkout, because pages refer to files outside of docs/.
"""

from __future__ import annotations

import warabi

project = "warabifs"
author = "the authors of warabifs"
copyright = author
version = release = warabi.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
root_doc = "docs/site/index"
include_patterns = ["*.md", "docs/**", "examples/README.md", "benchmarks/*.md"]
exclude_patterns = [".venv", "docs/site/_build"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autodoc_inherit_docstrings = False
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"warabifs {release}"
