"""How the documentation is built: ``sphinx-build -W docs site``."""

from __future__ import annotations

import sys
from pathlib import Path

from autocompress import __version__

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

project = "autocompress"
author = "the authors of autocompress"
release = version = __version__
extensions = ["generated", "myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"autocompress {__version__}"
html_static_path: list[str] = []
exclude_patterns = ["_build"]
# Notebooks stand here as they were run; the tests run them again.
nb_execution_mode = "off"
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
# Links to files that are no pages lead to the repository, where these are read as well.
suppress_warnings = ["myst.xref_missing"]
