import errno
import io
import os
import select
import socket
import time
from contextlib import closing
from dataclasses import replace
from unittest.mock import Mock

import gevent
import pytest
from gevent.event import Event
from listeners import dial, keepalives, keeps_alive, refuse_to_pause
from support import LIMITS, LOOPBACK, bounded, endpoint_of, silent_endpoint, wait_until

from nodepass_gevent import accepting, net
from nodepass_gevent.config import Address
from nodepass_gevent.errors import ConnectError

needs_ipv6 = pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this system has no IPv6")
# Addresses


@pytest.mark.parametrize(
    ("host", "family", "sockaddr"),
    [
        ("192.0.2.1", socket.AF_INET, ("192.0.2.1", 80)),
        ("0.0.0.0", socket.AF_INET, ("0.0.0.0", 80)),
        ("::1", socket.AF_INET6, ("::1", 80, 0, 0)),
        ("2001:DB8::1", socket.AF_INET6, ("2001:db8::1", 80, 0, 0)),
        ("fe80::1%lo", socket.AF_INET6, ("fe80::1", 80, 0, socket.if_nametoindex("lo"))),
        ("fe80::1%4", socket.AF_INET6, ("fe80::1", 80, 0, 4)),
    ],
)
def test_a_literal_never_visits_the_resolver(host, family, sockaddr, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", None)
    assert net.resolve(Address(host, 80)) == [net.Endpoint(family, sockaddr)]


@pytest.mark.parametrize("zone", ["nowhere0", "4294967296"])
def test_a_zone_that_is_no_interface_is_named(zone):
    with pytest.raises(ConnectError, match=f"there is no interface {zone}"):
        net.resolve(Address(f"fe80::1%{zone}", 80))


@pytest.mark.parametrize(
    ("found", "order"),
    [
        ("2001:db8::1 192.0.2.1", "2001:db8::1 192.0.2.1"),
        ("192.0.2.1 2001:db8::1", "192.0.2.1 2001:db8::1"),
        ("192.0.2.2 192.0.2.1", "192.0.2.2 192.0.2.1"),
        ("2001:db8::2 2001:db8::1 2001:db8::3 192.0.2.1", "2001:db8::2 192.0.2.1 2001:db8::1 2001:db8::3"),
    ],
)
def test_a_name_gives_its_endpoints_in_the_order_of_the_resolver_and_the_families_in_turn(found, order, monkeypatch):
    answers = [
        (socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 80))
        for host in found.split()
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: answers)
    assert [endpoint.sockaddr[0] for endpoint in net.resolve(Address("name", 80))] == order.split()


def test_an_empty_host_is_loopback_to_dial_and_every_interface_to_listen():
    dialled = [endpoint.sockaddr[0] for endpoint in net.resolve(Address("", 80))]
    listened_at = [endpoint.sockaddr[0] for endpoint in net.resolve(Address("", 80), passive=True)]
    assert set(dialled) <= {"127.0.0.1", "::1"} and set(listened_at) <= {"0.0.0.0", "::"}
    assert len(set(dialled)) == len(dialled) and len(set(listened_at)) == len(listened_at)  # for TCP, and nothing else


@pytest.mark.parametrize(
    ("failure", "why"),
    [
        (socket.gaierror(socket.EAI_NONAME, "No such name"), "no such name"),
        (UnicodeError("no such name"), "no such name"),
        (RuntimeError("can't start new thread"), "can't start new thread"),  # for the look-up
    ],
)
def test_a_name_that_does_not_resolve_is_a_connect_error(failure, why, monkeypatch):
    def fail(*args, **options):
        raise failure

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(ConnectError, match=f"resolve no-such-name: {why}"):
        net.resolve(Address("no-such-name", 80))


def test_a_resolver_that_does_not_answer_is_given_up(monkeypatch):
    monkeypatch.setattr(net, "RESOLVE_TIMEOUT_S", 0.02)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: Event().wait())
    with bounded(), pytest.raises(ConnectError, match=r"resolve silent: resolve: timed out after 0\.02 s"):
        net.resolve(Address("silent", 80))


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::", "2001:db8:1:2::/64"),
        ("fe80::1%lo", "fe80::/64"),
        ("::1", "::/64"),
    ],
)
def test_one_address_is_an_ipv4_address_or_an_ipv6_network(host, origin):
    assert net.origin_of(host) == origin


