import socket
from unittest.mock import Mock

import gevent
import pytest
from exchanges import ID, SHORT_S, FakeLink
from support import BOUND_S, is_reset, read_all, read_exactly, reset, wait_until

from nodepass_gevent.errors import LaunchFailed


def test_a_user_is_launched_and_talks_both_ways_until_both_have_ended(ingress):
    side = ingress()
    client, user = side.add_data(), side.user()
    user.sendall(b"question")
    user.shutdown(1)
    assert read_all(client) == b"question"
    assert side.link.sent == [b"//0a1b2c3d#1\n"]
    client.sendall(b"a late answer")  # after the user's half-close
    client.close()
    assert read_all(user) == b"a late answer"
    assert side.counted == {"tcp_exchanges": 1, "bytes_up": 8, "bytes_down": 13}


def test_what_is_carried_counts_while_it_is_and_the_first_answer_is_timed(ingress):
    side = ingress()
    client, user = side.add_data(), side.user()
    user.sendall(b"question")
    assert read_exactly(client, 8) == b"question"
    first_bytes = side.counters.first_bytes
    assert not sum(first_bytes.counts)
    client.sendall(b"answer")
    assert read_exactly(user, 6) == b"answer"
    total = side.counters.total()
    assert (total["bytes_up"], total["bytes_down"]) == (8, 6)
    assert sum(first_bytes.counts) == 1 and 0 < first_bytes.sum_s < BOUND_S


def test_a_user_for_whom_a_data_connection_is_ready_is_launched_before_anything_else_has_its_turn(ingress):
    side = ingress()
    side.add_data()
    user = side.user()
    assert side.link.sent == [b"//0a1b2c3d#1\n"]
    assert side.link.launched[ID].abort(LaunchFailed("its target is gone"))  # before its greenlet has begun
    assert is_reset(user)
    assert side.counted == {"tcp_exchanges": 1, "exchanges_failed": 1, "launches_failed": 1}


def test_a_user_for_whom_there_is_no_memory_for_a_greenlet_is_reset_with_its_data_connection(ingress, monkeypatch):
    side = ingress()
    taken = side.add_data()
    monkeypatch.setattr(side.exchanges, "spawn", Mock(side_effect=MemoryError))
    accepted, user = side.pair()
    left = Mock()
    with pytest.raises(MemoryError):
        side.ingress.user(accepted, left)
    assert is_reset(taken) and is_reset(user)
    assert left.call_count == 1 and not side.link.launched
    assert side.counted == {"tcp_exchanges": 1, "exchanges_failed": 1}


@pytest.mark.parametrize("what", ["launch", "exchange"])
def test_a_user_for_whom_there_is_no_memory_to_begin_is_reset_with_its_data_connection(ingress, monkeypatch, what):
    side = ingress()
    taken = side.add_data()
    fails = Mock(side_effect=MemoryError)
    if what == "launch":
        monkeypatch.setattr(side.link, "send", fails)
    else:
        monkeypatch.setattr("nodepass_gevent.ingress.Exchange", fails)
    accepted, user = side.pair()
    with pytest.raises(MemoryError):
        side.ingress.user(accepted)
    assert is_reset(taken) and is_reset(user)
    assert side.counted == {"tcp_exchanges": 1, "exchanges_failed": 1}


def test_a_user_whose_client_goes_in_the_moment_of_the_launch_is_served_by_the_next(ingress):
    side = ingress()
    lost = side.link
    lost.send = lambda line: False
    taken, user = side.add_data(), side.user()
    assert is_reset(taken)
    side.link = FakeLink()
    client = side.add_data()
    user.sendall(b"hello")
    assert read_exactly(client, 5) == b"hello"


def test_a_user_waits_for_a_data_connection(ingress):
    side = ingress()
    user = side.user()
    gevent.idle()
    assert side.link.sent == []
    client = side.add_data()
    user.sendall(b"hello")
    assert read_exactly(client, 5) == b"hello"
    assert side.link.sent == [b"//0a1b2c3d#1\n"]


