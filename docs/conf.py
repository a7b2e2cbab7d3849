"""How Sphinx makes the site: `make site`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from gptj_model import __version__

project = "gptj"
copyright = "the gptj authors"
version = release = __version__
extensions = ["myst_parser"]
html_theme = "furo"
html_title = f"gptj {__version__}"
exclude_patterns = ["_site"]
# Every heading can be linked to, as on the pages of a repository.
myst_heading_anchors = 4
nitpicky = True
