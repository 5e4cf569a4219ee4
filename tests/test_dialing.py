"""Data connections in clear, from the pool's wish to their id: at once where that can be, else in a greenlet."""

import contextlib
import select
import socket
from contextlib import closing, suppress
from dataclasses import replace

import gevent
import pytest
from gevent.lock import Semaphore
from support import LIMITS, bounded, endpoint_of, is_reset, read_exactly, reset, silent_endpoint, wait_until

from nodepass_gevent import net
from nodepass_gevent.dialing import PlainDial
from nodepass_gevent.dialing_pool import DialingPool
from nodepass_gevent.dials import RETRY_MIN_S
from nodepass_gevent.errors import ConnectError, ProtocolError
from nodepass_gevent.idle import ROUND_S

LINE = b"//0123456789abcdef?v=2#data\n"
FIRST_LINE = b"//10101?v=2#0\n"
ID = b"0a1b2c3d"


class Server:
    """Takes data connections, and says what the test wants."""

    def __init__(self, line):
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.says = FIRST_LINE if line else b""  # ahead of an id
        self._line = line

    def accept(self):
        """Give the next data connection, whose line has come."""
        self.listener.settimeout(5)
        peer = self.listener.accept()[0]
        peer.settimeout(5)
        assert read_exactly(peer, len(self._line)) == self._line
        return peer


@pytest.fixture(params=[b"", LINE], ids=["v1", "v2"])
def line(request):
    return request.param


@pytest.fixture
def server(no_leaks, line):
    server = Server(line)
    with closing(server.listener), bounded(20):
        yield server


@pytest.fixture
def dial(server, line):
    return PlainDial(endpoint_of(server.listener), replace(LIMITS, id_timeout_s=0.2), line)


@pytest.fixture
def rounds():
    """Each ``release`` ends a round of the pool; its pauses end by themselves."""
    return Semaphore(0)


@pytest.fixture
def slept():
    """Give the pauses, in seconds."""
    return []


@pytest.fixture
def dormant(dial, rounds, slept):
    """A pool that does not run yet."""

    def sleep(seconds):
        if seconds == ROUND_S:
            rounds.acquire()
        else:
            slept.append(seconds)
            gevent.sleep(seconds)

    pool = DialingPool(dial, 1, 16, sleep, at_once=dial)
    yield pool
    pool.close()


@pytest.fixture
def pool(dormant, spawn):
    """A pool that runs."""
    spawn(dormant.run)
    return dormant


@pytest.fixture
def greenlets(pool, monkeypatch):
    """Those that the pool has begun."""
    begun = []
    spawn = pool._dials._greenlets.spawn
    monkeypatch.setattr(pool._dials._greenlets, "spawn", lambda *what: begun.append(what) or spawn(*what))
    return begun


def let_greenlets_wait(pool, rounds):
    """Let as many rounds pass as an id may be awaited without one."""
    for _ in range(3):
        rounds.release()
        gevent.idle()
    assert not pool._dials._awaited


def is_the_one(transport, peer):
    with transport, peer:
        peer.sendall(b"here")
        return transport.recv_exactly(4) == b"here"


def test_a_dial_on_one_machine_needs_no_greenlet(server, pool, greenlets):
    with server.accept() as peer:
        peer.sendall(server.says + ID)
        wait_until(lambda: len(pool) == 1)
        assert not greenlets
        assert is_the_one(pool.take(ID, 0), peer)


def test_what_follows_the_id_is_for_whoever_takes_the_connection(server, pool, spawn):
    with server.accept() as peer:
        taking = spawn(pool.take, ID, 5)
        gevent.sleep(0)
        peer.sendall(server.says + ID + b"of a user")
        with taking.get() as data:
            assert data.recv_exactly(9) == b"of a user"


def test_a_launch_that_overtakes_its_id_costs_no_wake_up_per_byte_that_waits(server, pool, spawn, said):
    with server.accept() as peer:
        taking = spawn(pool.take, ID, 5)
        gevent.sleep(0)
        peer.sendall(server.says + ID)
        with taking.get() as data:
            peer.sendall(b"of a user")
            wait_until(data.peek)
            gevent.idle()
            assert not data._reader.active
            assert data.recv_exactly(9) == b"of a user"


