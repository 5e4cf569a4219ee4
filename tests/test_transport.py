import contextlib
import errno
import os
import socket
import sys
from unittest.mock import Mock

import gevent
import pytest
from gevent.socket import wait_read
from support import Flooded, bounded, is_reset, read_all, read_exactly, reset, segments_out, wait_until

from nodepass_gevent.errors import ProtocolError
from nodepass_gevent.transport import Stream

SHORT_S = 0.05


def test_read_line_takes_the_line_and_not_a_byte_behind_it(pair):
    stream, peer = pair()
    peer.sendall(b"//4321#1\n\nnot a line")
    with bounded():
        assert stream.read_line(1024) == b"//4321#1"
        assert stream.read_line(1024) == b""
        assert stream.recv_exactly(10) == b"not a line"


def test_read_line_puts_a_line_together_from_single_bytes(pair, spawn):
    stream, peer = pair()
    reading = spawn(stream.read_line, 1024)
    for byte in b"//4321#1\n":
        peer.sendall(bytes([byte]))
        gevent.sleep(0)
    assert reading.get(timeout=5) == b"//4321#1"


@pytest.mark.parametrize("too_long", [b"b" * 16, b"b" * 16 + b"\n", b"b" * 1000 + b"\n"])
def test_read_line_keeps_its_limit(too_long, pair):
    stream, peer = pair()
    peer.sendall(b"a" * 15 + b"\n" + too_long)
    with bounded():
        assert stream.read_line(16) == b"a" * 15
        with pytest.raises(ProtocolError, match="more than 16 bytes"):
            stream.read_line(16)


def test_read_line_needs_the_newline_before_the_end(pair):
    stream, peer = pair()
    peer.sendall(b"//4321#1")
    peer.close()
    with bounded(), pytest.raises(ConnectionAbortedError):
        stream.read_line(1024)


@pytest.mark.parametrize(
    "pieces", [[b"//4321#1\n0a1b2c3dxyz"], [b"//43", b"21#1\n0a1", b"b2c3dxyz"]], ids=["whole", "pieces"]
)
def test_what_stands_behind_a_line_is_read_and_not_a_byte_more(pieces, pair, spawn):
    stream, peer = pair()
    reading = spawn(stream.read_behind_line, 1024, 8)
    for piece in pieces:
        peer.sendall(piece)
        gevent.sleep(0)
    assert reading.get(timeout=5) == b"0a1b2c3d"
    with bounded():
        assert stream.recv(100) == b"xyz"


@pytest.mark.parametrize("before", [b"", b"//43", b"//4321#1\n0a1"])
def test_what_stands_behind_a_line_has_to_come_before_the_end(before, pair, spawn):
    stream, peer = pair()
    reading = spawn(stream.read_behind_line, 1024, 8)
    gevent.sleep(0)
    peer.sendall(before)
    peer.close()
    with pytest.raises(ConnectionAbortedError):
        reading.get(timeout=5)


@pytest.mark.parametrize("line", [b"a" * 16 + b"\n", b"a" * 20 + b"\n"])
def test_what_stands_behind_a_line_over_the_limit_is_not_read(line, pair):
    stream, peer = pair()
    peer.sendall(line + b"0a1b2c3d")
    with bounded(), pytest.raises(ProtocolError, match="more than 16 bytes"):
        stream.read_behind_line(16, 8)


def test_recv_exactly_waits_for_the_last_byte(pair, spawn):
    stream, peer = pair()
    reading = spawn(stream.recv_exactly, 8)
    for piece in (b"0a1b", b"2c3", b"dxyz"):
        peer.sendall(piece)
        gevent.sleep(0)
    assert reading.get(timeout=5) == b"0a1b2c3d"
    assert stream.recv(100) == b"xyz"


def test_recv_exactly_says_how_much_came_before_the_end(pair):
    stream, peer = pair()
    peer.sendall(b"0a1")
    peer.close()
    with bounded(), pytest.raises(ConnectionAbortedError, match="after 3 of 8 bytes"):
        stream.recv_exactly(8)


def test_sendall_goes_as_fast_as_the_peer_reads(pair, spawn):
    stream, peer = pair()
    data = os.urandom(1 << 20) * 16  # more than the kernel keeps
    sending = spawn(stream.sendall, data)
    assert read_exactly(peer, 1 << 20) == data[: 1 << 20]
    assert not sending.ready()
    assert read_exactly(peer, len(data) - (1 << 20)) == data[1 << 20 :]
    sending.get(timeout=5)


