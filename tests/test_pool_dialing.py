import logging
import socket
from unittest.mock import Mock

import gevent
import pytest
from gevent.event import Event
from support import bounded, is_reset, read_all, reset, wait_until

from nodepass_gevent import alarm, dialing_pool
from nodepass_gevent.alarm import soon
from nodepass_gevent.dialing_pool import DIALS_AT_ONCE, LINE_S, QUIET_ROUNDS, ROUND_S, DialingPool
from nodepass_gevent.dials import RETRY_MAX_S, RETRY_MIN_S
from nodepass_gevent.errors import ConnectError, NoDataConnection, PolicyError, PoolClosed, ProtocolError
from nodepass_gevent.transport import Stream


class Clock:
    """Time that passes when the test says so."""

    def __init__(self):
        self.now_s = 0.0
        self.slept_s = []  # every pause that was asked for
        self._sleepers = []

    def sleep(self, seconds):
        woken = Event()
        self.slept_s.append(seconds)
        self._sleepers.append((self.now_s + seconds, woken))
        woken.wait()

    @property
    def sleeping(self):
        return len(self._sleepers)

    def advance(self, seconds):
        """Let time pass, and whoever it wakes do what it can without waiting."""
        wait_until(lambda: self._sleepers)
        self.now_s += seconds
        for sleeper in [sleeper for sleeper in self._sleepers if sleeper[0] <= self.now_s]:
            self._sleepers.remove(sleeper)
            sleeper[1].set()
        gevent.idle()


class Dialler:
    """Makes data connections with the ids 00000000, 00000001, …, or with ``next_ids`` first; keeps their peers."""

    def __init__(self, pair):
        self._pair = pair
        self.ids = []
        self.peers = []  # in the same order
        self.next_ids = []
        self.in_flight = 0
        self.open = Event()  # while clear, dials hang
        self.open.set()
        self.failure = None
        self.takes_s = 0.0
        self.on_dialled = lambda: None

    def __call__(self):
        self.in_flight += 1
        try:
            self.open.wait()
            if self.takes_s:
                gevent.sleep(self.takes_s)
            if self.failure:
                raise self.failure
            stream, peer = self._pair()
        finally:
            self.in_flight -= 1
        id = self.next_ids.pop(0) if self.next_ids else b"%08x" % len(self.ids)
        self.ids.append(id)
        self.peers.append(peer)
        self.on_dialled()
        return id, stream


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def dialler(pair):
    return Dialler(pair)


@pytest.fixture
def dialing(dialler, clock, spawn, monkeypatch):
    """Make a pool of a near peer and run it; it is closed at the end, as its session would."""
    monkeypatch.setattr(dialing_pool, "NEAR_S", 3600)  # however slow this machine is just now
    pools = []

    def start(minimum, maximum=1024, lead_s=0.0, at_once=None):
        pool = DialingPool(dialler, minimum, maximum, clock.sleep, lead_s, at_once=at_once)
        pools.append(pool)
        spawn(pool.run)
        return pool

    yield start
    for pool in pools:
        pool.close()


def take(pool, id, timeout_s=0):
    with bounded():
        return pool.take(id, timeout_s)


def leads_to(transport, peer):
    """Say whether a connection that was handed out is whole both ways, and is the one of that peer."""
    with transport:
        transport.sendall(b"launched")
        peer.sendall(b"here")
        return transport.recv_exactly(4) == b"here" and peer.recv(100) == b"launched"


@pytest.mark.parametrize("minimum", [1, 4, 16, 128])
def test_the_pool_is_filled_and_refilled_the_moment_connections_are_used(minimum, dialler, dialing):
    pool = dialing(minimum)
    wait_until(lambda: len(pool) == minimum)
    dialler.open.clear()
    for id in list(dialler.ids):
        take(pool, id).close()
    wait_until(lambda: dialler.in_flight == minimum)  # all at once, none waits for another
    dialler.open.set()
    wait_until(lambda: len(pool) == minimum)
    assert len(dialler.ids) == 2 * minimum


def test_a_connection_is_replaced_at_once_when_there_is_nobody_else_to_serve(dialler, dialing, monkeypatch):
    monkeypatch.setattr(dialing_pool, "GATHER_S", 3600)
    pool = dialing(16, at_once=Mock(begin=Mock(side_effect=OSError)))  # a greenlet dials
    wait_until(lambda: len(pool) == 16)
    take(pool, dialler.ids[0]).close()
    assert len(dialler.ids) == 16
    wait_until(lambda: len(dialler.ids) == 17)


