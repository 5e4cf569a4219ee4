"""How a process ends, told by its exit code; and what never ends it."""

import os
import signal
import socket
import sys

import pytest

from .harness import START_S, Process, Target, free_port, nodepass, nodepass_client, nodepass_server, wait_until
from .users import comes_back, read_exactly

QUICK = {"SERVICE_COOLDOWN": "50ms", "NODEPASS_LOG": "debug", "SHUTDOWN_TIMEOUT": "20s"}


def local(port):
    return f"127.0.0.1:{port}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_by_signal_is_0(number):
    with nodepass(f"server://{local(free_port())}/{local(free_port())}") as server:
        server.wait_for_line("listening: ")
        assert server.stop(number) == 0


def test_a_signal_that_ends_a_client_without_a_server_is_0():
    with nodepass_client(local(free_port()), local(9), env=QUICK) as client:
        client.wait_for_line("connection refused")
        assert client.stop() == 0


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ([], "usage: "),
        (["--unknown"], "nodepass: error: unknown option or argument '--unknown'"),
        (["server://:1/:2?tls=3"], "nodepass: error: tls: '3' is not one of"),
        (["--config", "/nonexistent"], "nodepass: error: config: cannot read the file"),
    ],
)
def test_wrong_use_and_wrong_settings_are_2(argv, text):
    with Process([sys.executable, "-m", "nodepass_gevent", *argv]) as process:
        wait_until(lambda: process.returncode is not None, START_S, "the end")
        assert process.stop() == 2
        assert process.lines[0].startswith(text)


def test_a_fault_of_ours_is_1():
    broken = "from nodepass_gevent import cli, process; process.Tunnels.apply = None; cli.main(['server://:1/:2'])"
    with Process([sys.executable, "-c", f"from gevent import monkey; monkey.patch_all(); {broken}"]) as process:
        wait_until(lambda: process.returncode is not None, START_S, "the end")
        assert process.stop() == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_is_128_and_its_number(number, code):
    tunnel, public = free_port(), free_port("both")
    with (
        Target() as target,
        nodepass_server(local(tunnel), local(public), env=QUICK) as server,
        nodepass_client(local(tunnel), target.address, env=QUICK),
    ):
        wait_until(lambda: comes_back(("127.0.0.1", public)), START_S, "traffic")
        with socket.create_connection(("127.0.0.1", public), 10) as user:
            user.sendall(b"hello")
            assert read_exactly(user, 5) == b"hello"
            os.kill(server.pid, signal.SIGTERM)
            server.wait_for_line("stopping: exchanges 1")
            assert server.returncode is None
            assert server.stop(number) == code


def test_a_port_that_is_taken_is_tried_until_it_is_free():
    public = free_port()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with nodepass_server(local(port), local(public), env=QUICK) as server:
            wait_until(lambda: tries(server, "address already in use") >= 5, START_S, "five tries")
            taken.close()
            server.wait_for_line(f"listening: tunnel {local(port)}, ")
            assert server.stop() == 0


def test_a_server_that_is_not_there_is_called_until_it_is():
    port = free_port()
    with nodepass_client(local(port), local(9), env=QUICK) as client:
        wait_until(lambda: tries(client, "connection refused") >= 5, START_S, "five tries")
        with nodepass_server(local(port), local(free_port())):
            client.wait_for_line("connected to ")
        assert client.stop() == 0


def tries(process, why):
    return sum(why in line and "trying again" in line for line in process.lines)
