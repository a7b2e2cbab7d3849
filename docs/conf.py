"""How Sphinx makes the site: `make site`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from gptj_model import __version__

project = "gptj"
copyright = "the gptj authors"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
# Types are in the signature, and docstrings mark code with single backticks.
default_role = "code"
autodoc_preserve_defaults = True
html_theme = "furo"
html_title = f"gptj {__version__}"
exclude_patterns = ["_site"]
# Every heading can be linked to, as on the pages of a repository.
myst_heading_anchors = 4
nitpicky = True
# Names in signatures that no page of this site describes.
nitpick_ignore_regex = [("py:.*", r".*")]