def test_a_dial_that_takes_a_handshake_waits_for_its_time_although_nobody_else_is_to_be_served(
    dialler, dialing, monkeypatch
):
    monkeypatch.setattr(dialing_pool, "GATHER_S", 3600)
    pool = dialing(16)
    wait_until(lambda: len(pool) == 16)
    for id in dialler.ids[:8]:
        take(pool, id).close()
    for _ in range(10):
        gevent.idle()
    assert len(dialler.ids) == 16
    take(pool, dialler.ids[8]).close()  # less than half is left
    wait_until(lambda: len(dialler.ids) == 16 + 9)


def test_a_dial_for_which_there_is_no_memory_is_made_in_the_next_round(dialler, dialing, clock, monkeypatch):
    pool = dialing(2)
    wait_until(lambda: len(pool) == 2)
    with monkeypatch.context() as without:
        without.setattr(pool._dials._greenlets, "spawn", Mock(side_effect=MemoryError))
        for id in list(dialler.ids):
            assert leads_to(take(pool, id), dialler.peers[dialler.ids.index(id)])
        gevent.idle()
    assert len(pool) == 0
    clock.advance(ROUND_S)
    wait_until(lambda: len(pool) == pool.capacity)


def test_a_connection_for_whose_watcher_there_is_no_memory_is_reset_and_the_next_round_dials_another_one(
    dialler, dialing, clock, monkeypatch
):
    with monkeypatch.context() as without:
        without.setattr(Stream, "watch", Mock(side_effect=MemoryError))
        pool = dialing(1)
        wait_until(lambda: dialler.peers)
        assert is_reset(dialler.peers[0]) and len(dialler.ids) == 1
    clock.advance(ROUND_S)
    wait_until(lambda: len(pool) == pool.capacity)


def test_where_launches_come_late_as_many_more_are_kept_ready_as_came_lately(dialler, dialing):
    pool = dialing(4, lead_s=60)
    wait_until(lambda: len(pool) == 4)
    for id in dialler.ids[:3]:
        take(pool, id).close()
    wait_until(lambda: len(pool) == 7)
    assert pool.capacity == 4


def test_half_of_the_capacity_is_no_stream_for_which_more_are_kept_ready(dialler, dialing):
    pool = dialing(4, lead_s=0.6)
    wait_until(lambda: len(pool) == 4)
    for id in dialler.ids[:2]:
        take(pool, id).close()
    wait_until(lambda: len(dialler.ids) == 6 and not pool._gathering.is_set)
    assert len(pool) == 4 and not dialler.in_flight


def test_what_was_launched_long_ago_keeps_no_more_ready(dialler, dialing, said):
    pool = dialing(4, lead_s=0.002)
    wait_until(lambda: len(pool) == 4)
    for number in range(8):
        take(pool, dialler.ids[number]).close()
        gevent.sleep(0.003)
    wait_until(lambda: len(pool) >= 4)
    assert len(pool) <= 5


def test_a_crowd_keeps_no_more_ready_than_may_be_dialled_at_once(dialler, dialing):
    pool = dialing(4, lead_s=6)
    for number in range(2 * DIALS_AT_ONCE):
        wait_until(lambda number=number: len(dialler.ids) > number)
        take(pool, dialler.ids[number], 1).close()
    wait_until(lambda: len(pool) == 4 + DIALS_AT_ONCE)


def test_a_crowd_keeps_no_more_ready_than_the_maximum(dialler, dialing):
    pool = dialing(4, maximum=32, lead_s=6)
    for number in range(64):
        wait_until(lambda number=number: len(dialler.ids) > number)
        take(pool, dialler.ids[number], 1).close()
    wait_until(lambda: len(pool) == 32)


def test_of_a_peer_far_away_as_many_more_are_kept_ready_as_are_launched_while_a_dial_takes(
    dialler, dialing, monkeypatch
):
    pool = dialing(4)
    wait_until(lambda: len(pool) == 4)
    monkeypatch.setattr(dialing_pool, "NEAR_S", 0.01)
    pool._dials.quickest_s = 60
    for id in dialler.ids[:3]:
        take(pool, id).close()
    wait_until(lambda: pool._dials.quickest_s < 60 and not dialler.in_flight)
    assert len(dialler.ids) == 4 + 3 + 3
    pool._dials.quickest_s = 0.009  # a near one: what is ready has to be used up first
    for id in dialler.ids[3:6]:
        take(pool, id).close()
    wait_until(lambda: not pool._gathering.is_set)
    gevent.idle()
    assert len(pool) == 4 and len(dialler.ids) == 4 + 3 + 3 and not dialler.in_flight


