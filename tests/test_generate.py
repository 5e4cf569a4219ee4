import configparser
import dataclasses
import math
import os
import re
import shlex
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from integration.programs import require

from nodepass_gevent import generate, options
from nodepass_gevent.errors import ConfigError
from nodepass_gevent.generate import OwnCommand, own_command, supervisor_word, systemd_word

SERVER, CLIENT = "server://0.0.0.0:10101/0.0.0.0:8080", "client://server.example.com:10101/127.0.0.1:80"
EACH_ITS_PORTS = "server://0.0.0.0:101%(process_num)02d/0.0.0.0:80%(process_num)02d?tls=1"
COMMAND = OwnCommand(("/opt/nodepass/bin/nodepass",))
PRINTABLE = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FFF).filter(str.isprintable))
MOST_EXPOSED = 2.0  # as docs/operations.rst has it; 10 is the worst


def supervisor(*words, command=COMMAND):
    argv = ["generate", "supervisor", *words]
    return generate.supervisor(options.parse(argv, {}), argv, command)


def section(*words, **options):
    """Generate a program section, and read it as supervisord does."""
    parser = configparser.RawConfigParser(inline_comment_prefixes=(";", "#"), strict=False)
    parser.read_string(supervisor(*words, **options))
    (name,) = parser.sections()
    return dict(parser[name], section=name)


def command_of(section, number=0):
    """Read a command as supervisord does."""
    return shlex.split(section["command"] % {"process_num": number, "program_name": "web"})


def systemd(*words, command=COMMAND):
    return generate.systemd(options.parse(["generate", "systemd", *words], {}), command)


def refusal(make, *words, **options):
    with pytest.raises(ConfigError) as caught:
        make(*words, **options)
    return str(caught.value)


# supervisord


def test_a_program_section_runs_the_tunnel_and_is_stopped_after_the_drain():
    program = section("web", f"{SERVER}?tls=1&log=debug", "--shutdown-timeout", "1500ms")
    assert program["section"] == "program:web"
    assert command_of(program) == [*COMMAND.words, "--shutdown-timeout=1500ms", f"{SERVER}?tls=1&log=debug"]
    wanted = {
        "autostart": "true",
        "autorestart": "unexpected",
        "exitcodes": "2",
        "stopsignal": "TERM",
        "stopwaitsecs": str(math.ceil(1.5) + 5),
        "redirect_stderr": "true",
        "stdout_logfile": "/var/log/nodepass-web.log",
        "stdout_logfile_maxbytes": "20MB",
    }
    assert {key: program[key] for key in wanted} == wanted
    assert not {"numprocs", "process_name", "directory", "user"} & program.keys()


@pytest.mark.parametrize(
    ("setting", "stop_s"),
    [([], 10), (["--shutdown-timeout=0"], 5), (["--shutdown-timeout=1m", "--drain-linger=10s"], 73)],
)
def test_the_time_to_stop_is_above_the_drain(setting, stop_s):
    assert section("web", SERVER, *setting)["stopwaitsecs"] == str(stop_s)


def test_percent_semicolon_and_blank_come_back_as_they_were():
    url = f"{SERVER}?tls=1&crt=/a%20b;c%25d&key=/k;'\"$"
    program = section("web", url, "--ca", "/x ;y #z")
    assert command_of(program) == [*COMMAND.words, "--ca=/x ;y #z", url]


@given(PRINTABLE)
def test_any_word_comes_back_from_the_parsers_of_supervisord(word):
    text = f"[program:x]\ncommand=/bin/nodepass {supervisor_word(word)} 'last'\n"
    parser = configparser.RawConfigParser(inline_comment_prefixes=(";", "#"), strict=False)
    parser.read_string(text)
    expanded = parser["program:x"]["command"] % {"process_num": 7}
    assert shlex.split(expanded) == ["/bin/nodepass", word, "last"]


def test_processes_have_ports_and_logs_by_their_number():
    program = section("web", EACH_ITS_PORTS, "--numprocs", "3")
    assert (program["numprocs"], program["process_name"]) == ("3", "%(program_name)s_%(process_num)02d")
    assert program["stdout_logfile"] == "/var/log/nodepass-web_%(process_num)02d.log"
    assert command_of(program, 2)[-1] == "server://0.0.0.0:10102/0.0.0.0:8002?tls=1"
    assert section("web", EACH_ITS_PORTS, "--numprocs", "100")["numprocs"] == "100"


