"""Data connections in clear, from the pool's wish to their id: at once where that can be, else in a greenlet."""

import errno
import socket
from contextlib import closing, suppress
from dataclasses import replace

import gevent
import pytest
from gevent.lock import Semaphore
from support import LIMITS, bounded, endpoint_of, is_reset, read_exactly, silent_endpoint, wait_until

from nodepass_gevent import net
from nodepass_gevent.dialing import PlainDial
from nodepass_gevent.dialing_pool import DialingPool
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
def dormant(dial, rounds):
    """A pool that does not run yet."""

    def sleep(seconds):
        rounds.acquire() if seconds == ROUND_S else gevent.sleep(seconds)

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
    spawn = pool._dials.spawn
    monkeypatch.setattr(pool._dials, "spawn", lambda *what: begun.append(what) or spawn(*what))
    return begun


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


def test_a_launch_that_overtakes_its_id_costs_no_wake_up_per_byte_that_waits(server, pool, spawn):
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


@pytest.mark.parametrize("split", [1, 7])
def test_an_id_in_pieces_is_waited_for(server, pool, split):
    whole = server.says + ID
    with server.accept() as peer:
        peer.sendall(whole[:-split])
        gevent.sleep(0.01)
        assert not len(pool)
        peer.sendall(whole[-split:])
        wait_until(lambda: len(pool) == 1)
        assert is_the_one(pool.take(ID, 0), peer)


def test_an_id_that_never_comes_is_given_up_at_its_deadline(server, pool, rounds):
    with server.accept() as silent:
        for _ in range(3):
            rounds.release()
            gevent.idle()
        assert not pool._awaited
        assert is_reset(silent)
    with server.accept() as peer:
        peer.sendall(server.says + ID)
        wait_until(lambda: len(pool) == 1)


def test_an_id_that_comes_late_is_taken(server, pool, rounds):
    with server.accept() as peer:
        for _ in range(3):
            rounds.release()
            gevent.idle()
        assert not pool._awaited
        peer.sendall(server.says + ID)
        wait_until(lambda: len(pool) == 1)
        assert is_the_one(pool.take(ID, 0), peer)


@pytest.mark.parametrize("wrong", [b"0A1B2C3D", b""])
def test_what_is_no_id_is_told_and_dialled_anew_with_a_pause(server, pool, wrong, caplog, rounds):
    for _ in range(2):  # what is done at once, and what the greenlet does in its place, which tells
        with server.accept() as peer:
            peer.sendall(server.says + wrong)
            if not wrong:
                peer.shutdown(socket.SHUT_WR)
            with suppress(ConnectionError):
                assert peer.recv(1) == b""
        if not wrong:
            break
    wait_until(lambda: "no data connection" in caplog.text)
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


def test_a_connection_that_cannot_stand_at_once_is_waited_for(server, pool, dial, greenlets, monkeypatch):
    real = net.RawSocket

    class Far(real):
        """A socket to a server that answers a moment later."""

        def connect_ex(self, address):
            return super().connect_ex(address) and errno.EALREADY

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


def test_a_dial_without_an_answer_names_the_address_too(no_leaks, line):
    with silent_endpoint() as endpoint:
        dial = PlainDial(endpoint, replace(LIMITS, connect_timeout_s=0.05), line)
        stream, begun = dial.begin()
        assert not begun
        with pytest.raises(ConnectError, match=f"^connect {endpoint}: connect: timed out after 0.05 s$"):
            dial.finish(stream, begun=begun)


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
            (stream,) = pool._awaited
            pool._id_arrived(stream)  # to a greenlet that has not had its turn
            assert pool._handed_over == {stream}
        pool.close()
        assert is_reset(peer)


def test_a_dial_for_which_there_is_no_memory_is_made_in_the_next_round(server, dormant, rounds, spawn, monkeypatch):
    def fail(*_arguments, **_options):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(net.Stream, "watch", fail)
        spawn(dormant.run)
        with server.accept() as peer:
            assert is_reset(peer)
    rounds.release()
    with server.accept() as peer:
        peer.sendall(server.says + ID)
        wait_until(lambda: len(dormant) == 1)
