import os
import socket

import gevent
import pytest
from exchanges import ID, LIMIT, SHORT_S, Side, happened
from support import bounded, is_reset, read_all, read_exactly, reset, wait_until

from nodepass_gevent.config import Address
from nodepass_gevent.errors import NoDataConnection
from nodepass_gevent.forward import ONE_SEGMENT, Egress
from nodepass_gevent.wire import Kind, Launch


class FakePool:
    """Data connections by id; one that is not there is not waited for."""

    def __init__(self):
        self.ready = {}
        self.on_missing = lambda: None

    def take(self, id, timeout_s):
        if id not in self.ready:
            self.on_missing()
            raise NoDataConnection(f"no data connection {id.decode()}")
        return self.ready.pop(id)


class EgressSide(Side):
    def __init__(self, pair, settings):
        super().__init__({"role": "client", "tunnel": Address("127.0.0.1", 1), **settings})
        self._pair = pair
        self.pool = FakePool()
        self.egress = Egress(self.pool, self.exchanges, self.config, self.counters)

    def launch(self, kind, id=ID):
        """Launch a data connection, and give the server's end of it."""
        data, server = self._pair()
        self.pool.ready[id] = data
        self.egress.launch(Launch(id, kind))
        return server


@pytest.fixture
def egress(pair):
    made = []

    def make(**settings):
        made.append(EgressSide(pair, settings))
        return made[-1]

    yield make
    for side in made:
        side.end()


@pytest.fixture
def target(no_leaks):
    """A TCP target that the test accepts from."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(5)
        yield listener


@pytest.fixture
def udp_target(no_leaks):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(5)
        yield sock


def address_of(sock):
    return Address(*sock.getsockname())


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


def test_a_target_that_refuses_resets_the_user(egress, target):
    refused = address_of(target)
    target.close()
    side = egress(target=refused)
    assert is_reset(side.launch(Kind.TCP))
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


def test_launches_beyond_the_limit_wait_and_none_is_lost(egress, target):
    side = egress(target=address_of(target), semaphore_limit=2)
    servers = [side.launch(Kind.TCP, b"%08x" % number) for number in range(7)]
    gevent.idle()
    assert len(side.exchanges) == 2
    assert all(finish(server, target) for server in servers)
    assert side.counted == {"tcp_exchanges": 7, "bytes_up": 35, "bytes_down": 35}


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


def test_more_launches_than_there_can_be_data_connections_are_counted_as_lost(egress, target):
    side = egress(target=address_of(target), semaphore_limit=1, min_pool_capacity=3, max_pool_capacity=3)
    servers = [side.launch(Kind.TCP, b"%08x" % number) for number in range(5)]
    gevent.idle()
    assert happened(side.counters)["launches_lost"] == 1
    assert all(finish(server, target) for server in servers[:4])


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
    assert side.counted == {"udp_exchanges": 1, "bytes_up": LIMIT, "bytes_down": 6}


def test_an_answer_of_the_greatest_size_arrives_whole(egress, udp_target):
    side = egress(target=address_of(udp_target))
    server = side.launch(Kind.UDP)
    server.sendall(b"q")
    _, sender = udp_target.recvfrom(65536)
    answer = os.urandom(LIMIT)
    udp_target.sendto(answer, sender)
    assert read_all(server) == answer
    server.close()
    assert side.counted == {"udp_exchanges": 1, "bytes_up": 1, "bytes_down": LIMIT}


def test_a_silent_target_frees_its_slot_and_ends_without_a_reset(egress, udp_target):
    side = egress(target=address_of(udp_target), udp_read_timeout_s=SHORT_S)
    server = side.launch(Kind.UDP)
    server.sendall(b"question")
    assert read_all(server) == b""
    server.close()
    assert side.counted == {"udp_exchanges": 1, "bytes_up": 8, "datagrams_unanswered": 1}


def test_a_target_that_refuses_datagrams_frees_its_slot_at_once_and_ends_without_a_reset(egress, udp_target):
    refused = address_of(udp_target)
    udp_target.close()
    side = egress(target=refused, udp_read_timeout_s=60)
    server = side.launch(Kind.UDP)
    server.sendall(b"question")
    assert read_all(server) == b""
    server.close()
    assert side.counted == {"udp_exchanges": 1, "bytes_up": 8, "datagrams_unanswered": 1}


def test_a_target_s_answer_that_is_too_long_is_dropped_and_counted(egress, udp_target):
    side = egress(target=address_of(udp_target))
    server = side.launch(Kind.UDP)
    server.sendall(b"question")
    _, sender = udp_target.recvfrom(65536)
    udp_target.sendto(bytes(LIMIT + 1), sender)
    assert read_all(server) == b""
    server.close()
    assert side.counted == {"udp_exchanges": 1, "bytes_up": 8, "datagrams_dropped_size": 1}


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
        assert side.counted == {"udp_exchanges": 1, "bytes_up": 8, "bytes_down": 6}
