"""One UDP session over every kind of data connection: order, sizes, batches, back-pressure, ends and faults."""

import contextlib
import errno
import itertools
import os
import socket
import time
from unittest.mock import Mock

import gevent
import pytest
from secure import handshake, stream_pair, transports
from support import BOUND_S, bounded, wait_until

from nodepass_gevent.frames import MAX_DATAGRAM, Frames, format_frame
from nodepass_gevent.udp_relay import QUEUE, QUEUE_DATAGRAMS, RECEIVE_BATCH, UDPRelay

NEVER_S = 3600
SOON_S = 0.08


class FakeTarget:
    """A socket to a target, whose other end the test holds."""

    def __init__(self):
        self.here, self.there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.here.setblocking(False)
        self.pulled = 0

    def fileno(self):
        return self.here.fileno()

    def pull(self):
        datagram = self.here.recv(65536)
        self.pulled += 1
        return datagram

    def close(self):
        self.here.close()
        self.there.close()


class Session:
    """A running session; ``peer`` is the other end of its data connection."""

    def __init__(self, kind, idle_s=NEVER_S, deliver=None, target=None, ends=None):
        self.data, self.peer = ends or transports(kind)
        self.delivered = []
        self.relay = UDPRelay(deliver or (lambda datagram: self.delivered.append(bytes(datagram))))
        self.idle_s = idle_s
        self.target = target
        self.frames = Frames()
        self.greenlet = None

    def start(self):
        self.greenlet = gevent.spawn(self.relay.run, self.data, lambda: self.idle_s, self.target)
        return self

    def ended(self):
        """Wait for its end, and say how it was."""
        self.greenlet.get(timeout=BOUND_S)
        return self.relay.how

    def read(self, count):
        """Read ``count`` datagrams at the peer."""
        read = []
        while len(read) < count:
            data = self.peer.recv(65536)
            assert data, "the session has ended"
            read += map(bytes, self.frames.feed(data))
        return read

    def close(self):
        if self.greenlet:
            self.greenlet.kill()
        for each in filter(None, (self.data, self.peer, self.target)):
            each.close()


@pytest.fixture
def make(no_leaks):
    with contextlib.ExitStack() as stack, bounded(20):

        def make(kind="plain", **options):
            session = Session(kind, **options)
            stack.callback(session.close)
            return session

        yield make


@pytest.fixture(params=["plain", "1.2", "1.3"])
def session(request, make):
    return make(request.param).start()


