"""The lines of protocol v2, parsed beside formatted, by one table both ways."""

import base64
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodepass_gevent import opening, wire
from nodepass_gevent.errors import ProtocolError
from nodepass_gevent.opening import ClientProof, Data, FirstLine, Hello, ServerProof, Welcome
from nodepass_gevent.wire import Bye, Fail, Kind, Launch, Need

SESSION = bytes.fromhex("0123456789abcdef")
NONCE = bytes(range(16))
OPENINGS = [
    (b"//?v=2#hello", Hello()),
    (b"//site%20a%2F%C3%BC?v=2&c=need,udp#hello", Hello("site a/ü", frozenset((b"need", b"udp")))),
    (b"//0123456789abcdef?v=2#data", Data(SESSION)),
]
ID = b"0a1b2c3d"
SIGNALS = [
    (b"//3#need", Need(3)),
    (b"//#bye", Bye()),
    (b"//?why=busy#bye", Bye(b"busy")),
    (b"//0a1b2c3d?why=refused#fail", Fail(ID, b"refused")),
    (b"//0a1b2c3d#1", Launch(ID, Kind.TCP)),
    (b"//0a1b2c3d?from=192.0.2.1%3A443#1", Launch(ID, Kind.TCP, ("192.0.2.1", 443))),
    (b"//0a1b2c3d?from=%5B2001%3Adb8%3A%3A1%5D%3A65535#2", Launch(ID, Kind.UDP, ("2001:db8::1", 65535))),
]
WELCOMED = Welcome(SESSION, frozenset((b"need",)), 5, 1024)
FORMAT = {
    Hello: opening.format_hello,
    Data: opening.format_data,
    Launch: wire.format_launch,
    Fail: wire.format_fail,
    Need: wire.format_need,
    Bye: wire.format_bye,
}


@pytest.mark.parametrize(("line", "said"), OPENINGS)
def test_an_opening_is_read_and_written(line, said):
    assert opening.parse_opening(line) == said
    assert FORMAT[type(said)](said) == line + b"\n"


@pytest.mark.parametrize(("line", "signal"), SIGNALS)
def test_a_signal_is_read_and_written(line, signal):
    assert wire.parse_signal(line) == signal
    assert FORMAT[type(signal)](signal) == line + b"\n"


def test_a_bye_may_have_an_empty_query():
    """In place of a welcome, too."""
    for parse in (wire.parse_signal, opening.parse_welcome, opening.parse_server_proof):
        assert parse(b"//?#bye") == Bye()


@pytest.mark.parametrize(
    ("sockaddr", "written"),
    [
        (("::ffff:192.0.2.1", 443, 0, 0), b"192.0.2.1%3A443"),
        (("fe80::1%eth0", 443, 0, 2), b"%5Bfe80%3A%3A1%5D%3A443"),
    ],
)
def test_a_user_is_named_without_zone_and_by_ipv4_where_that_is_mapped(sockaddr, written):
    assert wire.format_launch(Launch(ID, Kind.TCP, sockaddr)) == b"//0a1b2c3d?from=%b#1\n" % written


def test_a_user_named_in_another_form_is_known_by_the_canonical_one():
    for written, user in (
        (b"%5B2001%3ADB8%3A0%3A0%3A%3A1%5D%3A443", ("2001:db8::1", 443)),
        (b"%5B%3A%3Affff%3A192.0.2.1%5D%3A443", ("192.0.2.1", 443)),
    ):
        assert wire.parse_signal(b"//0a1b2c3d?from=%b#1" % written).user == user


@pytest.mark.parametrize(
    "written",
    [
        b"", b"192.0.2.1", b"192.0.2.1%3A", b"192.0.2.1%3A0", b"192.0.2.1%3A65536", b"192.0.2.256%3A1",
        b"010.0.0.1%3A1", b"2001%3Adb8%3A%3A1%3A443", b"%5B192.0.2.1%5D%3A1", b"%5Bfe80%3A%3A1%25eth0%5D%3A1",
        b"localhost%3A80", b"192.0.2.1%3A1%0D%0APROXY", b"192.0.2.1%3A1%0A", b"%D9%A1.0.0.1%3A1", b"1.1.1.1%3A%D9%A1",
    ],
)  # fmt: skip
def test_a_user_that_is_no_address_is_not_known(written):
    assert wire.parse_signal(b"//0a1b2c3d?from=%b#1" % written) == Launch(ID, Kind.TCP)


