"""When users may come: the public port, shared or not, and what becomes of those who wait when it is closed."""

import errno
import random
import re
import socket
import time
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path

import gevent
import pytest
from support import BOUND_S, LIMITS, bounded, is_reset, read_exactly, wait_until
from test_v2_server import HELLO, V2Client, datagram_user
from tunnel import ELSEWHERE, closed, dial, is_served, quiet, read_line

from nodepass_gevent import accepting, net
from nodepass_gevent import log as logs
from nodepass_gevent.admission import Admission
from nodepass_gevent.clients import Clients
from nodepass_gevent.config import Address, Config
from nodepass_gevent.errors import ConfigError
from nodepass_gevent.handover import Sockets
from nodepass_gevent.metrics import Counters
from nodepass_gevent.public_port import DIVERTED_S, RETURN_S, PublicPort
from nodepass_gevent.server import Server
from nodepass_gevent.values import Networks


def free_address(kind=socket.SOCK_STREAM):
    """Draw below the ports that the kernel gives to connections: who binds this one again may come too late there."""
    while True:
        address = Address("127.0.0.1", random.randrange(20000, 32000))
        with suppress(OSError), closing(net.bind(address, kind)):
            return address


def shared(**settings):
    return {"reuse_port": 1, "tunnel": free_address(), "target": free_address()} | settings


def is_open(running):
    """Whether a socket listens on the public port; to try would be to be a user."""
    listening = f"0100007F:{running.public:04X} 00000000:0000 0A"
    return listening in Path("/proc/net/tcp").read_text()


def call_unseen(port):
    """Be a user whom the server's greenlets had no turn to see."""
    raw = net.RawSocket()
    raw.connect(("127.0.0.1", port))
    user = socket.socket(fileno=raw.detach())
    user.settimeout(BOUND_S)
    return user


class SharedV2Client(V2Client):
    """Its data connections come to the data port of its server process."""

    def open(self, session=None, source=None):
        data = dial(self.running.data, source or self.source)
        data.sendall(b"//%b?v=2#data\n" % (session or self.session))
        read_line(data)
        return data


def test_why_receiving_users_failed_is_said():
    class Broken:
        def user(self, user, ended=None): ...

        def wait_for_room(self): ...

        def room(self):
            raise ArithmeticError("a fault of ours")

    config = Config(role="server", tunnel=free_address(), target=free_address(), network="tcp", limits=LIMITS)
    admission = Admission(config, Counters())
    public = PublicPort(config, Sockets({}), Clients(LIMITS, logs.of("")), Broken(), admission, lambda exc: None)
    address = public.prepare()
    with socket.create_connection((address.host, address.port), BOUND_S), gevent.Timeout(BOUND_S):
        assert str(public.run()) == "a fault of ours"
    public.close(0)


# With several processes


def test_without_a_client_users_are_refused_and_with_one_they_are_served(serve, connect):
    running = serve(**shared())
    assert not is_open(running)
    for _ in range(2):
        client = connect(running).join()
        wait_until(lambda: is_open(running))
        assert is_served(connect(running, "user"), client)
        client.close()
        wait_until(lambda: not is_open(running))
        with pytest.raises(ConnectionRefusedError):
            connect(running, "user")


def test_users_who_wait_when_the_client_goes_are_served_by_the_next_one(serve, connect):
    running = serve(**shared())
    first = connect(running).join().known()
    wait_until(lambda: is_open(running))
    first.close()
    with closing(call_unseen(running.public)) as user:
        wait_until(lambda: not is_open(running))
        assert is_served(user, connect(running).join())


