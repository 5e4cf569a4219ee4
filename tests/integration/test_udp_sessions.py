"""UDP sessions through a server process and a client process: real programs, many users, ends, drains."""

import contextlib
import json
import select
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from . import programs
from .harness import PEERS, Process, Target, certificates, free_port, wait_until
from .load import FIXED_POOL, datagram_user, steady_fds, tunnel, wait_for_fds
from .targets import EchoUDP, same
from .users import WAIT_S, comes_back, ends_cleanly, payload

MIB = 1024 * 1024
RUN_S = 60
LARGEST = 65507
DRAIN_S = 30  # given to exchanges; an idle session must need nothing like it

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(params=[0, 1], ids="tls={}".format)
def tls(request):
    return request.param


@pytest.fixture
def echo():
    with Target() as target:
        yield target


@pytest.fixture(scope="module", params=[0, 1], ids="tls={}".format)
def running(request):
    """One pair of processes to an echo, for the tests that leave nothing behind in them."""
    with Target() as target, tunnel(target.address, request.param) as both:
        yield both, target


@pytest.fixture
def through(running):
    """The public address, and the target with its default behaviour and an empty record."""
    both, target = running
    target.udp.behaviour = same
    target.udp.forget()
    return both.public, target


def run(name, *arguments):
    command = [programs.require(name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_S, check=False)
    assert done.returncode == 0, f"{name}: {done.stderr or done.stdout}"
    return done.stdout


@pytest.mark.parametrize("direction", [[], ["--reverse"]], ids=["upload", "download"])
@pytest.mark.parametrize("size", [1200, 8000])
def test_iperf3_loses_next_to_nothing(tls, size, direction):
    with programs.iperf3_server() as port, tunnel(f"127.0.0.1:{port}", tls, ends_cleanly) as both:
        where = ["--client", "127.0.0.1", "--port", str(both.public_port)]
        how = ["--udp", "--length", str(size), "--bitrate", "5M", "--time", "2", "--json", *direction]
        report = json.loads(run("iperf3", *where, *how))
    assert "error" not in report
    result = report["end"]["sum"]
    assert result["packets"] > 0.8 * 2 * 5e6 / 8 / size
    assert result["lost_percent"] < 2  # the programs themselves lose some on a busy machine
    assert not report["end"]["streams"][0]["udp"]["out_of_order"]


def test_sixteen_mebibytes_come_over_http_3(tls):
    files, port = certificates(), free_port("udp")
    script = [sys.executable, str(PEERS / "http3.py")]
    with Process([*script, "serve", str(port), files.crt, files.key, str(16 * MIB)]) as server:
        served = server.wait_for_line("^[0-9a-f]{64}$")[0]
        with tunnel(f"127.0.0.1:{port}", tls, lambda public: True) as both:
            both.client.wait_for_line("connected to")
            with Process([*script, "fetch", str(both.public_port), files.ca]) as user:
                assert user.wait_for_line("^([0-9a-f]{64}) ([0-9]+)$", RUN_S).groups() == (served, str(16 * MIB))


def test_dns_answers_of_thousands_of_bytes_arrive(tls, tmp_path):
    texts = ["".join(chr(97 + (number + place) % 26) for place in range(250)) for number in range(13)]
    dnsmasq = programs.dnsmasq(tmp_path, {}, {"big.test": texts})
    with dnsmasq as port, tunnel(f"127.0.0.1:{port}", tls, ends_cleanly) as both:
        once = ["+tries=1", "+timeout=10", "+bufsize=4096", "+ignore", "+noall", "+answer", "+stats"]
        printed = run("dig", "@127.0.0.1", "-p", str(both.public_port), *once, "big.test", "TXT")
    assert sorted(line.split('"')[1] for line in printed.splitlines() if "TXT" in line) == sorted(texts)
    assert int(printed.partition("MSG SIZE  rcvd: ")[2].split()[0]) > 3000


def test_sixty_four_users_have_their_own_answers_in_order(through):
    public, target = through

    def use(number):
        """Keep two datagrams on the way: the system's buffers hold those of all users."""
        words = [b"%d of user %d" % (turn, number) + bytes(100) for turn in range(100)]
        with datagram_user(public, WAIT_S) as user:
            answers = []
            user.send(words[0])
            for word in words[1:]:
                user.send(word)
                answers.append(user.recv(65536))
            return [*answers, user.recv(65536)] == words

    with ThreadPoolExecutor(64) as users:
        assert all(users.map(use, range(64)))
    assert len({sender for _, sender in target.udp.seen}) == 64  # at the target each user has one socket


@pytest.mark.parametrize("size", [0, 1, 8193, LARGEST])
def test_a_datagram_of_any_size_is_echoed(through, size):
    public, target = through
    with datagram_user(public) as user:
        for seed in (1, 2):
            user.send(payload(size, seed))
            assert user.recv(65536) == payload(size, seed)
    assert [len(datagram) for datagram, _ in target.udp.seen] == [size] * 2


def test_each_datagram_may_have_several_answers_or_none(through):
    public, target = through
    target.udp.behaviour = lambda datagram: [datagram + b" %d" % number for number in range(int(datagram))]
    with datagram_user(public) as user:
        for count in (3, 0, 20):
            user.send(b"%d" % count)
        for count in (3, 20):
            for number in range(count):
                assert user.recv(100) == b"%d %d" % (count, number)


def test_a_target_that_restarts_is_asked_again_by_the_same_user(tls):
    target = EchoUDP()
    with tunnel(target.address, tls, lambda public: True) as both, datagram_user(both.public) as user:
        both.client.wait_for_line("connected to")
        user.send(b"before")
        assert user.recv(100) == b"before"
        target.stop()
        for _ in range(3):
            user.send(b"while it is away")

        def answered():
            user.send(b"after")
            return select.select([user], [], [], 0.1)[0] and user.recv(100) == b"after"

        with EchoUDP(port=target.port):
            wait_until(answered, WAIT_S, "an answer of the target that is back")


def test_idle_sessions_leave_nothing_behind(tls, echo):
    with (
        tunnel(echo.address, tls, NODEPASS_UDP_SESSION_TIMEOUT="5s", **FIXED_POOL) as both,
        contextlib.ExitStack() as stack,
    ):
        counts = [steady_fds(process) for process in (both.server, both.client)]
        users = [stack.enter_context(datagram_user(both.public)) for _ in range(50)]
        for number, user in enumerate(users):  # all at once: the first must not be idle before the last is there
            user.send(b"%d" % number)
        for number, user in enumerate(users):
            assert user.recv(100) == b"%d" % number
        wait_until(lambda: both.server.fds() >= counts[0] + 50, WAIT_S, "a data connection for each, and a full pool")
        for process, count in zip((both.server, both.client), counts, strict=True):
            wait_for_fds(process, count)
        users[0].send(b"again")
        assert users[0].recv(100) == b"again"


def stop(process):
    """Ask a process to end, at once; give how long that took."""
    began = time.monotonic()
    assert process.stop(signal.SIGTERM) == 0
    return time.monotonic() - began


@pytest.mark.parametrize("side", ["server", "client"])
def test_an_idle_session_does_not_hold_up_a_drain(echo, side):
    with tunnel(echo.address, 1, SHUTDOWN_TIMEOUT=f"{DRAIN_S}s") as both, datagram_user(both.public) as user:
        user.send(b"question")
        assert user.recv(100) == b"question"
        assert stop(getattr(both, side)) < 10


def test_a_session_in_which_something_moves_goes_on_while_the_server_drains(echo):
    with tunnel(echo.address, 1, SHUTDOWN_TIMEOUT="6s") as both, datagram_user(both.public) as user:
        user.send(b"before")
        assert user.recv(100) == b"before"
        with ThreadPoolExecutor(1) as stopping:
            stopped = stopping.submit(stop, both.server)
            both.server.wait_for_line("stopping")
            began, answered = time.monotonic(), 0
            while time.monotonic() < began + 1.5:  # longer than an idle session would stay
                user.send(b"%d" % answered)
                assert user.recv(100) == b"%d" % answered
                answered += 1
                time.sleep(0.01)
            assert stopped.result() < 10


def test_users_of_udp_and_tcp_share_the_port(through):
    public, _ = through
    with datagram_user(public) as user:
        for number in range(20):
            user.send(b"%d" % number)
            assert comes_back(public)
            assert user.recv(100) == b"%d" % number


def test_a_server_without_a_client_keeps_the_datagrams_of_a_session_for_it(echo):
    with tunnel(echo.address, 0) as both, datagram_user(both.public) as user:
        both.client.kill()
        for number in range(3):
            user.send(b"%d" % number)
        both.start_client()
        assert [user.recv(100) for _ in range(3)] == [b"0", b"1", b"2"]
