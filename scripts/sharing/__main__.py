"""Writes the man page and the completion of shells below a directory, as they are below share/ once installed."""

import sys
from pathlib import Path

import completion
import manpage

FILES = {
    "man/man1/nodepass.1": manpage.page,
    "bash-completion/completions/nodepass": lambda: completion.script("bash"),
    "zsh/site-functions/_nodepass": lambda: completion.script("zsh"),
    "fish/vendor_completions.d/nodepass.fish": lambda: completion.script("fish"),
}

(directory,) = map(Path, sys.argv[1:])
for name, make in FILES.items():
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(make())
