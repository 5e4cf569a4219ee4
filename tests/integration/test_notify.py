"""A process under a service manager that is told of it: a socket of ours stands for systemd's."""

import os
import re
import signal
import socket

import pytest

from .harness import START_S, STOP_S, Target, free_port, nodepass_client, nodepass_server, wait_until
from .users import comes_back, read_exactly


class Manager:
    """The socket that NOTIFY_SOCKET names, and all that came there, field by field."""

    def __init__(self, path):
        self.fields = []
        self.env = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "200000", "SHUTDOWN_TIMEOUT": "20s"}
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.setblocking(False)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def has(self, pattern, start=0):
        """Take what has come, and say whether a field after the first ``start`` is as asked for."""
        try:
            while True:
                self.fields += self.socket.recv(4096).decode().split("\n")
        except BlockingIOError:
            return any(re.fullmatch(pattern, field) for field in self.fields[start:])

    def wait(self, pattern, start=0, timeout_s=START_S):
        wait_until(lambda: self.has(pattern, start), timeout_s, f"{pattern}, got {self.fields}")


@pytest.fixture
def manager(tmp_path):
    with Manager(tmp_path / "notify") as made:
        yield made


def test_a_server_is_ready_reloads_counts_and_stops_as_its_manager_is_told(manager):
    port, public = free_port(), free_port("both")
    with Target() as target, nodepass_server(f"127.0.0.1:{port}", f"127.0.0.1:{public}", env=manager.env) as server:
        manager.wait("READY=1")
        server.wait_for_line("listening: ", 5.0)  # it has been said before
        manager.wait("STATUS=1 tunnel, 0 peers connected, 0 exchanges")
        with nodepass_client(f"127.0.0.1:{port}", target.address):
            wait_until(lambda: comes_back(("127.0.0.1", public)), START_S, "traffic")
            with socket.create_connection(("127.0.0.1", public), 10) as user:
                user.sendall(b"hello")
                assert read_exactly(user, 5) == b"hello"
                manager.wait("STATUS=1 tunnel, 1 peer connected, 1 exchange")
                begun = len(manager.fields)
                os.kill(server.pid, signal.SIGHUP)
                manager.wait("READY=1", begun)
                assert [
                    field.partition("=")[0]
                    for field in manager.fields[begun:]
                    if "STATUS" not in field and "DOG" not in field
                ] == [
                    "RELOADING",
                    "MONOTONIC_USEC",
                    "READY",
                ]
                os.kill(server.pid, signal.SIGTERM)
                manager.wait("STOPPING=1")
                begun = len(manager.fields)
                manager.wait("WATCHDOG=1", begun)  # as long as it drains
                assert manager.has("EXTEND_TIMEOUT_USEC=27000000")
                user.shutdown(socket.SHUT_WR)
                assert read_exactly(user, 1) == b""
        assert server.stop(timeout=STOP_S) == 0


def test_a_client_without_a_server_and_a_server_without_its_port_have_begun(manager):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with nodepass_server(f"127.0.0.1:{port}", f"127.0.0.1:{free_port()}", env=manager.env):
            manager.wait("READY=1")
    begun = len(manager.fields)
    with nodepass_client(f"127.0.0.1:{free_port()}", "127.0.0.1:9", env=manager.env):
        manager.wait("READY=1", begun)