def test_a_deadline_says_what_took_too_long():
    with pytest.raises(TimeoutError, match=r"^dial: timed out after 0.01 s$"), net.deadline(0.01, "dial"):
        Event().wait()


# bind


@needs_ipv6
@pytest.mark.parametrize("host", ["", "::"])
def test_every_interface_means_both_families(host, no_leaks):
    with closing(net.listen(Address(host, 0), LIMITS)) as listener:
        port = listener.getsockname()[1]
        for loopback in ("127.0.0.1", "::1"):
            socket.create_connection((loopback, port), 5).close()


@needs_ipv6
@pytest.mark.parametrize(("host", "other"), [("0.0.0.0", "::1"), ("127.0.0.1", "::1"), ("::1", "127.0.0.1")])
def test_any_other_address_means_its_own_family_alone(host, other, no_leaks):
    with closing(net.listen(Address(host, 0), LIMITS)) as listener:
        dial(listener).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((other, listener.getsockname()[1]), 5)


def test_a_name_is_bound_at_its_ipv4_address(monkeypatch, no_leaks):
    found = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)
    with closing(net.bind(Address("name", 0), socket.SOCK_DGRAM)) as sock:
        assert sock.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize("shared", [False, True])
def test_an_address_of_another_machine_is_refused_with_what_to_write(shared):
    with pytest.raises(OSError, match="which is no address of this machine") as caught:
        net.listen(Address("192.0.2.1", 0), LIMITS, shared=shared)
    assert caught.value.errno == errno.EADDRNOTAVAIL


def test_a_port_whose_last_connections_linger_in_the_kernel_is_bound_again(no_leaks):
    with closing(net.listen(LOOPBACK, LIMITS)) as listener, dial(listener) as caller:
        address = Address("127.0.0.1", listener.getsockname()[1])
        wait_until(lambda: select.select([listener], [], [], 0)[0])
        socket.close(listener._accept()[0])  # it ends first, and is remembered
        assert caller.recv(1) == b""
    net.listen(address, LIMITS).close()