def test_users_who_keep_coming_find_a_connection_though_more_come_than_the_pool_holds_while_a_dial_takes(
    dialler, dialing, spawn, monkeypatch
):
    pool = dialing(2)
    monkeypatch.setattr(dialing_pool, "NEAR_S", 0.01)
    wait_until(lambda: len(pool) == 2)
    dialler.takes_s = pool._dials.quickest_s = 0.1  # so that ten come meanwhile
    waited = []
    for number in range(60):
        waited.append(len(dialler.ids) <= number)
        spawn(lambda number=number: pool.take(b"%08x" % number, 5).close())
        gevent.sleep(0.01)
    assert sum(waited[30:]) < 15  # none, unless this machine is slow; else all


def test_the_quickest_dial_tells_how_far_away_the_peer_is(dialler, dialing):
    pool, quickest_s = dialing(0), []
    for takes_s in (0.2, 0.1, 0.3, 0):
        dialler.takes_s = takes_s
        pool.dial_more(1)
        wait_until(lambda: len(pool) > len(quickest_s))
        quickest_s.append(pool._dials.quickest_s)
    assert quickest_s[0] >= 0.2 and quickest_s[1] >= 0.1
    assert quickest_s[0] >= quickest_s[1] == quickest_s[2] > quickest_s[3]


def test_a_dial_that_fails_does_not_make_its_peer_far_away(dialler, dialing, clock):
    dialler.failure = OSError(111, "Connection refused")
    pool = dialing(1)
    wait_until(lambda: clock.sleeping == 2)
    gevent.sleep(0.2)
    assert pool._dials.quickest_s == 0
    dialler.failure = None
    clock.advance(RETRY_MIN_S)
    wait_until(lambda: len(pool) == 1)
    assert 0 < pool._dials.quickest_s < 0.2


def test_all_that_are_launched_in_one_turn_are_taken_before_one_is_replaced(dialler, dialing):
    done = []

    class AtOnce:
        def begin(self):
            done.append("replaced")
            raise OSError  # a greenlet dials it

    pool = dialing(4, at_once=AtOnce())
    wait_until(lambda: len(pool) == 4)
    done.clear()

    def launch(id):
        take(pool, id).close()
        done.append("taken")

    for id in dialler.ids[:4]:
        soon(launch, id)
    wait_until(lambda: len(done) >= 8)
    assert done == ["taken"] * 4 + ["replaced"] * 4


def test_the_last_one_is_replaced_each_time(dialler, dialing):
    pool = dialing(1)
    for number in range(3):
        wait_until(lambda: len(pool) == 1)
        take(pool, dialler.ids[number]).close()
    wait_until(lambda: len(pool) == 1)


def test_a_full_pool_dials_no_more(dialler, dialing, clock):
    pool = dialing(4, maximum=4)
    wait_until(lambda: len(pool) == 4)
    for _ in range(5):
        clock.advance(ROUND_S)
    assert len(dialler.ids) == 4


def test_dials_in_flight_have_a_limit(dialler, dialing):
    dialler.open.clear()
    pool = dialing(2 * DIALS_AT_ONCE)
    wait_until(lambda: dialler.in_flight == DIALS_AT_ONCE)
    gevent.idle()
    assert dialler.in_flight == DIALS_AT_ONCE
    dialler.open.set()
    wait_until(lambda: len(pool) == 2 * DIALS_AT_ONCE)


def test_to_a_peer_far_away_more_dials_are_in_flight(dialler, dialing):
    pool = dialing(1, maximum=2048)
    wait_until(lambda: len(pool) == 1)
    dialler.open.clear()
    pool._dials.quickest_s = 3 * LINE_S
    pool.dial_more(2000)
    wait_until(lambda: dialler.in_flight == 3 * DIALS_AT_ONCE)
    gevent.idle()
    assert dialler.in_flight == 3 * DIALS_AT_ONCE


def test_a_connection_is_found_by_its_id_and_given_once(dialler, dialing):
    pool = dialing(3)
    wait_until(lambda: len(pool) == 3)
    assert leads_to(take(pool, dialler.ids[1]), dialler.peers[1])
    with pytest.raises(NoDataConnection):
        take(pool, dialler.ids[1])


