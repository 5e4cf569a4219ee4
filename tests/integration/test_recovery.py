"""Sessions of two of our processes that end, orderly or not: what is noticed, what goes on, who comes back."""

import contextlib
import os
import signal
import socket
import threading
import time

import pytest

from .harness import START_S, STOP_S, Pair, pair, wait_for_traffic, wait_until
from .targets import EchoTCP, reset_after
from .users import comes_back, ends_cleanly, read_exactly

INTERVALS_S = 3.0  # three intervals of REPORT_INTERVAL=1s
SLACK_S = 4.0  # of a machine that is busy
MODES = pytest.mark.parametrize("tls", [0, 1])


@contextlib.contextmanager
def running(tls, behaviour=None, **options):
    """Run a target, both sides and a user in the middle of an exchange; yields the pair, the target and the user."""
    with EchoTCP(**({"behaviour": behaviour} if behaviour else {})) as target:
        with pair("ours", "ours", tls, target.address, probe=comes_back, **options) as both:
            with socket.create_connection(both.public, 10) as user:
                assert echoes(user, b"hello")
                yield both, target, user


def echoes(user, word):
    user.sendall(word)
    return read_exactly(user, len(word)) == word


@contextlib.contextmanager
def stopped(process):
    """Keep a process from running, as a machine that hangs."""
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process.pid, signal.SIGCONT)


def ended(process):
    """Wait for the end of a process that was told to stop; give its exit code."""
    wait_until(lambda: process.returncode is not None, STOP_S, f"the end of {process.name}")
    return process.stop()


def warnings(*processes):
    """Give warnings but those of a client that came before its server."""
    lines = [line for process in processes for line in process.lines]
    return [line for line in lines if "  WARN  " in line and "connection refused" not in line]


def is_reset_within(user, timeout_s):
    """Whether a user who waits is reset, or cut off, in that time."""
    user.settimeout(timeout_s)
    try:
        return user.recv(1) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


def asks_and_is_reset(public):
    """Whether a user who asks is reset; that may be so before the connect is through, or the question sent."""
    try:
        with socket.create_connection(public, 10) as user:
            user.sendall(b"question")
            return is_reset_within(user, 10)
    except (ConnectionResetError, BrokenPipeError):
        return True


@MODES
@pytest.mark.parametrize("side", ["server", "client"])
def test_a_side_that_hangs_is_noticed_within_three_intervals_and_both_recover(tls, side):
    with running(tls) as (both, _, user):
        silent = both.server if side == "server" else both.client
        other = both.client if side == "server" else both.server
        said = len(other.lines)
        began = time.monotonic()
        with stopped(silent):
            other.wait_for_line("control channel lost: silent for 3 s", INTERVALS_S + SLACK_S, said)
            assert time.monotonic() - began < INTERVALS_S + SLACK_S
        wait_for_traffic(both, comes_back)
        assert echoes(user, b"what was in flight goes on")


def test_a_pause_of_less_than_three_intervals_ends_nothing():
    with running(0, env={"REPORT_INTERVAL": "2s"}) as (both, _, user):
        for silent in (both.server, both.client):
            with stopped(silent):
                time.sleep(2)  # with the interval before it, 4 s of the 6 s that the other side bears
            assert echoes(user, b"still here")
        assert not [line for line in both.server.lines + both.client.lines if "lost" in line]


@MODES
def test_a_client_that_stops_is_no_warning_and_its_exchange_ends_in_peace(tls):
    with running(tls, env={"SHUTDOWN_TIMEOUT": "20s"}) as (both, _, user):
        os.kill(both.client.pid, signal.SIGTERM)
        both.server.wait_for_line(r"  INFO  client 127\.0\.0\.1:\d+ left: it said bye", STOP_S)
        assert echoes(user, b"goes on")
        user.shutdown(socket.SHUT_WR)
        assert user.recv(1) == b""
        assert ended(both.client) == 0
        assert not warnings(both.client, both.server)


@MODES
def test_no_user_is_lost_while_one_client_follows_another(tls):
    """The old one drains while users come without pause; the new one takes over."""
    with running(tls, env={"SHUTDOWN_TIMEOUT": "20s"}) as (both, _, user):
        enough, failed, served = threading.Event(), [], []

        def use():
            while not enough.is_set():
                try:
                    with socket.create_connection(both.public, 20) as each:
                        (served if echoes(each, b"a user's question") else failed).append(1)
                except OSError as exc:
                    failed.append(exc)

        users = [threading.Thread(target=use) for _ in range(8)]
        for each in users:
            each.start()
        wait_until(lambda: len(served) > 100, START_S, "users at work")
        old = both.client
        os.kill(old.pid, signal.SIGTERM)
        both.server.wait_for_line("left: it said bye", STOP_S)
        both.start_client()
        before = len(served)
        wait_until(lambda: len(served) > before + 100, START_S, "users of the new client")
        enough.set()
        for each in users:
            each.join()
        user.close()
        assert ended(old) == 0
        assert not failed


@MODES
def test_a_server_that_stops_says_bye_and_its_client_calls_again_at_once(tls):
    with running(tls, env={"SHUTDOWN_TIMEOUT": "20s"}) as (both, _, user):
        said = len(both.client.lines)
        time.sleep(1)  # a shorter session says nothing about its server
        os.kill(both.server.pid, signal.SIGTERM)
        both.client.wait_for_line(r"  INFO  .*: the server said bye; trying again now", STOP_S, said)
        assert echoes(user, b"goes on")
        user.close()
        assert ended(both.server) == 0
        both.start_server()
        wait_for_traffic(both, comes_back)


@MODES
def test_a_user_whose_target_refuses_is_reset_at_once_and_the_reason_logged_at_the_server(tls):
    with EchoTCP(refuse=True) as target:
        both = Pair("ours", "ours", tls, target.address)
        try:
            both.start_server()
            both.start_client()
            both.client.wait_for_line("connected to")
            assert asks_and_is_reset(both.public)  # once the pool is filled
            began = time.monotonic()
            for _ in range(20):
                assert asks_and_is_reset(both.public)
            assert time.monotonic() - began < 2  # 100 ms for each: no deadline was waited out
            pattern = r"WARN  user 127\.0\.0\.1:\d+ reset: its client's target refuses, or its setting network does"
            both.server.wait_for_line(pattern)
        finally:
            both.stop()


def test_users_who_come_while_there_is_no_client_wait_and_are_then_reset():
    with running(0, env={"NODEPASS_POOL_WAIT": "6s"}) as (both, _, _user):
        both.client.kill()
        both.server.wait_for_line("control channel lost")
        with socket.create_connection(both.public, 10) as waiting:
            both.start_client()
            assert echoes(waiting, b"the next client serves me")
        said = len(both.server.lines)
        both.client.kill()
        both.server.wait_for_line("control channel lost", start=said)
        began = time.monotonic()
        with socket.create_connection(both.public, 10) as hopeless:
            assert is_reset_within(hopeless, 6 * 3)
        assert time.monotonic() - began > 5


@MODES
def test_a_target_that_resets_resets_the_user_and_is_not_called_twice_once_bytes_have_moved(tls):
    with running(tls) as (both, target, _):
        target.forget()
        target.behaviour = reset_after(8)
        with socket.create_connection(both.public, 10) as user:
            user.sendall(b"question")
            assert is_reset_within(user, 10)
        assert len(target.seen) == 1


def test_a_client_killed_in_the_middle_is_replaced_and_users_in_flight_are_reset():
    with running(0) as (both, _, user):
        both.client.kill()
        assert is_reset_within(user, 10)
        both.start_client()
        wait_for_traffic(both, ends_cleanly)
