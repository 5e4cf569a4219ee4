"""The pages of the documentation as tests read them: their blocks, and the commands in these.

A `::` block holds shell commands. Everything else that is set apart is a `code-block` of its language; an `ini` one is
a file of ours, whose first line may be a comment with its path.
"""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS, README, CHINESE = ROOT / "docs", ROOT / "README.rst", ROOT / "docs" / "README.zh-CN.rst"
PAGES = [README, *sorted(path for path in DOCS.rglob("*.rst") if path != CHINESE)]
_OPENING = r"^(?!\.\. (?!code))(?:.*::|\.\. code-block:: (\w+))\n"
_BLOCK = re.compile(_OPENING + r"\n((?:(?:    .*)?\n)+)", re.MULTILINE)
_SHELL = "sh"


@dataclass(frozen=True)
class Block:
    """What a page sets apart."""

    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """The commands of a block of shell, one per logical line."""
        lines = self.text.replace("\\\n", " ").splitlines() if self.language == _SHELL else []
        return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def blocks(page: Path) -> list[Block]:
    """Read the blocks of a page, in order."""
    found = _BLOCK.findall(page.read_text() + "\n")
    return [Block(language or _SHELL, textwrap.dedent(text).strip("\n")) for language, text in found]


def commands(page: Path) -> list[str]:
    """Read the commands of a page, in order."""
    return [command for block in blocks(page) for command in block.commands]


def name(page: Path) -> str:
    """Name a page as an author does."""
    return str(page.relative_to(ROOT))
