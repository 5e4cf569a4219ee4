import json
import pathlib
from contextlib import suppress

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nodepass_gevent import opening, wire
from nodepass_gevent.errors import ProtocolError
from nodepass_gevent.opening import FirstLine
from nodepass_gevent.wire import Kind, Launch, Lines, Ping, Unknown

VECTORS = json.loads((pathlib.Path(__file__).parent / "vectors" / "v1.json").read_text("utf-8"))
LIMITS = {"first": opening.MAX_FIRST_LINE, "later": wire.MAX_LINE}
NETWORKS = {"tcp": Kind.TCP, "udp": Kind.UDP}

fuzz = settings(max_examples=700, deadline=None, database=None)
linelike = st.text("/?&=#%0123456789abcdefA~.-\n ", max_size=40).map(str.encode)  # near the grammar
foreign = st.binary(max_size=80) | linelike | linelike.map(b"//".__add__)


def each(kind):
    return [pytest.param(vector, id=f"{vector['line']}: {vector['name']}") for vector in VECTORS[kind]]


def stream_of(vector):
    return vector["bytes"].encode("latin-1")


def parse(vector, stream):
    """Read a vector as a peer would: cut its only line out of the stream, then parse it."""
    lines = Lines(LIMITS[vector["line"]]).feed(stream)
    if not lines:
        raise ProtocolError("no newline before the end of stream")
    (line,) = lines
    return opening.parse_first_line(line) if vector["line"] == "first" else wire.parse_signal(line)


def expected(meaning):
    match meaning["kind"]:
        case "handshake":
            return FirstLine(meaning["data_port"], meaning["tls"])
        case "keep-alive":
            return Ping()
        case "launch":
            user = meaning.get("query", {}).get("from")
            kind = NETWORKS[meaning["network"]]
            return Launch(meaning["id"].encode(), kind, user and (user.split(":")[0], int(user.split(":")[1])))
        case "unknown":
            return Unknown(meaning["fragment"].encode())


@pytest.mark.parametrize("vector", each("valid"))
def test_a_valid_line_has_its_meaning(vector):
    parsed = parse(vector, stream_of(vector))
    assert parsed == expected(vector["meaning"])
    if vector["line"] == "first":
        query = {key: value.decode() for key, value in parsed.query.items()}
        assert query == vector["meaning"]["query"]


@pytest.mark.parametrize("vector", each("malformed"))
def test_a_malformed_line_is_refused(vector):
    with pytest.raises(ProtocolError) as caught:
        parse(vector, stream_of(vector))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("vector", [each_ for each_ in each("valid") if not each_.values[0]["meaning"].get("query")])
def test_what_is_written_is_what_the_vectors_say(vector):
    value = expected(vector["meaning"])
    formatted = {
        FirstLine: opening.format_first_line,
        Launch: wire.format_launch,
        Ping: lambda _: wire.PING,
        Unknown: lambda _: stream_of(vector),  # never written by this side
    }[type(value)](value)
    assert formatted == stream_of(vector)


def test_a_server_without_a_port_for_v1_says_off():
    assert opening.format_first_line(FirstLine(None, 2)) == b"//off#2\n"
    assert opening.parse_first_line(b"//off#2") == FirstLine(None, 2)


@given(st.integers(1, 65535), st.sampled_from(opening.TLS_MODES))
@fuzz
def test_a_first_line_survives_the_way_there_and_back(port, tls):
    first = FirstLine(port, tls)
    assert opening.parse_first_line(opening.format_first_line(first)[:-1]) == first


@given(st.binary(min_size=4, max_size=4), st.sampled_from(Kind))
@fuzz
def test_a_launch_survives_the_way_there_and_back(id, kind):
    launch = Launch(id.hex().encode(), kind)
    assert wire.parse_signal(wire.format_launch(launch)[:-1]) == launch


@given(foreign)
@example(b"//%30a1b2c3d#1")
@example(b"//x?a=%ff#9")
@fuzz
def test_foreign_bytes_give_a_value_or_a_protocol_error(line):
    for parser in (wire.parse_line, opening.parse_first_line, wire.parse_signal, wire.parse_id):
        with suppress(ProtocolError):
            parser(line)


def test_the_parts_of_a_line_are_given_with_their_values_decoded():
    parts = wire.parse_line(b"//some-host?from=%5B2001%3Adb8%3A%3A1%5D%3A443&v=2,3#3")
    assert (parts.host, parts.fragment) == (b"some-host", b"3")
    assert parts.query == {"from": b"[2001:db8::1]:443", "v": b"2,3"}


@pytest.mark.parametrize("id", [b"", b"0a1b2c3", b"0a1b2c3d4", b"0A1B2C3D", b"0a1b2c3\n", b"0a1b2c3d\n", b"0a1b 2c3"])
def test_an_id_is_eight_lower_case_hexadecimal_digits(id):
    assert wire.parse_id(b"0a1b2c3d") == b"0a1b2c3d"
    with pytest.raises(ProtocolError, match="not an id"):
        wire.parse_id(id)


# Lines


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
def test_lines_come_whole_however_the_stream_is_cut(step):
    stream = b"//4321#1\n\n\n//0a1b2c3d#2\n//0a1b"
    lines, cut = Lines(), []
    for start in range(0, len(stream), step):
        cut += lines.feed(stream[start : start + step])
    assert cut == [b"//4321#1", b"", b"", b"//0a1b2c3d#2"]
    assert lines.feed(b"2c3d#1\n") == [b"//0a1b2c3d#1"]  # the tail was kept


def test_a_line_may_have_the_limit_with_its_newline_and_no_byte_more():
    assert Lines(16).feed(b"a" * 15 + b"\n") == [b"a" * 15]
    assert Lines(16).feed(b"a" * 15) == []
    for too_long in (b"a" * 16, b"a" * 16 + b"\n", b"\n" + b"a" * 16, b"a" * 1000 + b"\n"):
        with pytest.raises(ProtocolError, match="more than 16 bytes"):
            Lines(16).feed(too_long)


def test_an_endless_line_is_refused_as_soon_as_it_reaches_the_limit():
    lines = Lines(16)
    for _ in range(15):
        assert lines.feed(b"a") == []
    with pytest.raises(ProtocolError):
        lines.feed(b"a")


@given(st.lists(foreign, max_size=20), st.integers(1, 64))
@fuzz
def test_lines_hold_back_less_than_the_limit_and_change_no_byte(pieces, limit):
    lines, fed, cut = Lines(limit), b"", []
    for piece in pieces:
        fed += piece
        try:
            cut += lines.feed(piece)
        except ProtocolError:
            assert any(len(line) >= limit for line in fed.split(b"\n"))
            return
        held_back = len(fed) - sum(len(line) + 1 for line in cut)
        assert 0 <= held_back < limit
    assert cut == fed.split(b"\n")[:-1]


# What is shown of a peer's bytes


def test_foreign_bytes_are_shown_escaped_and_on_one_line():
    assert wire.printable(b"\x1b[2J\r\nuser 'x' \xff") == r'"\x1b[2J\r\nuser ' + "'x' " + r'\xff"'


def test_what_is_shown_of_a_peer_is_cut():
    assert wire.printable(b"a" * 80) == "'" + "a" * 80 + "'"
    assert wire.printable(b"a" * 81) == "'" + "a" * 80 + "'..."


@given(foreign)
@fuzz
def test_whatever_a_peer_sends_is_printable_in_the_log(line):
    assert wire.printable(line).isprintable()
    assert len(wire.printable(line)) < 400
