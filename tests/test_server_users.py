"""Users of the public port, and where a server listens."""

import errno
import os
import random
import socket
from unittest.mock import Mock

import gevent
import pytest
from gevent.event import Event
from support import LOOPBACK, bounded, is_reset, out_of_descriptors, read_all, read_exactly, wait_until
from tunnel import dial, is_served, read_line, without_offer

from nodepass_gevent import accepting, net
from nodepass_gevent.config import Address, Config
from nodepass_gevent.server import Server


@pytest.mark.parametrize("mode", [0, 1])
def test_bytes_and_ends_pass_both_ways_and_are_counted(serve, connect, mode):
    running = serve(tls=mode)
    client = connect(running).join()
    user = connect(running, "user")
    user.sendall(b"question")
    user.shutdown(socket.SHUT_WR)
    data, _ = client.launched()
    assert read_all(data) == b"question"
    data.sendall(b"the answer")
    (data.unwrap() if mode else data).close()
    assert read_all(user) == b"the answer"
    wait_until(lambda: not running.server.exchanges)
    assert (running.counters.bytes_up, running.counters.bytes_down) == (8, 10)
    assert (running.counters.tcp_exchanges, running.counters.exchanges_failed) == (1, 0)


@pytest.mark.parametrize("breaks", ["user", "client"])
def test_a_reset_of_one_side_is_a_reset_of_the_other(serve, connect, breaks):
    running = serve()
    client = connect(running).join()
    user = connect(running, "user")
    user.sendall(b"x")
    data, _ = client.launched()
    assert read_exactly(data, 1) == b"x"
    broken, other = (user, data) if breaks == "user" else (data, user)
    broken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    broken.close()
    assert is_reset(other)
    other.close()
    wait_until(lambda: running.counters.exchanges_failed == 1)


def test_users_that_come_while_no_client_is_there_are_served_by_the_next_one(serve, connect):
    running = serve()
    users = [connect(running, "user") for _ in range(3)]
    client = connect(running).join(3)
    assert all(is_served(user, client) for user in users)


def test_users_that_come_in_the_gap_between_two_clients_are_served_by_the_next_one(serve, connect):
    running = serve()
    first = connect(running).join(1).known()
    assert is_served(connect(running, "user"), first)
    waiting = connect(running, "user")  # for a data connection that the first client will not bring
    first.close()
    user = connect(running, "user")
    second = connect(running).join(2)
    assert is_served(waiting, second)
    assert is_served(user, second)


def test_users_that_nobody_serves_are_reset_after_the_wait_and_the_log_says_why(serve, connect, said):
    running = serve(pool_wait_s=0.5)  # a kernel that acknowledges an id late takes 40 ms
    assert is_reset(connect(running, "user"))
    assert said.find(r"WARNING user 127\.0\.0\.1:\d+ refused: no client is connected")
    connect(running).join().close()
    client = connect(running).join().known()
    assert is_served(connect(running, "user"), client)
    assert is_reset(connect(running, "user"))
    assert said.find(r"WARNING user 127\.0\.0\.1:\d+ refused: no data connection within")
    assert running.counters.exchanges_failed == 2


def test_an_exchange_outlives_the_client_that_launched_it(serve, connect):
    running = serve()
    first = connect(running).join()
    user = connect(running, "user")
    user.sendall(b"1")
    data, _ = first.launched()
    first.close()
    second = connect(running).join()
    assert is_served(connect(running, "user"), second)
    user.sendall(b"2")
    assert read_exactly(data, 2) == b"12"
    data.close()


def test_over_the_limit_users_wait_in_the_backlog_and_nothing_else_stops(serve, connect, caplog):
    running = serve(semaphore_limit=2, report_interval_s=0.01)
    client = connect(running).join(4)
    busy = [connect(running, "user") for _ in range(2)]
    held = []
    for user in busy:
        user.sendall(b"x")
        held.append(client.launched()[0])
    waiting = [connect(running, "user") for _ in range(2)]
    for user in waiting:
        user.sendall(b"later")
    assert [read_line(client.control) for _ in range(5)] == [b""] * 5  # pings, and no launch
    assert running.counters.tcp_exchanges == len(running.server.exchanges) == 2
    assert caplog.messages.count("all places are taken, 2 of semaphore-limit: further users wait") == 1
    for user, data in zip(busy, held, strict=True):
        user.close()
        data.close()
    for _ in waiting:
        data, _ = client.launched()
        assert read_exactly(data, 5) == b"later"
        data.close()


def test_users_come_and_go_and_descriptors_and_memory_are_as_before(serve, connect):
    running = serve()
    client = connect(running)

    def serve_users(count):
        for number in range(count):
            client.join(0 if number % 50 else 50)
            with dial(running.public) as user:
                assert is_served(user, client)

    serve_users(100)
    wait_until(lambda: not running.server.exchanges)
    descriptors, before = len(os.listdir("/proc/self/fd")), resident()
    serve_users(300)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors)
    assert resident() - before < 1 << 20


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(("network", "words"), [("both", "tcp and udp"), ("tcp", "tcp"), ("udp", "udp")])
def test_what_the_public_port_carries_is_told(serve, said, network, words):
    serve(network=network)
    assert said.find(rf", public 127\.0\.0\.1:[0-9]+ \({words}\), tls 0")


def test_datagrams_take_at_most_half_of_the_slots(serve, connect):
    running = serve(network="both", semaphore_limit=4, udp_read_timeout_s=5)
    client = connect(running).join(3)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as user:
        user.settimeout(5)
        user.connect(("127.0.0.1", running.public))
        for number in range(3):
            user.send(b"%d" % number)
        asked = [client.launched() for _ in range(2)]
        wait_until(lambda: running.counters.datagrams_dropped_busy == 1)
        assert [(read_all(data), kind) for data, kind in asked] == [(b"0", b"2"), (b"1", b"2")]
        for data, _ in reversed(asked):
            data.sendall(b"answer")
            data.close()
            assert user.recv(100) == b"answer"
    assert is_served(connect(running, "user"), client)
    assert running.counters.udp_exchanges == 2