def test_what_is_said_does_not_wait_for_the_peer(pair):
    stream, peer = pair()
    stream.say(b"hello")
    assert read_exactly(peer, 5) == b"hello"
    while stream.push(bytes(65536)):
        pass
    with pytest.raises(OSError) as caught:
        stream.say(b"hello")
    assert caught.value.errno == errno.ENOBUFS


def test_the_last_bytes_and_the_end_of_stream_share_a_segment(pair):
    stream, peer = pair()
    before = segments_out(stream)
    stream.send_last(b"answer")
    assert read_all(peer) == b"answer"
    assert segments_out(stream) == before + 1
    peer.sendall(b"more")
    with bounded():
        assert stream.recv_exactly(4) == b"more"


def test_last_bytes_that_are_more_than_the_kernel_keeps_arrive_whole(pair, spawn):
    stream, peer = pair()
    data = os.urandom(1 << 20) * 16
    sending = spawn(stream.send_last, data)
    assert read_all(peer) == data
    sending.get(timeout=5)


def test_unacknowledged_counts_what_the_peer_has_no_room_for(pair, spawn):
    stream, peer = pair()
    assert stream.unacknowledged() == 0
    data = bytes(16 << 20)
    spawn(stream.sendall, data)
    wait_until(lambda: stream.unacknowledged() > 0)
    assert read_exactly(peer, len(data)) == data
    wait_until(lambda: stream.unacknowledged() == 0)


def test_a_dead_path_ends_a_connection_after_the_time_that_was_set(pair):
    stream, _ = pair()
    stream.fail_when_unacknowledged(20)
    assert stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 20_000


LOCAL = ("127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1")
ELSEWHERE = ("192.0.2.127", "::2", "::1:2", "2001:db8::1", "::ffff:192.0.2.1")


def congestion(default, host):
    """Make a Stream to a host ready for bulk, where that is the system's congestion control; give what it changes."""
    sock = Mock()
    sock.getsockopt.return_value = default.ljust(16, b"\0")
    Stream(sock, (host, 80)).expect_bulk()
    return [change.args[2] for change in sock.setsockopt.mock_calls]


@pytest.mark.parametrize("host", LOCAL + ELSEWHERE)
def test_bulk_is_not_paced_within_the_machine_and_left_to_the_system_elsewhere(host):
    assert congestion(b"bbr", host) == ([b"reno"] if host in LOCAL else [])
    assert congestion(b"cubic", host) == []


def test_a_kernel_takes_what_is_set_for_bulk(pair):
    stream, _ = pair()
    option = socket.IPPROTO_TCP, socket.TCP_CONGESTION
    with contextlib.suppress(OSError):  # not every kernel has it
        stream.socket.setsockopt(*option, b"bbr")
    before = stream.socket.getsockopt(*option, 16).rstrip(b"\0")
    stream.expect_bulk()
    assert stream.socket.getsockopt(*option, 16).rstrip(b"\0") == (b"reno" if before == b"bbr" else before)


def test_a_sandbox_that_refuses_sends_bulk_all_the_same():
    sock = Mock()
    sock.getsockopt.side_effect = OSError(errno.ENOPROTOOPT, "no such option")
    Stream(sock, ("127.0.0.1", 80)).expect_bulk()


def test_after_shutdown_write_the_other_direction_goes_on(pair):
    stream, peer = pair()
    stream.sendall(b"question")
    stream.shutdown_write()
    assert read_all(peer) == b"question"
    peer.sendall(b"answer")
    peer.close()
    with bounded():
        assert stream.recv_exactly(6) == b"answer"
        assert stream.recv(1) == b""
    stream.shutdown_write()  # twice is once, even when all is over


def test_linger_loses_nothing_although_unread_bytes_are_waiting(pair, spawn):
    stream, peer = pair()
    peer.sendall(b"unread" * 1000)
    wait_until(stream.peek)
    answer, chunk = b"", os.urandom(100_000)
    while taken := stream.push(chunk):  # until the kernel holds what it can on both sides
        answer += chunk[:taken]

    def end():
        with stream:
            stream.linger(5)

    ending = spawn(end)
    gevent.idle()
    assert read_all(peer) == answer
    peer.close()
    ending.get(timeout=5)


def test_linger_does_not_wait_for_ever(pair):
    stream, _ = pair()
    with bounded():
        stream.linger(0.01)


def test_linger_ends_in_time_although_the_peer_sends_without_a_pause(pair):
    stream, peer = pair()
    peer.sendall(b"x")
    with bounded():
        Flooded(stream).linger(0.01)