def test_a_user_for_whom_no_data_connection_comes_is_reset(ingress):
    side = ingress(pool_wait_s=SHORT_S)
    assert is_reset(side.user())
    assert side.link.sent == []
    assert side.counted == {"tcp_exchanges": 1, "exchanges_failed": 1}


def test_a_user_without_a_client_is_reset(ingress):
    side = ingress()
    side.link = None
    assert is_reset(side.user())
    assert side.counted == {"tcp_exchanges": 1, "exchanges_failed": 1}


def test_a_user_whose_client_is_lost_while_waiting_is_served_by_the_next(ingress):
    side = ingress()
    user = side.user()
    gevent.idle()
    lost, side.link = side.link, FakeLink()
    lost.pool.close()
    client = side.add_data()
    user.sendall(b"hello")
    assert read_exactly(client, 5) == b"hello"
    assert (lost.sent, side.link.sent) == ([], [b"//0a1b2c3d#1\n"])


@pytest.mark.parametrize("limit", ["idle_timeout_s", "half_closed_timeout_s"])
def test_an_exchange_that_is_silent_for_the_time_that_is_set_is_reset(ingress, limit):
    side = ingress(**{limit: SHORT_S})
    client, user = side.add_data(), side.user()
    if limit == "half_closed_timeout_s":
        wait_until(lambda: side.link.sent)
        client.shutdown(1)
        assert user.recv(1) == b""
    else:
        assert is_reset(user)
    assert is_reset(client)
    assert side.counted == {"tcp_exchanges": 1, "exchanges_failed": 1}


def test_a_slow_user_gets_all_of_an_answer_whose_exchange_is_over_for_its_silence(ingress):
    side = ingress(half_closed_timeout_s=SHORT_S)
    client, user = side.add_data(), side.user()
    wait_until(lambda: side.link.sent)
    client.sendall(bytes(200_000))
    client.shutdown(1)
    assert is_reset(client)
    assert read_all(user) == bytes(200_000)
    assert side.counted == {"tcp_exchanges": 1, "exchanges_failed": 1, "bytes_down": 200_000}


def test_a_reset_of_the_user_is_a_reset_for_the_client(ingress):
    side = ingress()
    client, user = side.add_data(), side.user()
    user.sendall(b"hello")
    assert read_exactly(client, 5) == b"hello"
    reset(user)
    assert is_reset(client)
    assert side.counted == {"tcp_exchanges": 1, "exchanges_failed": 1, "bytes_up": 5}


def test_a_reset_of_a_user_who_had_ended_is_a_reset_for_the_client(ingress):
    side = ingress()
    client, user = side.add_data(), side.user()
    user.shutdown(1)
    assert client.recv(1) == b""
    client.sendall(b"half an ans")
    assert read_exactly(user, 11) == b"half an ans"
    reset(user)
    client.sendall(b"wer")  # whereby it is found out
    wait_until(lambda: client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))


def test_a_reset_of_the_client_is_a_reset_for_the_user(ingress):
    side = ingress()
    client, user = side.add_data(), side.user()
    wait_until(lambda: side.link.sent)
    client.sendall(b"half an ans")
    assert read_exactly(user, 11) == b"half an ans"
    reset(client)
    assert is_reset(user)
    assert side.counted == {"tcp_exchanges": 1, "exchanges_failed": 1, "bytes_down": 11}


def test_at_the_limit_of_exchanges_there_is_no_room_until_one_ends(ingress, spawn, caplog):
    side = ingress(semaphore_limit=2)
    assert side.ingress.room() == 2
    side.ingress.wait_for_room()  # there is some
    users = [side.user(), side.user()]
    assert not caplog.messages and side.ingress.room() == 0
    waiting = spawn(side.ingress.wait_for_room)
    gevent.idle()
    assert not waiting.ready()
    assert caplog.messages == ["all places are taken, 2 of semaphore-limit: further users wait"]
    reset(users[0])
    side.add_data()
    waiting.get(timeout=5)
    assert side.ingress.room() == 1