def test_a_process_whose_client_goes_takes_all_users_in_its_queue_and_waits_for_those_in_the_middle_of_calling(
    serve, connect, monkeypatch
):
    monkeypatch.setattr(accepting, "migrates", lambda: False)  # else the kernel would give them to another process
    running = serve(**shared())
    client = connect(running).join().known()
    wait_until(lambda: is_open(running))
    began = time.monotonic()
    client.close()
    with ExitStack() as stack:
        users = [stack.enter_context(closing(call_unseen(running.public))) for _ in range(20)]
        wait_until(lambda: not is_open(running))
        assert time.monotonic() - began >= DIVERTED_S
        assert all(map(quiet, users))  # none is reset: they wait for the next client


def test_a_datagram_without_a_client_is_refused_and_with_one_it_is_carried(serve, connect):
    running = serve(**shared(network="udp", target=free_address(socket.SOCK_DGRAM)))
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as user:
        user.settimeout(BOUND_S)
        user.connect(("127.0.0.1", running.public))
        user.send(b"lost")
        with pytest.raises(ConnectionRefusedError):
            user.recv(10)
        client = connect(running).join()

        def arrived():
            user.send(b"question")
            return running.counters.udp_exchanges

        client.known()
        wait_until(lambda: not_refused(arrived))
        data, kind = client.launched()
        with data:
            assert (data.recv(10), kind) == (b"question", b"2")
            data.sendall(b"answer")
        assert user.recv(10) == b"answer"


def not_refused(action):
    try:
        return action()
    except ConnectionRefusedError:
        return False


@pytest.mark.parametrize("protocol", ["auto", "2"])
def test_v2_data_connections_come_to_the_data_port_that_the_first_line_names(serve, connect, protocol):
    running = serve(**shared(protocol=protocol))
    with closing(SharedV2Client(running)) as client:
        host = b"//off?" if protocol == "2" else b"//%d?" % running.data
        assert client.first_line.startswith(host) and client.first_line.endswith(b"&d=%d#0" % running.data)
        client.join()
        wait_until(lambda: is_open(running))
        with closing(client.open(b"0" * 16)) as stranger:
            assert closed(stranger)
        user = connect(running, "user")
        user.sendall(b"question")
        data, _ = client.join().launched()
        with data:
            assert read_exactly(data, 8) == b"question"


def test_without_shared_ports_no_data_port_is_named_to_v2_clients(serve, connect):
    assert b"d=" not in read_line(connect(serve(), "caller"))
    assert b"d=" not in read_line(connect(serve(**shared(protocol="1")), "caller"))


def test_a_second_client_is_told_busy_and_it_is_no_warning(serve, said):
    running = serve(**shared())
    with closing(SharedV2Client(running)), closing(SharedV2Client(running, HELLO, ELSEWHERE)) as second:
        assert second.welcome == b"//?why=busy#bye"
        second.control.close()
        wait_until(lambda: said.find(r"DEBUG refused second client 127\.0\.0\.2"))
        assert not said.find("WARNING")


@pytest.mark.parametrize(
    ("port", "kind", "what"),
    [
        ("tunnel", socket.SOCK_STREAM, "tunnel port"),
        ("target", socket.SOCK_STREAM, "public port, TCP"),
        ("target", socket.SOCK_DGRAM, "public port, UDP"),
    ],
)
def test_a_port_that_is_taken_by_a_process_without_reuse_port_is_an_error_that_says_so(no_leaks, port, kind, what):
    address = free_address(kind)
    with closing(net.bind(address, kind)) as taken:
        if kind == socket.SOCK_STREAM:
            taken.listen()
        server = Server(Config(role="server", **shared(**{port: address})))
        text = f"{what}: address already in use: {address}, taken by a process without reuse-port"
        with pytest.raises(OSError, match=text):
            server.run()


@pytest.mark.parametrize("reuse_port", [0, 1])
def test_the_log_says_that_the_port_is_closed_until_a_client_is_connected_where_it_is(serve, said, reuse_port):
    running = serve(**shared(reuse_port=reuse_port))
    until = ", closed until a client is connected" if reuse_port else ""
    assert said.find(rf"listening: .*, public 127\.0\.0\.1:{running.public} \(tcp{until}\), tls 0$")
    assert is_open(running) != reuse_port


