import dataclasses
import math
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodepass_gevent.config import (
    SHOWN,
    Address,
    Config,
    Limits,
    did_you_mean,
    format_duration,
    parse_duration,
    printable,
    setting_name,
    setting_text,
    shown,
)
from nodepass_gevent.errors import ConfigError

fuzz = settings(max_examples=300, deadline=None, database=None)
TUNNEL, TARGET = Address("", 10101), Address("127.0.0.1", 8080)


def server(**values):
    return Config(role="server", tunnel=TUNNEL, target=TARGET, **values)


def client(**values):
    return Config(role="client", tunnel=TUNNEL, target=TARGET, **values)


# Text of errors


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("plain", "'plain'"),
        ("a\nb\x1b[31m", r"'a\nb\x1b[31m'"),
        ("caf\u00e9 \u202e", r"'caf\u00e9 \u202e'".replace(r"\u00e9", "\u00e9")),
        ("\udcff", r"'\udcff'"),
        ("np1:secret@host:1", "'***@host:1'"),
        ("a@b@c", "'***@c'"),
    ],
)
def test_foreign_text_is_escaped_and_what_may_be_a_key_is_hidden(text, escaped):
    assert shown(text) == escaped


@pytest.mark.parametrize("text", ["x" * 5000, "\x00" * 5000])
def test_long_foreign_text_is_cut(text):
    assert len(printable(text)) == SHOWN
    assert printable(text).endswith("...")


@pytest.mark.parametrize(
    ("word", "known", "hint"),
    [
        ("semaphor-limit", ["semaphore-limit", "log"], " (did you mean 'semaphore-limit'?)"),
        ("xyz", ["semaphore-limit", "log"], ""),
    ],
)
def test_a_misspelt_word_gets_a_hint_and_a_strange_one_none(word, known, hint):
    assert did_you_mean(word, known) == hint


# Addresses

ADDRESSES = [
    ("127.0.0.1:5432", Address("127.0.0.1", 5432)),
    (":10101", Address("", 10101)),
    ("0.0.0.0:0", Address("0.0.0.0", 0)),
    ("localhost:65535", Address("localhost", 65535)),
    ("my_host-1.example.com:80", Address("my_host-1.example.com", 80)),
    ("example.com.:80", Address("example.com.", 80)),
    ("[::]:8080", Address("::", 8080)),
    ("[::1]:80", Address("::1", 80)),
    ("[fe80::1%eth0]:80", Address("fe80::1%eth0", 80)),
    ("[::ffff:10.0.0.1]:80", Address("::ffff:10.0.0.1", 80)),
    (f"{'a' * 63}.{'b' * 63}.{'c' * 63}.{'d' * 61}:1", Address(f"{'a' * 63}.{'b' * 63}.{'c' * 63}.{'d' * 61}", 1)),
]


@pytest.mark.parametrize(("text", "address"), ADDRESSES)
def test_an_address_is_parsed_and_printed_back(text, address):
    assert Address.parse(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "has no port"),
        ("localhost", "has no port"),
        ("[::1]", "has no port"),
        ("localhost:", "the port is not a number"),
        ("localhost:65536", "the port is not a number from 0 to 65535"),
        ("localhost:-1", "the port is not a number"),
        ("localhost:+1", "the port is not a number"),
        ("localhost:0x50", "the port is not a number"),
        ("localhost:\u0661", "the port is not a number"),
        ("localhost:http", "the port is not a number"),
        ("localhost:1 ", "the port is not a number"),
        ("::1:80", "written in brackets: [::1]:80"),
        ("::1", "written in brackets"),
        ("::", "written in brackets"),
        ("a:b:80", "written in brackets"),
        ("[::1:80", "neither a name"),
        ("[]:80", "not an IPv6 address"),
        ("[127.0.0.1]:80", "not an IPv6 address"),
        ("[::1/64]:80", "not an IPv6 address"),
        ("[fe80::1%]:80", "not an interface"),
        ("[fe80::1%a b]:80", "not an interface"),
        ("256.1.1.1:80", "not an IPv4 address"),
        ("1.2.3:80", "not an IPv4 address"),
        ("10.0.0.01:80", "not an IPv4 address"),
        ("host name:80", "neither a name"),
        (" localhost:80", "neither a name"),
        ("local\thost:80", "neither a name"),
        ("host\n:80", "neither a name"),
        ("-host:80", "neither a name"),
        ("host-:80", "neither a name"),
        ("a..b:80", "neither a name"),
        (".:80", "neither a name"),
        ("b\u00fccher.example:80", "neither a name"),
        (f"{'a' * 64}:80", "neither a name"),
        (f"{'a' * 63}.{'b' * 63}.{'c' * 63}.{'d' * 62}:1", "neither a name"),
    ],
)
def test_a_wrong_address_is_refused_with_the_reason(text, why):
    with pytest.raises(ConfigError) as caught:
        Address.parse(text)
    assert why in str(caught.value)
    assert printable(text[:50]) in str(caught.value)


