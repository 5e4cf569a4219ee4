"""Real programs that expect a PROXY header are told who the user is, through a server and a client process."""

import contextlib
import ipaddress
import select
import socket

import pytest
from proxyprotocol.result import ProxyResultLocal
from proxyprotocol.v1 import ProxyProtocolV1
from proxyprotocol.v2 import ProxyProtocolV2

from . import programs
from .harness import Process, free_port, nodepass_client, nodepass_server, v1_server, wait_until
from .targets import EchoTCP, EchoUDP
from .users import WAIT_S, read_to_end

KEY = "correct horse battery staple"
KEYED = pytest.mark.parametrize("key", [None, KEY], ids=["no key", "key"])
MISSED = "does not tell users' addresses"
PROGRAMS = {"haproxy": programs.haproxy, "nginx": programs.nginx_behind_proxy}
REQUEST = b"GET / HTTP/1.0\r\nHost: told\r\n\r\n"


@contextlib.contextmanager
def tunnel(target, query, server=nodepass_server, key=None):
    """Run both sides; yields the public port, which takes users of both families, and the client."""
    tunnel_port, public, env = free_port(), free_port("both"), {}
    if key:
        env = {"TUNNEL_KEY": key, "NODEPASS_TLS": "1"}
    with contextlib.ExitStack() as stack:
        stack.enter_context(server(f"127.0.0.1:{tunnel_port}", f"[::]:{public}", env=env))
        client = stack.enter_context(
            nodepass_client(f"127.0.0.1:{tunnel_port}", f"127.0.0.1:{target}", query=query, env=env)
        )
        client.wait_for_line("connected to")
        yield public, client


def ask(address):
    """Fetch a page over HTTP; give what it says and the port it was asked from."""
    with socket.create_connection(address, 10) as user:
        user.sendall(REQUEST)
        answer = b""
        while piece := user.recv(4096):
            answer += piece
        if b" 200 OK\r\n" not in answer:
            raise ConnectionError(f"not an answer: {answer!r}")
        return answer.partition(b"\r\n\r\n")[2].decode().strip(), user.getsockname()[1]


def old(tunnel_address: str, public: str, env: dict) -> Process:
    return v1_server(tunnel_address, public.replace("[::]", "127.0.0.1"))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_target_is_told_the_address_of_users_of_both_families(program, version, tmp_path):
    with PROGRAMS[program](tmp_path) as port, tunnel(port, f"proxy-protocol={version}") as (public, _):
        for host in ("127.0.0.1", "::1"):
            for _ in range(3):
                told, asked_from = ask((host, public))
                assert told == f"{host} {asked_from} {port}"
    if program == "nginx":
        logged = (tmp_path / "nginx" / "access.log").read_text().splitlines()
        assert [line.split()[0] for line in logged] == ["127.0.0.1"] * 3 + ["::1"] * 3


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("program", PROGRAMS)
def test_with_a_v1_server_the_user_is_not_known_and_the_log_says_so_once(program, version, tmp_path):
    def served(address) -> bool:
        with contextlib.suppress(OSError):
            ask(address)
            return True
        return False

    with PROGRAMS[program](tmp_path) as port, tunnel(port, f"proxy-protocol={version}", old) as (public, client):
        wait_until(lambda: served(("127.0.0.1", public)), 10, "an answer")
        told, asked_from = ask(("127.0.0.1", public))
        assert str(asked_from) not in told.split()
        client.wait_for_line(MISSED)
        warnings = [line for line in client.lines if MISSED in line]
        assert len(warnings) == 1 and "WARN" in warnings[0]


@pytest.mark.parametrize(("version", "parser"), [(1, ProxyProtocolV1()), (2, ProxyProtocolV2())])
def test_with_a_tunnel_key_the_target_is_told_the_address_of_tcp_users(version, parser):
    with EchoTCP() as target, tunnel(target.port, f"proxy-protocol={version}", key=KEY) as (public, _):
        for host in ("127.0.0.1", "::1"):
            with socket.create_connection((host, public), WAIT_S) as user:
                user.sendall(b"question")
                user.shutdown(socket.SHUT_WR)
                header, word, rest = read_to_end(user).partition(b"question")
                assert word and not rest
                assert named(parser.unpack(header)) == [(host, user.getsockname()[1]), destination(host, target.port)]


def named(result):
    """Give the two addresses of a parsed header."""
    return [(str(ipaddress.ip_address(address)), port) for address, port in (result.source, result.dest)]


def destination(host, port):
    """Give a target at 127.0.0.1 as a header for a user of either family has it."""
    return ("127.0.0.1" if host == "127.0.0.1" else str(ipaddress.ip_address("::ffff:127.0.0.1"))), port


def split(datagram):
    """Cut a datagram into what a header of version 2 says, and what is behind it."""
    end = 16 + int.from_bytes(datagram[14:16], "big")
    return ProxyProtocolV2().unpack(datagram[:end]), datagram[end:]


@contextlib.contextmanager
def datagram_user(host, port):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as user:
        user.settimeout(WAIT_S)
        user.connect((host, port))
        yield user


@KEYED
def test_the_first_datagram_of_a_session_tells_a_udp_target_who_the_user_is_and_no_other_one_does(key):
    with (
        EchoUDP() as target,
        tunnel(target.port, "proxy-protocol=2", key=key) as (public, client),
        contextlib.ExitStack() as stack,
    ):
        hosts = ("127.0.0.1", "::1", "127.0.0.1")
        users = [(host, stack.enter_context(datagram_user(host, public))) for host in hosts]
        for host, user in users:
            user.send(b"first")
            result, rest = split(user.recv(100))
            assert rest == b"first" and result.protocol == socket.SOCK_DGRAM
            assert named(result) == [(host, user.getsockname()[1]), destination(host, target.port)]
        for word in (b"second", b"", b"third"):
            for _, user in users:
                user.send(word)
                assert user.recv(100) == word
        assert len({sender for _, sender in target.seen}) == len(users)  # one session each
        assert not [line for line in client.lines if MISSED in line]


def test_with_version_1_a_udp_target_is_sent_no_header():
    with (
        EchoUDP() as target,
        tunnel(target.port, "proxy-protocol=1") as (public, _),
        datagram_user("127.0.0.1", public) as user,
    ):
        user.send(b"first")
        assert user.recv(100) == b"first"


def test_with_a_v1_server_a_udp_target_is_told_that_the_user_is_not_known_and_the_log_says_so_once():
    with (
        EchoUDP() as target,
        tunnel(target.port, "proxy-protocol=2", old) as (public, client),
        datagram_user("127.0.0.1", public) as user,
    ):

        def answered():
            user.send(b"again")
            return select.select([user], [], [], 0.2)[0]

        wait_until(answered, 10, "an answer")
        for _ in range(3):
            user.send(b"question")
        answers = [split(user.recv(100)) for _ in range(4)]
        assert all(isinstance(result, ProxyResultLocal) for result, _ in answers)
        assert {rest for _, rest in answers} <= {b"again", b"question"}
        client.wait_for_line(MISSED)
        warnings = [line for line in client.lines if MISSED in line]
        assert len(warnings) == 1 and "WARN" in warnings[0]