def test_a_welcome_is_read_and_written():
    line = b"//0123456789abcdef?c=need&i=5&p=1024#welcome"
    assert opening.parse_welcome(line) == WELCOMED
    assert opening.format_welcome(WELCOMED) == line + b"\n"
    assert opening.parse_welcome(b"//?why=busy#bye") == Bye(b"busy")
    with pytest.raises(ProtocolError, match="not a welcome: "):
        opening.parse_welcome(line.replace(b"#welcome", b"#hello"))


def test_a_welcome_without_an_interval_leaves_the_server_a_second_to_be_heard():
    assert opening.parse_welcome(b"//0123456789abcdef?i=0&p=1#welcome").ping_interval_s == 1


def test_a_name_that_is_no_text_is_read_all_the_same():
    assert opening.parse_opening(b"//%ff?v=2#hello") == Hello("\ufffd")


def test_an_offer_is_written_and_recognised():
    line = opening.format_first_line(FirstLine(None, 1), NONCE)
    assert line == b"//off?v=2&n=AAECAwQFBgcICQoLDA0ODw#1\n"
    assert opening.offers_v2(opening.parse_first_line(line[:-1]))
    assert not opening.offers_v2(opening.parse_first_line(b"//1234#0"))
    assert not opening.offers_v2(opening.parse_first_line(b"//1234?v=3&n=x#0"))
    assert not opening.offers_v2(opening.parse_first_line(b"//1234?v=12&n=x#0"))


def test_without_an_offer_no_port_is_named_for_its_data_connections():
    """A server of protocol=1 with reuse-port: the line would be none."""
    assert opening.format_first_line(FirstLine(1234, 0), data_port=1234) == b"//1234#0\n"
    assert opening.format_first_line(FirstLine(1234, 0), NONCE, data_port=1234).endswith(b"&d=1234#0\n")


HTTP = "it speaks HTTP: most often a browser or a scanner, perhaps a client of NodePass 1.13 or later"
OLD = "it sent one line of no known protocol; perhaps it is a client of NodePass 1.4 to 1.12"


@pytest.mark.parametrize(
    ("said", "named"),
    [
        (b"GET / HTTP/1.1\r\n", HTTP),
        (b"POST /api HTTP/1.1\r\n", HTTP),
        (b"PRI * HTTP/2.0\r\n", HTTP),
        (b"\x16\x03\x01\x02\x00", "it speaks TLS"),
        (b"SSH-2.0-OpenSSH\r\n", "it speaks SSH"),
        (b"//1234?v=9#hello\n", "it speaks a later profile of this protocol"),
        (base64.b64encode(b"8 bytes.") + b"\n", OLD),
        (base64.b64encode(bytes(16)), OLD),
        (b"hello\n", "it speaks no known protocol"),
        (b"password\n", "it speaks no known protocol"),  # base64, but of too little
        (b"ConnectionTest1\n", "it speaks no known protocol"),  # of no base64 is the length 15
        (base64.b64encode(b"8 bytes.") + b"=\n", "it speaks no known protocol"),
        (base64.b64encode(b"8 bytes.") + b"\n\n", "it speaks no known protocol"),
        (b"", "it speaks no known protocol"),
    ],
)
def test_who_speaks_another_protocol_is_told_by_the_first_bytes(said, named):
    assert opening.recognise(said) == named


# The tunnel key

VECTORS = json.loads((Path(__file__).parent / "vectors" / "psk1.json").read_text())
CLIENT_NONCE, TAG = bytes(range(16)), bytes(range(32))
N, M, S = b"n=AAECAwQFBgcICQoLDA0ODw", b"m=AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8", b"s=ASNFZ4mrze8"


@pytest.mark.parametrize("case", VECTORS, ids=lambda case: case["case"])
def test_the_recorded_lines_of_the_tunnel_key_are_read_and_written(case):
    first = opening.parse_first_line(case["first"].encode())
    assert opening.offers_v2(first) and first.query["a"] == b"psk1"
    assert opening.format_first_line(first, NONCE, keyed=True) == case["first"].encode() + b"\n"
    assert opening.format_hello(Hello()) == case["hello"].encode() + b"\n"
    nonce, tag, session, server_tag = (
        bytes.fromhex(case[name]) for name in ("client_nonce", "client_tag", "session_id", "server_tag")
    )
    proof = ClientProof(nonce, tag)
    assert opening.parse_client_proof(case["auth_c"].encode()) == proof
    assert opening.format_client_proof(proof) == case["auth_c"].encode() + b"\n"
    answer = opening.format_server_proof(ServerProof(server_tag, Welcome(session, frozenset(), 5, 1024)))
    assert answer == case["auth_s"].encode().removesuffix(b"#s") + b"&c=&i=5&p=1024#s\n"


