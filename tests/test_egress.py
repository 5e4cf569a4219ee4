import errno
import os
import re
import socket
import time
from unittest.mock import Mock, call

import gevent
import pytest
from exchanges import ID, SHORT_S, address_of, happened
from secure import transports
from support import Flooded, as_stream, bounded, is_reset, read_all, read_exactly, reset, silent_endpoint, wait_until

from nodepass_gevent import net
from nodepass_gevent.config import Address
from nodepass_gevent.egress import FIRST, Egress
from nodepass_gevent.errors import GONE, ProtocolError
from nodepass_gevent.transport import Stream
from nodepass_gevent.wire import Kind, Launch


@pytest.fixture(autouse=True, params=[False, True], ids=["calm", "busy"])
def busy(request, monkeypatch):
    """While others wait for their turn, what a user has said goes along with the handshake."""
    monkeypatch.setattr("nodepass_gevent.egress.soon", Mock(busy=request.param))
    return request.param


@pytest.fixture
def target(no_leaks):
    """A TCP target that the test accepts from."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(5)
        yield listener


def accept(listener):
    accepted, _ = listener.accept()
    accepted.settimeout(5)
    return accepted


def test_a_launch_is_brought_to_the_target_both_ways_until_both_have_ended(egress, target):
    side = egress(target=address_of(target))
    server = side.launch(Kind.TCP)
    server.sendall(b"question")
    server.shutdown(1)
    with accept(target) as accepted:
        assert read_all(accepted) == b"question"
        accepted.sendall(b"a late answer")
    assert read_all(server) == b"a late answer"
    assert side.counted == {"tcp_exchanges": 1, "bytes_up": 8, "bytes_down": 13}


def test_a_data_connection_with_tls_is_brought_to_the_target(egress, target):
    side = egress(target=address_of(target))
    data, server = transports("1.3")
    side.pool.ready[ID] = data
    side.egress.launch(Launch(ID, Kind.TCP))
    with server, accept(target) as accepted:
        server.sendall(b"question")
        server.shutdown_write()
        assert read_all(accepted) == b"question"


@pytest.mark.parametrize("far", [False, True])
def test_what_a_user_has_said_comes_once_and_counts_once(egress, target, busy, far, monkeypatch):
    said = []

    class Noting(net.RawSocket):
        def send(self, data):
            said.append(bytes(data))
            if far and len(said) == 1:
                raise BlockingIOError
            return super().send(data)

    monkeypatch.setattr(net, "RawSocket", Noting)
    side, whole = egress(target=address_of(target)), bytes(range(256)) * 64
    server = side.prepare()
    server.sendall(whole)
    server.shutdown(1)
    side.egress.launch(Launch(ID, Kind.TCP))
    with accept(target) as accepted:
        assert read_all(accepted) == whole
    assert read_all(server) == b""
    assert side.counted == {"tcp_exchanges": 1, "bytes_up": len(whole)}
    assert said[0] == (whole[:FIRST] if busy else b"")


def test_the_header_of_the_proxy_protocol_stands_before_what_a_user_has_said(egress, target):
    side = egress(target=address_of(target), proxy_protocol=1)
    server = side.prepare()
    server.sendall(b"question")
    server.shutdown(1)
    side.egress.launch(Launch(ID, Kind.TCP))
    with accept(target) as accepted:
        assert read_all(accepted) == b"PROXY UNKNOWN\r\nquestion"


def test_a_user_who_has_ended_without_a_word_is_ended_at_the_target(egress, target):
    side = egress(target=address_of(target))
    server = side.prepare()
    server.shutdown(1)
    side.egress.launch(Launch(ID, Kind.TCP))
    with accept(target) as accepted:
        assert read_all(accepted) == b""
        accepted.sendall(b"an answer")
    assert read_all(server) == b"an answer"


def test_a_user_who_was_reset_before_the_launch_is_reset_at_the_target(egress, target):
    side = egress(target=address_of(target))
    reset(side.prepare())
    side.egress.launch(Launch(ID, Kind.TCP))
    with accept(target) as accepted:
        assert is_reset(accepted)
    assert side.counted == {"tcp_exchanges": 1, "exchanges_failed": 1}


def test_a_target_that_refuses_resets_the_user_and_is_named_once(egress, target, caplog):
    refused = address_of(target)
    target.close()
    side = egress(target=refused)
    assert is_reset(side.launch(Kind.TCP))
    assert side.counted == {"tcp_exchanges": 1, "exchanges_failed": 1}
    assert caplog.messages == [f"exchange {ID.decode()}: target {refused}: connection refused"]


def test_of_a_target_with_a_name_the_address_that_refuses_is_said(egress, target, caplog):
    refused = address_of(target)
    target.close()
    side = egress(target=Address("localhost", refused.port))
    assert is_reset(side.launch(Kind.TCP))
    where = rf"target localhost:{refused.port}: connect [0-9.:\[\]]+:{refused.port}"
    assert re.search(f"{where}: connection refused$", caplog.messages[0])


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("network", ["tcp", "udp", "both"])
def test_a_client_carries_its_network_alone_whatever_the_server_launches(
    egress, target, udp_target, caplog, network, kind
):
    protocol = "tcp" if kind is Kind.TCP else "udp"
    at = address_of(target if protocol == "tcp" else udp_target)
    side = egress(target=at, network=network, drain_linger_s=0.01)
    side.egress._fail = Mock()
    if network in (protocol, "both"):
        server = side.launch(kind)
        server.sendall(b"\0\5hello" if kind is Kind.UDP_SESSION else b"hello")
        server.shutdown(socket.SHUT_WR)
        with bounded():
            there = accept(target) if protocol == "tcp" else udp_target
            assert there.recv(100) == b"hello"
        there.close()
        side.egress._fail.assert_not_called()
    else:
        assert is_reset(side.launch(kind))
        side.egress._fail.assert_called_once_with(ID, "refused")
        assert side.counted == {"exchanges_failed": 1}
        assert f"network={network} keeps {protocol} out" in caplog.text


class Timed(Stream):
    """A data connection that proves to have timed out as soon as something arrives; ``dead``: TCP says so, too."""

    dead = True

    def pull(self, buffer):
        if not self.peek():
            raise BlockingIOError
        raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))

    def is_dead(self):
        return self.dead


def launch_timed(side, kind):
    """Launch such a data connection, and give the server's end of it."""
    side.egress._fail = Mock()
    server, data = side.prepare(), side.pool.ready[ID]
    side.pool.ready[ID] = Timed(data.socket, data.peer)
    side.egress.launch(Launch(ID, kind))
    return server


