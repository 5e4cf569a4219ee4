"""Datagrams at the egress: exchanges of one, and sessions, against a target of plain sockets."""

import gc
import os
import socket
from contextlib import closing, suppress

import gevent
import pytest
from exchanges import ID, LIMIT, SHORT_S, Full, address_of
from proxyprotocol.result import ProxyResultLocal
from proxyprotocol.v2 import ProxyProtocolV2
from support import bounded, is_reset, read_all, read_exactly, wait_until

from nodepass_gevent.config import Address
from nodepass_gevent.egress import Egress
from nodepass_gevent.frames import format_frame
from nodepass_gevent.udp import TargetSocket
from nodepass_gevent.unframed import ONE_SEGMENT
from nodepass_gevent.wire import Kind, Launch

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


@pytest.mark.parametrize("before", [("::1", 9, 0, 0), ("255.255.255.255", 9)])  # another family; no way there
def test_a_name_with_several_addresses_is_reached_by_the_first_that_there_is_a_way_to(
    before, egress, udp_target, monkeypatch
):
    udp_address = udp_target.getsockname()
    family = socket.AF_INET6 if len(before) > 2 else socket.AF_INET
    found = [(family, socket.SOCK_STREAM, 6, "", before), (socket.AF_INET, socket.SOCK_STREAM, 6, "", udp_address)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)
    side = egress(target=Address("localhost", udp_address[1]))
    server = side.launch(Kind.UDP)
    server.sendall(b"question")
    received, sender = udp_target.recvfrom(65536)
    assert received == b"question"
    udp_target.sendto(b"answer", sender)
    assert read_all(server) == b"answer"


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


def test_an_answer_that_the_server_does_not_read_frees_its_slot(egress, udp_target, pair):
    side = egress(target=address_of(udp_target), udp_read_timeout_s=0.1)
    data, server = pair()
    side.pool.ready[ID] = Full(data.socket)
    side.egress.launch(Launch(ID, Kind.UDP))
    server.sendall(b"q")
    _, sender = udp_target.recvfrom(65536)
    udp_target.sendto(b"answer", sender)
    assert side.counted["exchanges_failed"] == 1


def test_a_silent_target_frees_its_slot_and_ends_without_a_reset(egress, udp_target):
    side = egress(target=address_of(udp_target), udp_read_timeout_s=SHORT_S)
    server = side.launch(Kind.UDP)
    server.sendall(b"question")
    assert read_all(server) == b""
    server.close()
    assert side.counted == {"udp_exchanges": 1, "datagrams_up": 1, "bytes_up": 8, "datagrams_unanswered": 1}


def test_a_target_that_refuses_datagrams_frees_its_slot_at_once_and_ends_without_a_reset(egress, udp_target, caplog):
    refused = address_of(udp_target)
    udp_target.close()
    side = egress(target=refused, udp_read_timeout_s=60)
    server = side.launch(Kind.UDP)
    server.sendall(b"question")
    assert read_all(server) == b""
    assert caplog.messages == [f"target {refused}: nobody listens there (UDP)"]
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


def test_a_launched_datagram_that_drips_without_end_is_a_failure(egress, udp_target, spawn):
    side = egress(target=address_of(udp_target), udp_read_timeout_s=SHORT_S)
    server = side.launch(Kind.UDP)
    server.sendall(bytes(ONE_SEGMENT))

    def drip():
        with suppress(OSError):
            while True:
                server.sendall(b".")
                gevent.sleep(SHORT_S / 10)

    spawn(drip)
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


def test_after_its_answer_a_datagram_s_exchange_waits_for_the_end_of_the_server(egress, udp_target):
    side = egress(target=address_of(udp_target))
    server = side.launch(Kind.UDP)
    server.sendall(b"question")
    _, sender = udp_target.recvfrom(65536)
    udp_target.sendto(b"answer", sender)
    assert read_all(server) == b"answer"
    gevent.idle()
    assert len(side.exchanges) == 1
    server.close()
    assert side.counted["datagrams_down"] == 1