def test_the_end_of_a_block_is_an_end_and_an_exception_is_a_reset(pair):
    stream, peer = pair()
    with stream:
        stream.sendall(b"all")
    assert read_all(peer) == b"all"
    stream, peer = pair()
    with pytest.raises(ValueError), stream:
        stream.sendall(b"half")
        raise ValueError
    assert is_reset(peer)
    stream.reset()  # of a closed one: nothing happens


def test_a_reset_of_the_peer_is_seen_as_a_reset(pair):
    stream, peer = pair()
    reset(peer)
    with bounded(), pytest.raises(ConnectionResetError):
        stream.recv(1)


@pytest.mark.parametrize("half_closed", [False, True])
def test_a_reset_is_known_behind_bytes_that_nobody_reads_and_an_end_is_none(pair, half_closed):
    stream, peer = pair()
    peer.sendall(b"unread")
    if half_closed:
        peer.shutdown(socket.SHUT_WR)
        assert stream.recv(6) == b"unread" and stream.peek() is False
    assert not stream.is_dead()
    reset(peer)
    wait_until(stream.is_dead)


def test_what_is_lost_is_sent_again_each_second_where_the_kernel_can(pair):
    stream, _ = pair()
    stream.retransmit_soon()
    with contextlib.suppress(OSError):  # before Linux 6.15
        assert stream.socket.getsockopt(socket.IPPROTO_TCP, 44) == 1000  # TCP_RTO_MAX_MS


def test_the_round_trip_is_what_the_kernel_has_measured(pair):
    stream, _ = pair()
    assert 0 < stream.round_trip_s() < 0.1


@pytest.mark.parametrize(
    ("info", "round_trip_s"),
    [
        (bytes(104), 0),  # a system that does not tell
        (bytes(148) + (25_000).to_bytes(4, sys.byteorder), 0.025),
        (b"\xff" * 152, 0),  # not measured yet
    ],
)
def test_a_round_trip_that_is_not_known_is_none(info, round_trip_s):
    assert Stream(Mock(getsockopt=lambda *_: info), ("127.0.0.1", 1)).round_trip_s() == round_trip_s


def test_peek_tells_nothing_yet_from_bytes_and_from_an_end(pair):
    stream, peer = pair()
    assert stream.peek() is None
    peer.sendall(b"x")
    wait_until(lambda: stream.peek() is True)
    peer.close()
    assert stream.recv(1) == b"x"  # peeking took nothing
    wait_until(lambda: stream.peek() is False)
    stream, peer = pair()
    reset(peer)
    wait_read(stream.fileno(), timeout=5)
    assert stream.peek() is False


def test_what_is_here_is_received_without_a_wait_and_an_end_is_told_later(pair):
    stream, peer = pair()
    assert stream.recv_ready(2) == b""
    peer.sendall(b"xyz")
    wait_until(stream.peek)
    assert [stream.recv_ready(2), stream.recv_ready(2), stream.recv_ready(2)] == [b"xy", b"z", b""]
    peer.close()
    wait_read(stream.fileno(), timeout=5)
    assert [stream.recv_ready(2), stream.recv(2)] == [b"", b""]


@pytest.mark.parametrize("read", [lambda stream: stream.recv(1), lambda stream: stream.pull(memoryview(bytearray(1)))])
def test_a_reset_is_told_to_who_reads_behind_what_was_here(pair, read):
    stream, peer = pair()
    reset(peer)
    wait_read(stream.fileno(), timeout=5)
    assert stream.recv_ready(2) == b""
    for _ in range(2):
        with pytest.raises(ConnectionResetError):
            read(stream)


@pytest.mark.parametrize("read", [lambda stream: stream.recv(1), lambda stream: stream.pull(memoryview(bytearray(1)))])
def test_a_reset_that_was_peeked_at_is_no_end(pair, read):
    stream, peer = pair()
    peer.sendall(b"x")
    wait_until(stream.peek)
    reset(peer)
    assert read(stream) in (b"x", 1)  # what came before it is whole
    wait_until(lambda: stream.peek() is False)
    for _ in range(2):
        with pytest.raises(ConnectionResetError):
            read(stream)


def test_an_arrival_is_told_until_nobody_watches(pair):
    stream, peer = pair()
    told = []
    stream.watch(told.append, "bytes")
    gevent.sleep(0)
    assert not told
    peer.sendall(b"x")
    wait_until(lambda: told)
    stream.unwatch()
    told.clear()
    gevent.sleep(0.001)
    assert not told
