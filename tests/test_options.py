import contextlib
import dataclasses
import io
import os
import re
import shlex
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodepass_gevent import command_line, options
from nodepass_gevent.config import Address, Config, Limits, Process
from nodepass_gevent.errors import ConfigError
from nodepass_gevent.tunnel_key import parse_key
from nodepass_gevent.usage import EXAMPLES
from nodepass_gevent.values import Networks, Pins

fuzz = settings(max_examples=300, deadline=None, database=None)
URL = "server://:10101/127.0.0.1:8080"
KEY = "np1:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8"


@pytest.fixture
def write(tmp_path):
    """Write a config file; return its path and what errors call it."""

    def write_file(text):
        path = tmp_path / "t.ini"
        path.write_text(text, encoding="utf-8")
        return str(path), f"file {path}"

    return write_file


def parse_one(*argv, **environ):
    (config,) = options.parse(argv, environ).configs
    return config


def parse_for(name, *argv, **environ):
    """Give what holds a setting: the process, or the only tunnel."""
    parsed = options.parse(argv, environ)
    (config,) = parsed.configs
    return parsed.process if options.BY_NAME[name].of_process else config


def error(*argv, **environ):
    with pytest.raises(ConfigError) as caught:
        options.parse(argv, environ)
    assert str(caught.value).isprintable()
    return str(caught.value)


# The table

TYPES = {
    each.name: each.type
    for each in (*dataclasses.fields(Config), *dataclasses.fields(Limits), *dataclasses.fields(Process))
}
TEXTS = {  # a value other than the default, as written and in Config
    "network": ("udp", "udp"),
    "protocol": ("2", "2"),
    "proxy-protocol": ("1", 1),
    "data-port": ("10102", 10102),
    "reuse-port": ("1", 1),
    "tls": ("1", 1),
    "crt": ("/etc/a%b.pem", "/etc/a%b.pem"),
    "key": ("/etc/a b.pem", "/etc/a b.pem"),
    "ca": ("/etc/ca.pem", "/etc/ca.pem"),
    "sni": ("a.example", "a.example"),
    "pin": (f"sha256//{'+/' * 21}8=", Pins((b"\xfb\xff\xbf" * 10 + b"\xfb\xff",))),
    "tunnel-key-file": ("/etc/a.key", "/etc/a.key"),
    "tunnel-key": (KEY, parse_key(KEY)),
    "tunnel-name": ("site-a", "site-a"),
    "semaphore-limit": ("5", 5),
    "min-pool-capacity": ("6", 6),
    "max-pool-capacity": ("70", 70),
    "udp-data-buf-size": ("8", 8),
    "udp-read-timeout": ("9ms", 0.009),
    "report-interval": ("1m30s", 90),
    "reload-interval": ("1.5h", 5400),
    "service-cooldown": ("12s", 12),
    "shutdown-timeout": ("0", 0),
    "log": ("warn", "warn"),
    "access-log": ("off", "off"),
    "log-to": ("stderr", "stderr"),
    "log-format": ("json", "json"),
    "log-rate": ("27", 27),
    "status": ("[::1]:9100", Address("::1", 9100)),
    "status-token-file": ("/etc/status.token", "/etc/status.token"),
    "callers": ("13", 13),
    "allow-users": ("10.0.0.0/8,::1", Networks.parse("10.0.0.0/8,::1")),
    "deny-users": ("192.0.2.1", Networks.parse("192.0.2.1")),
    "users-per-address": ("22", 22),
    "udp-rate-per-address": ("23", 23),
    "allow-clients": ("::/0", Networks.parse("::/0")),
    "deny-clients": ("10.0.0.0/8", Networks.parse("10.0.0.0/8")),
    "penalty-after": ("24", 24),
    "penalty-first": ("25s", 25),
    "penalty-longest": ("26m", 1560),
    "connect-timeout": ("1ms", 0.001),
    "target-timeout": ("2ms", 0.002),
    "first-line-timeout": ("3ms", 0.003),
    "opening-timeout": ("4ms", 0.004),
    "caller-timeout": ("6ms", 0.006),
    "tls-handshake-timeout": ("7ms", 0.007),
    "authentication-timeout": ("22ms", 0.022),
    "takeover-timeout": ("23ms", 0.023),
    "id-timeout": ("8ms", 0.008),
    "pool-wait": ("11ms", 0.011),
    "half-closed-timeout": ("1h", 3600),
    "idle-timeout": ("12h", 43200),
    "udp-session-timeout": ("2m", 120),
    "drain-linger": ("14ms", 0.014),
    "dead-intervals": ("15", 15),
    "dead-timeout": ("16s", 16),
    "accept-pause": ("27ms", 0.027),
    "accept-pause-longest": ("28s", 28),
    "descriptor-reserve": ("29", 29),
    "keepalive-idle": ("17s", 17),
    "keepalive-interval": ("18s", 18),
    "keepalive-count": ("19", 19),
    "tcp-user-timeout": ("21s", 21),
}
CLIENTS = ("ca", "sni", "pin", "proxy-protocol")  # a server has none, or not without tls
PARTNER = {"crt": ("key", "/x"), "key": ("crt", "/x"), "tunnel-key": ("tls", "1"), "tunnel-key-file": ("tls", "1")}
# fmt: off
NAMED_ELSEWHERE = ("TUNNEL_KEY", "SEMAPHORE_LIMIT", "MIN_POOL_CAPACITY", "MAX_POOL_CAPACITY", "UDP_DATA_BUF_SIZE",
                   "UDP_READ_TIMEOUT", "REPORT_INTERVAL", "RELOAD_INTERVAL", "SERVICE_COOLDOWN", "SHUTDOWN_TIMEOUT")
