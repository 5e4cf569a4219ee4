"""Real programs that expect a PROXY header are told who the user is, through a server and a client process."""

import contextlib
import socket

import pytest

from . import programs
from .harness import Process, free_port, nodepass_client, nodepass_server, v1_server, wait_until

PROGRAMS = {"haproxy": programs.haproxy, "nginx": programs.nginx_behind_proxy}
REQUEST = b"GET / HTTP/1.0\r\nHost: told\r\n\r\n"


@contextlib.contextmanager
def tunnel(target, query, server=nodepass_server):
    """Run both sides; yields the public port, which takes users of both families, and the client."""
    tunnel_port, public = free_port(), free_port()
    with contextlib.ExitStack() as stack:
        stack.enter_context(server(f"127.0.0.1:{tunnel_port}", f"[::]:{public}"))
        client = stack.enter_context(nodepass_client(f"127.0.0.1:{tunnel_port}", f"127.0.0.1:{target}", query=query))
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

    def server(tunnel_address: str, public: str) -> Process:
        return v1_server(tunnel_address, public.replace("[::]", "127.0.0.1"))

    with PROGRAMS[program](tmp_path) as port, tunnel(port, f"proxy-protocol={version}", server) as (public, client):
        wait_until(lambda: served(("127.0.0.1", public)), 10, "an answer")
        told, asked_from = ask(("127.0.0.1", public))
        assert str(asked_from) not in told.split()
        warnings = [line for line in client.lines if "does not tell users' addresses" in line]
        assert len(warnings) == 1 and "WARN" in warnings[0]
