"""The documentation says what is: commands parse, tables are the settings, messages are the program's, pages build.

That commands do what is said of them shows tests/integration/test_doc_commands.py.
"""

import ast
import functools
import importlib
import os
import re
import shutil
import subprocess
import sys

import docutils.core
import pages
import pytest
from pages import DOCS, PAGES, README, ROOT

from nodepass_gevent import options
from nodepass_gevent.settings import SETTINGS

PACKAGE = ROOT / "nodepass_gevent"
INTERNALS = (DOCS / "internals.rst").read_text()
URLS = sorted({url for page in PAGES for url in re.findall(r'"((?:server|client)://[^"$]*)"', page.read_text())})
FILES = [(pages.name(page), block.text) for page in PAGES for block in pages.blocks(page) if block.language == "ini"]


def test_the_pages_show_commands_and_files():
    assert sum(len(pages.commands(page)) for page in PAGES) > 100 and len(URLS) > 25 and len(FILES) >= 7


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 165


@pytest.mark.parametrize("url", URLS)
def test_each_url_parses_without_a_warning(url):
    url = url.replace("%(process_num)02d", "01")
    assert not options.parse([url], {}).warnings


@pytest.mark.parametrize(("page", "text"), FILES)
def test_each_config_file_parses(page, text, tmp_path):
    path = tmp_path / "t.conf"
    path.write_text(text)
    parsed = options.parse(["--config", str(path)], {})
    assert parsed.configs and not parsed.warnings


# settings


def setting_rows(text):
    """Yield name, variable and default of each row in the tables of settings."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if re.match("name +environment +default ", line):
            columns = [match.span() for match in re.finditer("=+", lines[number - 1])]
            for row in lines[number + 2 :]:
                if row.startswith("="):
                    break
                if not row.startswith(" "):
                    yield tuple(row[start:end].strip() for start, end in columns[:3])


ROWS = [*setting_rows((DOCS / "settings.rst").read_text())]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_each_setting_stands_in_one_table_with_its_variable_and_default(setting):
    default = "any free" if setting.name == "data-port" else setting.default.replace("none", "")
    assert [row for row in ROWS if row[0] == setting.name] == [(setting.name, setting.env, default)]


def test_the_tables_hold_nothing_else():
    assert {name for name, _, _ in ROWS} == {setting.name for setting in SETTINGS}


# messages

TROUBLE = " ".join((DOCS / "troubleshooting.rst").read_text().split())
TERMS = re.findall(r"^``.*``$", (DOCS / "troubleshooting.rst").read_text().partition("By message")[2], re.MULTILINE)
SAID_ELSEWHERE = {  # what needs no word of its own, and why
    "%s: %s%s": "by its reason, of either side",
    "%s: unexpected error": "as unexpected error",
    "refused %s": "by who is refused, and why",
    "exchange %s: %s %s -> %s: %s after %.3f s, %s": "the access line, in logs.rst",
    "%s": "a message made elsewhere",
    "status: unexpected error: %r": "as unexpected error",
}


def literal(node):
    """Give the words of a string in the code, each value in it as %s; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "%s" for part in node.values)
    return None


def messages():
    """Yield what the program may say at WARNING and above, and why it refuses a peer."""
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("warning", "error", "critical", "exception", "PolicyError", "KeyMismatch", "RefusedByPeer"):
                yield literal(node.args[0])
            elif called == "log" and len(node.args) > 1:
                yield literal(node.args[1])
            elif called == "append" and getattr(node.func.value, "id", "") == "warnings":  # of settings
                yield literal(node.args[0])


MESSAGES = sorted(set(filter(None, messages())))


def test_the_messages_are_found():
    assert len(MESSAGES) > 35


@pytest.mark.parametrize("message", [message for message in MESSAGES if message not in SAID_ELSEWHERE])
def test_each_warning_and_error_stands_on_the_page_about_trouble(message):
    pieces = re.split(r"%(?:\.\d)?[a-z]| \[from ", message)
    assert max(pieces, key=len).strip(" :;,()") in TROUBLE