LATER_KEYS = ("min", "max", "mode", "dial", "read", "rate", "slot", "proxy", "block", "dns", "notcp", "noudp",
              "type", "quic", "pool")
# fmt: on


def test_every_setting_of_config_is_in_the_table():
    fields = {each.name for group in (Config, Limits, Process) for each in dataclasses.fields(group)}
    settable = fields - {"role", "tunnel", "target", "name", "limits", "sources"}
    assert {setting.field for setting in options.SETTINGS} == settable | {"url"}
    assert set(TEXTS) == set(options.BY_NAME) - {"url"}


def test_environment_names_are_the_original_ones_or_have_the_prefix():
    own = [s for s in options.SETTINGS if s.env.startswith("NODEPASS_")]
    assert sorted(s.env for s in options.SETTINGS if s not in own) == sorted(NAMED_ELSEWHERE)
    assert all(s.env == "NODEPASS_" + s.name.upper().replace("-", "_") for s in own)


def query(url, texts):
    return url + "?" + "&".join(f"{k}={v.replace('%', '%25').replace(' ', '%20')}" for k, v in texts.items())


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("source", ["flag", "query", "underscored query", "environment", "file", "underscored file"])
def test_every_setting_comes_from_every_source(name, source, write):
    text, value = TEXTS[name]
    texts = {name: text}
    url = "client://h:1/:2" if name in CLIENTS else URL
    if name in PARTNER:
        texts |= [PARTNER[name]]  # refused one without the other
    if source.startswith("underscored"):
        texts = {key.replace("-", "_"): each for key, each in texts.items()}
    if source == "flag":
        config, named = parse_for(name, url, *(f"--{key}={each}" for key, each in texts.items())), "command line"
    elif source.endswith("query"):
        config, named = parse_for(name, query(url, texts)), "URL query"
    elif source == "environment":
        environ = {options.BY_NAME[key].env: each for key, each in texts.items()}
        config, named = parse_for(name, url, **environ), f"environment variable {options.BY_NAME[name].env}"
    else:
        path, label = write("".join(f"{key} = {each}\n" for key, each in texts.items()))
        config, named = parse_for(name, "-c", path, url), f"{label}:1"
    found = config.value(options.BY_NAME[name].field)
    assert found == value
    assert isinstance(found, int) or TYPES[options.BY_NAME[name].field] is not int  # sockets take no floats
    assert config.source(name) == named


def test_without_any_source_the_defaults_hold():
    config = parse_one(URL)
    assert config == Config(role="server", tunnel=Address("", 10101), target=Address("127.0.0.1", 8080))
    assert config.sources == {"url": "command line"}


LAYERS = [
    ("command line", "1"),
    ("URL query", "2"),
    ("environment variable SEMAPHORE_LIMIT", "3"),
    ("file", "4"),
    ("default", "1024"),
]


@pytest.mark.parametrize("first", range(len(LAYERS)))
def test_the_strongest_source_wins(first, write):
    present = [source for source, _ in LAYERS[first:]]
    path, label = write("semaphore_limit = 4\n" if "file" in present else "")
    argv = ["-c", path, URL + ("?semaphore_limit=2" if "URL query" in present else "")]
    if "command line" in present:
        argv += ["--semaphore-limit", "1"]
    environ = {"SEMAPHORE_LIMIT": "3"} if "environment variable SEMAPHORE_LIMIT" in present else {}
    config = parse_one(*argv, **environ)
    source, text = LAYERS[first]
    assert config.semaphore_limit == int(text)
    assert config.source("semaphore-limit") == (f"{label}:1" if source == "file" else source)


@pytest.mark.parametrize("blank", ["", " ", "\t\n"])
def test_a_blank_environment_value_is_unset(blank):
    environ = {setting.env: blank for setting in options.SETTINGS}
    assert parse_one(URL, **environ) == parse_one(URL)
    assert options.parse([], environ).action == "usage"


@pytest.mark.parametrize("query", ["tls=", "tls", "tls=%20"])
def test_an_empty_query_value_is_refused_as_that_of_an_unset_shell_variable(query):
    assert error(URL + "?" + query) == "tls: the value is empty; leave the key out for the default [from URL query]"


def test_an_empty_option_is_not_unset():
    assert (
        error(URL, "--log=", NODEPASS_LOG="warn") == "log: '' is empty or holds control characters [from command line]"
    )


def test_two_hyphens_are_a_value_like_any_other_and_no_fault_of_ours(write):
    path, _ = write(f"url = {URL}\nlog = --\n")
    for argv in ([URL, "--log=--"], [URL + "?log=--"], ["--config", path]):
        assert error(*argv).startswith("log: '--' is not one of debug, ")
    assert error(URL, NODEPASS_LOG="--").startswith("log: '--' is not one of debug, ")
    assert parse_for("log-to", URL, "--log-to=--").log_to == "--"
    assert error("--config=--").startswith("config: cannot read the file: ")
    assert error("--config", path, "--only=--").startswith("only: no tunnel is called '--'")


