import os

import gevent
import pytest
from exchanges import ID, LIMIT, SHORT_S, Side, happened
from support import is_reset, read_all, read_exactly, reset, wait_until

from nodepass_gevent.errors import NoDataConnection
from nodepass_gevent.forward import Ingress
from nodepass_gevent.pool import AcceptingPool


class FakeLink:
    """A client whose launches are a list."""

    def __init__(self):
        self.pool = AcceptingPool(capacity=16)
        self.sent = []
        self.send = self.sent.append


class IngressSide(Side):
    def __init__(self, pair, settings):
        super().__init__(settings)
        self._pair = pair
        self.link = FakeLink()
        self.answers = []
        self.ingress = Ingress(self._find_link, self.exchanges, self.config, self.counters)

    def _find_link(self, timeout_s):
        if self.link is None:
            raise NoDataConnection("no client is connected")
        return self.link

    def end(self):
        super().end()
        if self.link:
            self.link.pool.close()

    def add_data(self, id=ID):
        """Make a data connection ready, and give the client's end of it."""
        data, client = self._pair()
        self.link.pool.add(id, data)
        return client

    def user(self):
        """Let a user come, and give the user's end."""
        accepted, user = self._pair()
        self.ingress.user(accepted)
        return user

    def datagram(self, datagram):
        self.ingress.datagram(datagram, self.answers.append)


@pytest.fixture
def ingress(pair):
    made = []

    def make(**settings):
        made.append(IngressSide(pair, settings))
        return made[-1]

    yield make
    for side in made:
        side.end()


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


def test_a_reset_of_the_user_is_a_reset_for_the_client(ingress):
    side = ingress()
    client, user = side.add_data(), side.user()
    user.sendall(b"hello")
    assert read_exactly(client, 5) == b"hello"
    reset(user)
    assert is_reset(client)
    assert side.counted == {"tcp_exchanges": 1, "exchanges_failed": 1, "bytes_up": 5}


def test_a_reset_of_the_client_is_a_reset_for_the_user(ingress):
    side = ingress()
    client, user = side.add_data(), side.user()
    wait_until(lambda: side.link.sent)
    client.sendall(b"half an ans")
    assert read_exactly(user, 11) == b"half an ans"
    reset(client)
    assert is_reset(user)
    assert side.counted == {"tcp_exchanges": 1, "exchanges_failed": 1, "bytes_down": 11}


def test_at_the_limit_of_exchanges_there_is_no_room_until_one_ends(ingress, spawn):
    side = ingress(semaphore_limit=2)
    assert side.ingress.room() == 2
    users = [side.user(), side.user()]
    waiting = spawn(side.ingress.room)
    gevent.idle()
    assert not waiting.ready()
    reset(users[0])
    side.add_data()
    assert waiting.get(timeout=5) == 1


def test_a_datagram_is_launched_and_answered(ingress):
    side = ingress()
    client = side.add_data()
    side.datagram(b"question")
    assert read_all(client) == b"question"  # and a half-close behind it
    assert side.link.sent == [b"//0a1b2c3d#2\n"]
    client.sendall(b"an ans")
    gevent.idle()
    client.sendall(b"wer")
    client.close()
    assert side.counted == {"udp_exchanges": 1, "bytes_up": 8, "bytes_down": 9}
    assert side.answers == [b"an answer"]


@pytest.mark.parametrize("size", [0, LIMIT + 1, 65507])
def test_an_empty_or_oversized_datagram_is_dropped_and_counted(size, ingress):
    side = ingress()
    side.add_data()
    side.datagram(bytes(size))
    assert side.counted == {"datagrams_dropped_size": 1}
    assert len(side.link.pool) == 1


def test_datagrams_and_answers_of_the_greatest_size_arrive_whole(ingress):
    side = ingress()
    client = side.add_data()
    datagram, answer = os.urandom(LIMIT), os.urandom(LIMIT)
    side.datagram(datagram)
    assert read_all(client) == datagram
    client.sendall(answer)
    client.close()
    assert side.counted == {"udp_exchanges": 1, "bytes_up": LIMIT, "bytes_down": LIMIT}
    assert side.answers == [answer]


def test_datagrams_take_half_of_the_slots_at_most(ingress):
    side = ingress(semaphore_limit=4)
    clients = [side.add_data(id) for id in (b"0000000a", b"0000000b", b"0000000c")]
    for datagram in (b"first", b"second", b"third"):
        side.datagram(datagram)
    assert happened(side.counters) == {"udp_exchanges": 2, "datagrams_dropped_busy": 1}
    assert side.exchanges.free_count() == 2
    assert read_all(clients[0]) == b"first"
    clients[0].close()
    wait_until(lambda: side.exchanges.free_count() == 3)
    side.datagram(b"fourth")  # the slot is free again
    assert read_all(clients[2]) == b"fourth"


def test_a_datagram_for_which_no_slot_is_left_is_dropped_and_counted(ingress):
    side = ingress(semaphore_limit=2)
    for _ in range(2):
        side.user()
    side.datagram(b"question")
    assert happened(side.counters) == {"tcp_exchanges": 2, "datagrams_dropped_busy": 1}


def test_with_a_single_slot_a_datagram_may_have_it(ingress):
    side = ingress(semaphore_limit=1)
    client = side.add_data()
    side.datagram(b"question")
    assert read_all(client) == b"question"


def test_a_datagram_whose_answer_never_comes_is_given_up(ingress):
    side = ingress(udp_read_timeout_s=SHORT_S)
    client = side.add_data()
    side.datagram(b"question")
    assert read_all(client) == b"question"
    assert side.counted == {"udp_exchanges": 1, "bytes_up": 8, "datagrams_unanswered": 1}


def test_an_end_of_stream_without_an_answer_frees_the_slot(ingress):
    side = ingress()
    client = side.add_data()
    side.datagram(b"question")
    assert read_all(client) == b"question"
    client.close()
    assert side.counted == {"udp_exchanges": 1, "bytes_up": 8, "datagrams_unanswered": 1}
    assert side.answers == []


def test_a_datagram_without_a_client_is_unanswered(ingress):
    side = ingress()
    side.link = None
    side.datagram(b"question")
    assert side.counted == {"udp_exchanges": 1, "datagrams_unanswered": 1}


def test_an_answer_that_is_too_long_is_dropped_and_counted(ingress):
    side = ingress()
    client = side.add_data()
    side.datagram(b"question")
    assert read_all(client) == b"question"
    client.sendall(bytes(LIMIT + 1))
    counted = {"udp_exchanges": 1, "bytes_up": 8, "datagrams_dropped_size": 1, "datagrams_unanswered": 1}
    assert side.counted == counted
    assert side.answers == []