def numbered(count, size=1200):
    return [b"%08d" % number * (size // 8) for number in range(count)]


@pytest.mark.parametrize("size", [0, 1, 1200, 16384, MAX_DATAGRAM])
def test_a_datagram_of_any_size_passes_both_ways(session, size):
    datagram = os.urandom(size)
    session.relay.send(datagram)
    assert session.read(1) == [datagram]
    session.peer.sendall(format_frame(datagram))
    wait_until(lambda: session.delivered == [datagram])


def test_many_datagrams_keep_their_order_and_their_bounds(session):
    datagrams = [*numbered(200), b"", *numbered(50, 8)]
    for number, datagram in enumerate(datagrams):
        session.relay.send(datagram)
        if number % 100 == 0:
            gevent.idle()
    assert session.read(len(datagrams)) == datagrams
    session.peer.sendall(b"".join(map(format_frame, datagrams)))
    wait_until(lambda: len(session.delivered) == len(datagrams))
    assert session.delivered == datagrams
    relay = session.relay
    assert (relay.framed, relay.delivered) == (len(datagrams), len(datagrams))
    assert (relay.framed_bytes, relay.delivered_bytes) == (sum(map(len, datagrams)),) * 2


def test_frames_in_pieces_of_any_size_are_delivered_whole(session):
    stream = b"".join(map(format_frame, numbered(3)))
    for at in range(0, len(stream), 7):
        session.peer.sendall(stream[at : at + 7])
        gevent.sleep(0)
    wait_until(lambda: session.delivered == numbered(3))


def test_what_stands_before_the_start_is_delivered_too(make):
    for kind in ("plain", "1.2", "1.3"):
        session = make(kind)
        session.peer.sendall(format_frame(b"early"))
        wait_until(session.data.peek)  # with TLS, it is out of the kernel's sight from then on
        session.start()
        wait_until(lambda session=session: session.delivered == [b"early"])


def test_the_first_of_a_turn_of_the_event_loop_leaves_at_once_and_what_follows_in_one_write(make):
    session = make().start()
    gevent.idle()
    writes = []
    session.data.socket = Counting(session.data.socket, writes)
    for datagram in numbered(20):
        session.relay.send(datagram)
        assert writes == [1202]
    assert session.read(20) == numbered(20)
    assert writes == [1202, 19 * 1202]


class Counting:
    """A socket whose writes are noted."""

    def __init__(self, sock, writes):
        self._socket, self._writes = sock, writes

    def send(self, data):
        self._writes.append(len(data))
        return self._socket.send(data)

    def __getattr__(self, name):
        return getattr(self._socket, name)


def test_datagrams_wait_for_the_data_connection(make):
    session = make()
    for datagram in numbered(10):
        session.relay.send(datagram)
    gevent.idle()
    session.start()
    assert session.read(10) == numbered(10)


@pytest.mark.parametrize("size", [0, 1200, 60000])
def test_while_there_is_no_data_connection_the_queue_is_bounded(make, size):
    session = make()
    for _ in range(QUEUE_DATAGRAMS + 10):
        session.relay.send(bytes(size))
    kept = min(QUEUE // size if size else QUEUE_DATAGRAMS, QUEUE_DATAGRAMS)
    assert session.relay.dropped_queue == QUEUE_DATAGRAMS + 10 - kept
    session.start()
    assert session.read(kept) == [bytes(size)] * kept


def test_what_has_waited_can_be_taken_back(make):
    session = make()
    for datagram in (b"one", b"", b"three"):
        session.relay.send(datagram)
    assert session.relay.take_waiting() == [b"one", b"", b"three"]
    assert session.relay.take_waiting() == []


@pytest.mark.parametrize("kind", ["plain", "1.3"])
def test_when_the_peer_does_not_read_datagrams_are_dropped_and_the_others_arrive_in_order(make, kind):
    near, far = stream_pair()
    for end in (near, far):
        end.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        end.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    session = make(ends=(near, far) if kind == "plain" else handshake(near, far)).start()
    gevent.idle()
    sent = 0
    while not session.relay.dropped_queue:
        for _ in range(50):
            session.relay.send(b"%08d" % sent * 150)
            sent += 1
        gevent.sleep(0)
        assert sent * 1200 < 20 << 20, "nothing is ever dropped"
    arriving = sent - session.relay.dropped_queue
    numbers = [int(datagram[:8]) for datagram in session.read(arriving)]
    assert numbers == sorted(set(numbers))
    session.relay.send(b"and on")
    assert session.read(1) == [b"and on"]
    gevent.idle()  # who is told again and again that there is room never comes to rest


def test_a_datagram_that_the_kernel_has_not_taken_at_once_needs_none_behind_it(make):
    """With TLS it is encrypted by then, and kept."""
    session = make("1.3").start()
    gevent.idle()
    session.data.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    sent = []
    while not session.data.unsent:
        sent.append(b"%08d" % len(sent) * 150)
        session.relay.send(sent[-1])
        gevent.sleep(0)
    assert session.read(len(sent)) == sent


def test_more_than_the_queue_in_one_turn_is_no_reason_to_drop_while_the_peer_reads(make):
    session = make().start()
    gevent.idle()
    datagrams = [b"%08d" % number * 1000 for number in range(100)]  # 800 kB; the kernel takes them
    for datagram in datagrams:
        session.relay.send(datagram)
    assert session.relay.dropped_queue == 0
    assert session.read(100) == datagrams


def test_a_datagram_that_no_frame_holds_is_dropped_and_counted(session):
    session.relay.send(bytes(MAX_DATAGRAM + 1))
    session.relay.send(b"next")
    assert session.read(1) == [b"next"]
    assert session.relay.dropped_size == 1


def test_replies_of_a_target_are_framed(make):
    target = FakeTarget()
    session = make(target=target).start()
    for datagram in numbered(100):
        target.there.send(datagram)
        gevent.sleep(0)
    assert session.read(100) == numbered(100)


def test_a_flood_of_the_target_lets_others_have_their_turn(make):
    target = FakeTarget()
    target.pull = lambda: b"x"  # it never runs dry
    session = make(target=target)
    pulled = []
    pull = target.pull
    target.pull = lambda: pulled.append(1) or pull()
    target.there.send(b"x")
    session.start()
    seen = [0]
    while seen[-1] < 10 * RECEIVE_BATCH:
        gevent.sleep(0)
        seen.append(len(pulled))
    assert max(after - before for before, after in itertools.pairwise(seen)) <= RECEIVE_BATCH


def test_the_peers_end_of_stream_ends_the_session(session):
    session.peer.sendall(format_frame(b"last"))
    session.peer.shutdown_write()
    assert session.ended() == "ended"
    assert (session.delivered, session.relay.failed) == ([b"last"], False)


def test_a_data_connection_that_is_cut_in_a_frame_ends_the_session_and_half_a_datagram_goes_nowhere(session):
    session.peer.sendall(format_frame(b"whole") + format_frame(b"x" * 1000)[:500])
    wait_until(lambda: session.delivered)
    session.peer.reset()
    session.ended()
    assert session.relay.failed
    assert session.delivered == [b"whole"]


def test_datagrams_that_came_behind_the_end_of_a_session_are_not_delivered(session):
    session.peer.sendall(format_frame(b"first"))
    wait_until(lambda: session.delivered)
    session.peer.sendall(format_frame(b"late"))
    session.relay.end("idle")
    session.relay._on_readable()  # as it is called where it was put off
    session.ended()
    assert session.delivered == [b"first"]


def test_a_frame_longer_than_any_datagram_ends_the_session(session):
    session.peer.sendall(format_frame(b"good"))
    wait_until(lambda: session.delivered)
    session.peer.sendall(b"\xff\xff" + bytes(70_000))
    assert "a frame of 65535 bytes" in session.ended()
    assert session.relay.failed and session.delivered == [b"good"]


@pytest.mark.parametrize("kind", ["plain", "1.2", "1.3"])
def test_a_session_in_which_nothing_moves_ends_and_its_peer_sees_an_end_and_no_cut(make, kind):
    session = make(kind, idle_s=SOON_S).start()
    assert session.ended() == "idle for 0.08 s"
    assert not session.relay.failed
    session.data.close()
    assert session.peer.recv(1) == b""


@pytest.mark.parametrize("way", ["in", "out"])
def test_a_datagram_either_way_keeps_a_session_from_being_idle(make, way):
    session = make(idle_s=0.5).start()
    gevent.idle()
    for _ in range(3):
        before = session.relay.active_at
        gevent.sleep(0.01)
        if way == "in":
            session.relay.send(b"x")
        else:
            session.peer.sendall(format_frame(b"x"))
        wait_until(lambda before=before: session.relay.active_at > before)
        assert session.relay.idle_s() < 0.5
    assert session.ended() == "idle for 0.5 s"


def test_a_clock_that_is_set_makes_no_session_idle_nor_immortal(make):
    relay = make().relay
    assert abs(relay.active_at - time.monotonic()) < 5 and 0 <= relay.idle_s() < 5


def test_a_session_of_a_silent_peer_ends_although_its_user_speaks_on(make):
    session = make().start()
    session.relay.forsake(time.monotonic() - 1, OSError("silent"))
    gevent.idle()
    assert not session.relay.how  # it has only begun
    gevent.sleep(0.02)
    session.relay.send(b"x")
    session.relay.forsake(time.monotonic() - 0.01, OSError("silent"))
    assert session.ended() == "silent" and session.relay.failed


def test_a_session_that_is_answered_outlives_a_silent_control_channel(make):
    session = make().start()
    before = session.relay.answered_at
    gevent.sleep(0.02)
    session.peer.sendall(format_frame(b"x"))
    wait_until(lambda: session.relay.answered_at > before)
    session.relay.forsake(before + 0.01, OSError("silent"))
    gevent.idle()
    assert not session.relay.how


def test_a_session_whose_data_connection_the_peer_has_lost_ends_although_it_was_answered(make):
    session = make().start()
    session.peer.sendall(format_frame(b"x"))
    wait_until(lambda: session.relay.delivered)
    assert not session.relay.abort(OSError("gone"))
    session.relay.lose(OSError("gone"))
    assert session.ended() == "gone" and session.relay.failed and not session.relay.refused


def test_the_time_that_a_session_may_be_idle_can_become_shorter(make):
    session = make(idle_s=4.0).start()
    gevent.idle()
    session.idle_s = SOON_S
    assert session.ended() == "idle for 0.08 s"


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.ENOBUFS, errno.EMSGSIZE, errno.EPERM])
def test_a_datagram_that_the_network_does_not_take_is_counted_and_the_session_goes_on(make, code):
    delivered = []

    def deliver(datagram):
        if datagram == b"bad":
            raise OSError(code, os.strerror(code))
        delivered.append(bytes(datagram))

    session = make(deliver=deliver).start()
    session.peer.sendall(b"".join(map(format_frame, (b"one", b"bad", b"two"))))
    wait_until(lambda: delivered == [b"one", b"two"])
    assert (session.relay.dropped_network, session.relay.delivered) == (1, 2)


@pytest.mark.parametrize("error", [OSError(errno.ENETUNREACH, "network is unreachable"), ValueError("a fault of ours")])
def test_any_other_failure_to_deliver_ends_this_session_and_no_other(make, error):
    def deliver(_datagram):
        raise error

    session, other = make(deliver=deliver).start(), make().start()
    for each in (session, other):
        each.peer.sendall(format_frame(b"x"))
    assert session.ended() == (error.strerror if isinstance(error, OSError) else str(error))
    assert session.relay.failed
    wait_until(lambda: other.delivered == [b"x"])


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_session_can_be_ended_from_elsewhere(make, when):
    session = make()
    if when == "before":
        session.relay.send(b"this waits in vain")
        session.relay.end("another user came")
        session.start()
    else:
        session.start()
        gevent.idle()
        session.relay.end("another user came")
    assert session.ended() == "another user came"
    assert session.relay.dropped_queue == (when == "before")


def test_a_session_for_whose_end_there_is_no_memory_goes_on_and_may_be_ended_later(make, monkeypatch):
    session = make().start()
    gevent.idle()
    with monkeypatch.context() as without:
        without.setattr(session.relay, "_loop", Mock(run_callback=Mock(side_effect=MemoryError)))
        with pytest.raises(MemoryError):
            session.relay.end("another user came")
    session.relay.end("a third user came")
    assert session.ended() == "a third user came"


@pytest.mark.parametrize("kind", ["plain", "1.2", "1.3"])
def test_a_peer_that_is_gone_when_a_session_ends_is_no_failure(make, kind):
    session = make(kind).start()
    gevent.idle()
    session.relay.end("another user came")
    session.peer.reset()
    assert session.ended() == "another user came" and not session.relay.failed


def test_what_comes_after_the_end_is_dropped(session):
    session.peer.shutdown_write()
    session.ended()
    session.relay.send(b"late")
    session.relay.end("again")
    gevent.idle()
    assert (session.relay.dropped_queue, session.relay.how) == (1, "ended")


@pytest.mark.parametrize("stalled", [False, True])
def test_a_killed_session_leaves_nothing_behind(session, stalled):
    session.relay.send(b"x")
    gevent.idle()
    while stalled and not session.relay.dropped_queue:
        session.relay.send(bytes(60000))
        gevent.sleep(0)
    session.greenlet.kill()
    assert session.relay.how == "killed"