def test_a_launch_that_overtakes_its_id_waits_and_refills_meanwhile(dialler, dialing, spawn):
    dialler.open.clear()
    pool = dialing(2)
    waiting = spawn(pool.take, b"00000000", 5)
    wait_until(lambda: dialler.in_flight == 3)  # one more: the awaited one is used the moment it is here
    dialler.open.set()
    assert leads_to(waiting.get(timeout=5), dialler.peers[0])
    wait_until(lambda: len(pool) == 2)


def test_a_launch_whose_id_never_comes_ends_and_leaves_the_pool_full(dialler, dialing):
    pool = dialing(2)
    with pytest.raises(NoDataConnection, match=r"no data connection ffffffff within 0.01 s"):
        take(pool, b"ffffffff", 0.01)
    wait_until(lambda: len(pool) == 3)  # one was dialled for it, and is kept
    for id in dialler.ids[:2]:
        take(pool, id).close()
    wait_until(lambda: len(pool) == 2)


def test_launches_of_a_crowd_that_have_not_begun_are_waited_for(dialler, dialing, monkeypatch):
    monkeypatch.setattr(alarm, "TURN_S", 1e-6)  # one call in a turn of the event loop, and at times two
    pool = dialing(8)
    wait_until(lambda: len(pool) == 8)
    taken = []
    for id in list(dialler.ids):
        soon(lambda id=id: taken.append(pool.take(id, 0)))
    with bounded():
        pool.settle()
    assert len(taken) == 8
    for transport in taken:
        transport.close()


def test_a_second_launch_of_an_awaited_id_breaks_the_protocol(dialler, dialing, spawn):
    dialler.open.clear()
    pool = dialing(1)
    first = spawn(pool.take, b"00000000", 5)
    wait_until(lambda: dialler.in_flight == 2)
    with pytest.raises(ProtocolError, match="launched twice"):
        take(pool, b"00000000")
    dialler.open.set()
    assert leads_to(first.get(timeout=5), dialler.peers[0])


def test_a_connection_that_comes_for_a_launch_that_just_gave_up_is_reset(dialler, dialing, spawn):
    dialler.open.clear()
    pool = dialing(1)
    waiting = spawn(pool.take, b"00000000", 5)
    wait_until(lambda: dialler.in_flight == 2)
    dialler.on_dialled = lambda: waiting.kill(block=False)  # in the turn in which it is handed over
    dialler.open.set()
    assert isinstance(waiting.get(timeout=5), gevent.GreenletExit)
    assert is_reset(dialler.peers[0])


def test_a_connection_that_comes_when_its_launch_has_given_up_is_reset_and_takes_nobodys_place(dialler, dialing, spawn):
    dialler.open.clear()
    pool = dialing(2)
    waiting = spawn(pool.take, b"00000000", 5)
    wait_until(lambda: dialler.in_flight == 3)
    waiting.kill()
    dialler.open.set()
    wait_until(lambda: len(dialler.peers) == 3 and len(pool) == 2)
    assert is_reset(dialler.peers[0])
    assert all(leads_to(take(pool, dialler.ids[number]), dialler.peers[number]) for number in (1, 2))


def test_a_dropped_connection_is_replaced_at_once(dialler, dialing):
    pool = dialing(1)
    wait_until(lambda: len(pool) == 1)
    pool.drop(dialler.ids[0])
    assert is_reset(dialler.peers[0])
    wait_until(lambda: len(pool) == 1)


def test_an_id_that_is_dropped_before_it_comes_is_dropped_once(dialler, dialing):
    dialler.open.clear()
    dialler.next_ids = [b"ffffffff", b"ffffffff"]
    pool = dialing(1)
    pool.drop(b"ffffffff")
    dialler.open.set()
    wait_until(lambda: len(pool) == 1)
    assert is_reset(dialler.peers[0])
    assert leads_to(take(pool, b"ffffffff"), dialler.peers[1])


def test_what_is_dropped_before_it_comes_is_forgotten_behind_as_many_as_can_be_there(dialler, dialing):
    dialler.open.clear()
    pool = dialing(2, maximum=3)
    for id in [b"00000000", *(b"fffffff%d" % number for number in range(2)), b"00000001"]:
        pool.drop(id)
    dialler.open.set()
    wait_until(lambda: len(pool) == 2)
    assert is_reset(dialler.peers[1])
    assert leads_to(take(pool, b"00000000"), dialler.peers[0])