def test_the_environment_of_the_process_is_not_read(monkeypatch):
    monkeypatch.setenv("SEMAPHORE_LIMIT", "7")
    monkeypatch.setenv("NODEPASS_URL", URL)
    assert parse_one(URL).semaphore_limit == 1024
    assert options.parse([], {}).action == "usage"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("NODEPASS_TSL", " (did you mean NODEPASS_TLS?)"),
        ("NODEPASS_tls", " (did you mean NODEPASS_TLS?)"),
        ("NODEPASS_MIN_POOL_CAPACITY", " (did you mean MIN_POOL_CAPACITY?)"),
        ("NODEPASS_TUNNEL_KEY", " (did you mean TUNNEL_KEY?)"),
        ("NODEPASS_STATUS_PORT", " (did you mean NODEPASS_STATUS?)"),
        ("NODEPASS_XYZZY", "; nodepass --help shows all of them"),
    ],
)
def test_an_unknown_variable_with_the_prefix_is_refused_without_its_value(name, hint):
    assert error(URL, **{name: "s3cret"}) == f"unknown environment variable {name}{hint}"
    assert error("health", **{name: "s3cret"}).startswith("unknown environment variable")
    assert parse_one(URL, **{name: " "}) == parse_one(URL)
    assert options.parse(["genkey"], {name: "s3cret"}).action == "genkey"


def test_variables_of_others_are_let_be():
    others = {
        "NODEPASS": "1",
        "MY_NODEPASS_TLS": "1",
        "NODEPASS_SINGLE_FILE": "/usr/bin/nodepass",
        "NODEPASS_PORT": "tcp://10.0.0.1:10101",  # Kubernetes, for a service called nodepass, and nodepass-web
        "NODEPASS_PORT_10101_TCP": "tcp://10.0.0.1:10101",
        "NODEPASS_PORT_10101_TCP_ADDR": "10.0.0.1",
        "NODEPASS_SERVICE_HOST": "10.0.0.1",
        "NODEPASS_WEB_SERVICE_PORT": "10101",
        "NODEPASS_SERVICE_PORT_TUNNEL": "10101",
    }
    assert parse_one(URL, **others) == parse_one(URL)
    assert error(URL, NODEPASS_PORT="10102").startswith("unknown environment variable NODEPASS_PORT")


def test_every_example_of_the_documentation_parses():
    assert parse_one("server://:10101/127.0.0.1:5432?tls=1").tls == 1
    assert parse_one("server://0.0.0.0:10101/[::]:8080").target == Address("::", 8080)
    assert parse_one("client://localhost:10101/127.0.0.1:80").role == "client"


def test_every_example_of_the_help_parses():
    quoted = re.findall(r"nodepass '(\S+)'", EXAMPLES)
    assert len(re.findall("^  .*nodepass ", EXAMPLES, re.MULTILINE)) == 8
    assert [parse_one(url).role for url in quoted] == ["server", "client", "server"]
    (generated,) = re.findall(r"nodepass (generate .*) > ", EXAMPLES)
    assert options.parse(shlex.split(generated), {}).line.words == ("web",)


# The URL's own sources


def test_the_url_comes_from_the_strongest_source(write):
    path, label = write("url = server://:3/:9?tls=1\n")
    one = parse_one("-c", path)
    assert (one.tunnel.port, one.source("url")) == (3, f"{label}:1")
    assert one.source("tls") == f"URL query, {label}:1"
    two = parse_one("-c", path, NODEPASS_URL="server://:2/:9?tls=2&crt=a&key=b")
    assert (two.tunnel.port, two.tls, two.source("url")) == (2, 2, "environment variable NODEPASS_URL")
    for argv in (["server://:1/:9"], ["--url", "server://:1/:9"], ["--", "server://:1/:9"]):
        config = parse_one("-c", path, *argv, NODEPASS_URL="server://:2/:9?tls=1")
        assert (config.tunnel.port, config.tls, config.source("url")) == (1, 0, "command line")


def test_two_urls_on_the_command_line_are_refused():
    assert error(URL, "--url", URL).startswith("url: given twice")
    assert error(URL, "client://secret@x:1/:2") == "unknown option or argument '***@x:1/:2' [from command line]"


def test_without_a_url_the_usage_is_asked_for():
    assert options.parse([], {}) == options.Parsed("usage")
    assert options.parse(["--log", "debug"], {"NODEPASS_TLS": "1"}) == options.Parsed("usage")


def test_a_file_without_a_url_is_refused(write):
    path, label = write("log = debug")
    assert error("-c", path) == (
        "url: no tunnel is named; allowed: url = server://<tunnel_addr>/<target_addr> "
        f"or client://<tunnel_addr>/<target_addr> [from {label}]"
    )


# Errors: the line names setting, value, what is allowed, and the source