def test_each_process_is_checked():
    url = "server://:655%(process_num)02d/:8080"
    words = ("web", url, "--numprocs", "40")
    assert "the port is not a number from 0 to 65535" in refusal(supervisor, *words)


def test_processes_on_the_same_ports_need_to_share_them():
    words = ("web", SERVER, "--numprocs", "2")
    if "reuse-port" in options.BY_NAME:
        assert "--reuse-port=1" in command_of(section(*words))
    else:
        assert refusal(supervisor, *words) == (
            "numprocs: 2 processes need ports of their own, such as 101%(process_num)02d [from command line]"
        )


def test_processes_need_data_ports_of_their_own():
    words = ("web", EACH_ITS_PORTS, "--numprocs", "2")
    assert refusal(supervisor, *words, "--data-port=10500").startswith("numprocs: 2 processes need data ports of")
    status = refusal(supervisor, *words, "--status=127.0.0.1:9100")
    assert status.startswith(
        "numprocs: 2 processes need status addresses of their own, such as --status=127.0.0.1:91%(p"
    )
    shared = refusal(supervisor, "web", SERVER, "--numprocs", "2", "--reuse-port=0", "--data-port=105%(process_num)02d")
    assert shared == "reuse-port: '0' must be 1 for 2 processes on the same ports [from command line]"
    assert "--data-port=105%(process_num)02d" in section(*words, "--data-port=105%(process_num)02d")["command"]


def test_one_process_may_have_tunnels_on_one_port(tmp_path):
    path = tmp_path / "n.conf"
    path.write_text(
        "[tunnel a]\nurl = server://:1001/:53?network=udp\n[tunnel b]\nurl = server://:1002/:53?network=tcp\n"
    )
    assert "reuse" not in section("dns", "--config", str(path))["command"]


def test_clients_need_no_ports_of_their_own_and_share_none():
    program = section("web", CLIENT, "--numprocs", "2")
    assert (program["numprocs"], command_of(program)) == ("2", [*COMMAND.words, CLIENT])


def test_a_server_beside_a_client_says_in_its_section_that_it_shares_its_ports(tmp_path):
    path = tmp_path / "n.conf"
    path.write_text(f"[tunnel x]\nurl = {SERVER}\n[tunnel y]\nurl = {CLIENT}\n")
    words = ("web", "--config", str(path), "--numprocs", "2")
    assert refusal(supervisor, *words) == (
        "numprocs: 2 processes need reuse-port = 1 in each server's section [from command line]"
    )
    path.write_text(f"[tunnel x]\nurl = {SERVER}\nreuse-port = 1\n[tunnel y]\nurl = {CLIENT}\n")
    assert "reuse" not in section(*words)["command"]


def test_paths_that_no_line_can_hold_are_refused(tmp_path):
    path = tmp_path / "two\nlines"
    path.write_text(f"[tunnel x]\nurl = {SERVER}\n")
    why = refusal(supervisor, "web", "--config", str(path))
    assert why == f"config: '{tmp_path}/two\\nlines' holds control characters [from command line]"
    assert refusal(supervisor, "web", SERVER, f"--log-dir={path}").startswith(f"log-dir: '{tmp_path}/two\\nlines' must")


@pytest.mark.parametrize("text", ["0", "101", "x", "-1", "1e1", ""])
def test_a_wrong_number_of_processes_is_refused(text):
    assert "is not within 1 to 100" in refusal(supervisor, "web", SERVER, f"--numprocs={text}")


def test_a_file_is_named_by_its_whole_path(tmp_path, monkeypatch):
    (tmp_path / "a b.conf").write_text(
        f"shutdown-timeout = 20s\n[tunnel x]\nurl = {SERVER}\n[tunnel y]\nurl = {CLIENT}\n"
    )
    monkeypatch.chdir(tmp_path)
    program = section("web", "--config", "a b.conf", "--only", "x")
    assert command_of(program) == [*COMMAND.words, f"--config={tmp_path}/a b.conf", "--only=x"]
    assert program["stopwaitsecs"] == "25"


