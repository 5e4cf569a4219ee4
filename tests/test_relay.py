"""The two-way copy over every pair of transports: ends, counts, back-pressure, failures."""

import contextlib
import gc
import hashlib
import os
import random
import socket
import time
from unittest.mock import Mock

import gevent
import pytest
from exchanges import run_exchange
from secure import handshake, stream_pair, transports
from support import BOUND_S, as_stream, bounded, read_all, reset, segments_out, tcp_state, wait_until

from nodepass_gevent import relay
from nodepass_gevent.transport import Stream

KINDS = [("plain", "plain"), ("plain", "1.2"), ("1.3", "plain"), ("1.2", "1.3")]
NEVER_S = 3600
LATE = bytes(range(256)) * 1200  # about 300 KiB
MIB = 1 << 20


class Exchange:
    """A running exchange between a user and a target; ``a`` and ``b`` are the relay's own ends."""

    def __init__(self, kinds, *timeouts):
        self.a, self.user = transports(kinds[0])
        self.b, self.target = transports(kinds[1])
        self.greenlet = gevent.spawn(run_exchange, self.a, self.b, *timeouts)

    def directions(self):
        return (self.user, self.target), (self.target, self.user)

    def outcome(self):
        return self.greenlet.get(timeout=BOUND_S)

    def close(self):
        self.greenlet.kill()
        for transport in (self.user, self.a, self.b, self.target):
            transport.close()


@pytest.fixture
def start(no_leaks):
    with contextlib.ExitStack() as stack, bounded(20):

        def make(kinds=("plain", "plain"), half_closed_timeout_s=NEVER_S, idle_timeout_s=0):
            exchange = Exchange(kinds, half_closed_timeout_s, idle_timeout_s)
            stack.callback(exchange.close)
            return exchange

        yield make


@pytest.fixture(params=KINDS, ids="-".join)
def exchange(request, start):
    return start(request.param)


def read_to_end(transport):
    read = bytearray()
    while piece := transport.recv(65536):
        read += piece
    return bytes(read)


def send_and_end(transport, data):
    transport.sendall(data)
    transport.shutdown_write()


def test_what_was_said_before_counts_as_moved(pair):
    a, b = pair()[0], pair()[0]
    exchange = relay.Exchange(a, b, NEVER_S, said=3)
    assert exchange.began and exchange.traffic() == (3, 0, 0, 0)


def finish(exchange):
    """End both directions and give the outcome."""
    exchange.user.shutdown_write()
    exchange.target.shutdown_write()
    return exchange.outcome()


def shrink_buffers(*ends):
    """Let the kernel hold little, so that back-pressure comes soon."""
    for transport in ends:
        sock = getattr(transport, "stream", transport).socket
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)


def push_until_blocked(transport, data):
    """Send as much of ``data`` as the other side takes while nobody reads there; give how much that is."""
    sent = refused = 0
    while refused < 20 and sent < len(data):
        taken = transport.push(memoryview(data)[sent : sent + MIB])
        sent += taken
        refused = 0 if taken else refused + 1
        gevent.sleep(0.001)
    return sent


@pytest.mark.parametrize("direction", [0, 1])
def test_late_bytes_arrive_after_half_close(exchange, spawn, direction):
    early, late = exchange.directions()[direction]
    early.sendall(b"question")
    early.shutdown_write()
    assert read_to_end(late) == b"question"
    spawn(send_and_end, late, LATE)
    assert read_to_end(early) == LATE
    counts = (8, len(LATE)) if direction == 0 else (len(LATE), 8)
    assert exchange.outcome() == (*counts, None)


def test_what_the_user_said_before_an_exchange_began_needs_no_turn_of_the_event_loop(pair, spawn):
    class Unwatched(Stream):
        __slots__ = ()

        def watch(self, callback, *args):
            pass

    (user_side, user), (target_side, target) = pair(), pair()
    user.sendall(b"question")
    user_side.wait_for_arrival()
    spawn(run_exchange, Unwatched(user_side.socket), target_side, NEVER_S)
    assert target.recv(100) == b"question"


def test_a_reset_that_one_direction_is_told_is_no_end_for_the_other(pair, spawn):
    ends = []

    class Noting(Stream):
        __slots__ = ()

        def finish(self):
            ends.append(self)
            super().finish()

    (user_side, user), (target_side, target) = pair(), pair()
    running = spawn(run_exchange, Noting(user_side.socket), target_side, NEVER_S)
    gevent.idle()
    reset(target)  # the kernel lists it first, and libev serves it last
    user.sendall(b"more")
    assert isinstance(running.get(timeout=BOUND_S).error, ConnectionError)
    assert not ends