@pytest.mark.parametrize("kind", [Kind.UDP, Kind.UDP_SESSION])
def test_a_target_that_does_not_answer_is_looked_up_before_it_is_used_again(kind, egress, udp_target, monkeypatch):
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as silent:
        silent.bind(("127.0.0.1", 0))
        addresses = [silent.getsockname(), udp_target.getsockname()]

        def resolve(*_arguments, **_options):
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", addresses.pop(0))]

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        side = egress(target=Address("moving-target", 80), udp_read_timeout_s=SHORT_S, udp_session_timeout_s=0.1)
        question = b"question" if kind is Kind.UDP else format_frame(b"question")
        server = side.launch(kind)
        server.sendall(question)
        assert read_all(server) == b""
        server.close()
        wait_until(lambda: not len(side.exchanges))
        server = side.launch(kind)
        server.sendall(question)
        assert udp_target.recv(100) == b"question"
        server.close()
        wait_until(lambda: not len(side.exchanges))


# Sessions


def frames(*datagrams):
    return b"".join(map(format_frame, datagrams))


def test_a_session_has_one_socket_and_carries_any_number_of_datagrams_both_ways(egress, udp_target):
    side = egress(target=address_of(udp_target))
    server = side.launch(Kind.UDP_SESSION)
    datagrams = [b"one", b"", os.urandom(LIMIT + 1), os.urandom(65507)]  # the limit is that of v1
    server.sendall(frames(*datagrams))
    received = [udp_target.recvfrom(65536) for _ in datagrams]
    assert [datagram for datagram, _ in received] == datagrams
    assert len({sender for _, sender in received}) == 1
    for datagram in datagrams:
        udp_target.sendto(datagram, received[0][1])
    assert read_exactly(server, len(frames(*datagrams))) == frames(*datagrams)
    assert side.counters.total()["datagrams_down"] == 4  # while it lasts
    server.close()
    size = sum(map(len, datagrams))
    counts = {"datagrams_up": 4, "datagrams_down": 4, "bytes_up": size, "bytes_down": size}
    assert side.counted == {"udp_sessions": 1} | counts


def test_the_end_of_the_servers_stream_ends_a_session_after_all_datagrams_before_it(egress, udp_target):
    side = egress(target=address_of(udp_target))
    server = side.launch(Kind.UDP_SESSION)
    server.sendall(frames(b"first", b"last"))
    server.shutdown(1)
    assert read_all(server) == b""
    assert [udp_target.recv(100), udp_target.recv(100)] == [b"first", b"last"]
    assert side.counted == {"udp_sessions": 1, "datagrams_up": 2, "bytes_up": 9}


def test_an_idle_session_ends_and_leaves_nothing_behind(egress, udp_target):
    side = egress(target=address_of(udp_target), udp_session_timeout_s=SHORT_S)
    server = side.launch(Kind.UDP_SESSION)
    assert read_all(server) == b""
    assert side.counted == {"udp_sessions": 1}


def test_a_session_leaves_nothing_for_the_garbage_collector(egress, udp_target):
    side = egress(target=address_of(udp_target))
    gc.collect()
    gc.disable()
    try:
        server = side.launch(Kind.UDP_SESSION)
        server.sendall(frames(b"question"))
        assert udp_target.recv(100) == b"question"
        server.close()
        assert side.counted["udp_sessions"] == 1
        gevent.idle()
        assert not [each for each in gc.get_objects() if isinstance(each, TargetSocket)]
    finally:
        gc.enable()


def test_a_target_that_restarts_does_not_end_the_session(egress, udp_target, caplog):
    restarting = address_of(udp_target)
    udp_target.close()
    side = egress(target=restarting)
    server = side.launch(Kind.UDP_SESSION)
    for _ in range(3):
        server.sendall(frames(b"lost"))
        gevent.idle()
    wait_until(lambda: side.counters.datagrams_refused)  # while it lasts
    assert caplog.messages == [f"target {restarting}: nobody listens there (UDP)"]
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as target:
        target.settimeout(5)
        target.bind((restarting.host, restarting.port))
        server.sendall(frames(b"question"))
        question, sender = target.recvfrom(100)
        target.sendto(b"answer", sender)
        assert (question, read_exactly(server, 8)) == (b"question", frames(b"answer"))
    server.close()
    counted = side.counted
    assert counted.pop("datagrams_refused") >= 1
    assert counted == {"udp_sessions": 1, "datagrams_up": 4, "datagrams_down": 1, "bytes_up": 20, "bytes_down": 6}


