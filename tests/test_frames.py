"""Frames of datagrams: whole, byte by byte, in any pieces, and hostile."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodepass_gevent.errors import ProtocolError
from nodepass_gevent.frames import LENGTH, MAX_DATAGRAM, Frames, format_frame

fuzz = settings(max_examples=500, deadline=None, database=None)
SIZES = [0, 1, 255, 256, 1200, MAX_DATAGRAM]


def held(frames):
    return len(frames._rest)


def feed(frames, *pieces):
    """Feed pieces as the relay does, from a buffer that is used again at once; give the datagrams."""
    datagrams = []
    for piece in pieces:
        buffer = bytearray(piece)
        datagrams += map(bytes, frames.feed(memoryview(buffer)))
        buffer[:] = bytes(len(buffer))
    return datagrams


def cut(stream, places):
    places = [0, *sorted(places), len(stream)]
    return [stream[start:end] for start, end in itertools.pairwise(places)]


@pytest.mark.parametrize(("datagram", "frame"), [(b"", b"\0\0"), (b"a", b"\0\1a"), (b"x" * 258, b"\1\2" + b"x" * 258)])
def test_a_frame_is_the_length_in_network_order_and_the_datagram(datagram, frame):
    assert format_frame(datagram) == frame
    assert feed(Frames(), frame) == [datagram]


@pytest.mark.parametrize("size", SIZES)
def test_a_datagram_of_any_size_survives_byte_by_byte(size):
    datagram = (bytes(range(256)) * 256)[:size]
    frames = Frames()
    stream = format_frame(datagram) * 2
    assert feed(frames, *(stream[at : at + 1] for at in range(len(stream)))) == [datagram] * 2
    assert held(frames) == 0


@given(st.lists(st.binary(max_size=300), max_size=20), st.data())
@fuzz
def test_datagrams_survive_in_whatever_pieces_they_come(datagrams, data):
    stream = b"".join(map(format_frame, datagrams))
    places = data.draw(st.lists(st.integers(0, len(stream)), max_size=30))
    frames = Frames()
    assert feed(frames, *cut(stream, places)) == datagrams
    assert held(frames) == 0


@given(st.lists(st.binary(max_size=4000), max_size=20))
@fuzz
def test_foreign_bytes_give_datagrams_or_a_protocol_error_and_are_not_kept(pieces):
    frames = Frames()
    try:
        for piece in pieces:
            feed(frames, piece)
            assert held(frames) < LENGTH + MAX_DATAGRAM
    except ProtocolError:
        pass


@pytest.mark.parametrize("before", [b"", format_frame(b"good")])
@pytest.mark.parametrize("size", [MAX_DATAGRAM + 1, 65535])
def test_a_frame_longer_than_any_datagram_is_refused_at_its_length(before, size):
    length = size.to_bytes(2, "big")
    with pytest.raises(ProtocolError, match=f"a frame of {size} bytes"):
        feed(Frames(), before + length)
    with pytest.raises(ProtocolError):
        feed(Frames(), before + length[:1], length[1:])
    with pytest.raises(ProtocolError):
        feed(Frames(), before + length + bytes(size))


def test_a_frame_that_is_not_whole_is_kept_and_no_byte_more():
    frames = Frames()
    assert feed(frames, format_frame(b"first") + format_frame(b"second")[:-1]) == [b"first"]
    assert held(frames) == LENGTH + 5
    assert feed(frames, b"d" + b"\0") == [b"second"]
    assert held(frames) == 1