def test_bytes_that_overtake_the_launch_wait_for_it(dialler, dialing):
    pool = dialing(1)
    wait_until(lambda: len(pool) == 1)
    dialler.peers[0].sendall(b"the user was fast")
    gevent.idle()
    with take(pool, dialler.ids[0]) as transport:
        assert transport.recv_exactly(17) == b"the user was fast"


@pytest.mark.parametrize("rounds", [0, 1])
def test_a_user_who_ends_before_the_launch_is_handed_out_for_a_round(rounds, dialler, dialing, clock):
    pool = dialing(1)
    wait_until(lambda: len(pool) == 1)
    dialler.peers[0].shutdown(1)
    wait_until(lambda: len(pool) == 0)  # the pool counts on it no more
    for _ in range(rounds):
        clock.advance(ROUND_S)
    with take(pool, dialler.ids[0]) as transport:
        assert transport.recv(1) == b""
        transport.sendall(b"answer")
    assert read_all(dialler.peers[0]) == b"answer"
    wait_until(lambda: len(pool) == pool.capacity)


def test_a_user_who_resets_before_the_launch_is_not_taken_for_one_who_ends(dialler, dialing):
    pool = dialing(1)
    wait_until(lambda: len(pool) == 1)
    reset(dialler.peers[0])
    wait_until(lambda: len(pool) == 0)
    with take(pool, dialler.ids[0]) as transport, pytest.raises(ConnectionResetError):
        transport.recv(1)


def test_a_connection_that_ended_and_is_never_launched_is_dropped(dialler, dialing, clock):
    pool = dialing(1)
    wait_until(lambda: len(pool) == 1)
    dialler.peers[0].shutdown(1)
    wait_until(lambda: len(pool) == 0)
    clock.advance(ROUND_S)
    clock.advance(ROUND_S)
    assert is_reset(dialler.peers[0])
    with pytest.raises(NoDataConnection, match=f"^data connection {dialler.ids[0].decode()} is gone$"):
        take(pool, dialler.ids[0], 30)
    with pytest.raises(NoDataConnection, match="within"):  # once
        take(pool, dialler.ids[0])


def test_of_as_many_that_are_gone_as_can_be_there_a_launch_is_told(dialler, dialing, clock):
    pool = dialing(1, maximum=1)
    for number in range(2):
        wait_until(lambda: len(pool) == 1)
        dialler.peers[number].shutdown(1)
        wait_until(lambda: len(pool) == 0)
        clock.advance(ROUND_S)
        clock.advance(ROUND_S)
    for id, told in zip(dialler.ids[:2], ("within", "is gone"), strict=True):
        with pytest.raises(NoDataConnection, match=told):
            take(pool, id)


def test_an_id_that_is_gone_may_come_again(dialler, dialing, clock):
    dialler.next_ids = [b"ffffffff", b"00000001", b"ffffffff"]
    pool = dialing(1, maximum=1)
    wait_until(lambda: len(pool) == 1)
    dialler.peers[0].shutdown(1)
    wait_until(lambda: len(pool) == 0)
    clock.advance(ROUND_S)
    clock.advance(ROUND_S)
    wait_until(lambda: len(pool) == 1)
    take(pool, b"00000001").close()
    wait_until(lambda: len(pool) == 1)
    assert leads_to(take(pool, b"ffffffff"), dialler.peers[2])


def end_each(dialler):
    """Be a server that ends each data connection as soon as it is dialled."""
    dialler.on_dialled = lambda: dialler.peers[-1].shutdown(1)


def test_a_server_that_ends_each_connection_at_once_makes_it_dial_once_a_round(dialler, dialing, clock):
    end_each(dialler)
    pool = dialing(4)
    expected = 0
    for _ in range(5):
        expected += pool.capacity
        wait_until(lambda expected=expected: len(dialler.ids) == expected)
        wait_until(lambda: len(pool) == 0)
        gevent.idle()
        assert len(dialler.ids) == expected
        clock.advance(ROUND_S)
    assert expected == 4 + 5 + 6 + 7 + 8


def test_a_server_that_ends_each_connection_at_once_makes_it_hold_no_more_than_the_maximum(dialler, dialing):
    end_each(dialler)
    pool = dialing(4, maximum=6)
    for _ in range(20):
        pool.dial_more(6)
        gevent.idle()
    assert len(dialler.ids) == 6