@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("dead", [False, True])
def test_that_the_path_of_a_user_is_dead_the_server_is_told(egress, target, dead, answered, monkeypatch):
    monkeypatch.setattr(Timed, "dead", dead)  # else it is the target's that has timed out
    side = egress(target=address_of(target))
    server = launch_timed(side, Kind.TCP)
    with accept(target) as accepted:
        if answered:
            accepted.sendall(b"!")
            assert read_exactly(server, 1) == b"!"
        server.sendall(b"question")
        assert is_reset(accepted)
    assert side.egress._fail.mock_calls == ([call(ID, GONE)] if dead else [])


def test_that_the_path_of_a_session_is_dead_the_server_is_told(egress, udp_target):
    side = egress(target=address_of(udp_target), drain_linger_s=0.01)
    server = launch_timed(side, Kind.UDP_SESSION)
    server.sendall(b"\0\5hello")
    wait_until(lambda: side.egress._fail.called)
    side.egress._fail.assert_called_once_with(ID, GONE)


def test_a_launch_that_failed_ends_in_time_although_the_server_sends_without_a_pause(egress, pair):
    side = egress(target=Address("127.0.0.1", 1), drain_linger_s=0.01)
    side.egress._fail = lambda id, why: True
    data, server = pair()
    server.sendall(b"x")
    side.pool.ready[ID] = Flooded(data)
    with bounded():
        side.egress.launch(Launch(ID, Kind.TCP))
        assert side.counted == {"tcp_exchanges": 1, "exchanges_failed": 1}