labels = st.text(string.ascii_letters + string.digits + "_", min_size=1, max_size=20)
hosts = (
    st.just("")
    | st.ip_addresses().map(str)
    | st.lists(labels, min_size=1, max_size=4).map(lambda parts: ".".join([*parts, "example"]))
)


@fuzz
@given(hosts, st.integers(0, 65535))
def test_any_address_survives_printing_and_parsing(host, port):
    assert Address.parse(str(Address(host, port))) == Address(host, port)


@fuzz
@given(st.text() | st.text("[]:%.01af-_@ "))
def test_any_text_is_an_address_or_a_config_error(text):
    try:
        address = Address.parse(text)
    except ConfigError as exc:
        assert str(exc).isprintable()
    else:
        assert Address.parse(str(address)) == address


# Durations: the rows are those of Go's own tests where they fit

NS, US, MS, S, M, H = 1, 10**3, 10**6, 10**9, 60 * 10**9, 3600 * 10**9

BOTH_WAYS = [
    ("0s", 0),
    ("1ns", NS),
    ("1.1\u00b5s", 1100 * NS),
    ("2.2ms", 2200 * US),
    ("3.3s", 3300 * MS),
    ("100ms", 100 * MS),
    ("5s", 5 * S),
    ("4m5s", 4 * M + 5 * S),
    ("4m5.001s", 4 * M + 5001 * MS),
    ("1m0s", M),
    ("1h0m0s", H),
    ("1h30m0s", H + 30 * M),
    ("5h6m7.001s", 5 * H + 6 * M + 7001 * MS),
    ("8m0.000000001s", 8 * M + 1),
    ("-5s", -5 * S),
    ("-1h0m0.5s", -H - 500 * MS),
    ("36h0m0s", 36 * H),
]


@pytest.mark.parametrize(("text", "ns"), BOTH_WAYS)
def test_a_duration_is_parsed_and_printed_back(text, ns):
    assert parse_duration(text) == ns / 10**9
    assert format_duration(ns / 10**9) == text


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("0", 0),
        ("-0", 0),
        ("+0", 0),
        ("30s", 30 * S),
        ("1478s", 1478 * S),
        ("+5s", 5 * S),
        ("5.0s", 5 * S),
        ("5.s", 5 * S),
        (".5s", 500 * MS),
        ("1.0040s", 1004 * MS),
        ("100.00100s", 100001 * MS),
        ("12us", 12 * US),
        ("12\u00b5s", 12 * US),
        ("12\u03bcs", 12 * US),
        ("1.5h", 90 * M),
        ("1h15m30.918273645s", H + 15 * M + 30918273645),
        ("1h1h", 2 * H),
        ("5s1h", H + 5 * S),
        ("10.5s4m", 4 * M + 10500 * MS),
        ("52763797000ns", 52763797000),
        ("0.3333333333333333333h", 20 * M),
        ("0.11111111111111111111h", 400 * S),
        ("0.9223372036854775807h", 3320413933267),
        ("0.100000000000000000000h", 6 * M),
        ("0.830103483285477580700h", 49 * M + 48 * S + 372539827),
        ("9223372036854775807ns", 2**63 - 1),
        ("9223372036854775.807us", 2**63 - 1),
        ("9223372036s854ms775us807ns", 2**63 - 1),
        ("-9223372036854775808ns", -(2**63)),
        ("-2562047h47m16.854775808s", -(2**63)),
        ("0.00000000000000000001s", 0),
    ],
)
def test_a_duration_is_read_as_go_reads_it(text, ns):
    assert parse_duration(text) == ns / 10**9