def test_of_two_connections_with_one_id_the_first_is_kept(dialler, dialing, clock):
    dialler.next_ids = [b"0000000a", b"0000000a"]
    pool = dialing(2)
    wait_until(lambda: clock.sleeping == 2)
    assert is_reset(dialler.peers[1])
    clock.advance(RETRY_MIN_S)
    wait_until(lambda: len(pool) == 2)
    assert leads_to(take(pool, b"0000000a"), dialler.peers[0])


def test_the_first_of_two_with_one_id_is_kept_although_its_user_has_ended(dialler, dialing, clock):
    dialler.next_ids = [b"0000000a", b"0000000a"]
    pool = dialing(1)
    wait_until(lambda: len(pool) == 1)
    dialler.peers[0].shutdown(1)
    wait_until(lambda: len(pool) == 0)
    clock.advance(ROUND_S)
    wait_until(lambda: len(dialler.ids) >= 2)
    assert is_reset(dialler.peers[1])
    with take(pool, b"0000000a") as transport:
        transport.sendall(b"answer")
    assert read_all(dialler.peers[0]) == b"answer"


def test_a_server_that_gives_all_connections_one_id_makes_it_dial_with_pauses(dialler, dialing, clock):
    dialler.next_ids = [b"0000000a"] * 1000
    dialing(2)
    for dials in range(2, 7):
        wait_until(lambda dials=dials: len(dialler.ids) == dials)
        wait_until(lambda: clock.sleeping == 2)
        clock.advance(clock.slept_s[-1])
    assert clock.slept_s[1:6] == [RETRY_MIN_S * 2**each for each in range(5)]


# Failing dials


def test_failed_dials_pause_twice_as_long_each_time_up_to_a_limit_and_recover(dialler, dialing, clock):
    dialler.failure = ConnectionRefusedError(111, "Connection refused")
    pool = dialing(1)

    def pauses_s():
        return [pause_s for pause_s in clock.slept_s if pause_s != ROUND_S]

    while len(pauses_s()) < 9:
        clock.advance(RETRY_MAX_S)
    assert pauses_s() == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, RETRY_MAX_S, RETRY_MAX_S]
    dialler.failure = None
    clock.advance(RETRY_MAX_S)
    wait_until(lambda: len(pool) == 1)


def test_a_dial_waits_out_its_pause(dialler, dialing, clock):
    dialler.failure = ConnectionRefusedError(111, "Connection refused")
    dialing(1)
    wait_until(lambda: RETRY_MIN_S in clock.slept_s)
    clock.advance(RETRY_MIN_S / 2)
    assert len(clock.slept_s) == 2  # the round, and the first pause
    clock.advance(RETRY_MIN_S / 2)
    assert len(clock.slept_s) == 3


def test_a_launch_is_served_by_a_dial_of_its_own_while_others_pause(dialler, dialing, clock, spawn):
    dialler.failure = ConnectionRefusedError(111, "Connection refused")
    pool = dialing(1)
    wait_until(lambda: RETRY_MIN_S in clock.slept_s)
    dialler.failure = None
    waiting = spawn(pool.take, b"00000000", 5)
    assert leads_to(waiting.get(timeout=5), dialler.peers[0])


def test_a_dial_that_is_wanted_no_more_is_not_tried_again(dialler, dialing, clock):
    dialler.failure = ConnectionRefusedError(111, "Connection refused")
    pool = dialing(1)
    with pytest.raises(NoDataConnection):
        take(pool, b"00000000", 0.01)
    assert clock.sleeping == 3  # the round, the dial that fills the pool, and the one for the launch
    clock.advance(RETRY_MIN_S)
    assert clock.sleeping == 2


@pytest.fixture
def warnings():
    """The lines that the pool logs as warnings."""
    lines = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("nodepass_gevent.dialing_pool").addHandler(handler)
    yield lines
    logging.getLogger("nodepass_gevent.dialing_pool").removeHandler(handler)


def test_a_failure_is_a_warning_once_until_a_dial_works(dialler, dialing, clock, warnings):
    dialler.failure = ConnectionRefusedError(111, "Connection refused")
    pool = dialing(3)
    for _ in range(5):
        clock.advance(RETRY_MAX_S)
    assert warnings == ["no data connection: connection refused"]
    dialler.failure = None
    clock.advance(RETRY_MAX_S)
    wait_until(lambda: len(pool) == 3)
    dialler.failure = ConnectionRefusedError(111, "Connection refused")
    take(pool, dialler.ids[0]).close()
    wait_until(lambda: len(warnings) == 2)


