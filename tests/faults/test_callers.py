"""Faults of callers: of the tunnel port, and of the data port of v1 clients."""

import contextlib
import os
import re
import secrets
import time

import pytest
from integration.harness import wait_until

from .harness import LIMITS, SLACK, Probing, Tunnel, complaints, standing
from .peers import RawClient, dial, how_it_ends, read_exactly, read_line

HELLO_CUT = b"\x16\x03\x01\x01\x00\x01\x00\x00\xfc\x03\x03" + bytes(20)  # a ClientHello that stalls


@contextlib.contextmanager
def crowd():
    """Open sockets with ``add``; all are closed with the block."""
    with contextlib.ExitStack() as stack:

        def add(port, source="127.0.0.2", said=b""):
            sock = stack.enter_context(dial(port, source))
            with contextlib.suppress(OSError):
                sock.sendall(said)
            return sock

        yield add


@contextlib.contextmanager
def lone_server(tls=0):
    """A server whose only client is yet to come, spoken by hand."""
    tunnel = Tunnel("127.0.0.1:1", tls)
    try:
        tunnel.start_server()
        tunnel.server.wait_for_line("listening: ")
        yield tunnel
        assert not complaints(tunnel.server)
    finally:
        tunnel.stop()


def v1_data_port(tunnel):
    return int(tunnel.server.wait_for_line(r"data port (\d+)")[1])


@pytest.mark.fault(1)
def test_a_silent_caller_who_came_first_delays_the_client_by_nothing_and_is_closed():
    with lone_server() as tunnel, dial(tunnel.tunnel_port) as silent:
        assert read_line(silent).endswith(b"#0\n")
        began = time.monotonic()
        with RawClient(tunnel.tunnel_port) as client:
            assert client.welcome.endswith(b"#welcome\n")
            assert time.monotonic() - began < 1
            assert how_it_ends(silent)[0] == b""
            assert time.monotonic() - began < SLACK * LIMITS["caller_timeout_s"]


@pytest.mark.fault(2)
def test_five_hundred_callers_who_connect_and_close_cost_users_nothing(tunnel):
    with Probing(tunnel) as users:
        for number in range(500):
            dial(tunnel.tunnel_port, "127.0.0.2" if number % 2 else "127.0.0.1").close()
        wait_until(lambda: users.tried >= 100, 30, "a hundred users have come")
    assert users.served == users.tried


@pytest.mark.fault(3)
def test_of_five_hundred_idle_callers_at_most_sixty_four_are_held(tunnel):
    before = tunnel.server.fds()
    with crowd() as add:
        for _ in range(500):
            add(tunnel.tunnel_port)
        wait_until(lambda: tunnel.server.fds() <= before + 64 + 2, 5, "all but 64 are closed")
        assert tunnel.served(20) == 20


@pytest.mark.fault(3)
def test_the_client_gets_in_while_five_hundred_callers_are_idle():
    with lone_server() as tunnel, crowd() as add:
        for _ in range(500):
            add(tunnel.tunnel_port)
        began = time.monotonic()
        with RawClient(tunnel.tunnel_port) as client:
            assert client.welcome.endswith(b"#welcome\n")
            assert time.monotonic() - began < 1


SPEECHES = {
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "tls": HELLO_CUT,
    "ssh": b"SSH-2.0-OpenSSH_9.2\r\n",
    "noise": None,
    "a line without end": b"//" + b"a" * 5000,
    "escapes": b"//\x1b[31m\x00\r\n//#hello\n",
}


@pytest.mark.fault(4)
@pytest.mark.parametrize("speech", SPEECHES)
def test_a_caller_who_speaks_something_else_is_closed_with_one_line_in_the_log(tunnel0, speech):
    said = SPEECHES[speech] or b"\x01" + secrets.token_bytes(1 << 20)
    lines = len(tunnel0.server.lines)
    with crowd() as add:
        stranger = add(tunnel0.tunnel_port, said=said)
        how_it_ends(stranger)
    tunnel0.server.wait_for_line("refused caller 127.0.0.2", 5, lines)
    assert len([line for line in tunnel0.server.lines[lines:] if "127.0.0.2" in line]) == 1


@pytest.mark.fault(9)
def test_a_hello_that_comes_a_byte_at_a_time_is_closed_at_its_deadline(tunnel0):
    with crowd() as add:
        began = time.monotonic()  # before the server's clock does
        slow = add(tunnel0.tunnel_port)
        read_line(slow)
        with contextlib.suppress(OSError):
            for byte in b"//a-name-that-takes-its-time?v=2&c=need#hello\n" * 10:
                slow.sendall(bytes([byte]))
                time.sleep(0.1)
        taken_s = time.monotonic() - began
    assert LIMITS["opening_timeout_s"] * 0.9 < taken_s < SLACK * LIMITS["opening_timeout_s"]


