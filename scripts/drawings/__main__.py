"""The pictures of the documentation, as files in a directory."""

import sys
from pathlib import Path

from .pictures import PICTURES

for name, draw in PICTURES.items():
    Path(sys.argv[1], f"{name}.svg").write_text(draw().svg())