def test_an_address_in_use_is_named_in_the_error(listener):
    taken = Address("127.0.0.1", listener.getsockname()[1])
    with pytest.raises(OSError, match=f"already in use: {taken}") as caught:
        net.listen(taken, LIMITS)
    assert caught.value.errno == errno.EADDRINUSE


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_port_that_is_taken_and_not_shared_is_said_to_be(kind):
    with closing(net.bind(LOOPBACK, kind)) as taken:
        if kind == socket.SOCK_STREAM:
            taken.listen()
        address = Address("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(OSError, match=f"in use: {address}, taken by a process without reuse-port"):
            net.bind(address, kind, shared=True)


# connect


def free_endpoint():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return endpoint_of(sock)


def test_accepted_and_connected_sockets_notice_a_dead_peer(listener, accepted, spawn):
    spawn(accepting.serve, listener, accepted.append, refuse_to_pause)
    with net.connect([endpoint_of(listener)], 5, LIMITS) as stream:
        assert stream.peer == listener.getsockname()
        wait_until(lambda: accepted)
        for sock in (stream.socket, accepted[0].socket):
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
            wait_until(lambda sock=sock: keeps_alive(sock))


def test_a_connection_that_ends_before_it_is_given_keepalives_does_not_disturb_the_others(listener):
    endpoint = endpoint_of(listener)
    with net.connect([endpoint], 5, LIMITS) as short, net.connect([endpoint], 5, LIMITS) as lasting:
        short.close()
        wait_until(lambda: keeps_alive(lasting.socket))


def test_a_connection_dialled_after_those_that_last_ends_before_it_is_given_keepalives(listener):
    endpoint = endpoint_of(listener)
    with net.connect([endpoint], 5, LIMITS) as lasting:
        wait_until(lambda: keeps_alive(lasting.socket))
        with net.connect([endpoint], 5, LIMITS) as short:
            gevent.sleep(0.1)
            assert not short.socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_keepalives_follow_the_settings(no_leaks):
    limits = replace(LIMITS, keepalive_idle_s=7, keepalive_interval_s=6, keepalive_count=5)
    with closing(net.listen(LOOPBACK, limits)) as listener:
        with net.connect([endpoint_of(listener)], 5, limits) as stream:
            for sock in (listener, stream.socket):
                wait_until(lambda sock=sock: sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 5)
                idle_s, interval_s = keepalives(sock)
                assert 4 <= idle_s <= 7 and 3 <= interval_s <= 6


def test_whoever_speaks_first_is_accepted_with_what_it_says(listener):
    def unseen_until_it_speaks():
        with net.connect([endpoint_of(listener)], 5, LIMITS, speaks_first=True) as stream:
            seen = bool(select.select([listener], [], [], 0)[0])
            stream.sendall(b"first")
            wait_until(lambda: select.select([listener], [], [], 0)[0])
            with accepting._accept(listener) as accepted:
                assert accepted.recv(16) == b"first"
            return not seen

    assert any(unseen_until_it_speaks() for _ in range(5))  # the kernel waits for it 40 ms at least, once in five times


@pytest.mark.parametrize("far", [False, True])
def test_what_a_caller_says_is_there_when_it_is_connected(listener, far, monkeypatch):
    tried = []

    class Noting(net.RawSocket):
        def send(self, data):
            tried.append(data)
            if far and len(tried) == 1:
                raise BlockingIOError
            return super().send(data)

    monkeypatch.setattr(net, "RawSocket", Noting)
    with net.connect([endpoint_of(listener)], 5, LIMITS, b"first"), accepting._accept(listener) as accepted:
        assert accepted.recv(16) == b"first"
    assert tried == [b"first"] * (1 + far)


def test_what_is_said_in_part_alone_ends_in_a_reset_and_is_said_to_nobody_else(listener, no_leaks, monkeypatch):
    class Short(net.RawSocket):
        def send(self, data):
            return super().send(data[:2])

    monkeypatch.setattr(net, "RawSocket", Short)
    with pytest.raises(OSError, match="No buffer space"):
        net.connect([endpoint_of(listener)] * 2, 5, LIMITS, b"first")
    with accepting._accept(listener) as accepted, bounded(), pytest.raises(ConnectionResetError):
        while accepted.recv(16):
            pass
    with pytest.raises(BlockingIOError):
        accepting._accept(listener)


def test_without_memory_nothing_is_said(listener, no_leaks, monkeypatch):
    monkeypatch.setattr(net, "_dialled", Mock(add=Mock(side_effect=MemoryError)))
    with pytest.raises(MemoryError):
        net.connect([endpoint_of(listener)], 5, LIMITS, b"first")
    with accepting._accept(listener) as accepted:
        assert accepted.recv(16) == b""


def test_whoever_may_stay_silent_is_accepted_at_once(listener):
    with net.connect([endpoint_of(listener)], 5, LIMITS):
        assert select.select([listener], [], [], 0)[0]  # perhaps it waits for a word of the other side


def test_a_refused_connect_names_the_address_and_the_reason(no_leaks):
    endpoint = free_endpoint()
    with pytest.raises(ConnectError, match=rf"^connect {endpoint}: connection refused$"):
        net.connect([endpoint], 5, LIMITS)


def test_a_connect_to_where_no_way_leads_names_the_reason(no_leaks):
    endpoint = net.Endpoint(socket.AF_INET, ("255.255.255.255", 9))
    with closing(net.RawSocket(socket.AF_INET, socket.SOCK_STREAM)) as sock:
        why = os.strerror(sock.connect_ex(endpoint.sockaddr)).lower()
    with pytest.raises(ConnectError, match=f"^connect {endpoint}: {why}$"):
        net.connect([endpoint], 5, LIMITS)


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_connection_that_would_reach_itself_is_refused(no_leaks, monkeypatch, host, far):
    endpoint = net.Endpoint(socket.AF_INET, (host, free_endpoint().sockaddr[1]))

    class Unlucky(net.RawSocket):
        sends = 0

        def send(self, data):
            self.sends += 1
            if far and self.sends == 1:
                raise BlockingIOError
            return super().send(data)

        def connect_ex(self, address):
            if not self.getsockname()[1]:
                self.bind(("127.0.0.1", address[1]))  # as the kernel draws it, once in 28,000 times
            return super().connect_ex(address)

    monkeypatch.setattr(net, "RawSocket", Unlucky)
    with pytest.raises(ConnectError, match="connection refused"):
        net.connect([endpoint], 5, LIMITS)


def test_a_connection_to_the_same_port_of_another_address_is_none_to_itself(no_leaks, monkeypatch):
    def bind(sock, address):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)

    class Alike(net.RawSocket):
        def connect_ex(self, address):
            bind(self, drawn.getsockname())
            return super().connect_ex(address)

    with closing(socket.socket()) as drawn:
        bind(drawn, ("127.0.0.1", 0))  # nobody else has this port until the end
        with closing(net.listen(Address("127.0.0.2", drawn.getsockname()[1]), LIMITS)) as listener:
            monkeypatch.setattr(net, "RawSocket", Alike)
            net.connect([endpoint_of(listener)], 5, LIMITS).close()


