"""Builds the site: `make docs`. The pages are Markdown, and read well on a code-hosting page too."""

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from docstrings import setup  # noqa: E402, F401 (Sphinx calls it)
from example_pages import write_examples  # noqa: E402

project = "torchreg"
author = "torchreg maintainers"
project_copyright = author
version = release = re.search(r'__version__ = "(.+?)"', (HERE.parent / "torchreg/__init__.py").read_text())[1]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
    "mathml",
]
exclude_patterns = ["_build", "_examples", "gallery"]
myst_heading_anchors = 3
default_role = "py:obj"  # `name` in a docstring links to it if it is on a page, and is code otherwise

nitpicky = True  # a name in capitals that is on no page is an error
nitpick_ignore_regex = [
    ("py:.*", r"(torch|nn|sklearn|matplotlib)\..*"),  # looking up others' names would take a network
    ("py:obj", r"[a-z]\w*(=.+)?|copy_X|Xy|\w+\.\w+_"),  # parameters and attributes
    ("py:obj", r"torchreg(\.[a-z_]+)+"),  # modules
]

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False  # what every penalty or optimizer can do is said once, with the base class
autodoc_typehints = "none"  # the docstrings say what arguments are, with units
napoleon_use_ivar = True
napoleon_use_rtype = False

html_math_renderer = "mathml"
html_theme = "furo"
html_title = "torchreg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"light_css_variables": {"code-font-size": "0.78em"}, "dark_css_variables": {}}
html_copy_source = False
html_show_sphinx = False
pygments_style = "friendly"

write_examples(HERE.parent / "examples", HERE / "_examples")
sphinx_gallery_conf = {
    "examples_dirs": ["gallery", "_examples"],
    "gallery_dirs": ["auto_gallery", "auto_examples"],
    "filename_pattern": r"plot_\w+\.py$",  # the others, which train networks or need data, are shown and not run
    "ignore_pattern": r"__init__\.py",
    "download_all_examples": False,
    "show_memory": False,
    "min_reported_time": 60,
    "within_subsection_order": "FileNameSortKey",
}