@pytest.mark.fault(13)
@pytest.mark.parametrize("tls", [0, 1], ids="tls={}".format)
def test_the_lines_of_a_caller_may_be_cut_at_every_byte(tls):
    def by_bytes(sock, line):
        for at in range(len(line)):
            sock.sendall(line[at : at + 1])

    with lone_server(tls) as tunnel:
        with RawClient(tunnel.tunnel_port, tls) as client:
            data = dial(tunnel.tunnel_port)
            by_bytes(data, b"//%b?v=2#data\n" % client.session)
            read_line(data)
            if not tls:
                assert re.fullmatch(b"[0-9a-f]{8}", read_exactly(data, 8))
            data.close()
        late = dial(tunnel.tunnel_port)
        read_line(late)
        by_bytes(late, b"//?v=2&c=need&later=1#hello\n")
        if not tls:
            assert read_line(late).endswith(b"#welcome\n")
        late.close()


@pytest.mark.fault(27)
@pytest.mark.parametrize("source", ["127.0.0.1", "127.0.0.2"])
def test_two_hundred_silent_connections_to_the_data_port_do_not_stop_a_v1_pool(tunnels, source):
    with standing(tunnels(1, "protocol=1")) as tunnel, crowd() as add:
        for _ in range(200):
            add(v1_data_port(tunnel), source)
        began = time.monotonic()
        assert tunnel.served(50) == 50
        assert time.monotonic() - began < SLACK * 1.0


@pytest.mark.fault(28)
@pytest.mark.parametrize("query", ["", "protocol=1"], ids=["v2", "v1"])
def test_a_tls_handshake_that_stalls_ends_at_its_deadline_and_stops_nobody(tunnels, query):
    with standing(tunnels(1, query)) as tunnel, crowd() as add:
        port = v1_data_port(tunnel) if query else tunnel.tunnel_port
        said = HELLO_CUT if query else b"//?v=2#hello\n" + HELLO_CUT
        began = time.monotonic()
        stalled = [add(port, "127.0.0.1", said) for _ in range(50)]
        assert tunnel.served(20) == 20
        for each in stalled:
            how_it_ends(each)
        assert time.monotonic() - began < SLACK * LIMITS["tls_handshake_timeout_s"]


BAD_TLS = {
    "TLS 1.0": bytes.fromhex("16030100310100002d0301") + bytes(32) + b"\0\0\x04\0\x2f\0\x35\x01\0\0\0",
    "SSLv2": b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10" + bytes(37),
    "HTTP": b"GET / HTTP/1.0\r\n\r\n",
    "a record of 65,535 bytes": b"\x16\x03\x01\xff\xff" + bytes(70000),
    "fragments": b"".join(b"\x16\x03\x01\x00\x01" + bytes([byte]) for byte in HELLO_CUT[5:]),
    "an alert": b"\x15\x03\x01\x00\x02\x02\x28",
    "application data": b"\x17\x03\x03\x00\x10" + bytes(16),
}


@pytest.mark.fault(31)
@pytest.mark.parametrize("query", ["", "protocol=1"], ids=["v2", "v1"])
def test_what_is_no_tls_1_3_handshake_ends_that_connection_alone(tunnels, query):
    with standing(tunnels(1, query)) as tunnel, crowd() as add, Probing(tunnel) as users:
        for said in BAD_TLS.values():
            port, opening = (v1_data_port(tunnel), b"") if query else (tunnel.tunnel_port, b"//?v=2#hello\n")
            how_it_ends(add(port, "127.0.0.1", opening + said))
    assert users.tried and users.served == users.tried


@pytest.mark.fault(32)
@pytest.mark.parametrize("tls", [0, 1], ids="tls={}".format)
def test_data_connections_that_vanish_before_their_id_is_written_are_given_to_nobody(tls):
    with lone_server(tls) as tunnel, RawClient(tunnel.tunnel_port, tls) as client:
        opening = b"//%b?v=2#data\n" % client.session
        for number in range(50):
            data = dial(tunnel.tunnel_port)
            data.sendall(opening + (HELLO_CUT if tls and number % 2 else b""))
            data.close()
        client.join()
        with dial(tunnel.public_port) as user:
            user.sendall(b"question")
            with client.launched() as data:
                assert read_exactly(data, 8) == b"question"


@pytest.mark.fault(78)
def test_what_callers_say_is_escaped_and_cut_in_the_log(tunnel0):
    dirt = b"\x1b[2J\n2026-01-01 00:00:00.000  ERROR  forged\r\0" + os.urandom(64) + b"x" * 100_000
    lines = len(tunnel0.server.lines)
    with crowd() as add:
        for said in (dirt, b"//" + dirt, b"//%0A%1B[2J?v=2#hello\n", b"//?v=2&c=%0A%1B#later\n", b"//%1B?v=3#hello\n"):
            how_it_ends(add(tunnel0.tunnel_port, "127.0.0.3", said))
    tunnel0.server.wait_for_line("refused caller 127.0.0.3", 5, lines)
    assert all(line.isprintable() for line in tunnel0.server.lines)


@pytest.mark.fault(29)
@pytest.mark.parametrize("tls", [0, 1], ids="tls={}".format)
def test_a_data_connection_of_the_right_session_from_another_address_is_not_pooled(tls):
    with lone_server(tls) as tunnel, RawClient(tunnel.tunnel_port, tls) as client, crowd() as add:
        thief = add(tunnel.tunnel_port, said=b"//%b?v=2#data\n" % client.session)
        read_line(thief)
        assert how_it_ends(thief)[0] == b""
        client.join()
        with dial(tunnel.public_port) as user:
            user.sendall(b"question")
            with client.launched() as data:
                assert read_exactly(data, 8) == b"question"