def test_the_ports_that_the_kernel_draws_are_known():
    with closing(socket.socket()) as drawn:
        drawn.bind(("127.0.0.1", 0))
        assert drawn.getsockname()[1] in net.ports_drawn()


@pytest.mark.parametrize("read", [Mock(side_effect=FileNotFoundError), Mock(return_value=io.StringIO("hidden"))])
def test_where_nothing_tells_which_ports_the_kernel_draws_it_may_be_any(read, monkeypatch):
    monkeypatch.setattr(net, "open", read, raising=False)
    assert net.ports_drawn.__wrapped__() == range(1, 65536)


def test_a_connect_without_an_answer_times_out(no_leaks):
    with silent_endpoint() as endpoint:
        with pytest.raises(ConnectError, match=rf"^connect {endpoint}: connect: timed out after 0.05 s$"):
            net.connect([endpoint], 0.05, LIMITS)


def test_after_an_address_of_a_family_that_the_system_lacks_the_next_one_is_tried(listener, monkeypatch):
    real = net.RawSocket

    def lacking(family, *options):
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return real(family, *options)

    monkeypatch.setattr(net, "RawSocket", lacking)
    there = net.Endpoint(socket.AF_INET6, ("::1", 9, 0, 0))
    net.connect([there, endpoint_of(listener)], 5, LIMITS).close()
    with pytest.raises(ConnectError, match="address family not supported") as caught:
        net.connect([there], 5, LIMITS)
    assert caught.value.why == "unreachable"


def test_where_no_descriptor_is_left_no_other_address_is_tried(listener, monkeypatch):
    tried = []

    def lacking(*what):
        tried.append(what)
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(net, "RawSocket", lacking)
    with pytest.raises(OSError, match="Too many open files"):
        net.connect([endpoint_of(listener)] * 2, 5, LIMITS)
    assert len(tried) == 1


def test_after_an_address_that_refuses_or_is_silent_the_next_one_is_tried(listener):
    with silent_endpoint() as silent:
        began = time.monotonic()
        with net.connect([free_endpoint(), silent, endpoint_of(listener)], 60, LIMITS) as stream:
            assert stream.peer == listener.getsockname()
        assert net.ATTEMPT_DELAY_S <= time.monotonic() - began < 3 * net.ATTEMPT_DELAY_S


class Far(net.RawSocket):
    """A connection of this machine that seems to stand a little later; as ``failure`` has it, it fails then."""

    failure = None
    sends = 0

    def send(self, data):
        self.sends += 1
        if self.sends == 1:
            raise BlockingIOError
        if self.failure and self.getpeername() == self.failure.sockaddr:
            raise OSError(errno.EHOSTUNREACH, "No route to host")
        return super().send(data)


