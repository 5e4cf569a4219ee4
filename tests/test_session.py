import contextlib
import itertools
import time
from unittest.mock import Mock

import gevent
import pytest
from gevent.event import Event
from support import bounded, read_all, read_exactly, reset, wait_until

from nodepass_gevent import session, wire
from nodepass_gevent.errors import PolicyError, ProtocolError, SessionLost
from nodepass_gevent.pool import AcceptingPool
from nodepass_gevent.session import AT_ONCE, FAR_S, GATHERED, SPACED, Session
from nodepass_gevent.transport import Stream


class Recording(Stream):
    """Keeps what is written, write by write."""

    def __init__(self, stream):
        super().__init__(stream.socket, stream.peer)
        self.writes = []

    def push(self, data):
        self.writes.append(bytes(data))
        return super().push(data)


class Run:
    """A running session over loopback, and what can be seen of it from both sides."""

    def __init__(self, pair, spawn, receive=None, **options):
        stream, self.peer = pair()
        self.control = Recording(stream)
        self.pool = AcceptingPool(capacity=4)
        self.received = []
        self.session = Session(self.control, self.pool, receive or self.received.append, **options)
        self._running = spawn(self.session.run)
        gevent.idle()

    @property
    def alive(self):
        return not self._running.ready()

    def lost(self):
        """Wait for the session's end, and give its SessionLost."""
        with pytest.raises(SessionLost) as caught:
            self._running.get(timeout=5)
        return caught.value

    def kill(self):
        self._running.kill()


@pytest.fixture
def run(pair, spawn):
    return lambda *args, **options: Run(pair, spawn, *args, **options)


# Which end comes first


def end_by_end_of_stream(running):
    running.peer.shutdown(1)


def end_by_reset(running):
    reset(running.peer)


def end_by_writing(running):
    running.control.socket.shutdown(1)  # what the writer meets, the reader does not
    running.session.send(b"//0a1b2c3d#1\n")


def end_by_the_pool(running):
    running.pool.close()


@pytest.mark.parametrize(
    ("end", "how"),
    [
        (end_by_end_of_stream, "closed by the peer"),
        (end_by_reset, "connection reset by peer"),
        (end_by_writing, "broken pipe"),
        (end_by_the_pool, "the pool was closed"),
    ],
)
def test_the_first_to_end_ends_the_session_and_its_pool(end, how, run):
    running = run()
    end(running)
    assert str(running.lost()) == f"control channel lost: {how}"
    assert running.pool.closed


def test_what_may_not_be_received_ends_the_session(run):
    running = run(wire.Lines().feed)
    running.peer.sendall(b"a" * (wire.MAX_LINE - 1))
    gevent.idle()
    assert running.alive
    running.peer.sendall(b"a")
    assert str(running.lost()) == "control channel lost: a line of more than 256 bytes"
    assert running.pool.closed


def test_a_protocol_error_ends_the_session_with_its_text(run):
    def refuse(data):
        raise ProtocolError(f"not expected: {data!r}")

    running = run(refuse)
    running.peer.sendall(b"hello")
    assert str(running.lost()) == "control channel lost: not expected: b'hello'"


def test_a_fault_of_ours_ends_the_session_too(run, capsys):
    running = run(lambda data: 1 / 0)
    running.peer.sendall(b"hello")
    assert "ZeroDivisionError" in str(running.lost())
    assert running.pool.closed
    assert "ZeroDivisionError" in capsys.readouterr().err  # with its traceback, for us to find


def test_a_session_that_is_killed_leaves_neither_pool_nor_greenlet(run):
    running = run(ping_interval_s=0.001)
    running.kill()
    assert running.pool.closed
    written = len(running.control.writes)
    gevent.sleep(0.005)
    assert len(running.control.writes) == written


def test_a_session_for_which_there_is_no_memory_leaves_neither_pool_nor_greenlet(pair, monkeypatch):
    stream, _ = pair()
    pool, spawned, spawn = AcceptingPool(4), [], gevent.spawn

    def spawn_one(part):
        if spawned:
            raise MemoryError
        spawned.append(spawn(part))
        return spawned[0]

    monkeypatch.setattr(gevent, "spawn", spawn_one)
    with pytest.raises(MemoryError):
        Session(stream, pool, list).run()
    assert pool.closed and spawned[0].dead


def test_the_end_tells_how_long_the_session_lived(run):
    started = time.monotonic()
    running = run()
    gevent.sleep(0.01)
    running.peer.close()
    assert 0.01 <= running.lost().lived_s <= time.monotonic() - started


# Receiving


def test_what_arrives_is_handed_on_in_order(run):
    running = run()
    for piece in (b"//0a1b", b"2c3d#1\n", b"\n"):
        running.peer.sendall(piece)
    wait_until(lambda: b"".join(running.received) == b"//0a1b2c3d#1\n\n")
    assert running.alive


