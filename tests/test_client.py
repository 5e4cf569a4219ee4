"""The client against a scripted server: its first line, its signals, its data connections."""

import contextlib
import gc
import logging
import re
import select
import socket
import time
from dataclasses import replace

import gevent
import pytest
from secure import presented
from support import BOUND_S, LIMITS, as_stream, bounded, is_reset, read_exactly, silent_endpoint, wait_until

from nodepass_gevent import net, tls
from nodepass_gevent.client import Client
from nodepass_gevent.config import Address, Config
from nodepass_gevent.errors import ConnectError, NoPlace, PolicyError, ProtocolError, SessionEnded, SessionLost
from nodepass_gevent.transport import Stream


def listener():
    sock = socket.create_server(("127.0.0.1", 0))
    sock.settimeout(BOUND_S)
    return sock


def port_of(sock):
    return sock.getsockname()[1]


class Scripted:
    """A server that does what the test says: a tunnel port, a data port and, behind the client, a target."""

    def __init__(self, stack):
        self.stack = stack
        self.tunnel, self.data, self.target = (stack.enter_context(listener()) for _ in range(3))

    def run(self, **settings):
        """Run a client of this server in a greenlet, which gives what ended it."""
        limits = {name: settings.pop(name) for name in list(settings) if hasattr(LIMITS, name)}
        address = Address("127.0.0.1", port_of(self.tunnel))
        defaults = {"tunnel": address, "target": Address("127.0.0.1", port_of(self.target)), "min_pool_capacity": 1}
        self.client = Client(Config(role="client", limits=replace(LIMITS, **limits), **defaults | settings))
        self.stack.callback(self.client.exchanges.kill)
        self.again()
        self.control = self.take(self.tunnel)
        return self

    def again(self):
        """Let the same client run, once more when it has ended."""
        self.running = gevent.spawn(self._run)
        self.stack.callback(self.running.kill)

    def _run(self):
        try:
            return self.client.run()
        except (OSError, ConnectError, NoPlace, PolicyError, ProtocolError, SessionEnded, SessionLost) as exc:
            return exc

    def greet(self, tls=0):
        self.say(b"//%d#%d\n" % (port_of(self.data), tls))
        return self

    def say(self, *pieces):
        for piece in pieces:
            self.control.sendall(piece)

    def take(self, sock):
        """Accept a connection."""
        taken, _ = sock.accept()
        self.stack.enter_context(taken)
        taken.settimeout(BOUND_S)
        taken.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return taken

    def join(self, id):
        """Accept a data connection and name it."""
        data = self.take(self.data)
        data.sendall(id)
        return data

    def carries(self, data):
        """Carry a question to the target and its answer back on a data connection that is launched."""
        data.sendall(b"question")
        with self.take(self.target) as target:
            assert read_exactly(target, 8) == b"question"
            target.sendall(b"answer")
        return read_exactly(data, 6) == b"answer"

    def ended(self):
        return self.running.get(timeout=BOUND_S)


@pytest.fixture
def server(no_leaks):
    with contextlib.ExitStack() as stack, bounded(30):
        yield Scripted(stack)


def test_a_launched_connection_is_carried_to_the_target(server, caplog):
    server.run().greet()
    data = server.join(b"0123abcd")
    server.say(b"\n//0123abcd#1\n")
    assert server.carries(data)
    data.close()
    wait_until(lambda: not server.client.exchanges)
    assert (server.client.counters.bytes_up, server.client.counters.bytes_down) == (8, 6)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_the_client_says_nothing_on_the_control_channel(server):
    server.run().greet()
    data = server.join(b"0123abcd")
    server.say(b"\n" * 100, b"//x#9\n", b"//0123abcd#1\n")
    assert server.carries(data)
    assert not select.select([server.control], [], [], 0)[0]


