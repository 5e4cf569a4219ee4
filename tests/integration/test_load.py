"""A server and a client process under many users, and what is left in them afterwards."""

import contextlib
import fcntl
import os
import select
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from .harness import ROOT, Process, Target, free_port, nodepass_client, nodepass_server, wait_until
from .load import FIXED_POOL, Crowd, ask, datagram_user, steady_fds, tunnel, visit, wait_for_fds
from .targets import EchoTCP, EchoUDP
from .users import comes_back, read_exactly, read_to_end

KIB_PER_THOUSAND = 1024  # growth that is still no leak
RECOVERY_S = 4.0  # both sides try again at once, and half a second goes into starting Python
SLACK = 3  # of a machine that is busy
ROUND_TRIP_S = 0.2  # of a long line
HALF = b"h" * 500_000  # more than what fits into the buffers on the way


@pytest.fixture
def target():
    with Target() as echo:
        yield echo


@pytest.mark.parametrize("tls", [0, 1], ids="tls={}".format)
def test_thousands_of_short_users_leave_nothing_behind(target, tls):
    with tunnel(target.address, tls, **FIXED_POOL) as both, datagram_user(both.public) as user:
        processes = (both.server, both.client)
        serve(both.public, user, connections=500, datagrams=200)
        fds = [steady_fds(process) for process in processes]

        for connections, datagrams in ((5000, 0), (0, 2000)):
            before = [process.rss_kib() for process in processes]
            serve(both.public, user, connections, datagrams)
            for process, count, kib in zip(processes, fds, before, strict=True):
                wait_for_fds(process, count)
                grown = process.rss_kib() - kib
                assert grown < KIB_PER_THOUSAND * (connections + datagrams) / 1000, f"{process.name}: {grown} KiB more"


def serve(public, user, connections, datagrams):
    for _ in range(connections):
        visit(public)
    for _ in range(datagrams):
        ask(user)


@pytest.mark.parametrize("tls", [0, 1], ids="tls={}".format)
def test_over_a_long_line_users_who_keep_coming_wait_for_no_more_than_their_round_trip(target, tls):
    tunnel_port, near, public = free_port(), free_port(), ("127.0.0.1", free_port())
    line = [sys.executable, str(ROOT / "scripts/benchmark/line.py"), str(near), str(tunnel_port)]

    def wait_of_one():
        began = time.monotonic()
        visit(public)
        return time.monotonic() - began

    with (
        nodepass_server(f"127.0.0.1:{tunnel_port}", "{}:{}".format(*public), query=f"tls={tls}"),
        Process([*line, str(ROUND_TRIP_S / 2 * 1000)], name="line"),
        nodepass_client(f"127.0.0.1:{near}", target.address, env={"MIN_POOL_CAPACITY": "2"}),
        ThreadPoolExecutor(64) as users,
    ):
        wait_until(lambda: comes_back(public), 30, "traffic passes")
        waits = []
        for _ in range(200):  # 50 a second: 20 to 30 come while a data connection is dialled
            waits.append(users.submit(wait_of_one))
            time.sleep(0.02)
        late = [wait.result() for wait in waits][100:]
    assert statistics.median(late) < 1.9 * ROUND_TRIP_S  # one more at least, where none is ready


def test_exchanges_that_were_busy_rest_on_little_memory(target):
    with tunnel(target.address, 1, **FIXED_POOL) as both, contextlib.ExitStack() as stack:
        users = [stack.enter_context(socket.create_connection(both.public, timeout=30)) for _ in range(100)]
        sending = stack.enter_context(ThreadPoolExecutor(1))

        def all_ask(question):
            for user in users:
                sending.submit(user.sendall, question)
                assert read_exactly(user, len(question)) == question

        all_ask(b"question")
        resting = {process: process.rss_kib() for process in (both.server, both.client)}
        all_ask(HALF)
        for process, kib in resting.items():
            assert (process.rss_kib() - kib) / len(users) < 96, "KiB more for each; four records both ways are 128"


@pytest.mark.parametrize("tls", [0, 1], ids="tls={}".format)
def test_three_hundred_users_at_once_are_served_from_a_small_pool(target, tls):
    everybody = threading.Barrier(300)

    def stay(number):
        word = b"user %d" % number
        with socket.create_connection(both.public, timeout=30) as user:
            user.sendall(word)
            answer = read_exactly(user, len(word), 30)
            everybody.wait(30)  # nobody leaves before all are served
            return answer == word

    with tunnel(target.address, tls, MIN_POOL_CAPACITY="4") as both, ThreadPoolExecutor(everybody.parties) as users:
        assert all(users.map(stay, range(everybody.parties)))


def test_an_idle_pair_rests(target):
    with tunnel(target.address) as both:
        processes = (both.server, both.client)
        for process in processes:
            steady_fds(process)
        before = sum(process.cpu_s() for process in processes)
        time.sleep(5)  # the span that is measured
        assert sum(process.cpu_s() for process in processes) - before < 0.05  # 1 % of a core


@pytest.mark.parametrize("victim", ["client", "server"])
def test_traffic_flows_again_each_time_one_side_is_killed(target, victim):
    with tunnel(target.address, tls=1, **FIXED_POOL) as both:
        counts = {side: steady_fds(getattr(both, side)) for side in ("server", "client")}
        with Crowd(both.public) as crowd:
            for _ in range(10):
                getattr(both, victim).kill()
                revive(both, crowd, [victim])
        for side, count in counts.items():
            wait_for_fds(getattr(both, side), count)


@pytest.mark.parametrize("order", [("server", "client"), ("client", "server")], ids="-then-".join)
def test_traffic_flows_again_after_both_were_killed(target, order):
    with tunnel(target.address, tls=1, **FIXED_POOL) as both, Crowd(both.public) as crowd:
        for side in order:
            getattr(both, side).kill()
        revive(both, crowd, order)


