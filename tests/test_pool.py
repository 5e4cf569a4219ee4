import socket
from functools import partial
from unittest.mock import Mock

import gevent
import pytest
from support import bounded, is_reset, read_all, reset, wait_until

from nodepass_gevent import pool as pools
from nodepass_gevent.alarm import Alarm
from nodepass_gevent.errors import NoDataConnection, PoolClosed
from nodepass_gevent.pool import AcceptingPool
from nodepass_gevent.transport import Stream

ENDINGS = {  # how an idle connection becomes useless
    "its peer has ended": lambda peer: peer.shutdown(1),
    "its peer has reset it": reset,
    "its peer has spoken": lambda peer: peer.sendall(b"out of turn"),
}


@pytest.fixture
def accepting(no_leaks):
    pool = AcceptingPool(capacity=4)
    yield pool
    pool.close()


@pytest.fixture
def added(accepting, pair):
    """Add a connection under an id, and give its peer."""

    def add(id):
        stream, peer = pair()
        accepting.add(id, stream)
        return peer

    return add


def test_the_oldest_connection_is_handed_out_first(accepting, added):
    for id in (b"0000000c", b"0000000a", b"0000000b"):
        added(id)
    assert [accepting.take(0)[0] for _ in range(3)] == [b"0000000c", b"0000000a", b"0000000b"]
    assert len(accepting) == 0


def test_what_is_handed_out_leads_to_the_peer_of_that_id(accepting, added):
    peers = {id: added(id) for id in (b"0000000a", b"0000000b")}
    assert all(id in accepting for id in peers)
    for _ in peers:
        id, transport = accepting.take(0)
        assert id not in accepting
        with transport:
            transport.sendall(id)
        assert read_all(peers[id]) == id


@pytest.mark.parametrize("how", ENDINGS)
def test_an_idle_connection_is_dropped_as_soon_as(how, accepting, added):
    peer = added(b"0000000a")
    ENDINGS[how](peer)
    wait_until(lambda: len(accepting) == 0)
    assert peer.fileno() < 0 or is_reset(peer)


@pytest.mark.parametrize("how", ENDINGS)
def test_a_connection_is_not_handed_out_when_a_moment_ago(how, accepting, added):
    dead, _ = added(b"0000000a"), added(b"0000000b")
    ENDINGS[how](dead)  # the event loop has had no turn to tell
    assert len(accepting) == 2
    assert accepting.take(0)[0] == b"0000000b"
    assert dead.fileno() < 0 or is_reset(dead)


def test_who_has_waited_longest_gets_the_first_connection(accepting, added, spawn):
    waiting = [spawn(accepting.take, 5) for _ in range(3)]
    gevent.idle()
    for id in (b"0000000a", b"0000000b", b"0000000c"):
        added(id)
    assert [taker.get(timeout=5)[0] for taker in waiting] == [b"0000000a", b"0000000b", b"0000000c"]
    assert len(accepting) == 0


def test_who_has_no_time_to_wait_is_told_at_once_and_nobody_is_asked_for_more(spawn):
    asked = []
    pool = AcceptingPool(capacity=4, on_shortage=asked.append)
    switched = spawn(lambda: None)
    with pytest.raises(NoDataConnection):
        pool.take(0)
    assert not switched.started or not switched.ready()
    gevent.idle()
    assert not asked
    pool.close()


def test_who_waits_too_long_is_told_and_costs_nobody_a_connection(accepting, added):
    with pytest.raises(NoDataConnection, match=r"^no data connection within 0\.01 s$"):
        accepting.take(0.01)
    added(b"0000000a")
    assert accepting.take(0)[0] == b"0000000a"


@pytest.mark.parametrize(("seconds", "told"), [(0.001, "0.001"), (9.99996, "10"), (1799.99996, "1800")])
def test_how_long_was_waited_in_vain_is_told_as_it_was_set(accepting, monkeypatch, seconds, told):
    told_at_once = partial(gevent.Timeout, 0.001)
    monkeypatch.setattr(gevent, "Timeout", lambda _seconds, exception: told_at_once(exception))
    with pytest.raises(NoDataConnection, match=rf"^no data connection within {told} s$"):
        accepting.take(seconds)