class Ahead(Stream):
    """Has some bytes that no descriptor tells of, as a TLS connection may behind its handshake."""

    buffered = True

    def __init__(self, stream, *pieces):
        super().__init__(stream.socket, stream.peer)
        self._pieces = list(pieces)

    def pull(self, buffer):
        if not self._pieces:
            self.buffered = False
            return super().pull(buffer)
        piece = self._pieces.pop(0)
        buffer[: len(piece)] = piece
        return len(piece)


def test_what_has_arrived_before_the_session_begins_is_handed_on(pair, spawn):
    stream, peer = pair()
    received = []
    spawn(Session(Ahead(stream, b"one", b"two"), AcceptingPool(capacity=4), received.append).run)
    wait_until(lambda: received == [b"one", b"two"])
    peer.sendall(b"three")
    wait_until(lambda: received[2:] == [b"three"])


def test_nothing_is_handed_on_behind_what_has_ended_the_session(run):
    received = []

    def refuse(data):
        received.append(data)
        raise ProtocolError("not expected")

    running = run(refuse)
    running.peer.sendall(b"a" * 10_000)  # more than one read
    assert str(running.lost()) == "control channel lost: not expected"
    assert len(received) == 1


def test_a_peer_that_is_silent_for_too_long_is_lost(run):
    assert str(run(silence_s=lambda: 0.01).lost()) == "control channel lost: silent for 0.01 s"


def test_a_peer_that_speaks_in_time_is_not_lost(run):
    running = run(silence_s=lambda: 1.0)  # a hundred times as long as it is silent
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        running.peer.sendall(b"\n")
        gevent.sleep(0.01)
    assert running.alive


def test_what_a_peer_has_said_counts_although_this_process_was_held_up(run):
    running = run(silence_s=lambda: 0.2)
    for _ in range(3):
        running.peer.sendall(b"\n")
        end = time.monotonic() + 0.3
        while time.monotonic() < end:  # the event loop has no turn
            pass
        gevent.sleep(0.01)
    assert running.alive and len(running.received) == 3


def test_the_limit_of_silence_is_asked_for_at_each_arrival_until_it_is_known(run):
    asked, limits_s = itertools.count(), itertools.chain([None], itertools.repeat(0.5))
    running = run(silence_s=lambda: next(limits_s) if next(asked) < 99 else None)
    gevent.sleep(0.02)
    assert running.alive
    for number in range(1, 4):
        running.peer.sendall(b"\n")
        wait_until(lambda number=number: len(running.received) == number)
    assert next(asked) == 2
    assert "silent for 0.5 s" in str(running.lost())


# Sending


def test_the_first_line_of_a_turn_goes_out_alone_and_the_others_in_groups(run):
    running = run()
    lines = [b"//%08x#1\n" % number for number in range(1 + GATHERED + 2)]
    first, group, rest = lines[0], b"".join(lines[1 : 1 + GATHERED]), b"".join(lines[1 + GATHERED :])
    for _ in range(2):
        for line in lines:
            running.session.send(line)
        assert running.control.writes == [first, group]
        assert read_exactly(running.peer, len(first + group + rest)) == b"".join(lines)
        assert running.control.writes == [first, group, rest]
        running.control.writes.clear()


def test_a_line_goes_out_at_once(run):
    running = run(ping_interval_s=60)
    assert read_exactly(running.peer, 1) == wire.PING
    for number in range(3):
        line = b"//%08x#1\n" % number
        running.session.send(line)
        assert read_exactly(running.peer, len(line)) == line