def test_the_directory_of_logs_may_be_chosen():
    assert section("web", SERVER, "--log-dir", "/srv/l%o g")["stdout_logfile"] == "/srv/l%%o g/nodepass-web.log"


@pytest.mark.parametrize("make", [supervisor, systemd])
@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["web", f"{SERVER}?tls=3"], "tls: '3' is not one of 0, 1, 2 [from URL query]"),
        (["web", "server://a b:1/:2"], "blanks and control characters are refused"),
        (["a/b", SERVER], "'a/b' is no name"),
        ([".a", SERVER], "'.a' is no name; allowed: 1 to 64 ASCII letters, digits, '_', '.' or '-', the first a "),
        (
            ["web", CLIENT, "--tunnel-key=0123456789abcdef"],
            "tunnel-key: ps and this text would show it; use tunnel-key-f",
        ),
        (["web", CLIENT.replace("//", "//0123456789abcdef@")], "tunnel-key-file [from URL]"),
        (["web", f"{CLIENT}?tunnel-key=0123456789abcdef"], "tunnel-key-file [from URL query]"),
        (["web", f"{SERVER}?tls=1&crt=c.pem&key=/k"], "crt: 'c.pem' must begin with /: the service starts elsewhere"),
        (["web", SERVER, "--log-to=x.log"], "log-to: 'x.log' "),
    ],
)
def test_what_could_not_run_or_not_be_secret_is_refused(make, words, text):
    said = refusal(make, *words)
    assert text in said
    assert "0123456789abcdef" not in said


def test_a_relative_directory_of_logs_is_refused():
    assert refusal(supervisor, "web", SERVER, "--log-dir=logs").startswith("log-dir: 'logs' must begin with /")


@pytest.mark.parametrize("environ", [{"NODEPASS_TLS": "1"}, {"NODEPASS_LOG_TO": "/l"}])
def test_settings_of_this_shells_environment_are_refused(environ):
    argv = ["generate", "supervisor", "web", SERVER]
    with pytest.raises(ConfigError, match="the service has another environment; give --"):
        generate.supervisor(options.parse(argv, environ), argv, COMMAND)


# systemd


def unit_of(text, name="nodepass-web.service"):
    """Read a unit, none of whose keys is there twice but SystemCallFilter."""
    keys = re.findall("^([A-Za-z]+)=(.*)$", text, re.MULTILINE)
    assert len(dict(keys)) == len(keys) - 1 - text.count("LoadCredential=") + bool(text.count("LoadCredential="))
    return dict(keys)


def test_a_unit_is_told_by_the_process_how_it_is_and_restarts_it_unless_its_settings_are_wrong():
    unit = unit_of(systemd("web", f"{SERVER}?tls=1", "--shutdown-timeout=1m"))
    wanted = {
        "Type": "notify",
        "NotifyAccess": "main",
        "WatchdogSec": "30s",
        "ExecStart": f"{COMMAND.words[0]} --shutdown-timeout=1m {SERVER}?tls=1",
        "ExecReload": "/bin/kill -HUP $MAINPID",
        "Restart": "on-failure",
        "RestartPreventExitStatus": "2",
        "TimeoutStopSec": "65s",
        "LimitNOFILE": "65536",
        "DynamicUser": "yes",
        "CapabilityBoundingSet": "",
    }
    assert {key: unit[key] for key in wanted} == wanted
    assert "AmbientCapabilities" not in unit


@pytest.mark.parametrize(
    ("words", "low"),
    [
        ([SERVER], False),
        (["server://:10101/:443"], True),
        (["server://:1023/:8080"], True),
        (["server://:1024/:8080"], False),
        ([SERVER, "--data-port=1000"], True),
        ([SERVER, "--status=127.0.0.1:910"], True),
        (["server://:0/:0"], False),
        (["client://h:443/h:80"], False),
        (["client://h:443/h:80", "--status=127.0.0.1:910"], True),
    ],
)
def test_only_ports_below_1024_bring_a_capability(words, low):
    assert ("AmbientCapabilities=CAP_NET_BIND_SERVICE" in systemd("web", *words)) is low


