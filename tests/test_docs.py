import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nodepass_gevent import options

ROOT = Path(__file__).resolve().parents[1]
DOCS, PACKAGE = ROOT / "docs", ROOT / "nodepass_gevent"
PAGES = sorted(path for path in DOCS.rglob("*.rst"))


def literal_blocks(text, opening):
    """Give the indented blocks behind lines that match `opening`, without their indentation and directive options."""
    for match in re.finditer(rf"{opening}\n\n((?:(?:    .*)?\n)+)", text):
        yield re.sub("^    ", "", match[1], flags=re.MULTILINE).strip("\n")


def commands_of(page):
    """Give the calls of nodepass, lines that end in a backslash joined."""
    for block in literal_blocks(page.read_text(), "(?:.*::|.. code-block:: sh)"):
        for line in block.replace("\\\n", " ").splitlines():
            if match := re.search(r"(?:^|\()(?:[A-Z_]+=\S+ )*nodepass .*", line):
                command = match[0].partition(" > ")[0].partition("  #")[0]
                yield command[1:].partition(")")[0] if command.startswith("(") else command


COMMANDS = [(page.name, command) for page in PAGES for command in commands_of(page)]
FILES = [(page.name, block) for page in PAGES for block in literal_blocks(page.read_text(), r"\.\. code-block:: ini")]


def test_the_pages_show_commands_and_files():
    assert len(COMMANDS) > 25 and len(FILES) >= 4


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_each_command_parses(page, command, tmp_path):
    words = shlex.split(command)
    environ = dict(word.split("=", 1) for word in words[: words.index("nodepass")])
    argv = words[words.index("nodepass") + 1 :]
    for number, word in enumerate(argv):
        if word.startswith("/etc/nodepass") and argv[number - 1] == "--config":
            argv[number] = str(tmp_path / "t.conf")
            text = "[tunnel {}]\nurl = server://:10101/:8080\n"
            (tmp_path / "t.conf").write_text(text.format("web") + text.format("production"))
    warnings = options.parse(argv, environ).warnings
    assert not warnings


@pytest.mark.parametrize(("page", "text"), FILES)
def test_each_config_file_parses(page, text, tmp_path):
    path = tmp_path / "t.conf"
    path.write_text(text)
    parsed = options.parse(["--config", str(path)], {})
    assert parsed.configs and not parsed.warnings


def test_the_pages_build_without_a_warning(tmp_path):
    argv = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "index.html").exists()


@pytest.mark.parametrize("module", sorted(path.stem for path in PACKAGE.glob("[a-z]*.py")))
def test_each_module_stands_on_the_page_about_the_code(module):
    assert re.search(rf"\b{module}\b", (DOCS / "internals.rst").read_text())
