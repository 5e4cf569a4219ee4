"""Faults of the control channel: what a server may say, silence, cuts, and either side gone for a while."""

import contextlib
import itertools
import os
import select
import signal
import time

import pytest
from integration.harness import wait_until
from integration.targets import EchoTCP

from .chaos import Relay, delayed, sliced
from .harness import LIMITS, SLACK, Namespace, Tunnel, Users, complaints, standing
from .peers import OFFER, FakeServer, dial, how_it_ends, read_exactly

DEAD_S = 3.0  # three intervals of the suite's REPORT_INTERVAL


@contextlib.contextmanager
def lone_client(server, target="127.0.0.1:1", **env):
    """A client of a server that is spoken by hand."""
    tunnel = Tunnel(target, dialled=server.port, env={"SERVICE_COOLDOWN": "100ms"} | env)
    try:
        tunnel.start_client()
        yield tunnel
        assert tunnel.client.returncode is None, tunnel.client.tail()
        assert not complaints(tunnel.client), complaints(tunnel.client)
    finally:
        tunnel.stop()


def answers(data):
    """Whether a launched data connection reaches the echo."""
    data.sendall(b"question")
    return read_exactly(data, 8) == b"question"


@contextlib.contextmanager
def relayed(target, tls, **options):
    """A tunnel whose client calls through a relay that can spoil what passes."""
    tunnel = Tunnel(target.address, tls, **options)
    with Relay(tunnel.tunnel_port) as relay:
        tunnel.dialled = relay.port
        with tunnel:
            yield relay, tunnel


FIRST_LINES = [
    b"", b"\n", b"//8000\n",
    b"//#0\n", b"//0#0\n", b"//65536#0\n", b"//-1#0\n", b"//1e4#0\n", b"//8000#3\n", b"//8000#\n",
    b"//8000#1?v=2\n", b"//8000#0\r\n", b" //8000#0\n", "//8000#0\u00e9\n".encode(), b"//8000\0#0\n", b"//\x1b[31m#0\n",
    b"//off?v=2&n=A#0\n",
    b"//off?v=2&v=2&n=AAAAAAAAAAAAAAAAAAAAAA#0\n", b"//%zz#0\n", b"a" * 1023 + b"\n", b"a" * (1 << 20),
]  # fmt: skip


@pytest.mark.fault(11)
def test_a_client_survives_every_first_line_and_takes_the_next_that_is_good():
    bad = iter(FIRST_LINES)
    with FakeServer(first=lambda: next(bad, OFFER)) as server, lone_client(server) as tunnel:
        tunnel.client.wait_for_line("trying again")
        kib = tunnel.client.rss_kib()
        wait_until(lambda: server.controls and len(server.idle) >= 8, 30, "the client has come and filled its pool")
        assert tunnel.client.rss_kib() - kib < 4096
        assert not [line for line in tunnel.client.lines if not line.isprintable()]


NONSENSE = [
    b"//0123456#1\n",
    b"//012345678#1\n", b"//0123456G#1\n", b"//0A1B2C3D#1\n", b"//0a1b2c3d#9\n", b"//x#later\n", b"//many#need\n",
    b"x\n", b"//\x1b[2J#1\n", b"//0a1b2c3d?from=x&from=y#1\n", b"//%#1\n", b"#1\n", b"//0a1b2c3d#1#2\n",
]  # fmt: skip


@pytest.mark.fault(12)
def test_signals_that_mean_nothing_cost_neither_the_pool_nor_the_processor():
    with EchoTCP() as echo, FakeServer() as server, lone_client(server, echo.address) as tunnel:
        wait_until(lambda: len(server.idle) >= 8, 20, "the pool is filled")
        cpu_s, kib = tunnel.client.cpu_s(), tunnel.client.rss_kib()
        for _ in range(100):
            server.send(*itertools.islice(itertools.cycle(NONSENSE), 1000))
        assert answers(server.launch())
        assert tunnel.client.cpu_s() - cpu_s < 20, "0.2 ms a line"
        assert tunnel.client.rss_kib() - kib < 8192
        assert len(server.controls) == 1


@pytest.mark.fault(12)
def test_launches_of_ids_that_are_unknown_or_used_leave_the_others_alone():
    with EchoTCP() as echo, FakeServer() as server, lone_client(server, echo.address) as tunnel:
        wait_until(lambda: len(server.idle) >= 8, 20, "the pool is filled")
        id, data = server.idle.popitem()
        server.send(*[b"//%08x#1\n" % number for number in range(100)], *[b"//%b#1\n" % id] * 3)
        assert answers(data)
        assert all(answers(server.launch()) for _ in range(5))
        assert len(server.controls) == 1 and tunnel.client.returncode is None


