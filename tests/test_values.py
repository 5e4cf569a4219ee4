import ipaddress
import math
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodepass_gevent.errors import ConfigError
from nodepass_gevent.values import (
    SHOWN,
    Address,
    Networks,
    Pins,
    did_you_mean,
    format_duration,
    parse_duration,
    printable,
    shown,
    shown_path,
    unmapped,
)

HEX = "4e07408562bedb8b60ce05c1decfe3ad16b72230967de01f640b7e4729b49fce"
BASE64 = "TgdAhWK+24tgzgXB3s/jrRa3IjCWfeAfZAt+Rym0n84="  # the same bytes
fuzz = settings(max_examples=300, deadline=None, database=None)


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


@pytest.mark.parametrize(
    ("path", "quoted"),
    [
        ("/run/credentials/nodepass@web.service/tunnel.key", "'/run/credentials/nodepass@web.service/tunnel.key'"),
        ("a@b\n", r"'a@b\n'"),
        ("client://s3cret@h:1/:2", "'***@h:1/:2'"),
        ("np1:s3cret", "'np1:***'"),
    ],
)
def test_the_name_of_a_file_is_shown_whole_unless_it_is_a_url(path, quoted):
    assert shown_path(path) == quoted


@pytest.mark.parametrize("text", ["x" * 5000, "\x00" * 5000])
def test_long_foreign_text_is_cut(text):
    assert len(printable(text)) == SHOWN
    assert printable(text).endswith("...")