@pytest.mark.parametrize("secured", [False, True])
def test_who_has_said_all_is_reset_by_the_word_that_its_launch_failed_and_not_before(egress, pair, secured):
    side, told = egress(target=Address("127.0.0.1", 1)), []
    side.egress._fail = lambda id, why: told.append(why) or True
    data, server = transports("1.3") if secured else pair()
    server = server if secured else as_stream(server)
    server.send_last(b"a request, and that is all")
    side.pool.ready[ID] = data
    side.egress.launch(Launch(ID, Kind.TCP))
    wait_until(lambda: told)
    gevent.sleep(0.05)
    assert len(side.exchanges) == 1
    server.reset()
    assert side.counted == {"tcp_exchanges": 1, "exchanges_failed": 1}


def test_a_server_that_resets_the_user_of_a_launch_that_failed_takes_no_reason_away(egress, caplog):
    side = egress(target=Address("127.0.0.1", 1))
    told = []
    side.egress._fail = lambda id, why: told.append(why) or True
    server = side.launch(Kind.TCP)
    wait_until(lambda: told)
    reset(server)
    assert side.counted == {"tcp_exchanges": 1, "exchanges_failed": 1}
    assert caplog.messages == [f"exchange {ID.decode()}: target 127.0.0.1:1: connection refused"]


def test_a_launch_that_is_repeated_is_counted_and_costs_no_line_in_the_log(egress, caplog):
    caplog.set_level("INFO")
    side = egress()

    def take(id, timeout_s):
        raise ProtocolError("launched twice")

    side.pool.take = take
    side.egress.launch(Launch(ID, Kind.TCP))
    assert side.counted == {"launches_lost": 1}
    assert not caplog.records


def test_a_target_that_does_not_answer_the_dial_resets_the_user_at_the_deadline(egress, caplog):
    with silent_endpoint() as endpoint:
        side = egress(target=Address(*endpoint.sockaddr), target_timeout_s=0.05, connect_timeout_s=3600)
        assert is_reset(side.launch(Kind.TCP))
    assert side.counted == {"tcp_exchanges": 1, "exchanges_failed": 1}
    assert "connect: timed out after 0.05 s" in caplog.text


@pytest.mark.parametrize("limit", ["idle_timeout_s", "half_closed_timeout_s"])
def test_an_exchange_that_is_silent_for_the_time_that_is_set_is_reset(egress, target, limit):
    side = egress(target=address_of(target), **{limit: SHORT_S})
    server = side.launch(Kind.TCP)
    with accept(target) as accepted:
        if limit == "half_closed_timeout_s":
            accepted.shutdown(1)
            assert read_all(server) == b""  # it was sent all that there is for it
        else:
            assert is_reset(server)
        assert is_reset(accepted)
    assert side.counted == {"tcp_exchanges": 1, "exchanges_failed": 1}


def test_a_reset_of_the_target_is_a_reset_for_the_user(egress, target):
    side = egress(target=address_of(target))
    server = side.launch(Kind.TCP)
    reset(accept(target))
    assert is_reset(server)
    assert side.counted == {"tcp_exchanges": 1, "exchanges_failed": 1}


def test_a_target_that_has_moved_is_found_again(egress, target, monkeypatch):
    ports = [1, target.getsockname()[1]]  # nobody listens on port 1

    def resolve(host, port, **options):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", ports.pop(0)))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    side = egress(target=Address("moving-target", 80))
    assert is_reset(side.launch(Kind.TCP))
    for _ in range(2):  # resolved once more, not twice
        server = side.launch(Kind.TCP)
        accept(target).close()
        assert read_all(server) == b""
        server.close()


def test_an_address_that_is_silent_makes_one_user_wait_and_not_all(egress, target, monkeypatch):
    with silent_endpoint() as endpoint:
        found = [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", address)
            for address in (endpoint.sockaddr, target.getsockname())
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)
        monkeypatch.setattr(net, "ATTEMPT_DELAY_S", 0.5)
        side = egress(target=Address("two-addresses", 80), target_timeout_s=60)
        for waits_s in (0.5, 0.0):
            began = time.monotonic()
            assert finish(side.launch(Kind.TCP), target)
            assert waits_s <= time.monotonic() - began < waits_s + 0.4