@pytest.mark.parametrize(
    ("argv", "environ", "text"),
    [
        (
            [URL],
            {"UDP_READ_TIMEOUT": "5"},
            "udp-read-timeout: '5' is not a duration such as 5s, 1h30m or 100ms [from environment variable UDP_READ_T",
        ),
        (
            [URL, "--semaphore-limit", "0"],
            {},
            "semaphore-limit: '0' is not within 1 to 1048576 [from command line]",
        ),
        (
            [URL, "--semaphore-limit=-5"],
            {},
            "semaphore-limit: '-5' is not within 1 to 1048576 [from command line]",
        ),
        ([URL + "?tls=3"], {}, "tls: '3' is not one of 0, 1, 2 [from URL query]"),
        (
            [URL + "?tls=2"],
            {},
            "tls: '2' needs crt and key (in a shell, put the URL in quotes); without them allowed: 0, 1 [from URL",
        ),
        ([URL], {"NODEPASS_TLS": "on"}, "tls: 'on' is not one of 0, 1, 2 [from environment variable NODEPASS_TLS]"),
        ([URL], {"SEMAPHORE_LIMIT": "7\n"}, r"semaphore-limit: '7\n' is empty or holds control characters [from envir"),
        ([URL + "?semaphore_limit=%D9%A1"], {}, "semaphore-limit: '\u0661' is not a whole number [from URL query]"),
        ([URL + "?semaphore_limit=" + "9" * 5000], {}, "..."),
        (
            [URL],
            {"NODEPASS_URL": "x", "NODEPASS_LOG": "inf"},
            "error, fatal (did you mean 'info'?) [from environment variable NODEPASS_LOG]",
        ),
        ([], {"NODEPASS_URL": "x"}, "url: 'x' has no ://; allowed: server://"),
        ([], {"NODEPASS_URL": "x://"}, "[from environment variable NODEPASS_URL]"),
        (["--url", "x"], {}, "url: 'x' has no ://"),
        (["server://:1/x"], {}, "url: the target address 'x' has no port; allowed: host:port, :port, [ipv6]:port"),
        ([URL + "?tsl=1"], {}, "unknown key 'tsl' (did you mean 'tls'?) [from URL query]"),
        ([URL + "?TLS=1"], {}, "unknown key 'TLS' (did you mean 'tls'?) [from URL query]"),
        ([URL + "?semaphor_limit=1"], {}, "unknown key 'semaphor_limit' (did you mean 'semaphore-limit'?)"),
        ([URL + "?zz=1"], {}, "unknown key 'zz'; nodepass --help shows all of them [from URL query]"),
        ([URL + "?url=x"], {}, "unknown key 'url'"),
        ([URL + "?config=x"], {}, "unknown key 'config', an option of the command line only [from URL query]"),
        ([URL + "?tls=1&tls=1"], {}, "tls: given twice [from URL query]"),
        ([URL + "?tls=&tls=1"], {}, "tls: given twice"),
        ([URL, "--tls", "1", "--tls=0"], {}, "tls: given twice [from command line]"),
        ([URL + "?log-x=1&log=a"], {}, "unknown key 'log-x'"),
        ([URL + "?udp_read_timeout=1s&udp-read-timeout=1s"], {}, "udp-read-timeout: given twice"),
        ([URL + "?crt=a&cert=b"], {}, "crt: given twice"),
        ([URL + "?crt=a"], {}, "crt: 'a' has no key that belongs to it; give both crt and key, or neither [from URL"),
        ([URL + "?tls=1&sni=a"], {}, "sni: 'a' belongs to the client; a server has none [from URL query]"),
        (
            [URL, "--ca", "a"],
            {},
            "ca: 'a' demands certificates of clients, and needs tls; allowed then: 1, 2 [from com",
        ),
        ([URL], {"NODEPASS_PIN": "ab"}, "pin: 'ab' is not a pin: sha256: and 64 hexadecimal digits, or sha256// and b"),
        (["client://a:1/b:0"], {}, "url: 'client://a:1/b:0' dials 'b:0'; a client needs ports from 1 to 65535 [from c"),
        (
            [URL + "?allow-users=10.0.0.1/8"],
            {},
            "allow-users: '10.0.0.1/8' has bits behind its prefix; the network is written 10.0.0.0/8 [from URL query]",
        ),
        ([URL, "--sem-limit", "5"], {}, "unknown option or argument '--sem-limit' (did you mean '--semaphore-limit'?)"),
        (
            [URL, "--semaphore_limit=5"],
            {},
            "unknown option or argument '--semaphore_limit' (did you mean '--semaphore-",
        ),
        (["--tsl", "2", URL], {}, "unknown option or argument '--tsl' (did you mean '--tls'?) [from command line]"),
        ([URL, "--semaphore", "5"], {}, "unknown option or argument '--semaphore'"),
        ([URL, "--loglevel=debug"], {}, "unknown option or argument '--loglevel' (did you mean '--log'?) [from comm"),
        ([URL, "--idle=5s"], {}, "unknown option or argument '--idle' (did you mean '--idle-timeout'?) [from comm"),
        ([URL, "--token=x"], {}, "unknown option or argument '--token'; nodepass --help shows all of them [from comm"),
        ([URL, "-x"], {}, "unknown option or argument '-x' [from command line]"),
        ([URL, "extra"], {}, "unknown option or argument 'extra' [from command line]"),
        ([URL, "--log"], {}, "--log is followed by debug|info|warn|error|fatal [from command line]"),
        ([URL, "-c"], {}, "--config is followed by FILE [from command line]"),
        ([URL, "--pool-wait", "--tls=1"], {}, "--pool-wait is followed by TIME [from command line]"),
        (["generate", "supervisor", "x", URL, "--log-dir"], {}, "--log-dir is followed by DIR [from command line]"),
        ([URL, "--show-config=s3cret"], {}, "argument --show-config: ignored explicit argument"),
    ],
)
def test_a_wrong_setting_is_one_line_with_its_source(argv, environ, text):
    line = error(*argv, **environ)
    assert text in line
    assert "s3cret" not in line
    assert len(line) < 400


