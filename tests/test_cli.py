import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from nodepass_gevent import __version__, cli, command_line
from nodepass_gevent.config import Config
from nodepass_gevent.errors import ConfigError
from nodepass_gevent.tunnel_key import parse_key

URL = "server://:10101/127.0.0.1:8080"


class FakeRole(NamedTuple):
    name: str
    config: Config
    before: object


class Recorder:
    """Stands for what main calls: certificates and the process."""

    def __init__(self):
        self.descriptors = 1 << 20
        self.loaded = []
        self.plan = None  # what the process was to do
        self.load = None  # how it gets another plan
        self.ran = None  # its roles

    def check_files(self, config):
        self.loaded.append((config.crt, config.key))
        if config.crt == "bad":
            raise ConfigError("key: 'k' does not fit the certificate 'bad'")
        if config.ca == "bad":
            raise ConfigError("ca: 'bad' is not a certificate in PEM form")

    def run(self, plan, load, make):
        self.plan, self.load = plan, load
        self.ran = [make(config, None) for config in plan.configs]
        return 7


@pytest.fixture
def world(monkeypatch):
    """Leave main the environment of nobody, and neighbours that only record."""
    recorder = Recorder()
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(cli.check, "check_files", recorder.check_files)
    monkeypatch.setattr(cli, "ROLES", {name: partial(FakeRole, name) for name in cli.ROLES})
    monkeypatch.setattr(cli.process, "run", recorder.run)
    monkeypatch.setattr(cli.descriptors, "allowed", lambda: recorder.descriptors)
    return recorder


def test_a_url_runs_the_service_and_its_exit_code_is_returned(world):
    assert cli.main([URL + "?log=debug"]) == 7
    assert [(role.name, role.config.url) for role in world.ran] == [("server", URL)]
    assert world.plan.log_level == "debug"
    assert world.loaded == [(None, None)]


def test_the_arguments_and_environment_of_the_process_are_the_default(world, monkeypatch):
    monkeypatch.setattr("sys.argv", ["nodepass", URL])
    os.environ["NODEPASS_LOG"] = "error"
    assert cli.main() == 7
    assert world.plan.log_level == "error"


def test_the_log_is_as_detailed_as_any_tunnel_asks_for(world, tmp_path):
    path = tmp_path / "t.ini"
    path.write_text("log = warn\n[tunnel a]\nurl = server://:1/:2?log=debug\n[tunnel b]\nurl = client://h:1/:2\n")
    assert cli.main(["-c", str(path)]) == 7
    assert world.plan.log_level == "debug"
    assert [(role.name, role.config.name) for role in world.ran] == [("server", "a"), ("client", "b")]


def test_limits_that_the_descriptors_do_not_allow_are_lowered_and_told(world):
    world.descriptors = 300
    assert cli.main([URL + "?semaphore-limit=500&protocol=2"]) == 7
    (role,) = world.ran
    assert 4 <= role.config.semaphore_limit < 150
    assert world.plan.warnings[0].startswith("open files: 300 are allowed, and ")
    assert world.plan.warnings[1].startswith(f"lowered: semaphore-limit from 500 to {role.config.semaphore_limit}, ")
    assert world.plan.pipes < 10


def test_pipes_get_what_the_limits_leave(world):
    assert cli.main([URL]) == 7
    assert (1 << 20) / 2 - 4000 < world.plan.pipes < (1 << 20) / 2


def test_too_few_descriptors_are_a_usage_error(world, capsys):
    world.descriptors = 40
    assert cli.main([URL]) == 2
    assert capsys.readouterr().err.startswith("nodepass: error: open files: 40 are allowed")
    assert world.ran is None


def test_warnings_go_to_the_log_of_the_process(world):
    assert cli.main([URL + "?cert=a&key=b&tls=1"]) == 7
    assert world.plan.warnings == ("cert is read as crt, which is its name [from URL query]",)
    assert world.loaded == [("a", "b")]