def test_a_data_port_that_is_taken_is_drawn_again(serve, connect, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as other:
        free = other.getsockname()[1]
        other.close()
        monkeypatch.setattr(random, "sample", lambda _population, k: [taken.getsockname()[1], free])
        running = serve()
        assert running.data == free
        assert is_served(connect(running, "user"), connect(running).join())


def test_when_no_data_port_is_free_the_error_says_so(monkeypatch, no_leaks):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(random, "sample", lambda _population, k: [taken.getsockname()[1]] * 3)
        with pytest.raises(OSError, match="no free data port in 1024-8191"):
            Server(Config(role="server", tunnel=LOOPBACK, target=LOOPBACK)).run()


def test_what_else_keeps_a_data_port_from_being_opened_is_said_as_it_is(monkeypatch, no_leaks):
    listen = net.listen

    def listen_once(address, limits, **options):
        if address.port:  # it is drawn
            raise OSError(errno.EMFILE, "too many open files")
        return listen(address, limits, **options)

    monkeypatch.setattr(net, "listen", listen_once)
    with pytest.raises(OSError, match="too many open files"):
        Server(Config(role="server", tunnel=LOOPBACK, target=LOOPBACK)).run()


@pytest.mark.parametrize(
    ("failure", "kind", "said"),
    [(OSError(errno.EIO, "broken"), OSError, "broken"), (ZeroDivisionError(), RuntimeError, "an accept loop ended")],
)
def test_a_listener_that_fails_ends_the_server_by_its_error(monkeypatch, no_leaks, failure, kind, said):
    failures = [failure]

    def serve(*_args, **_options):
        if failures:
            raise failures.pop()
        Event().wait()  # the other ones go on

    monkeypatch.setattr(accepting, "serve", serve)
    monkeypatch.setattr(gevent.get_hub(), "print_exception", Mock())
    with bounded(), pytest.raises(kind, match=said) as caught:
        Server(Config(role="server", tunnel=LOOPBACK, target=LOOPBACK, network="tcp")).run()
    assert failure in (caught.value, caught.value.__cause__)


def test_random_data_ports_are_those_of_the_original(serve):
    assert 1024 <= serve().data <= 8191


def test_a_fixed_data_port_is_taken(serve, connect):
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    running = serve(data_port=port)
    assert running.data == port
    assert without_offer(connect(running).first_line) == b"//%d#0" % port


@pytest.mark.parametrize(
    ("which", "kind", "what"),
    [
        ("tunnel", socket.SOCK_STREAM, "tunnel port"),
        ("data_port", socket.SOCK_STREAM, "data port"),
        ("target", socket.SOCK_STREAM, "public port, TCP"),
        ("target", socket.SOCK_DGRAM, "public port, UDP"),
    ],
)
def test_an_address_in_use_is_named_and_nothing_stays_open(no_leaks, which, kind, what):
    with socket.create_server(("127.0.0.1", 0)) as free:  # of TCP, too: UDP's choice may be in TIME_WAIT there
        port = free.getsockname()[1]
    with socket.socket(socket.AF_INET, kind) as taken, bounded():
        taken.bind(("127.0.0.1", port))
        settings = {"tunnel": LOOPBACK, "target": LOOPBACK}
        settings[which] = port if which == "data_port" else Address("127.0.0.1", port)
        with pytest.raises(OSError, match=f"] {what}: address already in use: 127.0.0.1:{port}$") as caught:
            Server(Config(role="server", **settings)).run()
        assert caught.value.errno == errno.EADDRINUSE


def is_open(kind, port):
    """Say whether somebody has the port: only a listener lets a TCP caller in, and only a free UDP port can be had."""
    with socket.socket(socket.AF_INET, kind) as sock:
        if kind == socket.SOCK_STREAM:
            return sock.connect_ex(("127.0.0.1", port)) == 0
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return True
        return False


@pytest.mark.parametrize(("network", "tcp", "udp"), [("tcp", True, False), ("udp", False, True), ("both", True, True)])
def test_the_public_port_is_opened_for_what_the_tunnel_carries(serve, network, tcp, udp):
    port = serve(network=network).public
    assert (is_open(socket.SOCK_STREAM, port), is_open(socket.SOCK_DGRAM, port)) == (tcp, udp)


def test_a_server_on_every_interface_serves_both_families(serve, connect):
    running = serve(tunnel=Address("", 0), target=Address("", 0))
    client = connect(running).join()
    for host in ("127.0.0.1", "::1"):
        with socket.create_connection((host, running.public), 5) as user:
            assert is_served(user, client.join())


@pytest.mark.parametrize("port", ["public", "tunnel"])
def test_out_of_descriptors_a_listener_pauses_as_the_settings_say_warns_once_and_recovers(serve, connect, said, port):
    running = serve(accept_pause_s=0.001, accept_pause_longest_s=0.002)
    client = connect(running).join().known()
    with socket.socket() as caller:
        with out_of_descriptors():
            caller.connect(("127.0.0.1", getattr(running, port)))
            wait_until(lambda: running.counters.accept_pauses >= 70)  # with the defaults that takes a minute
        assert (
            len([line for line in said.lines if line.startswith("WARNING accepting pauses: too many open files")]) == 1
        )
        if port == "public":
            assert is_served(caller, client)
        else:
            assert read_line(caller)