def revive(both, crowd, sides):
    """Start the sides that were killed, in this order, and wait until several users were served."""
    served = crowd.served
    for side in sides:
        getattr(both, f"start_{side}")()
    try:
        wait_until(lambda: crowd.served >= served + 10, SLACK * RECOVERY_S, "users are served again")
    except AssertionError as exc:
        raise AssertionError(f"{exc}\n{both.logs()}") from None


@contextlib.contextmanager
def transfers(tls, count, **env):
    """Bring `count` downloads half way; yields the pair, the users, and the event that lets the other half go."""
    gate = threading.Event()

    def in_halves(conn, seen):
        conn.sendall(HALF)
        gate.wait(30)
        conn.sendall(HALF)

    with contextlib.ExitStack() as stack:
        target = stack.enter_context(EchoTCP())
        both = stack.enter_context(tunnel(target.address, tls, **env))
        stack.callback(gate.set)
        target.behaviour = in_halves
        users = [stack.enter_context(socket.create_connection(both.public, timeout=20)) for _ in range(count)]
        for user in users:
            assert read_exactly(user, len(HALF)) == HALF
        yield both, users, gate


def end(process, sig):
    """Send a first signal; returns when the process has said so."""
    said = len(process.lines)
    os.kill(process.pid, sig)
    wait_until(lambda: len(process.lines) > said, 5, f"{process.name} says that it ends")


def exit_code(process, timeout):
    wait_until(lambda: process.returncode is not None, timeout, f"{process.name} ends\n{process.tail()}")
    return process.returncode


@pytest.mark.parametrize("tls", [0, 1], ids="tls={}".format)
@pytest.mark.parametrize("side", ["server", "client"])
def test_transfers_in_flight_end_whole_after_sigterm(side, tls):
    with transfers(tls, 20, SHUTDOWN_TIMEOUT="20s") as (both, users, gate):
        process = getattr(both, side)
        end(process, signal.SIGTERM)
        gate.set()
        for user in users:
            with user:
                assert read_to_end(user) == HALF, both.logs()
        assert exit_code(process, 5) == 0


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("side", ["server", "client"])
def test_a_second_signal_ends_at_once(side, second):
    with transfers(0, 1, SHUTDOWN_TIMEOUT="60s") as (both, _, _):
        process = getattr(both, side)
        end(process, signal.SIGTERM)
        os.kill(process.pid, second)
        assert exit_code(process, 2) == 128 + second


def test_a_log_that_nobody_reads_does_not_stall_the_traffic(target):
    tunnel_port, public = free_port(), ("127.0.0.1", free_port("both"))
    urls = [
        f"server://127.0.0.1:{tunnel_port}/127.0.0.1:{public[1]}?tls=0&log=debug",
        f"client://127.0.0.1:{tunnel_port}/{target.address}?log=debug",
    ]
    with contextlib.ExitStack() as stack:
        logs, processes = [], []
        for url in urls:
            log, process = start_unread(stack, url)
            logs.append(log)
            processes.append(process)
        wait_until(lambda: comes_back(public), 20, "traffic")
        deadline = time.monotonic() + 30
        while any(is_writable(log) for log in logs):
            assert time.monotonic() < deadline, "debug lines never filled a pipe of one page"
            visit(public)
        for _ in range(500):
            visit(public, timeout=2)
        for process in processes:
            process.terminate()
            assert process.wait(15) == 0


def start_unread(stack, url):
    """Run nodepass with a pipe as its stdout that holds one page; returns the pipe's writing end and the process."""
    unread, log = os.pipe()
    stack.callback(os.close, unread)
    stack.callback(os.close, log)
    fcntl.fcntl(log, fcntl.F_SETPIPE_SZ, 4096)
    command = [sys.executable, "-m", "nodepass_gevent", url]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, cwd=ROOT)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return log, process


def is_writable(pipe):
    return bool(select.select([], [pipe], [], 0)[1])


def test_empty_datagrams_free_their_slots(target):
    flood_and_recover(target.address, b"")


def test_a_refusing_udp_target_frees_its_slots(target):
    target.udp.stop()
    flood_and_recover(target.address, b"refused", lambda: restart(target))


def test_a_silent_udp_target_frees_its_slots(target):
    target.udp.behaviour = lambda _: []
    flood_and_recover(target.address, b"unanswered", lambda: answer(target))


def restart(target):
    target.udp = EchoUDP(port=target.tcp.port)


def answer(target):
    target.udp.behaviour = lambda datagram: [datagram]


def flood_and_recover(address, datagram, recover=lambda: None):
    """Send far more datagrams than there are slots: TCP goes on meanwhile, and UDP is answered after `recover()`."""
    quick = {"UDP_READ_TIMEOUT": "200ms", "NODEPASS_UDP_SESSION_TIMEOUT": "500ms"}
    with tunnel(address, SEMAPHORE_LIMIT="8", **quick, **FIXED_POOL) as both:
        processes = (both.server, both.client)
        fds = [steady_fds(process) for process in processes]
        with datagram_user(both.public, timeout=1.0) as user:
            for _ in range(30):
                for _ in range(10):
                    user.send(datagram)
                visit(both.public)
            recover()
            wait_until(lambda: is_answered(user), 10, "a datagram is answered again")
        for process, count in zip(processes, fds, strict=True):
            wait_for_fds(process, count)


def is_answered(user):
    """Ask once; late answers to earlier datagrams count as none."""
    with contextlib.suppress(OSError):
        user.send(b"asked")
        return user.recv(65536) == b"asked"
    return False
