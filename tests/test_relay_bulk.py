"""Bulky flows: by splice, through pipes that are never mixed up, and without starving others."""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import os
import random
import socket
import stat
import struct
import termios

import gevent
import pytest
from exchanges import run_exchange
from secure import stream_pair, transports
from support import bounded, open_pipes, wait_until

from nodepass_gevent import relay
from nodepass_gevent.pipes import MAX_KEPT, SIZE, Pipes
from nodepass_gevent.transport import Stream

NEVER_S = 3600
MIB = 1 << 20
BULK = random.Random(7).randbytes(4 * MIB) * 4  # more than the kernel holds


def bytes_in(pipe):
    """Ask the kernel how many bytes a pipe holds."""
    return struct.unpack("i", fcntl.ioctl(pipe._reader, termios.FIONREAD, bytes(4)))[0]


class WatchedPipes(Pipes):
    """The relay's pipes, counted; ``kept`` are ready for the next flow."""

    def __init__(self):
        super().__init__(MAX_KEPT)
        self.taken = 0
        self.returned = []  # bytes each one held, by the kernel's account

    @property
    def in_use(self):
        return self.taken - len(self.returned)

    @property
    def kept(self):
        return list(self._free)

    def take(self):
        pipe = super().take()
        self.taken += 1
        return pipe

    def give_back(self, pipe):
        self.returned.append(bytes_in(pipe))
        super().give_back(pipe)


@pytest.fixture
def pipes(monkeypatch):
    before = open_pipes()
    watched = WatchedPipes()
    monkeypatch.setattr(relay, "pipes", watched)
    yield watched
    for pipe in watched.kept:
        pipe.close()
    assert open_pipes() == before


@pytest.fixture
def start(no_leaks, pipes):
    with contextlib.ExitStack() as stack, bounded(20):

        def make(kinds=("plain", "plain"), half_closed_timeout_s=NEVER_S):
            a, user = transports(kinds[0])
            b, target = transports(kinds[1])
            for transport in (a, user, b, target):
                stack.callback(transport.close)
            greenlet = gevent.spawn(run_exchange, a, b, half_closed_timeout_s)
            stack.callback(greenlet.kill)
            return user, target, greenlet

        yield make


def send_and_end(transport, data):
    transport.sendall(data)
    transport.shutdown_write()


def read_exactly(transport, size):
    digest = hashlib.sha256()
    while size:
        piece = transport.recv(min(size, 1 << 18))
        assert piece, f"{size} bytes are missing"
        digest.update(piece)
        size -= len(piece)
    return digest.digest()


def carries(user, target, data=BULK):
    """Send bulk from the user to the target; say whether it is the same there."""
    sending = gevent.spawn(user.sendall, data)
    for _ in range(20):  # so that much waits: a flow is bulky when it is full at every read
        gevent.sleep(0.001)
    same = read_exactly(target, len(data)) == hashlib.sha256(data).digest()
    sending.get()
    return same


def end(user, target, greenlet):
    user.shutdown_write()
    target.shutdown_write()
    return greenlet.get()


def stall(user, data):
    """Send until nothing moves any more, for nobody reads."""
    sent = refused = 0
    while refused < 20:
        taken = user.push(memoryview(data)[sent % len(data) :])
        sent += taken
        refused = 0 if taken else refused + 1
        gevent.sleep(0.001)


def test_a_bulky_flow_goes_by_splice_and_gives_its_pipe_back_empty(start, pipes):
    user, target, greenlet = start()
    assert carries(user, target)
    assert (pipes.taken, pipes.in_use) == (1, 1)
    assert end(user, target, greenlet) == (len(BULK), 0, None)
    (pipe,) = pipes.kept
    assert bytes_in(pipe) == 0


def test_the_receiver_of_a_bulky_flow_is_made_ready_for_it(start, monkeypatch):
    ready = []
    monkeypatch.setattr(Stream, "expect_bulk", lambda sink: ready.append(sink.socket.getpeername()))
    user, target, greenlet = start()
    user.sendall(b"question")
    assert target.recv(100) == b"question" and not ready
    assert carries(user, target)
    assert ready == [target.socket.getsockname()]
    assert end(user, target, greenlet) == (8 + len(BULK), 0, None)


def test_both_directions_can_be_bulky(start, pipes):
    user, target, greenlet = start()
    both = [gevent.spawn(carries, user, target), gevent.spawn(carries, target, user)]
    assert [each.get() for each in both] == [True, True]
    assert pipes.taken == 2
    assert end(user, target, greenlet) == (len(BULK), len(BULK), None)
    assert pipes.in_use == 0


def test_a_small_flow_needs_no_pipe(start, pipes):
    user, target, greenlet = start()
    for _ in range(100):
        user.sendall(b"question")
        assert target.recv(100) == b"question"
    assert end(user, target, greenlet) == (800, 0, None)
    assert pipes.taken == 0