@pytest.mark.parametrize("key", LATER_KEYS)
def test_a_key_of_a_later_release_is_named_as_such(key):
    here = {
        "min": "; here there is min-pool-capacity",
        "max": "; here there is max-pool-capacity",
        "slot": "; here there is semaphore-limit",
        "proxy": "; here there is proxy-protocol",
        "notcp": "; here there is network=udp",
        "noudp": "; here there is network=tcp",
    }.get(key, "")
    text = f"unknown key '{key}', which belongs to a later NodePass release{here} [from URL query]"
    assert error(f"{URL}?{key}=1") == text


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["state"], "unknown command 'state' (did you mean 'status'?)"),
        (["server"], "unknown command 'server'; a tunnel is server://<tunnel_addr>/<target_addr> or client://"),
        (["generate", "supervisor", "--json"], "generate supervisor is followed by NAME [from command line]"),
        (["generate", "supervisor", URL], "generate supervisor is followed by NAME [from command line]"),
        (["generate"], "generate is followed by config, supervisor, systemd or systemd-template [from command line]"),
        (
            ["generate", "sytemd", "x"],
            "generate is followed by config, supervisor, systemd or systemd-template, not by 'sytemd' (did you mean '",
        ),
        (["generate", "nonsense"], "systemd or systemd-template, not by 'nonsense' [from command line]"),
        (
            ["generate", "systemd", "x", URL, "--numprocs", "2"],
            "unknown option or argument '--numprocs', which belongs to generate supervisor",
        ),
        ([URL, "--log-dir=/x"], "unknown option or argument '--log-dir'"),
        (["health", "--json"], "unknown option or argument '--json', which belongs to check and status"),
        (["status", "127.0.0.1:9100"], "status: whom to ask says --status HOST:PORT, or --config FILE"),
        (["generate", "systemd", "x"], "generate systemd: no tunnel is named; a URL or --config FILE does"),
        (["help"], "unknown command 'help'; --help shows all"),
        ([URL, "generate"], "unknown option or argument 'generate'"),
        (["localhost:10101/127.0.0.1:80"], "an address stands behind server:// or client://"),
        ([":10101/:80", "--log", "debug"], "an address stands behind server:// or client://"),
        (["server:/:1/:2"], "unknown command 'server:/:1/:2'; a tunnel is server://"),
        ([""], "unknown command ''"),
        (["s3cret@host:1/:2"], "unknown command '***@host:1/:2'"),
    ],
)
def test_a_word_that_is_no_url_is_an_unknown_command(argv, text):
    assert text in error(*argv)


# The file

FILE = """\
log = warn
[nodepass]
semaphore_limit = 7
tls = 1
[tunnel web]
url = server://:1/:2?udp_read_timeout=1s
tls = 2
crt = a
key = b
[tunnel ssh]
url = client://h:1/:2
"""


def test_a_tunnels_section_beats_the_defaults_of_the_file(write):
    path, label = write(FILE)
    web, ssh = options.parse(["-c", path], {"NODEPASS_NETWORK": "tcp"}).configs
    assert (web.name, web.url, web.tls, web.log, web.semaphore_limit) == ("web", "server://:1/:2", 2, "warn", 7)
    assert (ssh.name, ssh.url, ssh.tls, ssh.log, ssh.semaphore_limit) == ("ssh", "client://h:1/:2", 1, "warn", 7)
    assert {web.network, ssh.network} == {"tcp"}
    assert web.sources == {
        "url": f"{label}:6",
        "udp-read-timeout": f"URL query, {label}:6",
        "tls": f"{label}:7",
        "crt": f"{label}:8",
        "key": f"{label}:9",
        "log": f"{label}:1",
        "semaphore-limit": f"{label}:3",
        "network": "environment variable NODEPASS_NETWORK",
    }
    assert (ssh.udp_read_timeout_s, ssh.crt) == (5, None)


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ("semaphor_limit = 5", 1, "unknown key 'semaphor_limit' (did you mean 'semaphore-limit'?)"),
        ("[nodepass]\nmax = 5", 2, "unknown key 'max', which belongs to a later NodePass release"),
        ("semaphore_limit = 5\nsemaphore-limit = 5", 2, "semaphore-limit: given twice; first in"),
        ("log = info\n[nodepass]\nlog = info", 3, "log: given twice; first in"),
        ("config = /etc/x", 1, "unknown key 'config', an option of the command line only"),
        ("help = true", 1, "unknown key 'help', an option of the command line only"),
        ("version = true", 1, "unknown key 'version', an option of the command line only"),
        ("show_config = true", 1, "unknown key 'show_config', an option of the command line only"),
        ("positional = server://:1/:2", 1, "unknown key 'positional'"),
        ("--log = info", 1, "unknown key '--log'"),
        ("url = server://:1/:2\nlog = loud", 2, "log: 'loud' is not one of debug, info, warn, error, fatal"),
        ("url = server://:1/:2\nreport_interval = 0", 2, "report-interval: '0s' is not within 10ms to 1h0m0s"),
        ("url = server://:1/:2\ncrt = [a, b]\nkey = c\nlog = [info]", 4, "log: '[info]' is not one of"),
        ("\nurl = sever://:1/:2", 2, "url: unknown scheme 'sever' (did you mean 'server'?)"),
        ("[tunnel a]\nlog = info", 1, "url: missing in [tunnel a]"),
        ("[tunnel a]\nurl = server://:1/:2\n[tunnel b]", 3, "url: missing in [tunnel b]"),
        ("url = server://:1/:2\n[tunnel a]\nurl = server://:1/:2", 1, "url: not allowed beside the [tunnel NAME] sec"),
        ("log", 1, "'log' is not followed by = and a value"),
        ("[tunel a]", 1, "unknown section"),
    ],
)
def test_a_wrong_line_of_the_file_is_refused_with_its_number(write, text, line, why):
    path, label = write(text)
    message = error("--config", path)
    assert message.startswith(why)
    assert message.endswith(f" [from {label}:{line}]")