def test_an_exchange_without_a_byte_ends_with_its_two_ends(exchange):
    assert finish(exchange) == (0, 0, None)
    assert (exchange.user.recv(1), exchange.target.recv(1)) == (b"", b"")


def test_what_stands_before_the_start_is_carried_too(start):
    for kinds in KINDS:
        exchange = start(kinds)
        exchange.user.sendall(b"first")
        exchange.user.shutdown_write()
        exchange.target.sendall(b"answer")
        wait_without_a_turn(exchange.b.peek)  # with TLS, it is out of the kernel's sight from then on
        assert read_to_end(exchange.target) == b"first"
        assert exchange.user.recv(10) == b"answer"


def wait_without_a_turn(arrived):
    """Wait for what the kernel is about to deliver, before the relay has its turn."""
    end = time.monotonic() + BOUND_S
    while not arrived():
        assert time.monotonic() < end


def test_an_answer_and_the_end_right_behind_it_go_on_in_one_segment(exchange):
    before = segments_out(exchange.a)
    exchange.target.send_last(b"answer")
    wait_without_a_turn(lambda: tcp_state(exchange.b) == "CLOSE-WAIT")
    assert read_to_end(exchange.user) == b"answer"
    assert segments_out(exchange.a) == before + 1
    assert finish(exchange) == (0, 6, None)


def test_an_answer_that_the_user_does_not_take_at_once_keeps_its_end(exchange):
    shrink_buffers(exchange.user, exchange.a)
    before = push_until_blocked(exchange.a, bytes(16 * MIB))
    exchange.target.send_last(b"answer")
    wait_until(exchange.b.at_end)
    assert read_to_end(exchange.user) == bytes(before) + b"answer"
    assert finish(exchange) == (0, 6, None)


def test_an_answer_of_which_a_part_is_taken_comes_once(pair, spawn):
    class Narrow(Stream):
        """A socket that takes three bytes of what may be held back."""

        __slots__ = ()

        def push_more(self, data):
            return super().push_more(data[:3])

    (user_side, user), (target_side, target) = pair(), pair()
    running = spawn(run_exchange, Narrow(user_side.socket), target_side, NEVER_S)
    gevent.idle()
    with as_stream(target) as target:
        target.send_last(b"answer")
        assert read_all(user) == b"answer"
        user.shutdown(socket.SHUT_WR)
        assert running.get(timeout=BOUND_S) == (0, 6, None)


def test_a_reset_right_behind_an_answer_is_no_end(start):
    exchange = start()
    exchange.target.sendall(b"answer")
    exchange.target.reset()
    wait_without_a_turn(lambda: tcp_state(exchange.b) == "CLOSED")
    assert exchange.user.recv(10) == b"answer"
    counts = exchange.outcome()
    assert counts[:2] == (0, 6) and isinstance(counts.error, ConnectionResetError)


def chunks(name):
    rng = random.Random(name)
    if name == "one byte":
        return [b"%d" % (number % 10) for number in range(2000)]
    if name == "one mebibyte":
        return [rng.randbytes(MIB)] * 6
    return [rng.randbytes(rng.choice((1, 100, 1460, 16384, 65536, 70_000, 300_000))) for _ in range(60)]


@pytest.mark.parametrize("sizes", ["one byte", "one mebibyte", "random"])
def test_chunks_of_any_size_arrive_whole_both_ways_at_once(exchange, spawn, sizes):
    data = chunks(sizes)

    def send(sender):
        for chunk in data:
            sender.sendall(chunk)
        sender.shutdown_write()

    reading = []
    for sender, receiver in exchange.directions():
        spawn(send, sender)
        reading.append(spawn(lambda receiver=receiver: hashlib.sha256(read_to_end(receiver)).digest()))
    total = b"".join(data)
    assert [greenlet.get() for greenlet in reading] == [hashlib.sha256(total).digest()] * 2
    assert exchange.outcome() == (len(total), len(total), None)


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_a_stalled_reader_bounds_what_is_held_of_a_fast_sender(start, spawn, kinds):
    exchange = start(kinds)
    shrink_buffers(exchange.user, exchange.a, exchange.b, exchange.target)
    data = random.Random(1).randbytes(MIB) * 64
    before = resident()
    sent = push_until_blocked(exchange.user, data)
    assert sent < 4 * MIB
    assert resident() - before < 8 * MIB
    rest = spawn(send_and_end, exchange.user, memoryview(data)[sent : 8 * MIB])
    assert read_to_end(exchange.target) == data[: 8 * MIB]
    rest.get()