@pytest.mark.parametrize("kinds", [("plain", "1.3"), ("1.3", "plain"), ("1.2", "1.2")], ids="-".join)
def test_tls_needs_no_pipe(start, pipes, kinds):
    user, target, _ = start(kinds)
    assert carries(user, target)
    assert pipes.taken == 0


def test_a_flow_that_calms_down_gives_its_pipe_back_and_may_take_one_again(start, pipes):
    user, target, greenlet = start()
    assert carries(user, target)
    for _ in range(3 * relay.SMALL_IN_A_ROW):
        user.sendall(b"little")
        assert target.recv(100) == b"little"
    assert (pipes.in_use, pipes.returned) == (0, [0])
    assert carries(user, target)
    assert pipes.in_use == 1
    little = 3 * relay.SMALL_IN_A_ROW * len("little")
    assert end(user, target, greenlet) == (2 * len(BULK) + little, 0, None)


def test_what_comes_behind_an_urgent_byte_is_passed_on(start, pipes):
    """The kernel splices no further than up to it, and tells of more to read, or of an end, all the same."""
    user, target, greenlet = start()
    assert carries(user, target)
    assert pipes.in_use == 1
    user.socket.send(b"!", socket.MSG_OOB)
    user.sendall(b"behind")
    assert target.recv_exactly(6) == b"behind"
    assert carries(user, target)
    assert pipes.in_use == 1
    user.socket.send(b"!", socket.MSG_OOB)
    send_and_end(user, b"behind")
    assert target.recv_exactly(6) == b"behind"
    assert end(user, target, greenlet) == (2 * len(BULK) + 12, 0, None)
    assert pipes.in_use == 0


@pytest.mark.parametrize("cut", ["kill", "reset of the user", "reset of the target"])
def test_the_bytes_of_a_cut_exchange_never_reach_another_one(start, pipes, cut):
    user, target, greenlet = start()
    stall(user, b"foreign " * 100_000)
    assert pipes.in_use == 1
    if cut == "kill":
        greenlet.kill()
    else:
        (user if cut.endswith("user") else target).reset()
        if cut.endswith("user"):
            target.reset()  # or the relay waits for it to read
        assert greenlet.get().error
    assert pipes.in_use == 0
    assert pipes.returned[0] > 0, "the pipe held nothing, so this test shows nothing"
    assert pipes.kept == []
    for _ in range(3):
        user, target, greenlet = start()
        assert carries(user, target)
        assert end(user, target, greenlet) == (len(BULK), 0, None)


def test_a_half_closed_exchange_that_times_out_in_mid_write_leaves_no_byte_for_another_one(start, pipes):
    user, target, greenlet = start(half_closed_timeout_s=0.2)
    stall(user, b"foreign " * 100_000)
    target.shutdown_write()
    assert isinstance(greenlet.get().error, TimeoutError)
    assert pipes.returned[0] > 0, "the pipe held nothing, so this test shows nothing"
    assert pipes.kept == []


@pytest.mark.parametrize("seed", range(20))
def test_pipes_are_empty_whenever_their_exchanges_are_cut(start, pipes, seed):
    """Several at once, each at a moment of its own, and then the same number through what pipes are left."""
    rng = random.Random(seed)
    exchanges = [start() for _ in range(4)]

    def use_and_cut(user, target, greenlet):
        sending = gevent.spawn(user.sendall, BULK)
        gevent.sleep(0.001 * rng.randrange(10))
        for _ in range(rng.randrange(30)):
            target.recv(rng.randrange(1, 1 << 18))
        sending.kill()
        cut = rng.choice((greenlet.kill, user.reset, target.reset))
        cut()
        target.reset()  # or the relay waits for it to read
        greenlet.join()

    gevent.joinall([gevent.spawn(use_and_cut, *each) for each in exchanges], raise_error=True)
    assert pipes.in_use == 0
    assert not any(bytes_in(pipe) for pipe in pipes.kept)
    for _ in exchanges:
        user, target, greenlet = start()
        assert carries(user, target)
        assert end(user, target, greenlet) == (len(BULK), 0, None)


def test_a_stalled_bulky_flow_goes_on_where_it_stopped(start, spawn):
    user, target, greenlet = start()
    data = BULK
    sending = spawn(send_and_end, user, data)
    digest = hashlib.sha256()
    while piece := target.recv(70_001):
        digest.update(piece)
        gevent.sleep(0)
    sending.get()
    assert digest.digest() == hashlib.sha256(data).digest()
    target.shutdown_write()
    assert greenlet.get() == (len(data), 0, None)


def test_a_bulky_flow_that_gets_no_pipe_is_copied(start, pipes):
    pipes.most = 0
    user, target, greenlet = start()
    assert carries(user, target)
    assert end(user, target, greenlet) == (len(BULK), 0, None)
    assert pipes.taken == 0


def fail_with(code):
    def call(*_arguments, **_options):
        raise OSError(code, os.strerror(code))

    return call