def test_a_url_from_elsewhere_is_refused_beside_tunnel_sections(write):
    path, _ = write(FILE)
    why = "url: not allowed beside the [tunnel NAME] sections of the file"
    assert error("-c", path, URL) == f"{why} [from command line]"
    assert error("-c", path, "--url", URL) == f"{why} [from command line]"
    assert error("-c", path, NODEPASS_URL=URL) == f"{why} [from environment variable NODEPASS_URL]"


def test_an_unreadable_file_is_refused():
    assert error("-c", "/nonexistent\n/x") == (
        r"config: cannot read the file: no such file or directory [from file /nonexistent\n/x]"
    )


# Warnings


def test_cert_is_read_as_crt_with_a_warning(write):
    parsed = options.parse([URL + "?cert=a&key=b&tls=1"], {})
    assert parsed.configs[0].crt == "a"
    assert parsed.warnings == ("cert is read as crt, which is its name [from URL query]",)
    path, label = write("cert = a\nkey = b\ntls = 2")
    parsed = options.parse(["-c", path, URL], {})
    assert parsed.configs[0].crt == "a"
    assert parsed.warnings == (f"cert is read as crt, which is its name [from {label}:1]",)


def test_a_client_that_names_no_server_is_warned_about():
    (warning,) = options.parse(["client://:1/:2"], {}).warnings
    assert warning == "the URL names no server before :1: this machine itself is called [from command line]"
    assert not options.parse(["client://localhost:1/:2"], {}).warnings + options.parse(["server://:1/:2"], {}).warnings


def test_a_certificate_without_tls_is_warned_about():
    assert options.parse(["client://h:1/:2?crt=a&key=b"], {}).warnings == ()  # it demands tls of the server
    assert options.parse([URL + "?crt=a&key=b"], {}).warnings == (
        "crt and key are not used, as tls is 0 [from default]: nothing is encrypted",
    )
    assert options.parse([URL + "?crt=a&key=b&tls=1"], {}).warnings == ()


# The tunnel key

PHRASE = "s3cret words, s3cret enough"


@pytest.mark.parametrize("key", [KEY, PHRASE, "[s3cret, s3cret]", '"s3cret s3cret"" # x', "--s3cret s3cret s3cret"])
def test_a_key_is_the_same_from_every_source(key, write):
    quoted = "".join(f"%{byte:02x}" for byte in key.encode())
    as_value = key.replace('"', '""')
    path, _ = write(f'tunnel-key = "{as_value}"')
    client = "client://h:1/:2"
    configs = [
        parse_one(client, TUNNEL_KEY=key),
        parse_one("-c", path, client),
        parse_one(client, f"--tunnel-key={key}"),
        parse_one(f"{client}?tunnel_key={quoted}"),
        parse_one(f"client://{quoted}@h:1/:2"),
    ]
    assert all(config.tunnel_key == parse_key(key) for config in configs)


@pytest.mark.parametrize(
    ("argv", "environ", "source"),
    [
        ([f"client://{KEY}@h:1/:2"], {}, "URL"),
        ([f"client://h:1/:2?tunnel-key={KEY}"], {}, "URL query"),
        (["client://h:1/:2", "--tunnel-key", KEY], {}, "command line"),
        (["client://h:1/:2"], {"TUNNEL_KEY": KEY}, ""),
        ([], {"NODEPASS_URL": f"client://{KEY}@h:1/:2"}, ""),
    ],
)
def test_a_key_on_the_command_line_is_warned_about(argv, environ, source):
    parsed = options.parse(argv, environ)
    text = "tunnel-key can be read by everybody on this machine, with ps [from {}]; in a file it cannot"
    assert parsed.warnings == ((text.format(source),) if source else ())


@pytest.mark.parametrize("line", [f"tunnel_key = {KEY}", f"url = client://{KEY}@h:1/:2"])
def test_a_key_in_a_config_file_that_others_can_read_is_warned_about(write, line):
    path, label = write(f"[tunnel a]\nurl = client://h:1/:2\n{line}" if "tunnel" in line else f"[tunnel a]\n{line}")
    number = 3 if "tunnel" in line else 2
    for mode, warned in ((0o644, True), (0o640, True), (0o600, False)):
        os.chmod(path, mode)
        text = f"tunnel-key can be read by others: chmod 600 keeps them out [from {label}:{number}]"
        assert options.parse(["-c", path], {}).warnings == ((text,) if warned else ())


def test_a_key_in_the_url_beats_the_environment_and_gives_way_to_an_option():
    url, other = f"client://{KEY}@h:1/:2", "another key of 16 or more"
    assert parse_one(url, TUNNEL_KEY=other).tunnel_key == parse_key(KEY)
    assert parse_one(url, "--tunnel-key", other).tunnel_key == parse_key(other)
    assert error(f"{url}?tunnel-key=x").startswith("tunnel-key: given twice; first in URL")


