"""The example file: complete, what the command prints, and right in every line."""

import re
from pathlib import Path

import pytest

from nodepass_gevent import options
from nodepass_gevent.errors import ConfigError
from nodepass_gevent.example import EXAMPLES, example_file
from nodepass_gevent.settings import BY_NAME, SETTINGS

FILE = Path(__file__).parent.parent / "docs" / "nodepass.conf"
TEXT = FILE.read_text()
LINES = TEXT.splitlines()
OPTIONS = re.compile("#([a-z0-9-]+) = (.*)")
HEAD = LINES[: LINES.index("#[tunnel web]")]
TOGETHER = {"crt": "key", "key": "crt"}
URLS = ("server://:10101/:8080", "server://:10101/:8080?tls=1", "client://h:10101/h:80")  # one of them has the setting


def parse(tmp_path, text, *argv):
    path = tmp_path / "nodepass.conf"
    path.write_text(text)
    path.chmod(0o600)
    return options.parse(["--config", str(path), *argv], {})


def uncommented(lines, *names):
    return "\n".join(line[1:] if any(line.startswith(f"#{name} = ") for name in names) else line for line in lines)


def test_the_file_that_is_shipped_is_what_the_command_prints():
    assert example_file() == TEXT, "nodepass generate config > docs/nodepass.conf"


def test_the_file_has_every_setting_once():
    assert [match[1] for match in map(OPTIONS.fullmatch, HEAD) if match] == [setting.name for setting in SETTINGS]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_each_setting_has_its_help_its_default_and_its_environment_name(setting):
    number = next(number for number, line in enumerate(HEAD) if line.startswith(f"#{setting.name} = "))
    about = []
    while HEAD[number - 1].startswith("# "):
        number -= 1
        about.insert(0, HEAD[number][2:])
    text = " ".join(about)
    assert text.startswith(f"{setting.name}: {setting.help} Allowed: {setting.allowed}. ")
    assert f" Environment: {setting.env}." in text
    assert ("Only in [nodepass]." in text) == setting.of_process


def test_as_it_is_shipped_it_holds_one_tunnel_that_is_given_and_changes_nothing(tmp_path):
    (config,) = parse(tmp_path, TEXT, URLS[0]).configs
    assert config == options.parse([URLS[0]], {}).configs[0]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_each_line_may_be_uncommented(tmp_path, setting):
    names = [setting.name, *filter(None, [TOGETHER.get(setting.name)])]
    text = uncommented(HEAD, *names)
    assert text.count("\n#") == "\n".join(HEAD).count("\n#") - len(names)
    if setting.name == "url":
        assert parse(tmp_path, text).configs[0].url == EXAMPLES["url"]
        return
    parsed = parse_with_any(tmp_path, text)
    value = (parsed.process if setting.of_process else parsed.configs[0]).value(setting.field)
    assert value == setting.read(EXAMPLES.get(setting.name, setting.default))


def parse_with_any(tmp_path, text):
    """Parse for the first kind of tunnel that has the setting."""
    errors = []
    for url in URLS:
        try:
            return parse(tmp_path, text, url)
        except ConfigError as exc:
            errors.append(exc)
    raise AssertionError(errors)


def test_the_tunnels_of_the_example_parse_too(tmp_path):
    tunnels = "\n".join(line.removeprefix("#") for line in LINES[len(HEAD) :])
    web, ssh = parse(tmp_path, "\n".join([*HEAD, tunnels])).configs
    assert (web.name, web.role, web.tls) == ("web", "server", 1)
    assert (ssh.name, ssh.role, ssh.log, ssh.semaphore_limit) == ("ssh", "client", "warn", 16)


def test_settings_without_a_default_have_an_example_and_no_other_has_one():
    assert set(EXAMPLES) == {setting.name for setting in SETTINGS if setting.default == setting.unset}
    assert set(EXAMPLES) <= set(BY_NAME)