def test_a_proof_is_read_and_written_with_its_terms():
    line = b"//auth?%b&%b&c=need,udp#c" % (N, M)
    proof = ClientProof(CLIENT_NONCE, TAG, frozenset((b"need", b"udp")))
    assert opening.parse_client_proof(line) == proof
    assert opening.format_client_proof(proof) == line + b"\n"
    line = b"//auth?%b&%b&c=need&i=5&p=1024#s" % (S, M)
    assert opening.parse_server_proof(line) == ServerProof(TAG, WELCOMED)
    assert opening.format_server_proof(ServerProof(TAG, WELCOMED)) == line + b"\n"
    assert opening.parse_server_proof(b"//?why=busy#bye") == Bye(b"busy")
    assert opening.parse_client_proof(b"//auth?later=1&%b&%b#c" % (M, N)) == ClientProof(CLIENT_NONCE, TAG)


@pytest.mark.parametrize(
    "line",
    [
        b"", b"//auth#c", b"//auth?%b#c" % N, b"//auth?%b#c" % M, b"//auth?%b&%b#s" % (N, M), b"//a?%b&%b#c" % (N, M),
        b"//auth?%b&%b#c" % (N, M[:-1]), b"//auth?%b&%bA#c" % (N, M), b"//auth?%b&%b=#c" % (N, M),
        b"//auth?%b&%b9#c" % (N, M[:-1]), b"//auth?%b&%b&%b#c" % (N, M, M), b"//auth?%bA&%b#c" % (N, M),
        b"//auth?n=&m=#c", b"//?v=2#hello",
    ],
)  # fmt: skip
def test_a_malformed_proof_is_refused(line):
    with pytest.raises(ProtocolError):
        opening.parse_client_proof(line)


@pytest.mark.parametrize(
    "line",
    [
        b"", b"//auth?%b&%b#s" % (S, M), b"//auth?%b&%b&i=5#s" % (S, M), b"//auth?%b&%b&i=5&p=x#s" % (S, M),
        b"//auth?%b&%b&i=x&p=5#s" % (S, M),
        b"//auth?%b&i=5&p=1#s" % M, b"//auth?%b&i=5&p=1#s" % S, b"//auth?%bA&%b&i=5&p=1#s" % (S, M),
        b"//auth?%b&%b&i=5&p=1#c" % (S, M), b"//0123456789abcdef?c=need&i=5&p=1024#welcome",
    ],
)  # fmt: skip
def test_a_malformed_answer_to_a_proof_is_refused(line):
    with pytest.raises(ProtocolError):
        opening.parse_server_proof(line)


@pytest.mark.parametrize("nonce", [b"", b"AAEC", b"A", b"AAECAwQFBgcICQoLDA0ODx", b"A" * 23, b"~" * 22])
def test_an_offer_with_a_nonce_that_is_none_is_refused(nonce):
    with pytest.raises(ProtocolError):
        opening.offers_v2(opening.parse_first_line(b"//1234?v=2&n=%b#0" % nonce))


@pytest.mark.parametrize(
    "line",
    [
        b"//?v=1#hello", b"//#hello", b"//?v=2#Hello", b"//0123456789ABCDEF?v=2#data", b"//0123?v=2#data",
        b"//?v=2#data", b"//%zz?v=2#hello", b"//?v=2&v=2#hello", b"//?v=2#hello#", b"", b"//?v=2#hello\r",
    ],
)  # fmt: skip
def test_a_malformed_opening_is_refused(line):
    with pytest.raises(ProtocolError):
        opening.parse_opening(line)


def test_the_opening_of_a_data_connection_is_as_short_as_a_signal():
    """255 bytes, and the newline."""
    line = b"//0123456789abcdef?v=2&later=%b#data"
    assert opening.parse_opening(line % (b"x" * (255 - len(line % b"")))) == Data(SESSION)
    with pytest.raises(ProtocolError, match="more than 256 bytes"):
        opening.parse_opening(line % (b"x" * (256 - len(line % b""))))


@pytest.mark.parametrize(
    "line", [b"//x#need", b"//-1#need", b"//#need", b"//1234567890#need", b"//?x#bye", b"//1#fail"]
)
def test_a_malformed_signal_is_refused(line):
    with pytest.raises(ProtocolError):
        wire.parse_signal(line)


@settings(deadline=None, database=None)
@given(st.binary(max_size=300) | st.from_regex(rb"//[0-9a-f?&=a-z#%]{0,60}", fullmatch=True))
def test_parsers_raise_nothing_but_their_error(line):
    for parse in (
        opening.parse_client_proof,
        opening.parse_server_proof,
        opening.parse_opening,
        opening.parse_welcome,
        wire.parse_signal,
        opening.parse_first_line,
    ):
        try:
            parse(line)
        except ProtocolError:
            pass