def test_a_launch_whose_data_connection_never_comes_is_counted(egress):
    side = egress()
    side.egress.launch(Launch(ID, Kind.TCP))
    assert side.counted == {"launches_lost": 1}


def finish(server, target):
    """Serve one exchange to its end: the target says what it is told."""
    server.sendall(b"hello")
    server.shutdown(1)
    with accept(target) as accepted:
        accepted.sendall(read_all(accepted))
    return read_all(server) == b"hello"


def test_launches_beyond_the_limit_wait_and_none_is_lost(egress, target, caplog):
    side = egress(target=address_of(target), semaphore_limit=2)
    servers = [side.launch(Kind.TCP, b"%08x" % number) for number in range(7)]
    wait_until(lambda: happened(side.counters) == {"tcp_exchanges": 2})
    gevent.idle()
    assert len(side.exchanges) == side.counters.tcp_exchanges == 2
    assert caplog.messages == ["all places are taken, 2 of semaphore-limit: further users wait"]
    assert side.pool.kept == [b"%08x" % number for number in range(2, 7)]
    assert all(finish(server, target) for server in servers)
    assert side.counted == {"tcp_exchanges": 7, "bytes_up": 35, "bytes_down": 35}


def test_a_launch_that_comes_twice_while_it_waits_is_lost_once_and_carried_once(egress, target):
    side = egress(target=address_of(target), semaphore_limit=1)
    servers = [side.launch(Kind.TCP, b"%08x" % number) for number in range(2)]
    side.egress.launch(Launch(b"%08x" % 1, Kind.TCP))
    gevent.idle()
    assert happened(side.counters)["launches_lost"] == 1
    assert all(finish(server, target) for server in servers)
    assert side.counted["tcp_exchanges"] == 2


def test_a_launch_in_the_moment_in_which_the_last_exchange_ends_is_not_forgotten(egress, target):
    side = egress(target=address_of(target), semaphore_limit=1)
    loop, servers = gevent.get_hub().loop, []
    side.pool.on_missing = lambda: loop.run_callback(lambda: servers.append(side.launch(Kind.TCP)))
    side.egress.launch(Launch(b"00000000", Kind.TCP))  # ends at once, and the callback is next
    wait_until(lambda: servers)
    assert finish(servers[0], target)


def test_launches_of_a_new_session_get_the_slots_that_the_old_one_leaves(egress, target):
    old = egress(target=address_of(target), semaphore_limit=1)
    new = egress(target=address_of(target), semaphore_limit=1)
    new.egress = Egress(new.pool, old.exchanges, new.config, new.counters)
    first = old.launch(Kind.TCP)
    gevent.idle()
    second = new.launch(Kind.TCP)
    assert finish(first, target)
    assert finish(second, target)


def test_a_launch_for_which_there_is_no_memory_is_counted_as_lost_and_its_data_connection_reset(egress, monkeypatch):
    side = egress()
    monkeypatch.setattr(side.exchanges, "spawn", Mock(side_effect=MemoryError))
    assert is_reset(side.launch(Kind.TCP))
    assert side.counted == {"launches_lost": 1}


def test_more_launches_than_there_can_be_data_connections_are_counted_as_lost(egress, target):
    side = egress(target=address_of(target), semaphore_limit=1, min_pool_capacity=3, max_pool_capacity=3)
    servers = [side.launch(Kind.TCP, b"%08x" % number) for number in range(5)]
    gevent.idle()
    assert happened(side.counters)["launches_lost"] == 1
    assert all(finish(server, target) for server in servers[:4])
    assert side.counted["tcp_exchanges"] == 4
    servers = [side.launch(Kind.TCP, b"%08x" % number) for number in range(4)]  # nobody waits any more
    assert all(finish(server, target) for server in servers)