def test_the_process_can_have_its_plan_made_anew(world, tmp_path):
    path = tmp_path / "t.ini"
    path.write_text("url = server://:1/:2\n")
    assert cli.main(["-c", str(path)]) == 7
    path.write_text("url = server://:1/:3\nlog-to = stderr\n")
    again = world.load()
    assert (again.configs[0].target.port, again.process.log_to) == (3, "stderr")
    path.write_text("url = server://:1/:3\ntls = 7\n")
    with pytest.raises(ConfigError, match="tls: '7'"):
        world.load()


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([URL + "?tls=3"], "nodepass: error: tls: '3' is not one of 0, 1, 2 [from URL query]"),
        (
            [URL + "?zz=3&tls=\n"],
            "nodepass: error: url: character 41 is '\\n'; blanks and control characters are refused",
        ),
        (["stadus"], "nodepass: error: unknown command 'stadus' (did you mean 'status'?)"),
        ([URL, "--show-config", "--log", "x"], "nodepass: error: log: 'x' is not one of"),
        (
            [URL + "?crt=bad&tls=2", "--key", "k"],
            "nodepass: error: key: 'k' does not fit the certificate 'bad' [from URL query, command line]",
        ),
        (
            [URL + "?tls=1", "--ca", "bad"],
            "nodepass: error: ca: 'bad' is not a certificate in PEM form [from command line]",
        ),
        (
            [URL + "?crt=bad&tls=2&key=k"],
            "nodepass: error: key: 'k' does not fit the certificate 'bad' [from URL query]",
        ),
    ],
)
def test_a_wrong_setting_is_one_line_on_stderr_and_exit_code_2(world, capsys, argv, line):
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(line)
    assert err.count("\n") == 1
    assert world.ran is None
    assert world.plan is None


def test_without_arguments_a_short_usage_goes_to_stderr(world, capsys):
    assert cli.main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: nodepass [options] 'server://")
    assert err.endswith("nodepass --help shows all options\n")
    assert err.count("\n") == 11
    assert world.ran is None


def test_what_does_not_run_tunnels_ends_by_a_signal_as_any_program(world):
    kept_back = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, kept_back)  # as the entry point does
    try:
        assert cli.main(["--version"]) == 0
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()).intersection(kept_back)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_a_signal_while_gevent_is_imported_ends_nothing(tmp_path):
    (tmp_path / "gevent.py").write_text(
        "import os, signal\n"
        "for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):\n    os.kill(os.getpid(), number)\n"
        "print('alive', flush=True)\nos._exit(0)\n"
    )
    command = [sys.executable, "-m", "nodepass_gevent"]
    where = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(cli.__file__).parent.parent}"}
    ended = subprocess.run(command, env=os.environ | where, cwd=tmp_path, capture_output=True, timeout=30)
    assert (ended.returncode, ended.stdout) == (0, b"alive\n"), ended.stderr


@pytest.mark.parametrize("option", ["-V", "--version"])
def test_the_version_goes_to_stdout(world, capsys, option):
    assert cli.main([option]) == 0
    assert capsys.readouterr() == (f"nodepass-gevent {__version__}\n", "")


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["config"], "\n#semaphore-limit = 1024\n"),
        (["supervisor", "web", URL], "[program:web]\ncommand="),
        (["supervisor", "web", "server://:101%(process_num)d/:80%(process_num)d", "--numprocs=2"], "numprocs=2\n"),
        (["systemd", "web", URL], "Description=NodePass tunnel web\n"),
        (["systemd-template"], " --config=/etc/nodepass/%i.conf\n"),
    ],
)
def test_what_is_generated_goes_to_stdout(world, capsys, monkeypatch, argv, text):
    monkeypatch.setattr("sys.argv", ["/usr/bin/env"])
    assert cli.main(["generate", *argv]) == 0
    out, err = capsys.readouterr()
    assert text in out and err == ""
    assert ("\ncommand=/usr/bin/env" in out) == (argv[0] == "supervisor")