def test_two_servers_share_their_ports_and_each_has_its_client(serve, connect, said):
    settings = shared()
    servers = [serve(**settings), serve(**settings)]
    clients = {}
    while len(clients) < 2:
        client = connect(servers[0])
        port = int(re.search(rb"&d=(\d+)#", client.first_line)[1])
        if port in clients:
            client.close()
            continue
        client.running = next(running for running in servers if running.data == port)
        clients[port] = client.join(20).known()
    wait_until(lambda: len([line for line in said.lines if line.endswith(": open")]) == 2)
    users = [connect(servers[0], "user") for _ in range(40)]
    wait_until(lambda: sum(running.counters.tcp_exchanges for running in servers) >= len(users))
    assert min(running.counters.tcp_exchanges for running in servers) > 4


def test_new_settings_hand_the_open_port_over_to_whom_the_client_comes_back(serve, connect, spawn, said):
    running = serve(**shared())
    client = connect(running).join().known()
    wait_until(lambda: is_open(running))
    successor = Server(running.server.config, running.server)
    running.greenlet.kill()
    assert closed(client.control)
    said.lines.clear()
    greenlet = spawn(successor.run)
    with closing(call_unseen(running.public)) as user:
        wait_until(lambda: said.find("listening"))
        assert said.find(r"listening: .* \(tcp\), tls 0$")  # it is open all the time
        running.tunnel, running.data = (int(port) for port in said.find(r"tunnel .*:(\d+), data port (\d+)").groups())
        assert is_served(user, connect(running).join())
    greenlet.kill()
    successor.exchanges.kill()


def test_an_open_port_that_is_handed_over_is_closed_when_no_client_comes_back(serve, connect, spawn):
    running = serve(**shared())
    connect(running).join().known()
    wait_until(lambda: is_open(running))
    successor = Server(running.server.config, running.server)
    running.greenlet.kill()
    began = time.monotonic()
    spawn(successor.run)
    wait_until(lambda: not is_open(running))
    assert time.monotonic() - began >= RETURN_S


def test_a_successor_whose_certificate_has_gone_bad_leaves_callers_to_the_former_one(serve, connect):
    running = serve()
    client = connect(running).join().known()
    broken = replace(running.server.config, tls=1, crt="/nowhere/crt", key="/nowhere/key")
    with pytest.raises(ConfigError, match="no such file"):
        Server(broken, running.server)
    with closing(call_unseen(running.public)) as user:
        running.greenlet.kill()
        assert is_served(user, client)


def test_a_successor_for_which_there_are_no_descriptors_leaves_all_as_it_was(serve, connect, monkeypatch):
    running = serve()
    client = connect(running).join().known()
    made, duplicate = [], net.duplicate

    def duplicate_one(sock):
        if made:
            raise OSError(errno.EMFILE, "too many open files")
        made.append(duplicate(sock))
        return made[0]

    monkeypatch.setattr(net, "duplicate", duplicate_one)
    with pytest.raises(OSError, match="too many open files"):
        Server(running.server.config, running.server)
    assert made[0].fileno() == -1
    with closing(call_unseen(running.public)) as user:
        running.greenlet.kill()
        assert is_served(user, client)


def test_an_address_that_is_taken_does_not_keep_the_former_port_open(serve):
    running = serve(target=free_address())
    with closing(net.listen(Address("127.0.0.1", 0), LIMITS)) as taken:
        target = Address("127.0.0.1", taken.getsockname()[1])
        successor = Server(replace(running.server.config, target=target), running.server)
        running.greenlet.kill()
        with pytest.raises(OSError, match="in use"):
            successor.run()
        assert not is_open(running)