@pytest.mark.fault(13)
@pytest.mark.parametrize("tls", [0, 1], ids="tls={}".format)
def test_every_line_of_both_sides_may_come_a_byte_at_a_time(target, tls):
    tunnel = Tunnel(target.address, tls)
    with Relay(tunnel.tunnel_port) as relay:
        relay.rule = sliced(1)
        tunnel.dialled = relay.port
        with tunnel:
            assert tunnel.served(5, size=500) == 5
            relay.rule = lambda _link, _direction, data: [data]
            with standing(tunnel):
                pass


@pytest.mark.fault(14)
def test_a_thousand_lines_in_one_segment_are_all_obeyed():
    pool = {"MIN_POOL_CAPACITY": "32", "MAX_POOL_CAPACITY": "32"}
    with EchoTCP() as echo, FakeServer() as server, lone_client(server, echo.address, **pool):
        wait_until(lambda: len(server.idle) >= 32, 20, "the pool is filled")
        launched = [server.idle.popitem() for _ in range(30)]
        lines = [b"\n"] * 400 + [b"//x#later\n"] * 400
        for number, (id, _) in enumerate(launched):
            lines.insert(number * 25, b"//%b#1\n" % id)
        server.send(*lines)
        assert all(answers(data) for _, data in launched)


@pytest.mark.fault(15)
def test_both_sides_notice_a_held_connection_and_the_client_comes_back(target):
    with relayed(target, tls=1) as (relay, tunnel), standing(tunnel):
        lines = len(tunnel.server.lines), len(tunnel.client.lines)
        held = list(relay.links)
        relay.hold(held)
        tunnel.client.wait_for_line(r"silent for", SLACK * DEAD_S, lines[1])
        tunnel.server.wait_for_line(r"silent for", SLACK * DEAD_S, lines[0])
        relay.cut(lambda link: link in held)
        tunnel.recovers(SLACK * 2)


@pytest.mark.fault(17, 38)
def test_users_of_a_frozen_client_are_reset_once_it_is_missed_and_served_when_it_thaws(tunnel):
    os.kill(tunnel.client.pid, signal.SIGSTOP)
    try:
        lines = len(tunnel.server.lines)
        with contextlib.ExitStack() as stack:
            early = [stack.enter_context(dial(tunnel.public_port, timeout=SLACK * 5)) for _ in range(3)]
            for user in early:
                user.sendall(b"anybody?")
            tunnel.server.wait_for_line("silent for", SLACK * DEAD_S, lines)
            assert {how_it_ends(user) for user in early} == {(b"", "reset")}
            began = time.monotonic()
            late = [stack.enter_context(dial(tunnel.public_port, timeout=SLACK * 5)) for _ in range(10)]
            assert {how_it_ends(user) for user in late} == {(b"", "reset")}
            assert time.monotonic() - began < SLACK * LIMITS["pool_wait_s"]
    finally:
        os.kill(tunnel.client.pid, signal.SIGCONT)
    tunnel.recovers(SLACK * 5)


@pytest.mark.fault(17)
def test_a_frozen_server_is_noticed_by_its_client_and_serves_again_when_it_thaws(tunnel1):
    lines = len(tunnel1.client.lines)
    os.kill(tunnel1.server.pid, signal.SIGSTOP)
    try:
        tunnel1.client.wait_for_line("silent", SLACK * DEAD_S, lines)
    finally:
        os.kill(tunnel1.server.pid, signal.SIGCONT)
    tunnel1.recovers(SLACK * 5)


@contextlib.contextmanager
def apart(tls=1, **options):
    """A tunnel, its target and its users in a network of their own."""
    with Namespace() as network, network.target() as target:
        with Tunnel(target.address, tls, prefix=network.prefix, connect=network.connect, **options) as tunnel:
            yield network, tunnel


@pytest.mark.fault(18)
def test_service_is_back_within_ten_seconds_of_a_network_that_was_down():
    with apart() as (network, tunnel), standing(tunnel):
        lines = [len(process.lines) for process in tunnel.processes]
        network.run("ip", "link", "set", "lo", "down")
        for process, start in zip(tunnel.processes, lines, strict=True):
            process.wait_for_line("silent for 3 s", SLACK * DEAD_S, start)
        network.run("ip", "link", "set", "lo", "up")
        tunnel.recovers(10)


@pytest.mark.fault(19)
@pytest.mark.parametrize("tls", [0, 1], ids="tls={}".format)
def test_exchanges_go_on_when_the_control_channel_is_reset(target, tls):
    with relayed(target, tls) as (relay, tunnel), standing(tunnel), Users(tunnel, 20) as users:
        for _ in range(3):
            lines = len(tunnel.client.lines)
            assert relay.cut(lambda link: link.control) == 1
            tunnel.client.wait_for_line("connected to", SLACK * 2, lines)
            tunnel.recovers(SLACK * 2)
            assert users.alive() == 20


@pytest.mark.fault(19, 36)
def test_every_connection_killed_by_the_kernel_is_replaced():
    with apart(tls=0) as (network, tunnel), standing(tunnel):
        for _ in range(3):
            network.run("ss", "-K", "dport", "=", f":{tunnel.tunnel_port}")
            tunnel.recovers(SLACK * 2)