def test_a_setting_that_cannot_be_generated_is_exit_code_2(world, capsys):
    os.environ["NODEPASS_TLS"] = "1"
    assert cli.main(["generate", "supervisor", "web", URL]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("nodepass: error: tls: the service has another environment; give --tls [from environment")


def test_genkey_prints_another_key_each_time(world, capsys):
    keys = set()
    for _ in range(3):
        assert cli.main(["genkey"]) == 0
        out, err = capsys.readouterr()
        assert out.endswith("\n") and err == ""
        assert not parse_key(out).is_passphrase
        keys.add(out)
    assert len(keys) == 3 and world.ran is None


@pytest.mark.parametrize(("mode", "shown"), [(0o644, "0644"), (0o640, "0640"), (0o600, "")])
def test_genkey_warns_of_a_file_that_others_can_read_and_says_how_to_mend_it(
    world, capsys, tmp_path, monkeypatch, mode, shown
):
    path = tmp_path / "a tunnel.key"
    path.touch()
    path.chmod(mode)
    with path.open("w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        assert cli.main(["genkey"]) == 0
    words = f"the key's file has mode {shown}: others may use it; chmod 600 '{path}' keeps them out"
    assert capsys.readouterr().err == (f"nodepass: warning: {words}\n" if shown else "")
    assert parse_key(path.read_text()) and path.read_text().count("\n") == 1


def test_genkey_does_without_a_standard_output(world, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["genkey"]) == 0
    assert capsys.readouterr().err == ""


def test_a_key_file_that_cannot_be_used_is_refused_before_anything_runs(world, capsys, tmp_path):
    path = tmp_path / "tunnel.key"
    path.write_text("s3cret s3cret s3cret")
    path.chmod(0o644)
    assert cli.main([f"{URL}?tls=1&tunnel-key-file={path}"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"nodepass: error: tunnel-key-file: '{path}' has mode 0644: others may use it; chmod 600")
    assert (out, err.count("\n"), world.ran) == ("", 1, None) and "s3cret" not in err
    path.chmod(0o600)
    assert cli.main([f"{URL}?tls=1&tunnel-key-file={path}"]) == 7


def test_a_credential_of_systemd_is_named_whole(world, capsys):
    path = "/run/credentials/nodepass@web.service/no.key"
    assert cli.main([f"{URL}?tls=1&tunnel-key-file={path.replace('@', '%40')}"]) == 2
    assert capsys.readouterr().err.startswith(f"nodepass: error: tunnel-key-file: '{path}' cannot be read: no such")
    assert cli.main([f"{URL}?tls=0&tunnel-key-file={path}"]) == 2
    assert capsys.readouterr().err.startswith(f"nodepass: error: tunnel-key-file: '{path}' needs tls=1 or tls=2")


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_the_help_goes_to_stdout(world, capsys, option):
    assert cli.main([option]) == 0
    assert capsys.readouterr() == (command_line.build_parser().format_help(), "")


def test_the_configuration_goes_to_stdout_and_nothing_runs(world, capsys):
    assert cli.main(["--show-config", URL + "?tls=1&crt=bad&key=k"]) == 0
    out, err = capsys.readouterr()
    assert "tls = 1                                  # URL query\n" in out
    assert err == ""
    assert world.ran is None


def test_a_port_that_is_asked_for_twice_is_refused_at_the_start_and_by_a_reload(world, tmp_path, capsys):
    path = tmp_path / "t.conf"
    path.write_text("[tunnel a]\nurl = server://0.0.0.0:1/:2\n[tunnel b]\nurl = server://:3/127.0.0.1:1\n")
    text = "public port, TCP of [b]: 127.0.0.1:1 is asked for twice; first as the tunnel port of [a], 0.0.0.0:1"
    text += f" [from file {path}:4]"
    assert cli.main(["-c", str(path)]) == 2
    assert capsys.readouterr() == ("", f"nodepass: error: {text}\n") and world.ran is None
    twice = path.read_text()
    path.write_text(twice.replace(":1/", ":4/"))
    assert cli.main(["-c", str(path)]) == 7
    path.write_text(twice)
    with pytest.raises(ConfigError) as caught:
        world.load()
    assert str(caught.value) == text


def test_an_interrupt_while_the_settings_are_read_is_exit_code_130(world, monkeypatch, capsys):
    def interrupted(argv, environ):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.options, "parse", interrupted)
    assert cli.main([URL]) == 130
    assert capsys.readouterr() == ("", "")


def test_check_prints_what_it_found_and_ends_with_2_for_an_error(world, capsys):
    assert cli.main(["check", "client://127.0.0.1:1/127.0.0.1:2"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("ok       settings of client://127.0.0.1:1/127.0.0.1:2\n") and err == ""
    assert cli.main(["check", "--json", "client://127.0.0.1:1/127.0.0.1:2", "--tls", "9"]) == 2
    assert '"ok": false' in capsys.readouterr().out
    assert world.ran is None


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([URL, "check"], "unknown option or argument 'check'"),
        (["--log", "info", "check"], "check: a command stands first"),
        (["genkey", "x"], "genkey is followed by nothing"),
        (["--json", URL], "unknown option or argument '--json'"),
        (["--only", "web", URL], "only: no tunnel is called 'web'; there is no [tunnel NAME] section"),
    ],
)
def test_a_command_or_its_option_out_of_place_is_refused(world, capsys, argv, line):
    assert cli.main(argv) == 2
    assert capsys.readouterr().err.startswith(f"nodepass: error: {line}")
    assert world.ran is None


@pytest.mark.parametrize(
    "command",
    ["--help", "genkey", "generate config", "check client://127.0.0.1:1/127.0.0.1:2", "health --status=127.0.0.1:1"],
)
@pytest.mark.parametrize("full", [True, False], ids=["full disk", "closed pipe"])
def test_what_cannot_be_printed_ends_a_command_without_a_traceback(command, full):
    argv = [sys.executable, "-m", "nodepass_gevent", *command.split()]
    reader, writer = os.pipe()
    os.closerange(reader, reader + 1)  # gevent's own close may come after the command has ended
    with open("/dev/full", "wb") as disk, open(writer, "wb") as pipe:
        to = disk if full else pipe
        done = subprocess.run(argv, stdout=to, stderr=subprocess.PIPE, text=True, timeout=60)
    said = "nodepass: error: standard output: no space left on device\n" if full else ""
    assert (done.returncode, done.stderr) == (1, said)


def test_a_watched_status_does_without_a_standard_output():
    argv = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-m", "nodepass_gevent"]
    with subprocess.Popen([*argv, "status", "--watch", "--status=127.0.0.1:1"], stderr=subprocess.PIPE) as watching:
        assert watching.stderr.readline().startswith(b"nodepass: error: 127.0.0.1:1: connection refused; ")
        watching.terminate()
        assert watching.wait(timeout=60) == 1


def test_what_the_encoding_of_the_output_lacks_is_an_error_in_one_line():
    argv = [sys.executable, "-m", "nodepass_gevent", "--show-config", URL, "--log-to=/tmp/\u2026"]
    environ = os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch("nodepass: error: standard output: 'latin-1' codec can't encode .*\n", done.stderr)


@pytest.mark.parametrize("key", ["log-to", "crt", "tunnel-key-file", "status-token-file"])
def test_a_file_whose_name_the_locale_cannot_write_is_an_error_in_one_line(tmp_path, key):
    config = tmp_path / "nodepass.conf"
    config.write_text(f"url = {URL}\n{key} = /tmp/h\u00f6me/file\n", encoding="utf-8")
    environ = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    argv = [sys.executable, "-m", "nodepass_gevent", f"--config={config}"]
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        f"nodepass: error: {key}: '/tmp/h\\xf6me/file' is no name of a file in this locale, whose encoding is ascii; "
        f"LC_ALL=C.UTF-8 has all letters [from file {config}:2]\n",
    )