@pytest.mark.parametrize("part", [0.1, 0.6, 0.99])
def test_an_id_in_pieces_is_waited_for(server, pool, part):
    whole = server.says + ID
    first = int(len(whole) * part) or 1  # of a v2 connection: in the line, and in the id
    with server.accept() as peer:
        peer.sendall(whole[:first])
        wait_until(lambda: not pool._dials._awaited)
        gevent.idle()
        assert not len(pool) and not pool._dials._handed_over
        peer.sendall(whole[first:])
        wait_until(lambda: len(pool) == 1)
        assert is_the_one(pool.take(ID, 0), peer)


def test_a_reset_before_the_id_is_told_as_one(server, pool, caplog):
    reset(server.accept())
    wait_until(lambda: "no data connection: connection reset by peer" in caplog.text)


def test_behind_one_that_came_at_once_a_failure_is_a_warning_again(server, pool, caplog):
    def warnings():
        return [record for record in caplog.records if record.levelname == "WARNING"]

    reset(server.accept())
    wait_until(lambda: len(warnings()) == 1)
    pool.dial_more(1)
    with server.accept() as peer:
        peer.sendall(server.says + ID)
        wait_until(lambda: len(pool) == 1)
        pool.take(ID, 0).close()
    reset(server.accept())
    wait_until(lambda: len(warnings()) == 2)


def test_an_id_that_never_comes_is_given_up_at_its_deadline(server, pool, rounds):
    with server.accept() as silent:
        let_greenlets_wait(pool, rounds)
        assert is_reset(silent)
    with server.accept() as peer:
        peer.sendall(server.says + ID)
        wait_until(lambda: len(pool) == 1)


def test_an_id_that_comes_within_a_round_needs_no_greenlet(server, pool, greenlets, rounds):
    with server.accept() as peer:
        rounds.release()
        gevent.idle()
        assert not greenlets
        peer.sendall(server.says + ID)
        wait_until(lambda: len(pool) == 1)


def test_how_long_an_id_is_on_its_way_tells_how_far_away_the_server_is(server, pool):
    with server.accept() as peer:
        gevent.sleep(0.1)
        peer.sendall(server.says + ID)
        wait_until(lambda: len(pool) == 1)
        assert pool._dials.quickest_s >= 0.1


def test_an_id_that_comes_late_is_taken(server, pool, rounds):
    with server.accept() as peer:
        let_greenlets_wait(pool, rounds)
        peer.sendall(server.says + ID)
        wait_until(lambda: len(pool) == 1)
        assert is_the_one(pool.take(ID, 0), peer)


@pytest.mark.parametrize("wrong", [b"0A1B2C3D", b""])
def test_what_is_no_id_is_told_and_dialled_anew_with_a_pause(server, pool, wrong, caplog, slept):
    with server.accept() as peer:
        peer.sendall(server.says + wrong)
        if not wrong:
            peer.shutdown(socket.SHUT_WR)
        with suppress(ConnectionError):
            assert peer.recv(1) == b""
    wait_until(lambda: "no data connection" in caplog.text)
    assert slept == [RETRY_MIN_S]
    with server.accept() as peer:
        peer.sendall(server.says + ID)
        wait_until(lambda: len(pool) == 1)


def test_of_two_with_one_id_the_first_is_kept(server, pool):
    with server.accept() as first:
        first.sendall(server.says + ID)
        wait_until(lambda: len(pool) == 1)
        pool.dial_more(1)
        with server.accept() as second:
            second.sendall(server.says + ID)
            assert is_reset(second)
        assert is_the_one(pool.take(ID, 0), first)


class Far(net.RawSocket):
    """A socket to a peer that answers a moment later."""

    tried = False

    def send(self, data):
        if not self.tried:
            self.tried = True
            raise BlockingIOError
        return super().send(data)


def test_a_connection_that_cannot_stand_at_once_is_waited_for(server, pool, greenlets, monkeypatch):
    with server.accept() as peer:
        peer.sendall(server.says + ID)
        wait_until(lambda: len(pool) == 1)
    monkeypatch.setattr(net, "RawSocket", Far)
    pool.take(ID, 0).close()
    with server.accept() as peer:
        peer.sendall(server.says + ID)
        wait_until(lambda: len(pool) == 1)
        assert len(greenlets) == 1
        assert is_the_one(pool.take(ID, 0), peer)