@pytest.mark.fault(39)
def test_data_connections_that_the_network_forgets_in_silence_are_replaced_before_users_come():
    """No FIN and no RST: packets of theirs vanish, both ways; those of the control channel pass."""
    soon = {"keepalive_idle_s": 1, "keepalive_interval_s": 1, "tcp_user_timeout_s": 2}
    with apart(limits=soon) as (network, tunnel), standing(tunnel):
        control = tunnel.server.wait_for_line(r"client 127.0.0.1:(\d+) connected")[1]

        def pooled(side="dport", column=2):
            """Give the clients' ports of pooled connections, as the client's own ends have them, or the server's."""
            lines = network.sockets(side, "=", f":{tunnel.tunnel_port}")
            return {line.split()[column].rpartition(":")[2] for line in lines} - {control}

        def replaced():
            ends = pooled(), pooled("sport", 3)
            return all(not ports & forgotten and len(ports) >= 8 for ports in ends)

        network.run("ip", "rule", "add", "pref", "10", "lookup", "local")
        network.run("ip", "rule", "del", "pref", "0")
        forgotten = pooled()
        for port in forgotten:
            for end in ("sport", "dport"):
                network.run("ip", "rule", "add", "pref", "1", "ipproto", "tcp", end, port, "blackhole")
        wait_until(replaced, SLACK * 3, "all are others, at both ends")
        assert len(forgotten) >= 8
        assert not [line for line in tunnel.client.lines + tunnel.server.lines if "control channel lost" in line]


@pytest.mark.fault(33)
def test_an_id_may_come_in_pieces_but_not_in_part():
    def in_part(conn):
        conn.sendall(b"0123456")
        conn.close()

    def in_pieces(conn):
        id = b"0a1b2c%02x" % next(numbers)
        for byte in id:
            conn.sendall(bytes([byte]))
            time.sleep(0.001)
        server.idle[id] = conn

    numbers = itertools.count()
    with EchoTCP() as echo, FakeServer() as server:
        server.on_data = in_part
        with lone_client(server, echo.address) as tunnel:
            tunnel.client.wait_for_line("no data connection: the peer closed after 7 of 8 bytes")
            server.on_data = in_pieces
            wait_until(lambda: server.idle, 20, "an id was given in pieces")
            assert answers(server.launch())


@pytest.mark.fault(34)
def test_a_client_whose_data_connections_are_refused_rests_between_tries():
    with EchoTCP() as echo, FakeServer() as server:
        server.on_data = lambda conn: conn.close()
        with lone_client(server, echo.address) as tunnel:
            tunnel.client.wait_for_line("no data connection")
            cpu_s, calls = tunnel.client.cpu_s(), server.calls
            time.sleep(3)  # the span that is measured
            assert tunnel.client.cpu_s() - cpu_s < 0.3
            assert server.calls - calls < 8 * 10, "the pause between two dials doubles"
            server.on_data = server.give_id
            wait_until(lambda: server.idle, SLACK * 5, "the client has dialled again")
            assert answers(server.launch())


@pytest.mark.fault(34)
def test_a_client_whose_v1_data_port_is_closed_rests_between_tries():
    with dial_nothing() as port, FakeServer(first=b"//%d#0\n" % port) as server, lone_client(server) as tunnel:
        tunnel.client.wait_for_line("no data connection: .*refused")
        cpu_s = tunnel.client.cpu_s()
        time.sleep(3)  # the span that is measured
        assert tunnel.client.cpu_s() - cpu_s < 0.3


@contextlib.contextmanager
def dial_nothing():
    """Give a port that refuses."""
    with EchoTCP(refuse=True) as nobody:
        yield nobody.port


@pytest.mark.fault(35)
def test_of_two_data_connections_with_one_id_the_first_is_kept():
    with EchoTCP() as echo, FakeServer() as server:
        given = []

        def same(conn):
            given.append(conn)
            conn.sendall(b"0a1b2c3d")

        server.on_data = same
        with lone_client(server, echo.address):
            wait_until(lambda: len(given) >= 8, 20, "the client has dialled")
            wait_until(lambda: sum(map(is_open, list(given))) == 1, 10, "all but one are closed")
            kept = next(conn for conn in given if is_open(conn))
            server.send(b"//0a1b2c3d#1\n")
            assert answers(kept)


def is_open(conn):
    """Whether nothing has come on a connection, no end either."""
    return not select.select([conn], [], [], 0)[0]


@pytest.mark.fault(47)
def test_a_megabyte_in_slices_of_every_size_arrives_whole(target):
    with relayed(target, tls=1) as (relay, tunnel), standing(tunnel):
        for size in (1, 7, 1000):
            relay.rule = sliced(size)
            assert tunnel.served(2, size=min(size * 20_000, 1 << 20)) == 2
        relay.rule = delayed(0.01)
        assert tunnel.served(10) == 10