@pytest.mark.parametrize("tail", [b"", b"\n", b"\n//0123abcd#1\n"])
def test_the_first_line_may_come_byte_by_byte_and_with_a_tail(server, tail):
    server.run()
    line = b"//%d?later=2&n=x&d=1#0\n" % port_of(server.data)
    for number in range(len(line) - 1):
        server.say(line[number : number + 1])
        gevent.sleep(0)
    server.say(line[-1:] + tail)
    data = server.join(b"0123abcd")
    if not tail.endswith(b"#1\n"):
        server.say(b"//0123abcd#1\n")
    assert server.carries(data)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"\n", "not a line of the tunnel protocol"),
        (b"HTTP/1.1 400 Bad Request\r\n", "not a line of the tunnel protocol"),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "not a line of the tunnel protocol"),
        (b"\xff\x00\x1b[2J\n", "not a line of the tunnel protocol"),
        (b"//1234#3\n", "unknown TLS mode"),
        (b"//1234#\n", "unknown TLS mode"),
        (b"//0#0\n", "not a port"),
        (b"//65536#0\n", "not a port"),
        (b"//port#0\n", "not a port"),
        (b"x" * 5000, "a line of more than 1024 bytes"),
    ],
)
def test_a_malformed_first_line_ends_the_attempt_and_says_why(server, line, why):
    server.run().say(line)
    failure = server.ended()
    assert isinstance(failure, ProtocolError) and why in str(failure)
    assert str(failure).endswith(f"; is {server.client.config.tunnel} the tunnel port of a NodePass server?")
    assert str(failure).isprintable()
    assert is_reset(server.control)


def test_a_server_that_says_off_is_refused_by_policy(server):
    server.run().say(b"//off#0\n")
    failure = server.ended()
    assert isinstance(failure, PolicyError) and "takes no client" in str(failure)


@pytest.mark.parametrize(("least", "offered"), [(1, 0), (2, 0), (2, 1)])
def test_less_tls_than_asked_for_is_refused_by_policy(server, least, offered):
    server.run(tls=least).greet(offered)
    failure = server.ended()
    assert isinstance(failure, PolicyError) and f"offers tls {offered}" in str(failure)
    server.data.settimeout(0)
    with pytest.raises(BlockingIOError):
        server.data.accept()


def test_launches_that_wait_for_room_outlive_a_session_that_this_side_ends(server):
    server.run(semaphore_limit=1, min_pool_capacity=2).greet()
    running, waiting = server.join(b"0123abcd"), server.join(b"0123abce")
    server.say(b"//0123abcd#1\n//0123abce#1\n")
    running.sendall(b"x")
    with server.take(server.target) as target:
        assert read_exactly(target, 1) == b"x"
        server.running.kill()
        running.close()
    assert server.carries(waiting)


def test_a_server_that_closes_before_its_first_line_is_an_error(server):
    server.run().say(b"//12")
    server.control.close()
    assert "hung up before its first line" in str(server.ended())


def test_a_server_that_says_nothing_is_given_up_at_the_deadline(server):
    failure = server.run(first_line_timeout_s=0.02).ended()
    assert isinstance(failure, TimeoutError) and str(failure).startswith("first line")


def test_a_server_that_is_silent_at_first_is_asked_about(server, caplog):
    server.run(connect_timeout_s=0.02)
    wait_until(lambda: caplog.messages)
    said = (
        "took the call and is silent; a NodePass server speaks first: is this its tunnel port, and not its public port?"
    )
    assert caplog.messages == [f"{server.client.config.tunnel} {said}"]


def test_whom_a_client_calls_and_for_what_is_said_once(no_leaks, caplog):
    caplog.set_level(logging.INFO, "nodepass_gevent")
    with listener() as nobody:
        address = Address("127.0.0.1", port_of(nobody))
    client = Client(Config(role="client", tunnel=address, target=Address("localhost", 80)))
    for _ in range(2):
        with bounded(), pytest.raises(ConnectError):
            client.run()
    assert caplog.messages == [f"calling {address}, for localhost:80"]


def test_a_server_that_does_not_answer_the_dial_is_given_up_at_the_deadline(no_leaks):
    with silent_endpoint() as endpoint:
        address = Address(*endpoint.sockaddr)
        limits = replace(LIMITS, connect_timeout_s=0.05, target_timeout_s=3600)
        with bounded(), pytest.raises(ConnectError, match=f"connect {address}: connect: timed out after 0.05 s"):
            Client(Config(role="client", tunnel=address, target=address, limits=limits)).run()


def test_bytes_that_the_server_does_not_acknowledge_end_the_control_channel_after_the_time_that_is_set(
    server, monkeypatch
):
    hurried = []
    monkeypatch.setattr(Stream, "retransmit_soon", lambda stream: hurried.append(stream))
    server.run(tcp_user_timeout_s=1.5).greet()
    server.join(b"0123abcd")
    port = port_of(server.tunnel)
    (control,) = (each for each in gc.get_objects() if isinstance(each, Stream) and each.peer[1] == port)
    assert control.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1500
    assert hurried == [control]