@pytest.mark.parametrize(
    ("argv", "environ", "text"),
    [
        ([URL], {"TUNNEL_KEY": "s3cret"}, "tunnel-key: a passphrase has 16 to 1024 characters"),
        ([URL], {"TUNNEL_KEY": "s3cret\x1b s3cret s3cret"}, "tunnel-key: the value is empty or holds control"),
        (["server://s3cret@:1/:2"], {}, "tunnel-key: a passphrase has 16 to 1024 characters; better: a key made by"),
        ([URL, "--tunnel-key=np1:s3cret"], {}, "tunnel-key: np1: is not followed by a key"),
        ([URL, "np1:s3cret"], {}, "unknown option or argument 'np1:***'"),
        (["np1:s3cret"], {}, "unknown command 'np1:***'"),
        ([URL + "?np1:s3cret"], {}, "unknown key 'np1:***'"),
        (
            [URL],
            {"TUNNEL_KEY": PHRASE},
            "tunnel-key: '***' needs tls=1 or tls=2, and tls is 0 (from default) [from environment variable TUNNEL_K",
        ),
        (
            [URL + "?tunnel-key-file=x", "--tls=0"],
            {},
            "tunnel-key-file: 'x' needs tls=1 or tls=2, and tls is 0 (from command line) [from URL query]",
        ),
        ([URL + "?tls=1&protocol=1"], {"TUNNEL_KEY": PHRASE}, "protocol: '1' knows no tunnel key; with one"),
        ([URL + "?tls=1&data-port=9"], {"TUNNEL_KEY": PHRASE}, "data-port: '9' is for clients of profile v1, and"),
        (
            [URL + "?tls=1&tunnel-key-file=x"],
            {"TUNNEL_KEY": PHRASE},
            "tunnel-key-file: 'x' is not the only one: there is a tunnel-key, from environment variable TUNNEL_KEY",
        ),
        ([URL + "?tunnel-name=a/b"], {}, "tunnel-name: 'a/b' is not 1 to 64 ASCII letters, digits, '_', '.' or '-'"),
        ([URL + "?tunnel-name=" + "a" * 65], {}, "is not 1 to 64 ASCII letters"),
        (["genkey", URL], {}, "genkey is followed by nothing [from command line]"),
        (["genkey", "--log=info"], {}, "genkey is followed by nothing [from command line]"),
        (["genkye"], {}, "unknown command 'genkye' (did you mean 'genkey'?) [from command line]"),
    ],
)  # fmt: skip
def test_a_wrong_key_is_one_line_that_does_not_hold_it(argv, environ, text):
    line = error(*argv, **environ)
    assert text in line
    assert "s3cret" not in line


def test_a_key_is_shown_as_three_stars_which_are_no_key(write):
    config = parse_one(f"client://{PHRASE.replace(' ', '%20')}@h:1/:2")
    text = options.show(Process(), [config])
    assert "tunnel-key = ***                         # URL\n" in text
    assert not re.search("s3cret", f"{text} {config} {config!r} {[config]}")
    path, _ = write(text)
    assert error("-c", path).startswith("tunnel-key: *** only stands for a key, as --show-config prints it; the key it")


def test_genkey_is_asked_for():
    assert options.parse(["genkey"], {"TUNNEL_KEY": "x"}) == options.Parsed("genkey")


# What is only shown


@pytest.mark.parametrize("argv", [["-h"], ["--help"], ["--bogus", "-h"], ["-c", "/nonexistent", "-h"], ["word", "-Vh"]])
def test_help_is_asked_for_even_beside_mistakes(argv):
    assert options.parse(argv, {"NODEPASS_LOG": "loud"}) == options.Parsed("help")


def test_version_is_asked_for():
    assert options.parse(["-V"], {}) == options.parse(["--version", "x"], {}) == options.Parsed("version")


def test_the_help_shows_every_option_with_environment_default_and_choices():
    text = " ".join(command_line.build_parser().format_help().split())
    for setting in options.SETTINGS:
        assert f"--{setting.name} {setting.metavar} " in text
        assert f"(environment: {setting.env}, default: {setting.default})" in text
    for group in (*dict.fromkeys(setting.group for setting in options.SETTINGS), "configuration"):
        assert f" {group}: " in text
    for part in ("--log debug|info|warn|error|fatal", "--tls 0|1|2", "default: 1h0m0s)", "default: any free one)"):
        assert part in text
    assert "goo.gl" not in text
    assert "[env var" not in text


def test_every_setting_is_shown_with_its_value_and_source(write):
    path, label = write("report-interval = 1m")
    parsed = options.parse(["-c", path, "--show-config", URL + "?tls=1", "--log", "warn"], {"SEMAPHORE_LIMIT": "9"})
    assert parsed.action == "show-config"
    assert options.show(parsed.process, parsed.configs).splitlines() == [
        "log-to = stdout                          # default",
        "log-format = text                        # default",
        "log-rate = 1                             # default",
        "# status =                               # default: nowhere",
        "# status-token-file =                    # default: none",
        "",
        "url = server://:10101/127.0.0.1:8080     # command line",
        "network = both                           # default",
        "protocol = auto                          # default",
        "proxy-protocol = 0                       # default",
        "# data-port =                            # default: any free one",
        "reuse-port = 0                           # default",
        "tls = 1                                  # URL query",
        "# crt =                                  # default: none",
        "# key =                                  # default: none",
        "# ca =                                   # default: none",
        "# sni =                                  # default: none",
        "# pin =                                  # default: none",
        "# tunnel-key-file =                      # default: none",
        "# tunnel-key =                           # default: none",
        "# tunnel-name =                          # default: none",
        "semaphore-limit = 9                      # environment variable SEMAPHORE_LIMIT",
        "min-pool-capacity = 16                   # default",
        "max-pool-capacity = 1024                 # default",
        "udp-data-buf-size = 8192                 # default",
        "callers = 64                             # default",
        "udp-read-timeout = 5s                    # default",
        f"report-interval = 1m0s                   # {label}:1",
        "reload-interval = 1h0m0s                 # default",
        "service-cooldown = 5s                    # default",
        "shutdown-timeout = 5s                    # default",
        "log = warn                               # command line",
        "access-log = debug                       # default",
        "# allow-users =                          # default: all",
        "# deny-users =                           # default: none",
        "users-per-address = 0                    # default",
        "udp-rate-per-address = 0                 # default",
        "# allow-clients =                        # default: all",
        "# deny-clients =                         # default: none",
        "penalty-after = 3                        # default",
        "penalty-first = 5s                       # default",
        "penalty-longest = 10m0s                  # default",
        "connect-timeout = 5s                     # default",
        "target-timeout = 5s                      # default",
        "first-line-timeout = 30s                 # default",
        "opening-timeout = 5s                     # default",
        "caller-timeout = 10s                     # default",
        "tls-handshake-timeout = 5s               # default",
        "authentication-timeout = 5s              # default",
        "takeover-timeout = 2s                    # default",
        "id-timeout = 10s                         # default",
        "pool-wait = 10s                          # default",
        "half-closed-timeout = 1m0s               # default",
        "idle-timeout = 0s                        # default",
        "udp-session-timeout = 1m0s               # default",
        "drain-linger = 2s                        # default",
        "dead-intervals = 3                       # default",
        "dead-timeout = 15s                       # default",
        "accept-pause = 50ms                      # default",
        "accept-pause-longest = 1s                # default",
        "descriptor-reserve = 16                  # default",
        "keepalive-idle = 20s                     # default",
        "keepalive-interval = 8s                  # default",
        "keepalive-count = 3                      # default",
        "tcp-user-timeout = 20s                   # default",
    ]