@pytest.fixture
def slow(monkeypatch):
    """Let nobody answer before a second address is tried."""
    answers = iter([False])

    def look(streams, timeout_s):
        return next(answers, True) and first_to_answer(streams, timeout_s)

    first_to_answer = net._first_to_answer
    monkeypatch.setattr(net, "RawSocket", Far)
    monkeypatch.setattr(net, "_first_to_answer", look)


def test_an_address_that_was_silent_is_taken_if_it_answers_first_and_the_others_are_let_go(slow, listener):
    with closing(net.listen(LOOPBACK, LIMITS)) as other:
        with net.connect([endpoint_of(listener), endpoint_of(other)], 5, LIMITS, b"first") as stream:
            assert stream.peer == listener.getsockname()
            with accepting._accept(listener) as accepted, accepting._accept(other) as let_go, bounded():
                assert accepted.recv(16) == b"first"
                assert let_go.recv(16) == b""


def test_where_no_descriptor_is_left_for_a_second_address_the_first_may_answer_still(slow, listener, monkeypatch):
    monkeypatch.setattr(
        net, "RawSocket", Mock(side_effect=[Far(socket.AF_INET, net.NONBLOCKING), OSError(errno.EMFILE, "")])
    )
    with net.connect([endpoint_of(listener)] * 9, 5, LIMITS) as stream:
        assert stream.peer == listener.getsockname()


def test_what_was_said_in_part_is_not_said_to_another_address_that_was_begun(slow, listener, monkeypatch):
    class Short(Far):
        def send(self, data):
            return super().send(data[:2])

    monkeypatch.setattr(net, "RawSocket", Short)
    with closing(net.listen(LOOPBACK, LIMITS)) as other:
        with pytest.raises(OSError, match="No buffer space"):
            net.connect([endpoint_of(listener), endpoint_of(other)], 5, LIMITS, b"first")
        with accepting._accept(other) as let_go, bounded():
            assert let_go.recv(16) == b""


def test_an_address_that_fails_late_makes_nobody_wait_for_the_next_one(listener, monkeypatch):
    monkeypatch.setattr(net, "RawSocket", Far)
    monkeypatch.setattr(net, "ATTEMPT_DELAY_S", 60)
    with closing(net.listen(LOOPBACK, LIMITS)) as other:
        monkeypatch.setattr(Far, "failure", endpoint_of(other))
        with bounded(), net.connect([endpoint_of(other), endpoint_of(listener)], 90, LIMITS) as stream:
            assert stream.peer == listener.getsockname()


def test_who_is_silent_has_all_the_time_that_there_is(no_leaks, monkeypatch):
    monkeypatch.setattr(net, "ATTEMPT_DELAY_S", 0.01)
    with silent_endpoint() as endpoint:
        began = time.monotonic()
        with pytest.raises(ConnectError, match=f"^connect {endpoint}: connect: timed out after 0.1 s$") as caught:
            net.connect([endpoint, free_endpoint(), endpoint, free_endpoint()], 0.1, LIMITS)
        assert caught.value.why == "timeout"
        assert time.monotonic() - began >= 0.1


def test_more_addresses_than_there_is_time_for_end_with_it(no_leaks, monkeypatch):
    monkeypatch.setattr(net, "ATTEMPT_DELAY_S", 60)
    with silent_endpoint() as endpoint, bounded():
        with pytest.raises(ConnectError, match=r"timed out after 0\.1 s"):
            net.connect([endpoint] * 2, 0.1, LIMITS)


def test_when_no_address_answers_the_last_one_is_named(no_leaks):
    first, last = free_endpoint(), free_endpoint()
    with pytest.raises(ConnectError, match=f"connect {last}"):
        net.connect([first, last], 5, LIMITS)
    with pytest.raises(ConnectError, match="no address"):
        net.connect([], 5, LIMITS)


def test_a_connect_that_is_given_up_leaves_no_socket(spawn):
    with silent_endpoint() as endpoint:
        dialling = spawn(net.connect, [endpoint], 60, LIMITS)
        gevent.sleep(0)
        dialling.kill()
        assert isinstance(dialling.value, gevent.GreenletExit)