def test_a_connection_handed_to_somebody_who_just_gave_up_is_reset(accepting, pair, spawn):
    waiting = spawn(accepting.take, 5)
    gevent.idle()
    stream, peer = pair()
    waiting.kill(block=False)
    accepting.add(b"0000000a", stream)  # handed over in the same turn of the event loop
    assert is_reset(peer)
    assert isinstance(waiting.get(timeout=5), gevent.GreenletExit)


def test_there_is_room_up_to_the_capacity_and_for_those_who_wait(accepting, added, spawn):
    added(b"0000000a")
    assert accepting.room == 3
    accepting.take(0)
    for _ in range(2):
        spawn(accepting.take, 5)
    gevent.idle()
    assert accepting.room == 6


def test_closing_resets_what_is_idle_and_wakes_who_waits(accepting, added, spawn):
    running = spawn(accepting.run)
    waiting = spawn(accepting.take, 5)
    gevent.idle()
    accepting.close()
    with pytest.raises(PoolClosed):
        waiting.get(timeout=5)
    assert accepting.closed
    assert running.get(timeout=5) == "the pool was closed"


def test_a_closed_pool_neither_takes_nor_gives(accepting, added):
    peer = added(b"0000000a")
    accepting.close()
    assert is_reset(peer)
    with pytest.raises(PoolClosed):
        accepting.take(5)
    with pytest.raises(PoolClosed):
        added(b"0000000b")


def test_takers_that_have_to_wait_are_told_once_a_turn(spawn):
    told = []
    pool = AcceptingPool(4, told.append)
    for _ in range(3):
        spawn(pool.take, 5)
    gevent.idle()
    spawn(pool.take, 5)
    gevent.idle()
    assert told == [3, 1]
    pool.close()


def test_a_taker_for_whom_there_is_no_memory_does_not_wait_and_those_behind_are_told_all_the_same(spawn, monkeypatch):
    told = []
    pool = AcceptingPool(4, told.append)
    with monkeypatch.context() as without:
        without.setattr(pools, "soon", Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            pool.take(5)
    spawn(pool.take, 5)
    gevent.idle()
    assert told == [1] and pool.room == 5
    pool.close()


@pytest.mark.parametrize("what", [(Stream, "watch"), (Alarm, "set")], ids=["watcher", "round"])
def test_a_connection_for_which_there_is_no_memory_is_not_kept(accepting, pair, monkeypatch, what):
    stream, _ = pair()
    with monkeypatch.context() as without:
        without.setattr(*what, Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            accepting.add(b"0000000a", stream)
    assert len(accepting) == 0  # its owner closes it


def test_what_comes_on_a_connection_that_was_taken_does_not_touch_the_next_one_of_its_id(accepting, pair):
    (taken, peer), (later, _) = pair(), pair()
    accepting.add(b"00000001", taken)
    accepting.take(0)
    accepting.add(b"00000001", later)
    peer.sendall(b"for its taker")
    wait_until(lambda: taken.seen(1))
    with bounded():  # for who is told of it again and again never comes to rest
        gevent.idle()
    assert accepting.take(0) == (b"00000001", later)
    assert taken.recv(100) == b"for its taker"


def test_a_connection_that_stays_idle_has_a_deadline_for_acknowledgements_until_it_is_taken(pair):
    accepting = AcceptingPool(4, user_timeout_s=20)
    stream, _ = pair()

    def deadline_ms():
        return stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)

    accepting.add(b"00000001", stream)
    assert deadline_ms() == 0  # most are taken in this moment, and need none
    wait_until(lambda: deadline_ms() == 20_000)
    assert accepting.take(0) == (b"00000001", stream)
    assert deadline_ms() == 0
    accepting.add(b"00000001", stream)  # in a later round
    gevent.sleep(0.1)
    assert deadline_ms() == 0
    wait_until(lambda: deadline_ms() == 20_000)
    accepting.close()