def test_the_template_takes_a_file_by_the_name_of_the_instance_and_variables_if_there_are_some():
    unit = unit_of(generate.systemd_template(COMMAND))
    assert unit["ExecStart"] == f"{COMMAND.words[0]} --config=/etc/nodepass/%i.conf"
    assert unit["EnvironmentFile"] == "-/etc/nodepass/%i.env"


def test_secret_files_come_as_credentials():
    unit = systemd("web", f"{SERVER}?tls=1&crt=/etc/100%25/c.pem&key=/etc/k", "--tunnel-key-file=/etc/t")
    assert (
        "LoadCredential=crt:/etc/100%%/c.pem\nLoadCredential=key:/etc/k\nLoadCredential=tunnel-key-file:/etc/t\n"
        in unit
    )
    start = unit_of(unit)["ExecStart"]
    assert start.endswith("--crt=%d/crt --key=%d/key --tunnel-key-file=%d/tunnel-key-file")
    started = options.parse(shlex.split(start.replace("%d/", "/run/credentials/").replace("%%", "%"))[1:], {})
    assert started.configs[0].tunnel_key_file == "/run/credentials/tunnel-key-file"


def test_the_token_for_status_comes_as_a_credential():
    unit = systemd("web", SERVER, "--status=0.0.0.0:9100", "--status-token-file=/etc/token")
    assert "LoadCredential=status-token-file:/etc/token\n" in unit
    assert unit_of(unit)["ExecStart"].endswith(" --status-token-file=%d/status-token-file")


def test_files_that_a_file_names_are_said_once_to_be_read_by_the_units_user(tmp_path):
    path = tmp_path / "n.conf"
    path.write_text(
        "tls = 1\nstatus = :9100\nstatus-token-file = /etc/token\ntunnel-key-file = /etc/t\n"
        "ca = /run/credentials/nodepass-web.service/ca\n"
        f"[tunnel a]\nurl = {SERVER}\n[tunnel b]\nurl = server://:10102/:8081\n"
    )
    unit = systemd("web", "--config", str(path))
    assert unit.count("\n# to be read by the unit's user: ") == 2
    assert unit.count(": /etc/t\n") == unit.count(": /etc/token\n") == 1
    assert unit_of(unit)["ExecStart"] == f"{COMMAND.words[0]} --config={path}"


def test_a_config_file_in_a_home_is_refused_as_the_unit_cannot_see_it():
    parsed = options.parse(["generate", "systemd", "web", SERVER], {})
    line = dataclasses.replace(parsed.line, files=("/root/n.conf",))
    with pytest.raises(ConfigError, match="homes are hidden from the unit"):
        generate.systemd(dataclasses.replace(parsed, line=line), COMMAND)


@pytest.mark.parametrize("key", ["tunnel-key-file", "status-token-file", "ca"])
def test_what_a_config_file_names_in_a_home_is_refused_as_the_unit_cannot_see_it(tmp_path, key):
    path = tmp_path / "n.conf"
    path.write_text(f"tls = 1\n{key} = /root/x\nurl = {SERVER}\n")
    why = f"{key}: '/root/x': homes are hidden from the unit [from file {path}:2]"
    assert refusal(systemd, "web", "--config", str(path)) == why


def test_a_log_file_is_refused_as_the_unit_cannot_write_it():
    assert "its log goes to the journal" in refusal(systemd, "web", SERVER, "--log-to=/var/log/x")


@pytest.mark.parametrize("home", ["/root", "/home/me"])
def test_a_command_in_a_home_is_refused_as_the_unit_cannot_see_it(home):
    command = OwnCommand((f"{home}/nodepass/bin/nodepass",))
    assert f"the command is '{home}/nodepass/bin/nodepass', and homes are" in refusal(
        systemd, "web", SERVER, command=command
    )
    with pytest.raises(ConfigError, match="homes are hidden from the unit"):
        generate.systemd_template(command)


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("a%20b", "a%%20b"),
        ("a;b $x", '"a;b $$x"'),
        ('"\\', '"\\"\\\\"'),
        ("--key=%d/key", "--key=%%d/key"),
        ('--log-to=/a=%d/b" $c', '"--log-to=/a=%%d/b\\" $$c"'),
        ("/%d/x", "/%%d/x"),
        ("", '""'),
    ],
)
def test_words_are_quoted_for_systemd(word, text):
    assert systemd_word(word) == text


