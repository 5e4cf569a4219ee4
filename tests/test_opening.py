"""The lines of protocol v2, parsed beside formatted, by one table both ways."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodepass_gevent import opening, wire
from nodepass_gevent.errors import ProtocolError
from nodepass_gevent.opening import Data, FirstLine, Hello, Welcome
from nodepass_gevent.wire import Bye, Need

SESSION = bytes.fromhex("0123456789abcdef")
NONCE = bytes(range(16))
OPENINGS = [
    (b"//?v=2&c=#hello", Hello()),
    (b"//site%20a%2F%C3%BC?v=2&c=need,udp#hello", Hello("site a/ü", frozenset((b"need", b"udp")))),
    (b"//0123456789abcdef?v=2#data", Data(SESSION)),
]
SIGNALS = [(b"//3#need", Need(3)), (b"//#bye", Bye()), (b"//?why=busy#bye", Bye(b"busy"))]
WELCOMED = Welcome(SESSION, frozenset((b"need",)), 5, 1024)
FORMAT = {Hello: opening.format_hello, Data: opening.format_data, Need: wire.format_need, Bye: wire.format_bye}


@pytest.mark.parametrize(("line", "said"), OPENINGS)
def test_an_opening_is_read_and_written(line, said):
    assert opening.parse_opening(line) == said
    assert FORMAT[type(said)](said) == line + b"\n"


@pytest.mark.parametrize(("line", "signal"), SIGNALS)
def test_a_signal_is_read_and_written(line, signal):
    assert wire.parse_signal(line) == signal
    assert FORMAT[type(signal)](signal) == line + b"\n"


def test_a_bye_may_have_an_empty_query():
    assert wire.parse_signal(b"//?#bye") == Bye()


def test_a_welcome_is_read_and_written():
    line = b"//0123456789abcdef?c=need&i=5&p=1024#welcome"
    assert opening.parse_welcome(line) == WELCOMED
    assert opening.format_welcome(WELCOMED) == line + b"\n"
    assert opening.parse_welcome(b"//?why=busy#bye") == Bye(b"busy")


def test_an_offer_is_written_and_recognised():
    line = opening.format_first_line(FirstLine(None, 1), NONCE)
    assert line == b"//off?v=2&n=AAECAwQFBgcICQoLDA0ODw#1\n"
    assert opening.offers_v2(opening.parse_first_line(line[:-1]))
    assert not opening.offers_v2(opening.parse_first_line(b"//1234#0"))
    assert not opening.offers_v2(opening.parse_first_line(b"//1234?v=3&n=x#0"))


@pytest.mark.parametrize("nonce", [b"", b"AAEC", b"AAECAwQFBgcICQoLDA0ODx", b"A" * 23, b"~" * 22])
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


@pytest.mark.parametrize("line", [b"//x#need", b"//-1#need", b"//#need", b"//1234567890#need", b"//?x#bye"])
def test_a_malformed_signal_is_refused(line):
    with pytest.raises(ProtocolError):
        wire.parse_signal(line)


@given(st.binary(max_size=300) | st.from_regex(rb"//[0-9a-f?&=a-z#%]{0,60}", fullmatch=True))
def test_parsers_raise_nothing_but_their_error(line):
    for parse in (opening.parse_opening, opening.parse_welcome, wire.parse_signal, opening.parse_first_line):
        try:
            parse(line)
        except ProtocolError:
            pass
