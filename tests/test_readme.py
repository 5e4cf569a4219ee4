"""What README.rst says is so: its commands parse, its table is the table of settings, its file is a config file."""

import re
import shlex
from pathlib import Path

import pytest

from nodepass_gevent import options
from nodepass_gevent.options import SETTINGS

README = (Path(__file__).parent.parent / "README.rst").read_text()
COMMANDS = sorted(set(re.findall(r'^ +(nodepass "(?:server|client)://[^"]*")', README, re.MULTILINE)))
ROWS = {line.split()[0]: line for line in README.splitlines() if re.match(r"[a-z][a-z-]+ +[A-Z_]+  ", line)}


def test_the_readme_shows_commands():
    assert len(COMMANDS) > 8


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_parses(command):
    parsed = options.parse(shlex.split(command)[1:], {})
    assert parsed.action == "run" and not parsed.warnings


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_each_setting_stands_in_the_table_with_its_variable_and_default(setting):
    row = ROWS[setting.name]
    assert row[19:43].strip() == setting.env
    assert row[43:53].strip() == ("any free" if setting.name == "data-port" else setting.default.replace("none", ""))


def test_the_table_holds_nothing_else():
    assert set(ROWS) == {setting.name for setting in SETTINGS}


def test_the_example_file_parses(tmp_path):
    text = README.partition("``nodepass --config FILE``::\n")[2].partition("\nA wrong value")[0]
    path = tmp_path / "example.conf"
    path.write_text(re.sub("^    ", "", text, flags=re.MULTILINE))
    (config,) = options.parse(["--config", str(path)], {}).configs
    assert (config.name, config.log, config.tls, config.min_pool_capacity) == ("web", "warn", 1, 32)