@pytest.mark.parametrize(
    ("word", "known", "hint"),
    [
        ("semaphor-limit", ["semaphore-limit", "log"], " (did you mean 'semaphore-limit'?)"),
        ("xyz", ["semaphore-limit", "log"], ""),
        ("loglevel", ["lo", "log", "tls"], " (did you mean 'log'?)"),
        ("idle", ["idle-timeout", "log"], " (did you mean 'idle-timeout'?)"),
        ("udp", ["udp-dial-timeout", "udp-read-timeout"], ""),  # which?
        ("--token", ["--key"], ""),  # the dashes alone make nothing alike
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
    ("[::ffff:169.254.0.1]:80", Address("::ffff:169.254.0.1", 80)),  # IPv4 has no zones
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
        ("8080", "has no port (did you mean :8080?)"),
        ("[::1]", "has no port"),
        ("localhost:", "the port is not a number"),
        ("localhost:65536", "the port is not a number from 0 to 65535"),
        ("localhost:-1", "the port is not a number"),
        ("localhost:+1", "the port is not a number"),
        ("localhost:0x50", "the port is not a number"),
        ("localhost:\u0661", "the port is not a number"),
        ("localhost:http", "the port is not a number"),
        ("localhost:1 ", "the port is not a number"),
        ("http://127.0.0.1:80/", "'http://127.0.0.1:80/' is a URL; an address is host:port alone"),
        ("::1:80", "written in brackets: [::1]:80"),
        ("::1", "written in brackets"),
        ("::", "written in brackets"),
        ("a:b:80", "written in brackets"),
        ("[::1:80", "neither a name"),
        ("[]:80", "not an IPv6 address"),
        ("[127.0.0.1]:80", "not an IPv6 address"),
        ("[::1/64]:80", "not an IPv6 address"),
        ("[fe80::1%]:80", "not an interface"),
        ("[fe80::1]:80", "'[fe80::1]:80': a link-local address needs its interface, such as [fe80::1%eth0]"),
        ("[febf::1]:80", "needs its interface"),
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


LINK_LOCAL = ipaddress.ip_network("fe80::/10")
labels = st.text(string.ascii_letters + string.digits + "_", min_size=1, max_size=20)
hosts = (
    st.just("")
    | st.ip_addresses().map(lambda address: f"{address}%eth0" if address in LINK_LOCAL else str(address))
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


# Networks

NETWORKS = [
    ("192.0.2.1", "192.0.2.1", ["192.0.2.1", "::ffff:192.0.2.1"], ["192.0.2.2", "::192.0.2.1"]),
    ("10.0.0.0/8", "10.0.0.0/8", ["10.255.0.1", "::ffff:10.0.0.1"], ["11.0.0.1", "::1"]),
    ("2001:db8::/32", "2001:db8::/32", ["2001:db8:ffff::1"], ["2001:db9::1", "1.2.3.4"]),
    ("2001:DB8:0:0::1", "2001:db8::1", ["2001:db8::1"], ["2001:db8::2"]),
    ("fe80::/10", "fe80::/10", ["fe80::1%lo", "fe80::1"], ["fec0::1"]),
    ("::ffff:10.0.0.0/104", "10.0.0.0/8", ["10.1.1.1", "::ffff:10.1.1.1"], ["11.0.0.1", "::1"]),
    ("::ffff:10.0.0.1", "10.0.0.1", ["10.0.0.1"], ["10.0.0.2"]),
    ("0.0.0.0/0", "0.0.0.0/0", ["1.2.3.4", "::ffff:1.2.3.4"], ["::1"]),
    ("::/0", "::/0", ["::1"], ["1.2.3.4", "::ffff:1.2.3.4"]),
    ("10.0.0.0/255.0.0.0", "10.0.0.0/8", ["10.0.0.1"], ["11.0.0.1"]),
    ("192.0.2.1, ::1 ,10.0.0.0/8", "192.0.2.1,::1,10.0.0.0/8", ["::1", "10.0.0.1"], ["192.0.2.2"]),
]


@pytest.mark.parametrize(("text", "canonical", "inside", "outside"), NETWORKS)
def test_networks_are_parsed_and_printed_and_hold_what_they_name(text, canonical, inside, outside):
    networks = Networks.parse(text)
    assert str(networks) == canonical
    assert Networks.parse(canonical) == networks
    assert [unmapped(host) in networks for host in inside] == [True] * len(inside)
    assert [unmapped(host) in networks for host in outside] == [False] * len(outside)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("10.0.0.1/8", "'10.0.0.1/8' has bits behind its prefix; the network is written 10.0.0.0/8"),
        ("::1,2001:db8::1/32", "'2001:db8::1/32' has bits behind its prefix; the network is written 2001:db8::/32"),
        ("", "'' is neither an address nor a network such as 192.0.2.0/24 or 2001:db8::/32"),
        ("10.0.0.1,", "'' is neither"),
        ("localhost", "'localhost' is neither"),
        ("10.0.0.0/33", "'10.0.0.0/33' is neither"),
        ("10.0.0", "'10.0.0' is neither"),
        ("10.0.0.01", "'10.0.0.01' is neither"),
        ("[::1]", "'[::1]' is neither"),
        ("10.0.0.1:80", "'10.0.0.1:80' is neither"),
        ("10.0.0.1 10.0.0.2", "'10.0.0.1 10.0.0.2' is neither"),
        ("10.0.0.0/8/8", "'10.0.0.0/8/8' is neither"),
        ("fe80::1%lo/64", "is neither"),
        ("10.0.0.1\n", "'10.0.0.1\\n' is neither"),
        ("x" * 5000, "is neither"),
    ],
)
def test_wrong_networks_are_refused_with_the_reason(text, why):
    with pytest.raises(ConfigError) as caught:
        Networks.parse(text)
    assert why in str(caught.value)
    assert len(str(caught.value)) < 300


@fuzz
@given(st.lists(st.ip_addresses(network="::/0") | st.ip_addresses(v=4), min_size=1, max_size=4))
def test_any_address_is_in_the_network_of_itself(addresses):
    networks = Networks.parse(",".join(map(str, addresses)))
    assert all(unmapped(str(address)) in networks for address in addresses)


@fuzz
@given(st.text() | st.text("0123456789.:/,af% "))
def test_any_text_is_networks_or_a_config_error(text):
    try:
        networks = Networks.parse(text)
    except ConfigError as exc:
        assert str(exc).isprintable()
    else:
        assert Networks.parse(str(networks)) == networks


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


# Pins


@pytest.mark.parametrize(
    "text",
    [
        HEX, HEX.upper(), f"sha256:{HEX}", f"SHA256:{HEX}", f"sha256//{HEX}", BASE64, f"sha256//{BASE64}",
        f"sha256:{BASE64}", f"sha256/{BASE64}", f"SHA-256:{BASE64.rstrip('=')}", BASE64.translate({43: 45, 47: 95}),
        bytes.fromhex(HEX).hex(":"), f"sha256:{bytes.fromhex(HEX).hex(':').upper()}", f"sha256://{BASE64}",
    ],
)  # fmt: skip
def test_a_pin_is_read_as_openssl_and_curl_write_it(text):
    assert Pins.parse(text).digests == (bytes.fromhex(HEX),)


def test_several_pins_are_separated_by_commas_or_as_curl_does():
    other = "0" * 64
    pins = Pins((bytes.fromhex(HEX), bytes(32)))
    assert Pins.parse(f"sha256:{HEX},sha256:{other}") == Pins.parse(f"sha256//{BASE64};{other}") == pins
    assert str(pins) == f"sha256:{HEX},sha256:{other}"
    assert Pins.parse(str(pins)) == pins


@pytest.mark.parametrize(
    "text",
    ["", ",", f"{HEX},", HEX[:-1], HEX + "0", BASE64 + "=", BASE64[:-2], "sha1:" + HEX, "sha256:", "x" * 500, "\n"],
)
def test_what_is_no_pin_is_refused(text):
    with pytest.raises(ConfigError, match="is not a pin: sha256: and 64 hexadecimal digits") as caught:
        Pins.parse(text)
    assert str(caught.value).isprintable()
