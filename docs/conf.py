"""Sphinx's configuration. ``make docs`` builds the site in build/docs; warnings are errors."""

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import seqaccel

project = "seqaccel"
release = seqaccel.__version__
copyright = "the seqaccel authors. Licence: Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["requirements.txt"]
suppress_warnings = ["config.cache"]

myst_heading_anchors = 3

add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say what each argument is
napoleon_custom_sections = ["Shapes"]

html_theme = "furo"
html_title = f"seqaccel {release}"
html_math_renderer = "mathml"
html_static_path = ["static"]
html_css_files = ["site.css"]


def _math(writer, node):
    """An equation as MathML, which browsers draw themselves: the site needs no network."""
    writer.body.append(tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (_math, None), (_math, None))