def test_ports_go_through_one_that_had_no_time_to_open_them_and_are_closed_behind_it(serve):
    running = serve(target=free_address())
    between = Server(running.server.config, running.server)
    last = Server(running.server.config, between)
    running.greenlet.kill()
    between.retire()
    assert is_open(running)
    last.retire()
    assert not is_open(running)


def test_udp_sessions_do_not_keep_the_shared_port_of_a_process_without_a_client(serve, said):
    running = serve(**shared(network="udp", target=free_address(socket.SOCK_DGRAM)))
    bound = f"0100007F:{running.public:04X} 00000000:0000"
    with closing(SharedV2Client(running, b"//?v=2&c=udp#hello\n")) as client:
        client.join()
        wait_until(lambda: said.find(": open"))
        with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as user:
            user.connect(("127.0.0.1", running.public))
            user.send(b"question")
            data, _ = client.launched()
            with data:
                assert bound in Path("/proc/net/udp").read_text()
                client.control.close()
                wait_until(lambda: bound not in Path("/proc/net/udp").read_text())


# At the end


@pytest.mark.parametrize("settings", [{}, {"reuse_port": 1}])
def test_users_in_the_queue_when_the_server_stops_are_served(serve, connect, spawn, settings):
    running = serve(**(shared() if settings else {}))
    client = connect(running).join().known()
    wait_until(lambda: is_open(running))
    with closing(call_unseen(running.public)) as user:
        stopping = spawn(running.greenlet.kill)
        assert is_served(user, client)
        stopping.join(BOUND_S)
    assert closed(client.control)
    assert not is_open(running)


def test_users_in_the_queue_are_reset_at_the_end_when_no_client_is_there(serve):
    running = serve()
    with closing(call_unseen(running.public)) as user:
        running.greenlet.kill()
        assert is_reset(user)


def test_a_user_who_waits_for_a_data_connection_when_the_server_stops_is_given_one_that_comes(serve, connect, spawn):
    running = serve()
    with closing(V2Client(running)) as client:
        user = connect(running, "user")
        assert client.signal() == b"//1#need"
        spawn(running.greenlet.kill)
        gevent.sleep(0)
        client.join()
        user.sendall(b"question")
        data, _ = client.launched()
        with data:
            assert read_exactly(data, 8) == b"question"


def test_who_is_kept_out_is_kept_out_of_the_queue_too_when_the_server_stops(serve, connect):
    running = serve(deny_users=Networks.parse("127.0.0.1"))
    connect(running).join().known()
    with closing(call_unseen(running.public)) as user:
        running.greenlet.kill()
        assert is_reset(user)
    assert running.counters.users_kept_out == 1


def test_users_in_the_queue_hold_up_no_server_whose_places_are_all_taken_when_it_stops(serve, connect):
    running = serve(semaphore_limit=1, drain_linger_s=0.1)
    client = connect(running).join(2)
    user = connect(running, "user")
    user.sendall(b"question")
    data, _ = client.launched()
    with data, closing(call_unseen(running.public)) as other:
        with bounded():
            running.greenlet.kill()
        assert is_reset(other)
        assert read_exactly(data, 8) == b"question"


def test_udp_sessions_go_on_when_the_server_stops_and_leave_the_port_to_it_when_it_begins_anew(
    serve, connect, spawn, said
):
    running = serve(network="both", tunnel=free_address(), target=free_address())
    with closing(V2Client(running, b"//?v=2&c=udp#hello\n")) as client, datagram_user(running) as sender:
        client.join()
        sender.send(b"1")
        data, _ = client.launched()
        with data:
            running.greenlet.kill()
            sender.send(b"2")
            assert read_exactly(data, 6) == b"\0\0011\0\0012"
            said.lines.clear()
            again = spawn(running.server.run)
            wait_until(lambda: said.find("listening: ") or again.ready())
            assert closed(data)
    user = connect(running, "user")  # and waits for a client
    with closing(V2Client(running)) as client:
        assert is_served(user, client.join())