def test_a_failure_while_the_session_ends_is_no_warning(dialler, dialing, clock, warnings):
    dialler.open.clear()
    pool = dialing(1)
    wait_until(lambda: dialler.in_flight == 1)
    pool.leave()
    dialler.failure = ConnectionRefusedError(111, "Connection refused")
    dialler.open.set()
    wait_until(lambda: RETRY_MIN_S in clock.slept_s)
    assert not warnings


# Capacity


def use(pool, dialler, count):
    """Use the ``count`` oldest connections, and wait until each is replaced."""
    for _ in range(count):
        take(pool, dialler.ids.pop(0)).close()
        wait_until(lambda: len(pool) >= pool.capacity)


def grow(pool, dialler, clock, capacity):
    """Use connections, round after round, until the pool keeps ``capacity`` of them, one of which is new."""
    dialler.next_ids = [b"%08x" % number for number in range(2000)]
    wait_until(lambda: len(pool) == pool.capacity)
    while pool.capacity < capacity:
        use(pool, dialler, pool.capacity)
        clock.advance(ROUND_S)
        wait_until(lambda: len(pool) == pool.capacity)


@pytest.mark.parametrize(("used", "next_capacity"), [(0, 9), (1, 10), (7, 10), (8, 11)])
def test_a_round_of_little_use_costs_one_connection_and_one_of_much_use_gives_one(
    used, next_capacity, dialler, dialing, clock
):
    pool = dialing(5)
    grow(pool, dialler, clock, 10)
    use(pool, dialler, used)  # with the new one: 1, 2, 8 and 9 dialled of 10
    clock.advance(ROUND_S)
    assert pool.capacity == next_capacity


def test_the_capacity_stays_between_minimum_and_maximum(dialler, dialing, clock):
    pool = dialing(4, maximum=6)
    grow(pool, dialler, clock, 6)
    for _ in range(3):
        use(pool, dialler, 6)
        clock.advance(ROUND_S)
        assert pool.capacity == 6
    for capacity in (5, 4, 4, 4):
        clock.advance(ROUND_S)
        assert pool.capacity == capacity


# The end


def test_closing_a_dialing_pool_resets_what_is_idle_ends_the_dials_and_wakes_who_waits(dialler, dialing, spawn):
    pool = dialing(2)
    wait_until(lambda: len(pool) == 2)
    dialler.peers[1].shutdown(1)
    wait_until(lambda: len(pool) == 1)
    dialler.open.clear()
    waiting = spawn(pool.take, b"ffffffff", 5)
    wait_until(lambda: dialler.in_flight == 2)  # for the one that ended, too
    pool.close()
    with pytest.raises(PoolClosed):
        waiting.get(timeout=5)
    wait_until(lambda: dialler.in_flight == 0)
    assert all(is_reset(peer) for peer in dialler.peers)
    with pytest.raises(PoolClosed):
        pool.take(dialler.ids[0], 5)


def test_a_connection_that_comes_after_the_close_is_reset(dialler, dialing):
    dialler.open.clear()
    pool = dialing(1)
    wait_until(lambda: dialler.in_flight == 1)
    dialler.on_dialled = pool.close
    dialler.open.set()
    wait_until(lambda: dialler.peers)
    assert is_reset(dialler.peers[0])


def test_a_dial_refused_by_policy_is_not_tried_again_and_ends_the_pool():
    refusal, dials = PolicyError("certificate refused"), []

    def dial():
        dials.append(1)
        raise refusal

    pool = DialingPool(dial, 4, 8, sleep=lambda _seconds: gevent.idle())
    with bounded():
        assert gevent.spawn(pool.run).get() is refusal
    assert len(dials) <= 4
    pool.close()


def test_more_is_dialled_when_the_peer_asks_for_it_and_dropped_when_the_crowd_has_passed(dialler, dialing, clock):
    pool = dialing(2)
    wait_until(lambda: len(pool) == 2)
    pool.dial_more(5)
    wait_until(lambda: len(pool) == 7)
    clock.advance(ROUND_S)  # this round has dialled
    assert len(pool) == 7
    take(pool, b"%08x" % 0).close()  # now and then a user comes
    for _ in range(QUIET_ROUNDS - 1):
        clock.advance(ROUND_S)
        assert len(pool) == 6  # the next crowd finds them
    pool.dial_more(1)
    wait_until(lambda: len(pool) == 7)
    for _ in range(QUIET_ROUNDS):  # the first has dialled
        clock.advance(ROUND_S)
        assert len(pool) == 7
    clock.advance(ROUND_S)
    assert len(pool) == 2
    assert is_reset(dialler.peers[-1]) and leads_to(take(pool, b"%08x" % 1), dialler.peers[1])
    with pytest.raises(NoDataConnection, match="is gone"):
        take(pool, dialler.ids[-1], 30)


