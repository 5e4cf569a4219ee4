"""What the documents say is so: commands parse, tables of settings are the settings, the example is a config file."""

import re
import shlex
from pathlib import Path

import pytest

from nodepass_gevent import options
from nodepass_gevent.options import SETTINGS

ROOT = Path(__file__).parent.parent
README, SETTINGS_PAGE = (ROOT / "README.rst").read_text(), (ROOT / "docs" / "settings.rst").read_text()
COMMANDS = sorted(set(re.findall(r'^ +(nodepass "(?:server|client)://[^"]*")', README + SETTINGS_PAGE, re.MULTILINE)))


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


ROWS = [*setting_rows(README), *setting_rows(SETTINGS_PAGE)]


def test_the_readme_shows_commands():
    assert len(COMMANDS) > 8


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_parses(command):
    parsed = options.parse(shlex.split(command)[1:], {})
    assert parsed.action == "run" and not parsed.warnings


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_each_setting_stands_in_one_table_with_its_variable_and_default(setting):
    default = "any free" if setting.name == "data-port" else setting.default.replace("none", "")
    assert [row for row in ROWS if row[0] == setting.name] == [(setting.name, setting.env, default)]


def test_the_tables_hold_nothing_else():
    assert {name for name, _, _ in ROWS} == {setting.name for setting in SETTINGS}


def test_the_example_file_parses(tmp_path):
    text = README.partition("``nodepass --config FILE``::\n")[2].partition("\nOne process runs")[0]
    path = tmp_path / "example.conf"
    path.write_text(re.sub("^    ", "", text, flags=re.MULTILINE))
    (config,) = options.parse(["--config", str(path)], {}).configs
    assert (config.name, config.log, config.tls, config.min_pool_capacity) == ("web", "warn", 1, 32)