def test_a_server_that_is_not_there_is_an_error_that_names_it(no_leaks):
    with listener() as nobody:
        address = Address("127.0.0.1", port_of(nobody))
    with bounded(), pytest.raises(ConnectError, match=f"connect {address}: connection refused"):
        Client(Config(role="client", tunnel=address, target=address)).run()


def test_malformed_and_unknown_signals_are_counted_and_passed_over(server):
    server.run().greet()
    data = server.join(b"0123abcd")
    server.say(b"//0123abcd#9\n", b"//#hello\n", b"//?why=busy#bye\n")
    server.say(b"nonsense\n", b"//0123ABCD#1\n", b"//x#1\n", b"\xff\xfe\n", b"//a#b#c\n", b"//0123abcd#1\r\n")
    server.say(b"//0123abcd?from=192.0.2.1%3A443#1\n")
    assert server.carries(data)
    assert server.client.counters.signals_unknown == 3
    assert server.client.counters.signals_malformed == 6


def test_a_signal_without_an_end_ends_the_session(server):
    server.run().greet()
    server.say(b"x" * 5000)
    assert "a line of more than 256 bytes" in str(server.ended())


def test_a_thousand_launches_in_one_segment_are_all_handled(server, spawn):
    server.run(max_pool_capacity=1024, semaphore_limit=64).greet()
    ids = [b"%08x" % number for number in range(1000)]
    served = []

    def answer():
        while True:
            target = server.take(server.target)
            served.append(read_exactly(target, 8))
            target.close()

    def join():
        for id in ids:
            with server.join(id) as data:  # a launch has come before: the user speaks at once
                data.sendall(id)
                data.shutdown(socket.SHUT_WR)
                left.append(data.detach())

    left = []
    spawn(answer)
    server.say(b"".join(b"//%b#1\n" % id for id in ids))
    spawn(join)
    wait_until(lambda: len(served) == 1000, 20)
    assert sorted(served) == ids
    assert server.client.counters.launches_lost == 0
    for descriptor in left:
        socket.socket(fileno=descriptor).close()


def test_a_launch_that_overtakes_its_id_waits_for_it(server):
    server.run().greet()
    data = server.take(server.data)
    server.say(b"//0123abcd#1\n")
    gevent.sleep(0.02)  # time for the launch to be read, and lost
    data.sendall(b"0123abcd")
    assert server.carries(data)


def test_a_launch_whose_id_never_comes_is_counted_as_lost(server):
    server.run(pool_wait_s=0.02).greet()
    server.join(b"0123abcd")
    server.say(b"//ffffffff#1\n")
    wait_until(lambda: server.client.counters.launches_lost == 1)


def test_an_id_may_come_in_eight_segments_and_the_users_bytes_right_behind(server):
    server.run().greet()
    data = server.take(server.data)
    for digit in b"0123abcd":
        data.sendall(bytes((digit,)))
        gevent.sleep(0.001)
    data.sendall(b"and ")
    server.say(b"//0123abcd#1\n")
    data.sendall(b"more")
    assert read_exactly(server.take(server.target), 8) == b"and more"


@pytest.mark.parametrize("id", [b"", b"0123abc", b"0123ABCD", b"//1234#0", b"\x00" * 8])
def test_a_data_connection_without_a_whole_id_is_replaced(server, id):
    server.run().greet()
    broken = server.join(id)
    if len(id) < 8:
        broken.close()
    data = server.join(b"0123abcd")
    server.say(b"//0123abcd#1\n")
    assert server.carries(data)
    assert not server.running.ready()


def test_an_id_that_does_not_come_is_given_up_at_the_deadline(server):
    server.run(id_timeout_s=0.02).greet()
    silent = server.take(server.data)
    assert is_reset(silent)
    server.say(b"//0123abcd#1\n")
    assert server.carries(server.join(b"0123abcd"))


@pytest.mark.parametrize(
    ("limit", "greeting"), [("tls_handshake_timeout_s", None), ("id_timeout_s", b""), ("pool_wait_s", b"0123ABCD")]
)
def test_over_tls_a_data_connection_that_stalls_or_has_no_id_is_reset_and_replaced(server, limit, greeting):
    server.run(**{limit: 1.0}).greet(tls=1)
    with as_stream(server.take(server.data)) as broken, bounded(), contextlib.suppress(ConnectionError):
        if greeting is not None:
            broken = tls.accept(broken, presented().contexts[b""])
            broken.sendall(greeting)
        while broken.recv(1000):
            pass
    with tls.accept(as_stream(server.take(server.data)), presented().contexts[b""]) as data:
        data.sendall(b"0123abcd")
        server.say(b"//0123abcd#1\n")
        assert server.carries(data)


