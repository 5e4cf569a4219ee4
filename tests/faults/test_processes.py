"""Faults of processes: killed, started in any order, stopped, in want of ports, descriptors, memory or disk."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from integration.harness import ROOT, Process, wait_until
from integration.load import Crowd

from .harness import FORBIDDEN, SLACK, Namespace, Tunnel, Users, injected, need, standing
from .peers import dial, how_it_ends

RECOVERY_S = 4.0  # both sides try again at once, and half a second goes into starting Python


@pytest.mark.fault(20, 21)
@pytest.mark.parametrize("side", ["server", "client"])
def test_a_side_that_is_killed_under_load_again_and_again_is_missed_by_nobody_for_long(target, side):
    with Tunnel(target.address, tls=1) as tunnel, standing(tunnel), Crowd(tunnel.public) as crowd:
        for _ in range(5):
            served = crowd.served
            getattr(tunnel, side).kill()
            getattr(tunnel, f"start_{side}")()
            wait_until(lambda before=served: crowd.served > before + 5, SLACK * RECOVERY_S, "users are served again")


@pytest.mark.fault(21)
def test_users_of_a_client_that_is_gone_are_reset_within_the_wait_for_a_pool(target):
    with Tunnel(target.address) as tunnel:
        tunnel.client.kill()
        with dial(tunnel.public_port, timeout=20) as user:
            began = time.monotonic()
            assert how_it_ends(user) == (b"", "reset")
            assert time.monotonic() - began < SLACK * 3


@pytest.mark.fault(22)
@pytest.mark.parametrize("first", ["server", "client"])
def test_the_sides_may_start_in_either_order(target, first):
    for _ in range(3):
        tunnel = Tunnel(target.address)
        try:
            getattr(tunnel, f"start_{first}")()
            getattr(tunnel, first).wait_for_line("listening|trying again")
            getattr(tunnel, "start_client" if first == "server" else "start_server")()
            tunnel.recovers(SLACK * 2)
        finally:
            tunnel.stop()


@pytest.mark.fault(23)
@pytest.mark.parametrize("side", ["server", "client"])
def test_of_two_hundred_exchanges_those_that_end_in_time_are_whole_when_a_side_is_stopped(target, side):
    env = {"SHUTDOWN_TIMEOUT": "1s", "MAX_POOL_CAPACITY": "1024"}
    with Tunnel(target.address, tls=1, env=env) as tunnel, Users(tunnel, 200) as users:
        process = getattr(tunnel, side)
        os.kill(process.pid, signal.SIGTERM)
        process.wait_for_line("stopping: exchanges 200")
        for user in users.socks[:150]:
            user.sendall(b"the end")
            user.shutdown(1)
        assert [how_it_ends(user) for user in users.socks[:150]] == [(b"the end", "end")] * 150
        assert {how_it_ends(user) for user in users.socks[150:]} == {(b"", "reset")}
        process.wait_for_line("exchanges cut: 50")
        wait_until(lambda: process.returncode is not None, 10, "it has ended")
        assert process.returncode == 0


@pytest.mark.fault(24)
@pytest.mark.parametrize("side", ["server", "client"])
def test_a_second_signal_ends_at_once(target, side):
    with Tunnel(target.address, env={"SHUTDOWN_TIMEOUT": "60s"}) as tunnel, Users(tunnel, 1):
        process = getattr(tunnel, side)
        os.kill(process.pid, signal.SIGTERM)
        process.wait_for_line("stopping")
        began = time.monotonic()
        assert process.stop(signal.SIGTERM) == 128 + signal.SIGTERM
        assert time.monotonic() - began < SLACK * 1


@pytest.mark.fault(24)
def test_an_interrupt_in_the_middle_of_handshakes_ends_with_0():
    tunnel = Tunnel("127.0.0.1:1", tls=1, env={"SHUTDOWN_TIMEOUT": "100ms"})
    with contextlib.ExitStack() as stack:
        stack.callback(tunnel.stop)
        tunnel.start_server()
        tunnel.server.wait_for_line("listening")
        for _ in range(20):
            stack.enter_context(dial(tunnel.tunnel_port)).sendall(b"//?v=2#hello\n")
        began = time.monotonic()
        assert tunnel.server.stop(signal.SIGINT) == 0
        assert time.monotonic() - began < SLACK * 1
        assert not [line for line in tunnel.server.lines if FORBIDDEN.search(line)]


@pytest.mark.fault(25)
@pytest.mark.parametrize("port", ["tunnel_port", "public_port"])
def test_a_port_that_is_taken_is_named_and_used_once_it_is_free(target, port):
    tunnel = Tunnel(target.address)
    with contextlib.ExitStack() as stack:
        stack.callback(tunnel.stop)
        with socket.create_server(("127.0.0.1", getattr(tunnel, port))):
            tunnel.start_server()
            tunnel.server.wait_for_line(rf"address already in use: 127.0.0.1:{getattr(tunnel, port)}")
        tunnel.start_client()
        tunnel.recovers(SLACK * RECOVERY_S)


@pytest.mark.fault(26)
def test_a_data_port_that_is_taken_costs_one_more_draw():
    """All ports are taken but a few: the draw goes on until one is free."""
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(Namespace())
        stack.enter_context(most_data_ports_taken(network))
        tunnel = Tunnel("127.0.0.1:1", prefix=network.prefix)
        stack.callback(tunnel.stop)
        tunnel.start_server()
        tunnel.server.wait_for_line(r"listening: .*data port \d+")


@contextlib.contextmanager
def most_data_ports_taken(network):
    """Take nine of ten ports that a server draws from."""
    code = (
        "import socket, time, resource\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (10000, max(10000, resource.getrlimit(7)[1])))\n"
        "taken = [socket.create_server(('127.0.0.1', port)) for port in range(1024, 8192) if port % 10]\n"
        "print('taken', flush=True)\n"
        "time.sleep(100)\n"
    )
    with Process([*network.prefix, sys.executable, "-c", code], name="taker") as taker:
        taker.wait_for_line("taken")
        yield


@pytest.mark.fault(62)
def test_a_server_out_of_descriptors_rests_and_serves_again_when_users_leave(target):
    need("prlimit")
    with Tunnel(target.address, server_prefix=("prlimit", "--nofile=64:64"), query="log=info") as tunnel:
        with standing(tunnel), contextlib.ExitStack() as stack:
            for _ in range(200):
                user = stack.enter_context(dial(tunnel.public_port))
                with contextlib.suppress(OSError):
                    user.sendall(b"x")
            time.sleep(0.5)
            cpu_s = tunnel.server.cpu_s()
            time.sleep(2)  # the span that is measured
            assert tunnel.server.cpu_s() - cpu_s < 0.3
            stack.close()
            tunnel.recovers(10)


ACCEPT_FAULTS = ("EMFILE", "ENFILE", "ENOBUFS", "ENOMEM", "ECONNABORTED", "EINTR", "EPROTO", "EPERM")


@pytest.mark.fault(63, 64)
def test_accepting_goes_on_whatever_the_kernel_says(tunnel0):
    for fault in ACCEPT_FAULTS:
        with injected(tunnel0.server, "accept4", f"error={fault}:when=1..4"):
            assert tunnel0.served(5) == 5, fault


@pytest.mark.fault(63)
@pytest.mark.parametrize("side", ["server", "client"])
def test_a_process_survives_when_the_kernel_gives_it_no_sockets_and_no_watchers(target, side):
    with Tunnel(target.address, tls=1) as tunnel, standing(tunnel):
        process = getattr(tunnel, side)
        for syscalls, fault in (
            ("socket", "ENOBUFS"),
            ("connect", "ENOBUFS"),
            ("sendto", "ENOBUFS"),
            ("recvfrom", "EIO"),
        ):
            with injected(process, syscalls, f"error={fault}:when=1..5"):
                for _ in range(10):
                    tunnel.served(1)
            tunnel.recovers(10)


@pytest.mark.fault(65)
def test_a_client_without_a_free_port_of_its_own_comes_back_when_there_is_one():
    with Namespace() as network, network.target() as target:
        with Tunnel(target.address, prefix=network.prefix, connect=network.connect) as tunnel, standing(tunnel):
            usual = network.run("cat", "/proc/sys/net/ipv4/ip_local_port_range").split()
            network.run("sh", "-c", "echo 40000 40003 > /proc/sys/net/ipv4/ip_local_port_range")
            with contextlib.ExitStack() as stack:
                for _ in range(20):
                    with contextlib.suppress(OSError):
                        stack.enter_context(network.connect(tunnel.public, timeout=1))
                time.sleep(1)  # the fault
            network.run("sh", "-c", f"echo {' '.join(usual)} > /proc/sys/net/ipv4/ip_local_port_range")
            tunnel.recovers(10)


@pytest.mark.fault(67)
@pytest.mark.parametrize("log", ["/dev/full", "closed pipe"])
def test_a_log_that_takes_nothing_stops_nobody(target, log):
    tunnel = Tunnel(target.address)
    with contextlib.ExitStack() as stack:
        stack.callback(tunnel.stop)
        out = os.open(log, os.O_WRONLY) if log == "/dev/full" else closed_pipe()
        url = f"server://127.0.0.1:{tunnel.tunnel_port}/127.0.0.1:{tunnel.public_port}?log=debug"
        server = subprocess.Popen([sys.executable, "-m", "nodepass_gevent", url], stdout=out, cwd=ROOT)
        os.close(out)
        stack.callback(server.wait)
        stack.callback(server.kill)
        tunnel.start_client()
        tunnel.server = tunnel.client
        tunnel.recovers(SLACK * RECOVERY_S)
        assert tunnel.served(100) == 100
        server.terminate()
        assert server.wait(15) == 0


def closed_pipe():
    """Give the writing end of a pipe that nobody reads."""
    unread, written = os.pipe()
    os.close(unread)
    return written


@pytest.mark.fault(75)
@pytest.mark.parametrize("side", ["server", "client"])
def test_an_event_loop_that_is_blocked_for_two_seconds_loses_nobody(target, side):
    env = {"FAULT_BLOCK_S": "2", "REPORT_INTERVAL": "2s"}  # 4 s of silence at most, and 6 s are borne
    with Tunnel(target.address, tls=1, env=env) as tunnel, standing(tunnel), Users(tunnel, 10) as users:
        lines = len(tunnel.server.lines), len(tunnel.client.lines)
        os.kill(getattr(tunnel, side).pid, signal.SIGUSR2)
        assert users.alive() == 10
        assert tunnel.served(10) == 10
        assert not [
            line for line in tunnel.server.lines[lines[0] :] + tunnel.client.lines[lines[1] :] if "lost" in line
        ]


@pytest.mark.fault(83)
@pytest.mark.parametrize("step_s", [3600, -3600])
def test_a_wall_clock_that_steps_an_hour_ends_nothing(target, step_s):
    with Tunnel(target.address, tls=1, env={"FAULT_CLOCK_STEP_S": str(step_s)}) as tunnel, standing(tunnel):
        with Users(tunnel, 10) as users:
            lines = len(tunnel.server.lines), len(tunnel.client.lines)
            for process in tunnel.processes:
                os.kill(process.pid, signal.SIGUSR2)
            time.sleep(1.5)  # a ping and its answer
            assert users.alive() == 10
            assert tunnel.served(10) == 10
            later = tunnel.server.lines[lines[0] :] + tunnel.client.lines[lines[1] :]
            assert not [line for line in later if "lost" in line]


@pytest.mark.fault(83)
def test_no_timer_reads_the_wall_clock():
    reads = re.compile(r"\btime\.time\(|datetime\.now\(")
    found = {path.stem for path in (ROOT / "nodepass_gevent").glob("*.py") if reads.search(path.read_text())}
    assert found <= {"state", "tls_context", "certificates", "check"}, (
        "what is shown, and how long certificates are valid"
    )