def test_a_target_that_cannot_be_reached_at_all_is_a_failure(egress):
    side = egress(target=Address("255.255.255.255", 9))
    server = side.launch(Kind.UDP_SESSION)
    assert is_reset(server)
    assert side.counted == {"udp_sessions": 1, "exchanges_failed": 1}


def test_a_server_that_breaks_the_frames_loses_the_session(egress, udp_target):
    side = egress(target=address_of(udp_target))
    server = side.launch(Kind.UDP_SESSION)
    server.sendall(b"\xff\xff" + bytes(100))
    is_reset(server)  # or an end: there are bytes that nobody has read
    assert side.counted == {"udp_sessions": 1, "exchanges_failed": 1}


# The header for the target


def first_of(datagram):
    """Cut the header of the PROXY protocol off, as somebody else's parser reads it."""
    size = 16 + int.from_bytes(datagram[14:16], "big")
    return ProxyProtocolV2().unpack(datagram[:size]), datagram[size:]


def introduce(side):
    """Make the peer one that has agreed to tell who its users are."""
    side.egress = Egress(side.pool, side.exchanges, side.config, side.counters, told_users=True)


def launch(pair_end, side, kind, user):
    side.pool.ready[ID] = pair_end
    side.egress.launch(Launch(ID, kind, user))


@pytest.mark.parametrize("user", [("192.0.2.1", 443), ("2001:db8::1", 443), None])
def test_the_first_datagram_of_a_session_tells_who_the_user_is(egress, udp_target, pair, user):
    side = egress(target=address_of(udp_target), proxy_protocol=2)
    introduce(side)
    data, server = pair()
    launch(data, side, Kind.UDP_SESSION, user)
    server.sendall(b"".join(map(format_frame, (b"first", b"second"))))
    result, rest = first_of(udp_target.recvfrom(65536)[0])
    assert rest == b"first"
    if user is None:
        assert isinstance(result, ProxyResultLocal)
    else:
        assert (str(result.source[0]), result.source[1]) == user
        assert result.protocol == socket.SOCK_DGRAM
    assert udp_target.recvfrom(65536)[0] == b"second"
    server.close()


def test_an_exchange_of_one_datagram_tells_it_too(egress, udp_target):
    side = egress(target=address_of(udp_target), proxy_protocol=2)
    server = side.launch(Kind.UDP)
    server.sendall(b"question")
    received, sender = udp_target.recvfrom(65536)
    result, rest = first_of(received)
    assert isinstance(result, ProxyResultLocal) and rest == b"question"
    udp_target.sendto(b"answer", sender)
    assert read_all(server) == b"answer"
    assert side.counted["bytes_up"] == 8


def test_version_1_has_no_header_for_datagrams(egress, udp_target, pair):
    side = egress(target=address_of(udp_target), proxy_protocol=1)
    data, server = pair()
    launch(data, side, Kind.UDP_SESSION, ("192.0.2.1", 443))
    server.sendall(format_frame(b"first"))
    assert udp_target.recvfrom(65536)[0] == b"first"
    server.close()


@pytest.mark.parametrize(("host", "why"), [("no-such-name.invalid", "resolve"), ("255.255.255.255", "unreachable")])
def test_a_session_whose_target_has_no_address_or_no_way_to_it_is_told_to_the_peer(egress, pair, host, why):
    side, told = egress(target=Address(host, 1), drain_linger_s=0.05), []
    side.egress = Egress(side.pool, side.exchanges, side.config, side.counters, lambda *why: told.append(why) or True)
    data, server = pair()
    launch(data, side, Kind.UDP_SESSION, None)
    assert is_reset(server)
    assert told == [(ID, why)]