def test_a_dial_that_is_refused_names_the_address(no_leaks, line):
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        endpoint = endpoint_of(listener)
    with pytest.raises(ConnectError, match=f"^connect {endpoint}: connection refused$"):
        PlainDial(endpoint, LIMITS, line)()


def test_a_dial_that_is_refused_later_names_it_too(no_leaks, line, monkeypatch):
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        endpoint = endpoint_of(listener)
    monkeypatch.setattr(net, "RawSocket", Far)
    dial = PlainDial(endpoint, LIMITS, line)
    stream, only_id = dial.begin()
    assert not only_id
    with pytest.raises(ConnectError, match=f"^connect {endpoint}: connection refused$"):
        dial.finish(stream, only_id=only_id)


def test_a_dial_without_an_answer_names_it_too(no_leaks, line):
    with silent_endpoint() as endpoint:
        dial = PlainDial(endpoint, replace(LIMITS, connect_timeout_s=0.05), line)
        stream, only_id = dial.begin()
        assert not only_id
        with pytest.raises(ConnectError, match=f"^connect {endpoint}: connect: timed out after 0.05 s$"):
            dial.finish(stream, only_id=only_id)


@pytest.mark.parametrize("line", [LINE])
@pytest.mark.parametrize("failure", [ConnectionResetError(104, "Connection reset by peer"), MemoryError(), None])
def test_a_connection_that_takes_no_line_is_closed(dial, failure, monkeypatch):
    dialled = []

    class Full(net.RawSocket):
        def send(self, data):
            dialled.append(self)
            if failure:
                raise failure
            return len(data) - 1

    monkeypatch.setattr(net, "RawSocket", Full)
    with pytest.raises((OSError, MemoryError)):
        dial.begin()
    assert [sock.fileno() for sock in dialled] == [-1]


def test_a_dial_may_block_until_its_id_is_here(server, dial, spawn):
    dialling = spawn(dial)
    with server.accept() as peer:
        peer.sendall(server.says + ID)
        id, stream = dialling.get()
        assert id == ID and is_the_one(stream, peer)
    dialling = spawn(dial)
    with server.accept() as peer:
        peer.sendall(server.says + b"no id...")
        with pytest.raises(ProtocolError):
            dialling.get()


@pytest.mark.parametrize("handed_over", [False, True])
def test_a_pool_that_is_closed_resets_what_it_has_begun(server, pool, handed_over):
    with server.accept() as peer:
        if handed_over:
            peer.sendall((server.says + ID)[:3])
            (stream,) = pool._dials._awaited
            pool._dials._id_arrived(stream)  # to a greenlet that has not had its turn
            assert pool._dials._handed_over == {stream}
        pool.close()
        assert is_reset(peer)


def test_a_pool_that_is_closed_dials_no_more(server, pool):
    server.accept().close()
    pool.close()
    pool.dial_more(1)
    gevent.idle()
    assert not select.select([server.listener], [], [], 0)[0]


def no_memory(*_arguments, **_options):
    raise MemoryError


@pytest.mark.parametrize("what", ["watch", "begin", "spawn", "spawn for a far one", "take_id"])
def test_a_dial_for_which_there_is_no_memory_is_made_in_the_next_round(
    server, dial, dormant, rounds, spawn, monkeypatch, what
):
    with monkeypatch.context() as patched:
        if "spawn" in what:
            patched.setattr(dormant._dials._greenlets, "spawn", no_memory)
            patched.setattr(net, "RawSocket", Far) if "far" in what else patched.setattr(dial, "begin", no_memory)
        else:
            patched.setattr(net.Stream if what == "watch" else dial, what, no_memory)
        dormant.dial_more(2)
        if what == "take_id":
            with server.accept() as peer:
                peer.sendall(server.says + ID)
                assert is_reset(peer)
            assert dormant._dials.count == 1  # the other one's id may still come
        elif what != "begin":  # which a greenlet makes good
            assert (dormant._dials.count, dormant._owed) == (0, 2)
        assert not dormant._dials._handed_over or what == "begin"
    spawn(dormant.run)
    rounds.release()
    with contextlib.ExitStack() as stack:
        while len(dormant) < 1:
            peer = stack.enter_context(server.accept())
            with suppress(ConnectionError):
                peer.sendall(server.says + ID)
            gevent.sleep(0.001)