NO_DURATIONS = """
3 - s . -. .s +.s 1d 1w 1S 1Ms 5 1:30 1,5s 5s5 0.5.5s 1h-5m --1s 1e3s inf nan 0x5s 1_0s 00 \u0661s
3000000h 9223372036854775808ns 9223372036854775.808us -9223372036854775809ns
"""


@pytest.mark.parametrize("text", [*NO_DURATIONS.split(), "", "1 s", " 1s", "1s ", "1s\n", "1" * 5000 + "s"])
def test_what_go_refuses_is_no_duration(text):
    with pytest.raises(ConfigError, match="duration"):
        parse_duration(text)


@fuzz
@given(st.integers(0, 104 * 24 * H))
def test_any_duration_survives_printing_and_parsing(ns):
    assert parse_duration(format_duration(ns / 10**9)) == ns / 10**9


@fuzz
@given(st.text() | st.text("0123456789.hmsnu+-\u00b5"))
def test_any_text_is_a_duration_or_a_config_error(text):
    try:
        seconds = parse_duration(text)
    except ConfigError as exc:
        assert str(exc).isprintable()
    else:
        assert math.isfinite(seconds)
        assert parse_duration(format_duration(seconds)) == seconds


# Config


def test_the_defaults_are_those_of_the_original():
    config = server()
    texts = {setting_name(each.name): getattr(config, each.name) for each in dataclasses.fields(config)}
    for name in ("role", "tunnel", "target", "limits", "sources"):
        del texts[name]
    assert texts == {
        "name": "",
        "log": "info",
        "tls": 0,
        "crt": None,
        "key": None,
        "data-port": None,
        "network": "both",
        "protocol": "auto",
        "semaphore-limit": 1024,
        "min-pool-capacity": 16,
        "max-pool-capacity": 1024,
        "udp-data-buf-size": 8192,
        "udp-read-timeout": 5,
        "report-interval": 5,
        "reload-interval": 3600,
        "service-cooldown": 5,
        "shutdown-timeout": 5,
    }


def test_a_config_cannot_be_changed_but_replaced():
    config = server()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.tls = 1
    short = dataclasses.replace(config, limits=dataclasses.replace(config.limits, pool_wait_s=0.1))
    assert short.limits == Limits(pool_wait_s=0.1)
    assert short != config


def test_two_configs_from_different_sources_are_equal():
    assert server(sources={"tls": "default"}) == server(sources={"tls": "URL query"})


def test_a_config_names_its_tunnel_by_a_url():
    assert client().url == "client://:10101/127.0.0.1:8080"