def test_what_is_launched_and_waits_to_be_taken_is_no_surplus(dialler, dialing, clock):
    pool = dialing(2)
    wait_until(lambda: len(pool) == 2)
    pool.dial_more(5)
    wait_until(lambda: len(pool) == 7)
    launched = dialler.ids[2:6]
    for id in launched:
        pool.keep(id)
    dialler.peers[2].shutdown(1)  # a user who waits for the first word
    for _ in range(QUIET_ROUNDS + 2):
        clock.advance(ROUND_S)
    assert is_reset(dialler.peers[6])
    with take(pool, launched[0]) as ended:
        ended.sendall(b"first word")
    assert read_all(dialler.peers[2]) == b"first word"
    for id, peer in zip(launched[1:], dialler.peers[3:], strict=False):
        assert leads_to(take(pool, id), peer)
    wait_until(lambda: len(pool) == 2)


def test_what_is_launched_is_reset_with_the_pool(dialler, dialing, clock):
    pool = dialing(2)
    wait_until(lambda: len(pool) == 2)
    for id in dialler.ids:
        pool.keep(id)
    dialler.peers[1].shutdown(1)
    for _ in range(3):
        clock.advance(ROUND_S)
    pool.close()
    assert all(map(is_reset, dialler.peers[:2]))


def test_what_is_launched_outlives_a_session_that_ends_in_good_order_until_it_is_taken_or_dropped(
    dialler, dialing, clock
):
    pool = dialing(4)
    wait_until(lambda: len(pool) == 4)
    first, second, third, _ = dialler.ids
    for id in (first, second, third):
        pool.keep(id)
    dialler.peers[1].shutdown(1)
    clock.advance(ROUND_S)
    pool.leave()
    pool.close()
    assert is_reset(dialler.peers[3])
    assert [pool.outlives(id) for id in dialler.ids[:4]] == [True, True, True, False]
    assert leads_to(take(pool, first), dialler.peers[0])
    with take(pool, second) as ended:
        ended.sendall(b"first word")
    assert read_all(dialler.peers[1]) == b"first word"
    pool.drop(third)
    assert is_reset(dialler.peers[2])
    with pytest.raises(PoolClosed):
        take(pool, first)


@pytest.mark.parametrize("failure", [OSError("refused"), ConnectError("no address", "resolve"), MemoryError()])
def test_what_cannot_be_dialled_at_once_a_greenlet_dials(dialing, failure):
    pool = dialing(1, at_once=Mock(begin=Mock(side_effect=failure)))
    wait_until(lambda: len(pool) == 1)


def test_dials_that_fail_while_the_session_ends_are_no_warning(dialler, dialing, caplog):
    caplog.set_level(logging.DEBUG)
    dialler.open.clear()
    dialler.failure = ConnectionRefusedError()
    pool = dialing(1)
    wait_until(lambda: dialler.in_flight)
    pool.leave()
    dialler.open.set()
    wait_until(lambda: caplog.records)
    assert [record.levelname for record in caplog.records] == ["DEBUG"]


def test_no_more_is_dialled_than_the_peer_takes(dialler, dialing):
    pool = dialing(2, maximum=4)
    wait_until(lambda: len(pool) == 2)
    pool.dial_more(100)
    wait_until(lambda: len(pool) == 4)
    assert len(dialler.ids) == 4


def test_a_connection_that_stays_idle_has_a_deadline_for_acknowledgements_until_it_is_launched(pair, spawn):
    stream, _ = pair()
    dialled = [(b"00000001", stream)]
    pool = DialingPool(lambda: dialled.pop() if dialled else Event().wait(), 1, 1, user_timeout_s=20)
    spawn(pool.run)
    wait_until(lambda: len(pool) == 1)

    def deadline_ms():
        return stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)

    wait_until(lambda: deadline_ms() == 20_000)  # not sooner than in a round: most are launched before
    assert pool.take(b"00000001", 0) is stream
    assert deadline_ms() == 0
    pool.close()