def test_no_message_is_excused_that_is_not_said():
    assert set(SAID_ELSEWHERE) <= set(MESSAGES)


@pytest.mark.parametrize("term", TERMS)
def test_each_message_on_that_page_is_one_of_the_program(term):
    code = "\n".join(re.sub(r'"\n\s+f?"', "", path.read_text()) for path in PACKAGE.glob("*.py"))
    for message in re.findall("``(.*?)``", term):
        pieces = [
            piece.strip() for piece in re.split("[…:;,]|refused ", message)
        ]  # who, with what, why: one after another
        assert any(piece.removeprefix("log lines ") in code for piece in pieces if len(piece) > 5)


# the README in Chinese


def without_comments(page):
    """Give the commands of a page, what is behind ``#`` left out."""
    return [command.partition("  #")[0].strip() for command in pages.commands(page)]


def test_the_chinese_readme_has_the_commands_of_the_english_one():
    assert without_comments(pages.CHINESE) == without_comments(README)


def test_the_chinese_readme_names_the_settings_files_and_pages_of_the_english_one():
    for pattern in (r"``(.*?)``", r"\b[a-z]+(?:-[a-z]+)*=[\w.:]+", r"([\w-]+\.rst)>`_"):
        here, there = (set(re.findall(pattern, page.read_text())) for page in (pages.CHINESE, README))
        assert here - {"README.rst"} == there - {"README.zh-CN.rst", "zh-CN.rst"}


def test_the_chinese_comparison_has_the_cells_of_the_english_one():
    numbers = [
        re.findall(r"\d[\d.,]+\d|PROXY|mTLS|Noise|HAProxy|Prometheus", page.read_text())
        for page in (pages.CHINESE, README)
    ]
    assert sorted(numbers[0]) == sorted(numbers[1])


# pages, pictures, rules


def test_the_pages_build_without_a_warning(tmp_path):
    argv = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "index.html").exists()


@pytest.mark.parametrize("page", [README, pages.CHINESE], ids=pages.name)
def test_each_file_that_the_readme_names_is_there(page):
    names = re.findall(r"<([\w./-]+)>`_|image:: (\S+)", page.read_text())
    assert len(names) > 15
    for link, image in names:
        assert (page.parent / (link or image)).exists()


@pytest.mark.parametrize("page", [README, pages.CHINESE], ids=pages.name)
def test_the_readme_is_plain_restructured_text(page):
    docutils.core.publish_doctree(page.read_text(), settings_overrides={"halt_level": 2})  # without Sphinx, as GitHub


@pytest.mark.parametrize("module", sorted(path.stem for path in PACKAGE.glob("[a-z]*.py")))
def test_each_module_stands_on_the_page_about_the_code(module):
    assert re.search(rf"\b{module}\b", INTERNALS)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"``(\w+\.\w+(?:\.\w+)*)``", INTERNALS))))
def test_each_name_on_that_page_is_one_of_the_code(name):
    module, *names = name.split(".")
    if names not in (["rst"], ["cfg"]):
        assert functools.reduce(getattr, names, importlib.import_module(f"nodepass_gevent.{module}"))


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\b(?:docs|scripts|tests)/[\w./-]*\w", INTERNALS))))
def test_each_file_on_that_page_is_there(path):
    assert (ROOT / path).exists()


def test_the_pictures_are_those_that_the_script_draws(tmp_path):
    subprocess.run([ROOT / "scripts" / "pictures", tmp_path], check=True, timeout=60)
    drawn = sorted(tmp_path.glob("*.svg"))
    assert len(drawn) == 4
    for picture in drawn:
        assert picture.read_text() == (DOCS / picture.name).read_text(), "scripts/pictures"


@pytest.mark.parametrize("words", [("check", "rules", "docs/alerts.yml"), ("test", "rules", "tests/alerts_test.yml")])
def test_the_rules_for_alerts_fire_when_they_should(words):
    promtool = shutil.which("promtool")
    if promtool is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("promtool is not installed")
    done = subprocess.run([promtool, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