def test_a_stalled_direction_does_not_hold_up_the_other(exchange):
    shrink_buffers(exchange.user, exchange.a, exchange.b, exchange.target)
    push_until_blocked(exchange.user, bytes(16 * MIB))
    exchange.target.sendall(b"still flows")
    assert exchange.user.recv(100) == b"still flows"


def test_nobody_is_woken_while_a_reader_stalls(exchange):
    shrink_buffers(exchange.user, exchange.a, exchange.b, exchange.target)
    push_until_blocked(exchange.user, bytes(16 * MIB))
    gevent.idle()  # who is told again and again of what waits never comes to rest


def test_what_a_reader_has_not_taken_at_once_needs_no_byte_behind_it(start):
    """With TLS all of it is encrypted, and the kernel has not taken the last part yet."""
    exchange = start(("plain", "1.3"))
    shrink_buffers(exchange.b, exchange.target)
    sent = b""
    while not exchange.b.unsent:
        piece = random.Random(len(sent)).randbytes(relay.BUFFER)
        exchange.user.sendall(piece)
        sent += piece
        wait_until(lambda: exchange.a.peek() is None)
    assert exchange.target.recv_exactly(len(sent)) == sent


def test_what_a_read_of_tls_leaves_behind_needs_no_byte_behind_it(start):
    exchange = start(("1.3", "plain"))
    exchange.user.sendall(b"hello")
    assert exchange.target.recv_exactly(5) == b"hello"
    exchange.a.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MIB)
    data = random.Random(3).randbytes(relay.BUFFER + 500)  # the last record comes with others, and is one too many
    exchange.user.sendall(data)
    assert exchange.target.recv_exactly(len(data)) == data


class Gated(Stream):
    """A socket whose kernel takes nothing while ``full``."""

    __slots__ = ("full", "refused")

    def __init__(self, stream):
        super().__init__(stream.socket, stream.peer)
        self.full = False
        self.refused = 0  # calls

    def push_more(self, data):
        self.refused += self.full
        return 0 if self.full else super().push_more(data)


def test_nothing_is_lost_when_the_users_end_comes_before_the_last_bytes_to_it_are_sent(no_leaks, spawn):
    """The target has ended, but close_notify is not with the kernel yet, when the user ends as well."""
    near, far = stream_pair()
    gate = Gated(near)
    a, user = handshake(gate, far)
    b, target = stream_pair()
    with bounded(), a, user, b, target:
        exchange = spawn(run_exchange, a, b, NEVER_S)
        target.sendall(b"answer")
        assert user.recv(6) == b"answer"
        gate.full = True
        target.shutdown_write()
        wait_until(lambda: gate.refused)
        user.shutdown_write()
        assert target.recv(10) == b""  # the end of the user is passed on
        assert not exchange.ready()
        gate.full = False
        assert user.recv(10) == b""  # and so is that of the target
        assert exchange.get() == (0, 6, None)


@pytest.mark.parametrize("direction", [0, 1])
def test_a_reset_is_told_as_an_error_and_the_counts_are_exact(exchange, direction):
    breaking, other = exchange.directions()[direction]
    breaking.sendall(b"12345")
    assert other.recv(10) == b"12345"
    other.sendall(b"123")
    assert breaking.recv(10) == b"123"
    breaking.reset()
    *counts, error = exchange.outcome()
    assert sorted(counts) == [3, 5] and counts[direction] == 5
    assert isinstance(error, ConnectionResetError)


def test_a_reset_after_half_close_is_an_error(exchange):
    exchange.user.shutdown_write()
    assert exchange.target.recv(1) == b""
    exchange.target.reset()
    assert isinstance(exchange.outcome().error, ConnectionResetError)


def test_a_reader_that_resets_while_bytes_wait_for_it_is_an_error(exchange):
    shrink_buffers(exchange.user, exchange.a, exchange.b, exchange.target)
    sent = push_until_blocked(exchange.user, bytes(16 * MIB))
    exchange.target.reset()
    up, down, error = exchange.outcome()
    assert isinstance(error, ConnectionError)
    assert 0 < up <= sent and down == 0


class OftenLooked(relay._Waiting):
    looks = 0

    def _look(self):
        super()._look()
        self.looks += 1


