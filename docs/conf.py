"""The site: `make site` builds these pages and the reference from the docstrings, and fails on any warning."""

import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import q8lightning  # noqa: E402

project = "q8lightning"
author = "the q8lightning developers"
copyright = "the q8lightning developers, Apache-2.0"
version = release = q8lightning.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["records/*.jsonl"]

# Pages are Markdown as GitHub shows it; headings can be linked to as there.
myst_heading_anchors = 4

# The reference: what the public modules export, with the types of the signatures beside the words of the docstrings.
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"

# Names of other packages have no page here. Those of this one must be in the reference.
nitpicky = True
OTHERS = "torch", "torchmetrics", "lightning", "numpy", "collections", "contextlib", "concurrent", "os", "pathlib"
nitpick_ignore_regex = [("py:.*", rf"({'|'.join(OTHERS)})\b.*")]

# Formulas are MathML, which browsers draw themselves; a page loads nothing from elsewhere.
html_math_renderer = "mathml"


def setup(app: Any) -> None:
    def render(as_block: bool) -> Any:
        def visit(page: Any, node: Any) -> None:
            formula = tex2mathml(node.astext(), as_block=as_block)
            page.body.append(f'<div style="padding: 0.5em 0">{formula}</div>' if as_block else formula)
            raise nodes.SkipNode

        return visit, None

    app.add_html_math_renderer("mathml", render(False), render(True))


html_theme = "furo"
html_title = f"q8lightning {version}"
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