def test_a_unit_for_a_users_own_systemd_has_what_that_allows_and_reads_files_where_they_are():
    home = OwnCommand(("/home/me/.local/bin/nodepass",))
    text = systemd("web", f"{SERVER}?tls=1&crt=/home/me/c&key=/home/me/k", "--user", command=home)
    unit = unit_of(text)
    assert unit["ExecStart"] == f"/home/me/.local/bin/nodepass {SERVER}?tls=1&crt=/home/me/c&key=/home/me/k"
    assert unit["Type"] == "notify" and unit["NoNewPrivileges"] == "yes" and unit["WantedBy"] == "default.target"
    assert not re.search("DynamicUser|Capability|Credential|Protect|Private|network-online", text)


def test_a_unit_for_a_users_own_systemd_may_log_to_a_file():
    assert "--log-to=/home/me/l" in systemd("web", SERVER, "--log-to=/home/me/l", "--user")


@pytest.mark.parametrize("path", ["/srv/a ;b", "/srv/a #b", "/srv/a\\", "/srv/a "])
def test_a_path_that_would_be_read_as_another_one_is_refused(path):
    text = "would not be read as it stands"
    assert text in refusal(systemd, "web", SERVER, command=dataclasses.replace(COMMAND, directory=path))
    assert text in refusal(systemd, "web", f"{SERVER}?tls=1", f"--crt={path}", "--key=/k")
    assert text in refusal(supervisor, "web", SERVER, command=dataclasses.replace(COMMAND, directory=path))


@pytest.mark.parametrize("directory", ["/srv/a ;b", "/srv/a #b"])
def test_a_directory_of_logs_that_would_be_cut_is_refused(directory):
    assert "would not be read as it stands" in refusal(supervisor, "web", SERVER, "--log-dir", directory)


def units():
    """Units of every kind, by file name, with a command that exists."""
    command = OwnCommand(("/bin/sh", "-m", "nodepass_gevent"), "/tmp")
    url = f"{SERVER}?tls=1&crt=/a%20b;c&key=/k&ca=/a%27%22b%24"
    return {
        "nodepass-web.service": systemd("web", url, command=command),
        "nodepass-low.service": systemd("low", "server://:10101/:443?tunnel-key-file=/k&tls=1", command=command),
        "nodepass@.service": generate.systemd_template(command),
    }


def test_a_unit_for_a_users_own_systemd_passes_systemd_analyze(tmp_path):
    path = tmp_path / "nodepass-web.service"
    path.write_text(systemd("web", SERVER, "--user", command=OwnCommand(("/bin/sh",))))
    done = subprocess.run(
        [require("systemd-analyze"), "--user", "verify", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", ["nodepass-web.service", "nodepass-low.service", "nodepass@.service"])
def test_units_pass_systemd_analyze_and_expose_little(tmp_path, name):
    analyze = require("systemd-analyze")
    path = tmp_path / name
    path.write_text(units()[name])
    done = subprocess.run([analyze, "verify", str(path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = subprocess.run(
        [analyze, "security", "--offline=yes", "--no-pager", str(path)], capture_output=True, text=True, timeout=60
    )
    assert float(re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)[1]) <= MOST_EXPOSED


# The command


def test_a_script_is_run_again_by_its_absolute_path(tmp_path, monkeypatch):
    script = tmp_path / "nodepass"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    assert own_command("nodepass", sys.executable) == OwnCommand((str(script),))
    script.chmod(0o644)  # which nobody can run
    assert own_command("nodepass", sys.executable).words == (sys.executable, "-m", "nodepass_gevent")


def test_a_module_is_run_again_from_the_directory_that_has_it(tmp_path):
    command = own_command(generate.__file__.replace("generate.py", "__main__.py"), sys.executable)
    assert command.words == (sys.executable, "-m", "nodepass_gevent")
    done = subprocess.run(
        [*command.words, "--version"], cwd=command.directory, capture_output=True, text=True, timeout=60, env={}
    )
    assert done.stdout.startswith("nodepass-gevent ")
    assert section("web", SERVER, command=command)["directory"] == command.directory
