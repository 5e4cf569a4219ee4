import os

import gevent
import pytest
from exchanges import LIMIT, SHORT_S, happened
from support import read_all, wait_until


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
    assert side.counted == {"udp_exchanges": 1, "datagrams_up": 1, "bytes_up": 8, "datagrams_down": 1, "bytes_down": 9}
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
    counted = {"datagrams_up": 1, "datagrams_down": 1, "bytes_up": LIMIT, "bytes_down": LIMIT}
    assert side.counted == {"udp_exchanges": 1, **counted}
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
    assert side.counted == {"udp_exchanges": 1, "datagrams_up": 1, "bytes_up": 8, "datagrams_unanswered": 1}


def test_an_end_of_stream_without_an_answer_frees_the_slot(ingress):
    side = ingress()
    client = side.add_data()
    side.datagram(b"question")
    assert read_all(client) == b"question"
    client.close()
    assert side.counted == {"udp_exchanges": 1, "datagrams_up": 1, "bytes_up": 8, "datagrams_unanswered": 1}
    assert side.answers == []


def test_a_datagram_without_a_client_is_unanswered(ingress):
    side = ingress()
    side.link = None
    side.datagram(b"question")
    assert side.counted == {"datagrams_unanswered": 1}


def test_an_answer_that_is_too_long_is_dropped_and_counted(ingress):
    side = ingress()
    client = side.add_data()
    side.datagram(b"question")
    assert read_all(client) == b"question"
    client.sendall(bytes(LIMIT + 1))
    counted = {
        "udp_exchanges": 1,
        "datagrams_up": 1,
        "bytes_up": 8,
        "datagrams_dropped_size": 1,
        "datagrams_unanswered": 1,
    }
    assert side.counted == counted
    assert side.answers == []