@pytest.fixture
def waiting(monkeypatch):
    """Give the flows that wait for their sinks, whose sources are looked at fifty times a second."""
    monkeypatch.setattr(relay, "LOOK_S", 0.02)
    monkeypatch.setattr(relay, "_waiting", OftenLooked())
    return relay._waiting


@pytest.mark.parametrize("direction", [0, 1])
@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_a_reset_by_who_waits_for_a_reader_that_takes_nothing_ends_what_would_last_for_ever(
    waiting, start, kinds, direction
):
    exchange = start(kinds, half_closed_timeout_s=0.1)
    shrink_buffers(exchange.user, exchange.a, exchange.b, exchange.target)
    breaking, _ = exchange.directions()[direction]
    assert 0 < push_until_blocked(breaking, bytes(16 * MIB)) < 16 * MIB
    breaking.reset()
    *counts, error = exchange.outcome()
    assert counts[direction] > 0
    assert isinstance(error, OSError)  # a TimeoutError, or the reset where what is kept was taken


def test_an_end_behind_bytes_that_wait_for_a_slow_reader_waits_with_them(waiting, pair, spawn):
    class Stalled(Stream):
        __slots__ = ("stalled",)

        def push(self, data):
            return 0 if self.stalled else super().push(data)

    (source, user), (sink, target) = pair(), pair()
    sink = Stalled(sink.socket)
    sink.stalled = True
    running = spawn(run_exchange, source, sink, 0.04)
    user.sendall(b"first")
    wait_until(lambda: waiting._flows)
    user.sendall(b"last")
    user.shutdown(socket.SHUT_WR)
    wait_until(lambda: tcp_state(source) == "CLOSE-WAIT")
    until = waiting.looks + 20
    wait_until(lambda: waiting.looks > until)
    assert not running.ready()
    sink.stalled = False
    target.shutdown(socket.SHUT_WR)
    with bounded():
        assert read_all(target) == b"firstlast"
        assert running.get() == (9, 0, None)


@pytest.mark.parametrize("kinds", [("1.2", "plain"), ("1.3", "plain")], ids="-".join)
def test_a_tls_stream_that_is_cut_off_is_an_error(start, kinds):
    exchange = start(kinds)
    exchange.user.sendall(b"12345")
    assert exchange.target.recv(10) == b"12345"
    exchange.user.stream.finish()
    up, down, error = exchange.outcome()
    assert (up, down) == (5, 0)
    assert isinstance(error, ConnectionAbortedError) and "cut off" in str(error)


def test_half_closed_and_silent_an_exchange_ends(start):
    for kinds in KINDS:
        exchange = start(kinds, half_closed_timeout_s=0.02)
        exchange.target.shutdown_write()
        *counts, error = exchange.outcome()
        assert counts == [0, 0]
        assert isinstance(error, TimeoutError) and str(error) == "half-closed and idle for 0.02 s"


def test_half_closed_and_moving_an_exchange_goes_on(start):
    exchange = start(half_closed_timeout_s=0.1)
    silent = start(half_closed_timeout_s=0.1)
    for each in (exchange, silent):
        each.user.shutdown_write()
    received = 0
    while received < 5 or not silent.greenlet.ready():
        exchange.target.sendall(b"x")
        received += len(exchange.user.recv(1))
        gevent.sleep(0.01)
    exchange.target.shutdown_write()
    assert exchange.outcome() == (0, received, None)


def test_half_closed_an_exchange_goes_on_while_a_slow_reader_takes_what_was_moved_before(start, spawn):
    exchange = start(half_closed_timeout_s=0.2)
    exchange.user.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
    exchange.a.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * len(LATE))
    spawn(send_and_end, exchange.target, LATE).join()
    silent = start(half_closed_timeout_s=0.2)
    silent.target.shutdown_write()
    received = bytearray()
    while not silent.greenlet.ready():
        received += exchange.user.recv(8192)
        gevent.sleep(0.01)
    assert len(received) < len(LATE)
    assert not exchange.greenlet.ready()
    assert received + read_to_end(exchange.user) == LATE
    exchange.user.shutdown_write()
    assert exchange.outcome() == (0, len(LATE), None)


def test_an_open_exchange_may_be_silent(start):
    idle = start(half_closed_timeout_s=0.001)
    timed_out = start(half_closed_timeout_s=0.05)
    timed_out.user.shutdown_write()
    assert isinstance(timed_out.outcome().error, TimeoutError)
    assert not idle.greenlet.ready()


