"""Sphinx: `sphinx-build -W -b html docs build/html`."""

import re
from pathlib import Path

project = "nodepass-gevent"
copyright = "nodepass-gevent contributors"
version = release = re.search(
    r'__version__ = "(.+)"', Path(__file__).parent.with_name("nodepass_gevent").joinpath("__init__.py").read_text()
)[1]
highlight_language = "sh"  # what stands behind :: is for the shell
html_theme = "furo"
html_title = f"nodepass-gevent {version}"
exclude_patterns = ["performance-*.rst", "README.*.rst"]  # parts of performance.rst; the README in other languages
nitpicky = True