def test_a_data_port_that_refuses_is_dialled_with_pauses(server, monkeypatch):
    dials = []
    dial = net.begin_to_connect
    monkeypatch.setattr(net, "begin_to_connect", lambda *args, **how: dials.append(args) or dial(*args, **how))
    server.run(min_pool_capacity=4)
    server.data.close()
    before = time.process_time()
    server.say(b"//%d#0\n" % free_port())
    server.say(b"\n")
    gevent.sleep(1)
    assert 5 < len(dials) < 30  # four connections are missing; pauses double from 50 ms
    assert time.process_time() - before < 0.2
    assert not server.running.ready()


def free_port():
    with listener() as found:
        return port_of(found)


def test_a_server_that_pinged_and_falls_silent_is_declared_dead(server):
    server.run(dead_timeout_s=0.5).greet()
    server.say(b"\n")
    gevent.sleep(0.001)  # its interval
    server.say(b"\n")
    failure = server.ended()
    assert isinstance(failure, SessionLost) and "silent for 0.5 s" in str(failure)
    assert 0 < failure.lived_s < BOUND_S


def test_a_server_with_long_intervals_is_given_three_of_them(server):
    server.run(dead_timeout_s=0.01).greet()
    for _ in range(3):
        server.say(b"\n")
        gevent.sleep(0.1)
    assert not server.running.ready()  # ten times as long as the least
    assert isinstance(server.ended(), SessionLost)


def test_a_server_is_given_as_many_intervals_as_are_set(server):
    server.run(dead_timeout_s=0.01, dead_intervals=1).greet()
    for _ in range(2):
        server.say(b"\n")
        gevent.sleep(0.5)
    silent_for_s = float(re.search(r"silent for (\S+) s", str(server.ended()))[1])
    assert 0.3 < silent_for_s < 1.5  # one interval, and not three


def test_a_server_that_never_pings_is_believed(server):
    server.run(dead_timeout_s=0.001).greet()
    data = server.join(b"0123abcd")
    gevent.sleep(0.05)
    server.say(b"//0123abcd#1\n")
    assert server.carries(data)


@pytest.mark.parametrize("how", ["closed by the peer", "connection reset by peer"])
def test_the_end_of_the_control_channel_ends_the_session_but_no_exchange(server, how):
    server.run(min_pool_capacity=2).greet()
    data = server.join(b"0123abcd")
    idle = server.join(b"4567abcd")
    server.say(b"//0123abcd#1\n")
    data.sendall(b"1")
    target = server.take(server.target)
    assert read_exactly(target, 1) == b"1"
    if how.startswith("connection"):
        server.control.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    server.control.close()
    failure = server.ended()
    assert isinstance(failure, SessionLost) and how in str(failure)
    assert is_reset(idle)
    data.sendall(b"2")
    assert read_exactly(target, 1) == b"2"


def test_a_target_that_refuses_resets_the_data_connection(server):
    server.run(target=Address("127.0.0.1", free_port())).greet()
    data = server.join(b"0123abcd")
    server.say(b"//0123abcd#1\n")
    assert is_reset(data)
    assert server.client.counters.exchanges_failed == 1


def test_names_are_resolved_again_at_every_run(server, monkeypatch):
    moved = server.stack.enter_context(listener())
    resolve, ports = socket.getaddrinfo, [port_of(server.tunnel), port_of(moved)]

    def found(host, *_arguments, **_options):
        assert host == "tunnel.example"
        return resolve("127.0.0.1", ports.pop(0), type=socket.SOCK_STREAM)

    monkeypatch.setattr(socket, "getaddrinfo", found)
    server.run(tunnel=Address("tunnel.example", port_of(server.tunnel)))
    server.control.close()
    server.ended()
    server.again()
    server.take(moved).close()
    server.ended()


def test_data_connections_go_to_the_address_that_the_control_channel_reached(server, monkeypatch):
    """A name may have moved meanwhile; the session has not."""
    found = socket.getaddrinfo("127.0.0.1", port_of(server.tunnel), type=socket.SOCK_STREAM)
    answers = [found]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_arguments, **_options: answers.pop())
    server.run(tunnel=Address("tunnel.example", port_of(server.tunnel))).greet()
    server.say(b"//0123abcd#1\n")
    assert server.carries(server.join(b"0123abcd"))