@pytest.mark.parametrize(
    ("field", "least", "most"),
    [
        ("semaphore_limit", 1, 1048576),
        ("data_port", 1, 65535),
        ("udp_data_buf_size", 1, 65507),
        ("udp_read_timeout_s", 0.001, 86400),
        ("report_interval_s", 0.01, 3600),
        ("reload_interval_s", 0.01, 31536000),
        ("service_cooldown_s", 0.001, 86400),
        ("shutdown_timeout_s", 0, 86400),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_source_and_the_range(field, least, most):
    name = setting_name(field)
    for value in (least, most):
        assert getattr(server(**{field: value}), field) == value
    for value in (least - 0.0005 if field.endswith("_s") else least - 1, most + 1):
        with pytest.raises(ConfigError) as caught:
            server(**{field: value}, sources={name: "environment variable X"})
        allowed = f"{setting_text(field, least)} to {setting_text(field, most)}"
        value_text = setting_text(field, value)
        assert str(caught.value) == f"{name}: '{value_text}' is not within {allowed} [from environment variable X]"


@pytest.mark.parametrize(("least", "most"), [(0, 1), (1, 65537), (65537, 65537), (17, 16)])
def test_pool_capacities_stay_within_65536_and_in_order(least, most):
    with pytest.raises(ConfigError, match="pool-capacity"):
        server(min_pool_capacity=least, max_pool_capacity=most)
    assert server(min_pool_capacity=65536, max_pool_capacity=65536)


def test_a_pool_minimum_above_the_maximum_names_both_sources():
    with pytest.raises(ConfigError) as caught:
        server(max_pool_capacity=8, sources={"max-pool-capacity": "URL query"})
    assert str(caught.value) == (
        "min-pool-capacity: '16' is above max-pool-capacity, 8 (from URL query) [from default]"
    )


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("log", "inf", "log: 'inf' is not one of debug, info, warn, error, fatal (did you mean 'info'?)"),
        ("log", "INFO", "log: 'INFO' is not one of debug, info, warn, error, fatal (did you mean 'info'?)"),
        ("log", "verbose", "log: 'verbose' is not one of debug, info, warn, error, fatal"),
        ("tls", 3, "tls: '3' is not one of 0, 1, 2"),
        ("tls", -1, "tls: '-1' is not one of 0, 1, 2"),
        ("network", "", "network: '' is not one of tcp, udp, both"),
    ],
)
def test_a_wrong_choice_is_refused_with_the_choices(field, value, text):
    with pytest.raises(ConfigError) as caught:
        server(**{field: value})
    assert str(caught.value) == f"{text} [from default]"


def test_a_third_role_is_refused():
    with pytest.raises(ConfigError, match="role: 'master' is not one of server, client"):
        Config(role="master", tunnel=TUNNEL, target=TARGET)


@pytest.mark.parametrize("values", [{"crt": "a"}, {"key": "a"}, {"crt": "a", "tls": 2}, {"key": "a", "tls": 1}])
def test_certificate_and_key_come_together(values):
    with pytest.raises(ConfigError, match="give both crt and key"):
        server(**values)


def test_tls_2_needs_a_certificate_on_the_server_only():
    with pytest.raises(ConfigError, match="tls: '2' needs crt and key"):
        server(tls=2)
    assert server(tls=2, crt="a", key="b").tls == 2
    assert client(tls=2).tls == 2


@pytest.mark.parametrize("values", [{"crt": "a", "key": "b"}, {"data_port": 1}])
def test_what_belongs_to_the_server_is_refused_for_a_client(values):
    assert server(**values)
    with pytest.raises(ConfigError, match="belongs to the server"):
        client(**values)


@pytest.mark.parametrize(("tunnel", "target"), [(0, 80), (80, 0)])
def test_port_0_is_for_listeners_only(tunnel, target):
    addresses = {"tunnel": Address("h", tunnel), "target": Address("h", target)}
    assert Config(role="server", **addresses)
    with pytest.raises(ConfigError, match="a client needs ports from 1 to 65535"):
        Config(role="client", **addresses)


def test_a_port_cannot_be_listened_on_twice():
    with pytest.raises(ConfigError, match="data-port: '10101' is the tunnel port already"):
        server(data_port=10101)
    with pytest.raises(ConfigError, match="must differ"):
        Config(role="server", tunnel=TUNNEL, target=TUNNEL)
    assert Config(role="server", tunnel=TUNNEL, target=TUNNEL, network="udp")
    assert Config(role="server", tunnel=Address("", 0), target=Address("", 0))