@pytest.mark.parametrize(
    ("module", "name", "replacement"),
    [
        (os, "splice", None),
        (os, "splice", fail_with(errno.EINVAL)),
        (os, "pipe2", fail_with(errno.EMFILE)),
    ],
    ids=["no splice", "splice refused", "no descriptors"],
)
def test_without_what_splice_needs_the_bytes_are_copied(start, pipes, monkeypatch, module, name, replacement):
    user, target, greenlet = start()
    with monkeypatch.context() as patch:
        patch.setattr(module, name, replacement) if replacement else patch.delattr(module, name)
        assert carries(user, target)
    assert end(user, target, greenlet) == (len(BULK), 0, None)
    assert pipes.in_use == 0


def test_a_reset_in_the_middle_of_a_splice_is_a_reset(start, monkeypatch):
    """The kernel gives the number of bytes that went before, and tells nobody of the error: the next read gives 0."""
    user, target, greenlet = start()
    splice, reset = os.splice, []

    def interrupted(source, sink, count, **options):
        if reset or not stat.S_ISSOCK(os.fstat(sink).st_mode):
            return splice(source, sink, count, **options)
        sent = splice(source, sink, 1, **options)
        reset.append(sent)
        target.reset()
        with socket.socket(fileno=os.dup(sink)) as broken:
            assert broken.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET
        return sent

    monkeypatch.setattr(os, "splice", interrupted)
    sending = gevent.spawn(user.sendall, BULK)
    outcome = greenlet.get()
    sending.kill()
    assert reset and isinstance(outcome.error, OSError)
    assert user.peek() is None  # no end


def test_a_reset_of_who_sends_to_a_spliced_flow_is_no_end(start, pipes):
    user, target, greenlet = start()
    assert carries(user, target)
    assert pipes.in_use == 1
    user.reset()
    assert isinstance(greenlet.get().error, ConnectionResetError)
    assert target.peek() is None


class Counted(Stream):
    """A Stream that counts what it takes."""

    __slots__ = ("taken",)

    def __init__(self, stream):
        super().__init__(stream.socket, stream.peer)
        self.taken = 0

    def push(self, data):
        taken = super().push(data)
        self.taken += taken
        return taken


@contextlib.contextmanager
def rounds(count):
    """Sample ``count()`` once in each round of the event loop; give the samples."""
    samples = []
    watcher = gevent.get_hub().loop.prepare()
    watcher.start(lambda: samples.append(count()))
    try:
        yield samples
    finally:
        watcher.stop()
        watcher.close()


def most_at_once(samples):
    return max(after - before for before, after in itertools.pairwise(samples))


def fill(user, *ends):
    """Let much wait in the kernel, and let the sink take much at once."""
    for transport in ends:
        sock = getattr(transport, "stream", transport).socket
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 * MIB)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 * MIB)
    stall(user, BULK)


@pytest.mark.parametrize("kind", ["plain", "1.2", "1.3"])
def test_a_bulky_source_moves_a_bounded_amount_in_one_round_of_the_event_loop(start, spawn, kind):
    near, user = transports(kind)
    sink, target = stream_pair()
    with near, user, sink, target:
        fill(user, near, user, sink, target)
        counted = Counted(sink)
        with rounds(lambda: counted.taken) as samples:
            exchange = spawn(run_exchange, near, counted, NEVER_S)
            wait_until(lambda: counted.taken > 2 * MIB)
        exchange.kill()
    assert most_at_once(samples) <= 4 * relay.BUFFER


def test_a_spliced_flow_moves_one_pipeful_in_a_round_of_the_event_loop(start, monkeypatch):
    splice, moved = os.splice, [0]

    def counting(*arguments, **options):
        count = splice(*arguments, **options)
        moved[0] += count
        return count

    monkeypatch.setattr(os, "splice", counting)
    user, target, _ = start()
    with rounds(lambda: moved[0]) as samples:
        assert carries(user, target)
    assert moved[0] > MIB
    assert most_at_once(samples) <= 2 * SIZE  # in, and out


@pytest.mark.parametrize("kinds", [("plain", "plain"), ("1.3", "plain"), ("plain", "1.3")], ids="-".join)
def test_one_bulky_flow_does_not_starve_a_hundred_chatty_ones(start, spawn, kinds):
    """Each chatty exchange needs four rounds of the loop for a question and its answer; many may share a round."""
    bulk_user, bulk_target, _ = start(kinds)
    spawn(lambda: [bulk_user.sendall(BULK) for _ in range(1000)])
    spawn(lambda: [bulk_target.recv(1 << 18) for _ in range(1_000_000)])
    chatty = [start() for _ in range(100)]
    asked = 5

    def chat(user, target):
        for _ in range(asked):
            user.sendall(b"question")
            assert target.recv(100) == b"question"
            target.sendall(b"answer")
            assert user.recv(100) == b"answer"

    with rounds(lambda: 0) as samples:
        gevent.joinall([spawn(chat, user, target) for user, target, _ in chatty], raise_error=True)
    assert len(samples) <= asked * 4 * 10
