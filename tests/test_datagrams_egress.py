import os

import gevent
import pytest
from exchanges import LIMIT, SHORT_S, address_of
from support import bounded, is_reset, read_all, read_exactly

from nodepass_gevent.datagrams import ONE_SEGMENT
from nodepass_gevent.wire import Kind

PIECES = {
    "whole": lambda datagram: [datagram],
    "in two": lambda datagram: [datagram[:ONE_SEGMENT], datagram[ONE_SEGMENT:]],
    "in small ones": lambda datagram: [datagram[:600], *(datagram[at : at + 50] for at in range(600, LIMIT, 50))],
}


@pytest.mark.parametrize("half_close", [True, False])
@pytest.mark.parametrize("cut", PIECES)
def test_a_datagram_arrives_whole_however_it_was_cut(cut, half_close, egress, udp_target):
    side = egress(target=address_of(udp_target))
    server = side.launch(Kind.UDP)
    datagram = os.urandom(LIMIT)
    for piece in PIECES[cut](datagram):
        server.sendall(piece)
        gevent.idle()
    if half_close:
        server.shutdown(1)
    received, sender = udp_target.recvfrom(65536)
    assert received == datagram
    udp_target.sendto(b"answer", sender)
    assert read_all(server) == b"answer"
    server.close()
    assert side.counted == {
        "udp_exchanges": 1,
        "datagrams_up": 1,
        "bytes_up": LIMIT,
        "datagrams_down": 1,
        "bytes_down": 6,
    }


def test_an_answer_of_the_greatest_size_arrives_whole(egress, udp_target):
    side = egress(target=address_of(udp_target))
    server = side.launch(Kind.UDP)
    server.sendall(b"q")
    _, sender = udp_target.recvfrom(65536)
    answer = os.urandom(LIMIT)
    udp_target.sendto(answer, sender)
    assert read_all(server) == answer
    server.close()
    assert side.counted == {
        "udp_exchanges": 1,
        "datagrams_up": 1,
        "bytes_up": 1,
        "datagrams_down": 1,
        "bytes_down": LIMIT,
    }


def test_a_silent_target_frees_its_slot_and_ends_without_a_reset(egress, udp_target):
    side = egress(target=address_of(udp_target), udp_read_timeout_s=SHORT_S)
    server = side.launch(Kind.UDP)
    server.sendall(b"question")
    assert read_all(server) == b""
    server.close()
    assert side.counted == {"udp_exchanges": 1, "datagrams_up": 1, "bytes_up": 8, "datagrams_unanswered": 1}


def test_a_target_that_refuses_datagrams_frees_its_slot_at_once_and_ends_without_a_reset(egress, udp_target):
    refused = address_of(udp_target)
    udp_target.close()
    side = egress(target=refused, udp_read_timeout_s=60)
    server = side.launch(Kind.UDP)
    server.sendall(b"question")
    assert read_all(server) == b""
    server.close()
    assert side.counted == {"udp_exchanges": 1, "datagrams_up": 1, "bytes_up": 8, "datagrams_unanswered": 1}


def test_a_target_s_answer_that_is_too_long_is_dropped_and_counted(egress, udp_target):
    side = egress(target=address_of(udp_target))
    server = side.launch(Kind.UDP)
    server.sendall(b"question")
    _, sender = udp_target.recvfrom(65536)
    udp_target.sendto(bytes(LIMIT + 1), sender)
    assert read_all(server) == b""
    server.close()
    assert side.counted == {"udp_exchanges": 1, "datagrams_up": 1, "bytes_up": 8, "datagrams_dropped_size": 1}


@pytest.mark.parametrize("size", [0, LIMIT + 1])
def test_a_launched_datagram_that_is_empty_or_too_long_is_dropped_and_counted(size, egress, udp_target):
    side = egress(target=address_of(udp_target))
    server = side.launch(Kind.UDP)
    server.sendall(bytes(size))
    server.shutdown(1)
    assert read_all(server) == b""
    assert side.counted == {"udp_exchanges": 1, "datagrams_dropped_size": 1}


def test_a_launched_datagram_that_never_comes_is_a_failure(egress, udp_target):
    side = egress(target=address_of(udp_target), udp_read_timeout_s=SHORT_S)
    assert is_reset(side.launch(Kind.UDP))
    assert side.counted == {"udp_exchanges": 1, "exchanges_failed": 1}


def test_after_its_answer_a_datagram_s_exchange_waits_for_the_server_no_longer_than_set(egress, udp_target):
    side = egress(target=address_of(udp_target), drain_linger_s=SHORT_S)
    server = side.launch(Kind.UDP)
    server.sendall(b"question")
    _, sender = udp_target.recvfrom(65536)
    udp_target.sendto(b"answer", sender)
    assert read_exactly(server, 6) == b"answer"
    with bounded():  # the server, as the original's, never ends its side
        counted = {"datagrams_up": 1, "bytes_up": 8, "datagrams_down": 1, "bytes_down": 6}
        assert side.counted == {"udp_exchanges": 1, **counted}