def test_an_exchange_in_which_nothing_moves_ends_where_there_is_a_limit(start):
    for kinds in KINDS:
        started = time.monotonic()
        exchange = start(kinds, idle_timeout_s=0.02)
        *counts, error = exchange.outcome()
        assert time.monotonic() - started >= 0.02
        assert counts == [0, 0]
        assert isinstance(error, TimeoutError) and str(error) == "idle for 0.02 s"


@pytest.mark.parametrize("direction", [0, 1])
def test_bytes_in_one_direction_are_enough_to_be_no_idle_exchange(start, direction):
    moving, idle = start(idle_timeout_s=0.2), start(idle_timeout_s=0.2)
    sender, receiver = moving.directions()[direction]
    while not idle.greenlet.ready():
        sender.sendall(b"x")
        assert receiver.recv(1) == b"x"
        gevent.sleep(0.01)
    assert not moving.greenlet.ready()


def test_a_stalled_exchange_is_idle(start):
    exchange = start(idle_timeout_s=0.1)
    push_until_blocked(exchange.user, bytes(16 * MIB))
    assert isinstance(exchange.outcome().error, TimeoutError)


def test_an_idle_limit_costs_no_timer_per_byte(start):
    exchange = start(idle_timeout_s=NEVER_S)
    gevent.sleep(0)
    watching = gevent.get_hub().loop.activecnt
    for _ in range(100):
        exchange.user.sendall(b"x")
        assert exchange.target.recv(1) == b"x"
    assert gevent.get_hub().loop.activecnt == watching


@pytest.mark.parametrize("moment", ["idle", "half-closed", "stalled"])
def test_a_killed_exchange_leaves_nothing_behind(exchange, moment):
    """The fixture counts watchers and descriptors."""
    shrink_buffers(exchange.user, exchange.a, exchange.b, exchange.target)
    if moment == "half-closed":
        exchange.user.shutdown_write()
        assert exchange.target.recv(1) == b""
    elif moment == "stalled":
        push_until_blocked(exchange.user, bytes(16 * MIB))
    else:
        gevent.sleep(0)
    loop = gevent.get_hub().loop
    watching = loop.activecnt
    exchange.greenlet.kill()
    wait_until(lambda: loop.activecnt < watching)  # the loop serves more than this exchange


def test_a_hundred_exchanges_share_one_buffer_without_mixing_bytes(start, spawn):
    exchanges = [start(KINDS[number % 2]) for number in range(100)]
    for number, exchange in enumerate(exchanges):
        spawn(send_and_end, exchange.user, b"%03d" % number * 30_000)
    reading = [spawn(read_to_end, exchange.target) for exchange in exchanges]
    for number, greenlet in enumerate(reading):
        assert greenlet.get() == b"%03d" % number * 30_000


def test_what_a_stalled_reader_waits_for_is_not_overwritten_by_other_exchanges(start, spawn):
    stalled = start(("1.3", "plain"))  # not by splice: its bytes are in this process
    shrink_buffers(stalled.user, stalled.a, stalled.b, stalled.target)
    data = random.Random(2).randbytes(16 * MIB)
    sent = push_until_blocked(stalled.user, data)
    other = start(("plain", "1.3"))
    spawn(send_and_end, other.user, b"other" * MIB)
    assert read_to_end(other.target) == b"other" * MIB
    spawn(stalled.user.shutdown_write)
    assert read_to_end(stalled.target) == data[:sent]


def test_an_exchange_with_a_closed_end_is_an_error_and_no_crash(start):
    exchange = start()
    exchange.b.socket.shutdown(socket.SHUT_RDWR)
    exchange.user.sendall(b"x")
    assert isinstance(exchange.outcome().error, OSError)
    wait_until(lambda: exchange.greenlet.ready())


def test_an_exchange_for_whose_end_there_is_no_memory_ends_by_that(start, monkeypatch):
    exchange = start()
    exchange.user.sendall(b"question")
    exchange.user.shutdown_write()
    assert read_to_end(exchange.target) == b"question"
    monkeypatch.setattr(relay, "soon", Mock(side_effect=MemoryError))
    exchange.target.shutdown_write()
    assert isinstance(exchange.outcome().error, MemoryError)


def test_an_exchange_leaves_nothing_for_the_garbage_collector(start):
    gc.collect()
    gc.disable()
    try:
        running = start(("plain", "plain"), NEVER_S)
        running.user.shutdown_write()
        running.target.shutdown_write()
        assert running.outcome().error is None
        left = [each for each in gc.get_objects() if isinstance(each, relay.Exchange | relay._Flow)]
        assert not left
    finally:
        gc.enable()
