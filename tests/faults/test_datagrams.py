"""Faults of datagrams: empty and oversized ones, floods, targets that are silent, gone or late."""

import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from integration.harness import wait_until
from integration.targets import EchoUDP, same

from .harness import SLACK, Probing, Tunnel, standing

PROFILES = pytest.mark.parametrize("profile", ["protocol=1", "protocol=2"], ids=["v1", "v2"])
ENV = {"UDP_READ_TIMEOUT": "500ms", "SEMAPHORE_LIMIT": "64"}
PATIENT = {"UDP_READ_TIMEOUT": "5s"}  # where an answer has to come, however busy the machine is


@pytest.fixture
def udp(target):
    """Make tunnels with short waits for answers, held to the standing figures."""
    with contextlib.ExitStack() as stack:

        def make(profile, tls=1, **env):
            tunnel = stack.enter_context(Tunnel(target.address, tls, profile, env=ENV | env))
            return stack.enter_context(standing(tunnel))

        yield make


@contextlib.contextmanager
def user_of(tunnel, source="127.0.0.1", timeout=1.0):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as user:
        user.bind((source, 0))
        user.settimeout(timeout)
        user.connect(tunnel.public)
        yield user


def answered(tunnel, word=b"question"):
    """Whether a datagram from a fresh address comes back."""
    with user_of(tunnel) as user, contextlib.suppress(OSError):
        user.send(word)
        return user.recv(65536) == word
    return False


def recovers(tunnel):
    wait_until(lambda: answered(tunnel), SLACK * 6, "datagrams are answered again")


@pytest.mark.fault(55)
@PROFILES
def test_two_thousand_empty_datagrams_stop_nobody(udp, profile):
    tunnel = udp(profile)
    with user_of(tunnel) as user, Probing(tunnel) as users:
        for number in range(2000):
            user.send(b"")
            if number % 100 == 0:
                time.sleep(0.01)  # so that they arrive
        recovers(tunnel)
    assert users.tried and users.served == users.tried


@pytest.mark.fault(66)
@PROFILES
def test_memory_that_runs_out_at_a_datagram_costs_that_one_alone(target, profile):
    where = "launching:Launcher.launch_at_once@6" if profile == "protocol=1" else "udp_relay:UDPRelay.send@7"
    raising = f"nodepass_gevent.datagrams:DatagramIngress._enter@5,nodepass_gevent.{where}"
    env = PATIENT | {"FAULT_ERROR": "MemoryError", "FAULT_RAISE": raising}
    with Tunnel(target.address, 0, profile, env=env) as tunnel, standing(tunnel):
        assert 17 <= sum(answered(tunnel) for _ in range(20)) < 20
        assert not any("control channel lost" in line for line in tunnel.client.lines)


@pytest.mark.fault(72)
def test_a_user_who_speaks_on_does_not_keep_a_server_that_has_failed_from_beginning_anew(target):
    env = {"FAULT_RAISE": "nodepass_gevent.reception:Reception.take_data@60"}
    with Tunnel(target.address, env=env) as tunnel, user_of(tunnel) as user, ThreadPoolExecutor() as threads:
        silent = threading.Event()

        def speak():
            while not silent.wait(0.05):
                with contextlib.suppress(OSError):
                    user.send(b"word")

        recovers(tunnel)
        user.send(b"word")
        assert user.recv(4) == b"word"
        threads.submit(speak)
        try:
            while not any("injected" in line for line in tunnel.server.lines):
                tunnel.served(10)
            tunnel.recovers(SLACK * 2)
            recovers(tunnel)
        finally:
            silent.set()


@pytest.mark.fault(56)
@PROFILES
def test_datagrams_of_every_size_come_back_whole_or_not_at_all(udp, profile):
    tunnel = udp(profile, **PATIENT)
    for size in (1, 511, 512, 1200, 1472, 8000, 8192, 8193, 65507):
        with user_of(tunnel, timeout=1.0 if size > 8192 else 10.0) as user:
            word = bytes([size % 251]) * size
            user.send(word)
            try:
                assert user.recv(65536) == word
            except TimeoutError:
                assert size > 8192, f"{size} bytes"


@pytest.mark.fault(57)
@PROFILES
def test_a_flood_from_a_thousand_addresses_leaves_tcp_users_served(udp, profile):
    tunnel = udp(profile)
    with Probing(tunnel) as users, contextlib.ExitStack() as stack:
        flood = [stack.enter_context(user_of(tunnel, f"127.0.{n // 250 + 1}.{n % 250 + 1}")) for n in range(1000)]
        for _ in range(10):
            for each in flood:
                with contextlib.suppress(OSError):
                    each.send(b"flood")
            time.sleep(0.05)
        wait_until(lambda: users.tried >= 20, 20, "users have come")
    assert users.served >= 0.99 * users.tried
    recovers(tunnel)


@pytest.mark.fault(58)
@PROFILES
def test_a_silent_target_holds_nothing_for_longer_than_its_timeout(udp, target, profile):
    tunnel = udp(profile)
    target.udp.behaviour = lambda _: []
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(100):
                stack.enter_context(user_of(tunnel)).send(b"anybody?")
        assert tunnel.served(10) == 10
    finally:
        target.udp.behaviour = same
    recovers(tunnel)


@pytest.mark.fault(59)
@PROFILES
def test_a_closed_target_port_ends_the_exchange_and_nothing_else(udp, target, profile):
    tunnel = udp(profile)
    target.udp.stop()
    try:
        for _ in range(20):
            with user_of(tunnel, timeout=0.02) as user, contextlib.suppress(OSError):
                user.send(b"anybody?")
                user.recv(100)
        assert tunnel.served(10) == 10
    finally:
        target.udp = EchoUDP(port=target.port)
    recovers(tunnel)


@pytest.mark.fault(60)
@PROFILES
def test_late_and_second_answers_reach_no_other_user(udp, target, profile):
    def twice_and_late(datagram):
        time.sleep(0.01)
        return [datagram, datagram]

    tunnel = udp(profile, SEMAPHORE_LIMIT="256", **PATIENT)
    target.udp.behaviour = twice_and_late
    try:
        for number in range(50):
            with user_of(tunnel, timeout=10.0) as user:
                word = b"mine %d" % number
                user.send(word)
                assert user.recv(100) == word
                user.settimeout(0.002)
                with contextlib.suppress(TimeoutError):
                    assert user.recv(100) == word
    finally:
        target.udp.behaviour = same