class Rung:
    """An alarm that rings when the test says so."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.callback = None
        self.closed = False

    def set(self, callback):
        self.callback = callback

    def close(self):
        self.closed = True

    def ring(self):
        callback, self.callback = self.callback, None
        callback()


@pytest.fixture
def alarms(monkeypatch):
    """The alarms of sessions whose peer is far away."""
    made = []

    def make(seconds):
        made.append(Rung(seconds))
        return made[-1]

    monkeypatch.setattr(session, "Alarm", make)
    monkeypatch.setattr(Recording, "round_trip_s", lambda self: 0.5)
    return made


def test_to_a_peer_far_away_what_follows_a_few_lines_goes_out_together_a_part_of_the_round_trip_later(alarms, run):
    running = run()
    (alarm,) = alarms
    assert alarm.seconds == 0.5 / SPACED
    lines = [b"//%08x#1\n" % number for number in range(60)]
    writes, few, others = running.control.writes, lines[:AT_ONCE], b"".join(lines[AT_ONCE:])
    for number, line in enumerate(lines):
        running.session.send(line)
        if number % 10 == 9:
            gevent.idle()  # a turn
    assert writes == few
    alarm.ring()
    running.session.send(lines[0])
    assert writes == [*few, others]
    alarm.ring()
    assert writes == [*few, others, lines[0]]
    alarm.ring()  # nothing has followed
    assert alarm.callback is None
    for line in lines:
        running.session.send(line)
    assert writes == [*few, others, lines[0], *few]
    running.kill()
    assert alarm.closed


def test_to_a_peer_far_away_a_line_for_which_there_was_no_memory_holds_up_no_other(alarms, run):
    running = run()
    lines = [b"//%08x#1\n" % number for number in range(AT_ONCE + 2)]
    push, running.control.push = running.control.push, Mock(side_effect=MemoryError)
    for line in lines[:AT_ONCE]:
        with pytest.raises(MemoryError):
            running.session.send(line)
    for line in lines[AT_ONCE:]:
        running.session.send(line)
    with pytest.raises(MemoryError):
        alarms[0].ring()
    running.control.push = push
    alarms[0].ring()
    assert running.control.writes == [b"".join(lines)]


def test_while_a_peer_far_away_does_not_read_nothing_rings(alarms, run):
    running = run()
    while not running.session._wake.is_set():
        running.session.send(b"//%08x#1\n" % 1)
        alarms[0].ring()
    running.session.send(b"//%08x#1\n" % 1)
    alarms[0].ring()
    assert alarms[0].callback is None


@pytest.mark.parametrize("leave_s", [None, 5])
def test_to_a_peer_far_away_all_is_sent_before_an_end_in_good_order(alarms, run, leave_s):
    running = run(leave_s=lambda: leave_s)
    lines = [b"//%08x#1\n" % number for number in range(AT_ONCE + 2)]
    for line in lines:
        running.session.send(line)
    leaving = gevent.spawn(running.kill)
    assert read_exactly(running.peer, 13 * len(lines)) == b"".join(lines)
    running.peer.close()
    with bounded():
        leaving.join()


def test_an_end_in_good_order_without_a_bye_takes_no_line_any_more(run):
    running = run()
    taken, finish = [], running.control.finish

    def finish_late():
        taken.append(running.session.send(wire.PING))
        finish()

    running.control.finish = finish_late
    running.kill()
    assert taken == [False]


def test_to_a_peer_that_is_near_nothing_waits(run, monkeypatch):
    monkeypatch.setattr(Recording, "round_trip_s", lambda self: FAR_S)
    running = run()
    for number in range(1, AT_ONCE + 3):
        running.session.send(wire.PING)
        assert len(running.control.writes) == number
        gevent.idle()


def test_sending_never_blocks_and_loses_nothing_when_the_peer_does_not_read(run):
    running = run()
    lines = [b"//%08x#1\n" % number for number in range(500_000)]  # 6.5 MB, more than the kernel keeps
    with bounded():
        for line in lines:
            running.session.send(line)
    wait_until(running.control.unacknowledged)
    running.session.send(b"//ffffffff#1\n")
    assert read_exactly(running.peer, 13 * len(lines) + 13) == b"".join([*lines, b"//ffffffff#1\n"])


def test_a_line_that_the_kernel_takes_in_part_goes_on_where_it_was_cut(run):
    running = run()
    lines = [b"x" * (8 << 20) + b"\n", b"//ffffffff#1\n"]
    for line in lines:
        running.session.send(line)
    assert read_exactly(running.peer, sum(map(len, lines))) == b"".join(lines)


def test_a_line_to_a_peer_that_has_just_reset_harms_nobody_who_sends_it(run):
    running = run()
    reset(running.peer)
    assert running.session.send(b"//0a1b2c3d#1\n")
    running.lost()


def test_a_peer_that_has_itself_answered_and_does_not_read_ends_the_session(run, spawn):
    running = run(lambda data: [running.session.send(b"//%b?why=busy#fail\n" % (b"0" * 8)) for _ in data])
    running.peer.settimeout(None)

    def ask_for_ever():
        with contextlib.suppress(OSError):
            while True:
                running.peer.sendall(b"\n" * 4096)

    spawn(ask_for_ever)
    with bounded(30):
        assert "does not read" in str(running.lost())


def test_the_first_keep_alive_goes_out_at_once_and_then_one_each_interval(run):
    started = time.monotonic()
    running = run(ping_interval_s=0.02)
    assert running.control.writes[0] == wire.PING
    with bounded(1):
        assert read_exactly(running.peer, 5) == wire.PING * 5
    assert 0.08 <= time.monotonic() - started


def test_keep_alives_go_out_although_launches_never_pause(run, spawn):
    running = run(ping_interval_s=0.01)
    enough = Event()

    def launch_without_pause():
        while not enough.is_set():
            running.session.send(b"//0a1b2c3d#1\n")
            gevent.sleep(0.001)

    launching = spawn(launch_without_pause)
    splitter, pings = wire.Lines(), 0
    with bounded():
        while pings < 5:
            pings += splitter.feed(running.peer.recv(4096)).count(b"")
    enough.set()
    launching.join()


def test_without_an_interval_nothing_is_written_unasked(run):
    running = run()
    gevent.sleep(0.01)
    assert running.control.writes == []
    running.control.shutdown_write()
    assert read_all(running.peer) == b""


def test_a_pool_refused_by_policy_ends_the_session_with_that_refusal(pair):
    class Refused:
        def run(self):
            return PolicyError("certificate refused")

        def close(self):
            pass

    stream, _ = pair()
    with bounded(), pytest.raises(PolicyError, match="certificate refused"):
        Session(stream, Refused(), lambda data: None).run()