@pytest.mark.parametrize(
    "text",
    [
        FILE,
        f"url = client://h:1/:2\nsni = ::1\npin = {'0' * 64};sha256//{'B' * 43}=\nca = c",
        'url = server://[::1]:1/h:2\ntls = 1\nkey = \'\ncrt = "/a # b"\ndata_port = 9',
    ],
)
def test_what_is_shown_reads_back_as_a_file(write, text):
    path, _ = write(text)
    parsed = options.parse(["-c", path], {})
    path, _ = write(options.show(parsed.process, parsed.configs))
    again = options.parse(["-c", path], {})
    assert (again.process, again.configs) == (parsed.process, parsed.configs)


def test_what_a_client_demands_is_shown_in_place_of_the_default():
    def shown(query):
        parsed = options.parse([f"client://h:1/:2{query}"], {})
        (line,) = [line for line in options.show(parsed.process, parsed.configs).splitlines() if " tls =" in f" {line}"]
        return " ".join(line.split())

    assert shown("?ca=a") == "# tls = # default: ca demands 2"
    assert shown("?pin=" + "ab" * 32) == "# tls = # default: pin demands 1"
    assert shown("?tunnel-key-file=f") == "# tls = # default: tunnel-key-file demands 1"
    assert shown("?ca=a&tls=1") == "tls = 1 # URL query"
    assert shown("") == "tls = 0 # default"


def test_building_the_parser_needs_neither_gevent_nor_openssl():
    code = (
        "import sys; from nodepass_gevent import command_line, options; command_line.build_parser().format_help();"
        "print({'gevent', 'OpenSSL', 'cryptography', 'socket'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout == b"set()\n"


# Whatever comes

names = st.sampled_from([*options.BY_NAME, "cert", "config", "x"])
values = st.text(max_size=8) | st.sampled_from(["1", "5s", "info", "udp", URL, "client://h:1/:2", ""])
urls = st.lists(st.tuples(names, values), max_size=3).map(lambda q: URL + "?" + "&".join(f"{k}={v}" for k, v in q))
words = (
    st.text(max_size=8)
    | st.sampled_from(["-h", "-V", "--", "-c", "--show-config", "--url", URL])
    | st.builds("--{}={}".format, names, values)
    | names.map("--{}".format)
    | urls
)
lines = st.builds("{} = {}".format, names, values) | st.sampled_from(["[nodepass]", "[tunnel a]", f"url = {URL}"])
files = st.binary(max_size=50) | st.lists(lines, max_size=4).map(lambda all_: "\n".join(all_).encode(errors="replace"))
environs = st.dictionaries(st.sampled_from([setting.env for setting in options.SETTINGS]), values, max_size=3)


@fuzz
@given(argv=st.lists(words, max_size=4), environ=environs, file=st.none() | files)
def test_any_input_is_parsed_or_a_config_error_of_one_line(tmp_path_factory, argv, environ, file):
    if file is not None:
        path = tmp_path_factory.getbasetemp() / "fuzz.ini"
        path.write_bytes(file)
        argv = ["-c", str(path), *argv]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            parsed = options.parse(argv, environ)
        except ConfigError as exc:
            assert str(exc).isprintable()
        else:
            assert options.show(parsed.process, parsed.configs).count("url = ") == len(parsed.configs)
    assert not printed.getvalue()


# Several tunnels


def two(write, first="url = client://h:1/:2"):
    path, _ = write(f"[tunnel a]\n{first}\n[tunnel b]\nurl = client://h:3/:4\n")
    return path


def test_only_one_of_the_tunnels_is_there_when_it_is_named(write):
    assert [config.name for config in options.parse(["--config", two(write), "--only", "b"], {}).configs] == ["b"]


@pytest.mark.parametrize("first", ["url = client://h:1/:2\nlog-to = stderr", "url = client://h:1/:2?log-to=stderr"])
def test_what_holds_for_all_tunnels_stands_in_none(write, first):
    with pytest.raises(ConfigError, match="log-to', which holds for all tunnels: it belongs to"):
        options.parse(["--config", two(write, first)], {})


def test_for_the_process_too_an_option_wins_over_the_url():
    parsed = options.parse(["client://h:1/:2?log-rate=5&log-format=json", "--log-rate", "7"], {})
    assert (parsed.process.log_rate, parsed.process.log_format) == (7, "json")
