"""Faults in the middle of an exchange: half-closes, resets, cuts, ends that are slow, hostile or not there."""

import contextlib
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from integration.harness import wait_until
from integration.targets import EchoTCP, answer_after_end, echo, half_close_first, reset
from integration.users import payload, read_to_end, talk

from .chaos import Relay, flipped
from .harness import LIMITS, SLACK, Namespace, Probing, Tunnel, Users, standing
from .peers import dial, how_it_ends

LATE = payload(300_000)


@contextlib.contextmanager
def behaving(target, behaviour):
    """Let the target of the shared tunnels behave otherwise for a while."""
    target.tcp.behaviour = behaviour
    try:
        yield
    finally:
        target.tcp.behaviour = echo


@pytest.mark.fault(40)
def test_late_bytes_arrive_after_the_user_half_closed(tunnel, target):
    with behaving(target, answer_after_end(LATE)):
        assert talk(tunnel.public, b"question") == LATE


@pytest.mark.fault(41)
def test_the_users_late_bytes_arrive_after_the_target_half_closed(tunnel, target):
    with behaving(target, half_close_first(b"greeting")), dial(tunnel.public_port, timeout=20) as user:
        target.tcp.forget()
        assert read_to_end(user) == b"greeting"
        user.sendall(LATE)
        user.shutdown(socket.SHUT_WR)
        wait_until(lambda: target.tcp.seen[0].how == "end", 10, "the target has read to the end")
        assert target.tcp.seen[0].received == len(LATE)


@pytest.mark.fault(42)
def test_what_was_sent_arrives_although_the_other_side_speaks_on(tunnel, target):
    def speak_and_leave(conn, _seen):
        conn.sendall(LATE)
        conn.shutdown(socket.SHUT_WR)
        time.sleep(0.2)  # the user's bytes wait unread in the kernel, and a close would be a reset
        while conn.recv(65536):
            pass

    with behaving(target, speak_and_leave), dial(tunnel.public_port, timeout=20) as user:
        user.sendall(b"x" * 50_000)
        assert read_to_end(user) == LATE


@pytest.mark.fault(43)
def test_a_users_reset_reaches_the_target_and_frees_everything(tunnel, target):
    target.tcp.forget()
    for _ in range(20):
        user = dial(tunnel.public_port)
        user.sendall(b"x" * 100_000)
        user.recv(1)
        reset(user)
    wait_until(lambda: [seen.how for seen in target.tcp.seen] == ["reset"] * 20, SLACK * 1, "the target was told")


@pytest.mark.fault(44)
def test_a_targets_reset_reaches_the_user_as_a_reset(tunnel, target):
    def half_and_reset(conn, _seen):
        conn.sendall(b"half")
        conn.recv(1)
        reset(conn)

    with behaving(target, half_and_reset):
        for _ in range(20):
            with dial(tunnel.public_port) as user:
                assert user.recv(4) == b"half"
                user.sendall(b"x")
                assert how_it_ends(user) == (b"", "reset")


@pytest.mark.fault(44)
def test_a_crowd_whose_target_resets_while_it_speaks_on_is_told_of_no_end(tunnel, target):
    gate = threading.Event()

    def half_and_reset(conn, _seen):
        conn.sendall(b"half")
        gate.wait(10)
        reset(conn)

    with behaving(target, half_and_reset), contextlib.ExitStack() as stack:
        users = [stack.enter_context(dial(tunnel.public_port)) for _ in range(40)]
        assert [user.recv(4) for user in users] == [b"half"] * 40
        gate.set()
        for user in tuple(users):
            try:
                user.sendall(b"more")
            except ConnectionError:  # it is told already, and the kernel tells once
                users.remove(user)
        assert {how_it_ends(user) for user in users} <= {(b"", "reset")}


@contextlib.contextmanager
def relayed(target, tls):
    """A tunnel whose client calls through a relay that can spoil what passes."""
    tunnel = Tunnel(target.address, tls)
    with Relay(tunnel.tunnel_port) as relay:
        tunnel.dialled = relay.port
        with tunnel, standing(tunnel):
            yield relay, tunnel


@pytest.mark.fault(45)
def test_a_data_connection_cut_without_close_notify_is_a_reset_to_the_user(target):
    with relayed(target, tls=1) as (relay, tunnel):
        for _ in range(5):
            with Users(tunnel, 1) as users:
                relay.cut(lambda link: link.data, reset=False)
                assert how_it_ends(users.socks[0]) == (b"", "reset")
            tunnel.recovers(SLACK * 2)


@pytest.mark.fault(45)
def test_data_connections_that_are_reset_on_the_way_are_resets_to_their_users(target):
    with relayed(target, tls=0) as (relay, tunnel):
        for _ in range(5):
            with Users(tunnel, 3) as users:
                relay.cut(lambda link: link.data)
                assert {how_it_ends(user) for user in users.socks} == {(b"", "reset")}
            tunnel.recovers(SLACK * 2)


@pytest.mark.fault(49)
def test_a_flipped_bit_ends_the_exchange_and_nothing_forged_is_delivered(target):
    words = [payload(200_000, seed=number) for number in range(10)]

    def visit(word):
        got = bytearray()
        with contextlib.suppress(OSError), dial(tunnel.public_port, timeout=20) as user:
            threading.Thread(target=send_all, args=(user, word), daemon=True).start()
            while len(got) < len(word) and (piece := user.recv(65536)):
                got += piece
        return bytes(got)

    def send_all(user, word):
        with contextlib.suppress(OSError):
            user.sendall(word)

    with relayed(target, tls=1) as (relay, tunnel):
        relay.rule = flipped(at=60_000)
        with ThreadPoolExecutor(10) as users:
            got = list(users.map(visit, words))
        relay.rule = lambda _link, _direction, data: [data]
        assert all(word.startswith(piece) for word, piece in zip(words, got, strict=True))
        assert any(len(piece) < len(word) for word, piece in zip(words, got, strict=True))
        tunnel.recovers(SLACK * 5)


@pytest.mark.fault(46)
def test_a_hundred_readers_who_do_not_read_hold_little_and_slow_nobody(target):
    def pour(conn, _seen):
        conn.settimeout(30)
        while not stopped.is_set():
            conn.sendall(b"z" * 65536)

    stopped = threading.Event()
    with (
        Tunnel(target.address, tls=1) as tunnel,
        standing(tunnel, grown_kib=16 * 1024),
        contextlib.ExitStack() as stack,
    ):
        kib = [process.rss_kib() for process in tunnel.processes]
        with behaving(target, pour):
            for _ in range(100):
                user = stack.enter_context(socket.socket())
                user.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                user.connect(tunnel.public)
                user.settimeout(10)
                assert user.recv(1024)
        with Probing(tunnel) as users:
            wait_until(lambda: users.tried >= 50, 40, "fifty users beside them")
        assert users.served == users.tried
        for process, before in zip(tunnel.processes, kib, strict=True):
            assert process.rss_kib() - before < 100 * 256
        stopped.set()


@pytest.mark.fault(48)
def test_a_slow_link_is_shared_among_twenty_users():
    with Namespace() as network, network.target() as target:
        with Tunnel(target.address, 1, prefix=network.prefix, connect=network.connect) as tunnel, standing(tunnel):
            network.run(
                "tc", "qdisc", "add", "dev", "lo", "root", "tbf", "rate", "20mbit", "burst", "256k", "latency", "200ms"
            )
            word = payload(30_000)

            def visit(_):
                began = time.monotonic()
                with network.connect(tunnel.public, timeout=30) as user:
                    threading.Thread(target=user.sendall, args=(word,), daemon=True).start()
                    got = b""
                    while len(got) < len(word) and (piece := user.recv(65536)):
                        got += piece
                assert got == word
                return time.monotonic() - began

            with ThreadPoolExecutor(20) as users:
                taken_s = sorted(users.map(visit, range(20)))
            assert taken_s[-1] < 4 * taken_s[len(taken_s) // 4], taken_s
            network.run("tc", "qdisc", "del", "dev", "lo", "root")


@pytest.mark.fault(51)
def test_a_thousand_idle_exchanges_stay_alive_and_cost_little_memory(target):
    env = {"MIN_POOL_CAPACITY": "64", "MAX_POOL_CAPACITY": "1024"}
    with Tunnel(target.address, tls=1, env=env) as tunnel:
        kib = [process.rss_kib() for process in tunnel.processes]
        with Users(tunnel, 1000) as users:
            assert users.alive() == 1000
            for process, before in zip(tunnel.processes, kib, strict=True):
                assert (process.rss_kib() - before) / 1000 < 128, "KiB for each"
        tunnel.recovers(10)


@pytest.mark.fault(53)
@pytest.mark.parametrize("tls", [0, 1], ids="tls={}".format)
def test_a_target_that_refuses_is_a_reset_to_the_user_at_once(tls):
    with EchoTCP(refuse=True) as nobody, not_there(nobody.address, tls) as tunnel:
        began = time.monotonic()
        assert resets(tunnel, 20) == 20
        assert time.monotonic() - began < SLACK * 2


@pytest.mark.fault(53)
def test_a_target_whose_name_does_not_resolve_is_a_reset_to_the_user():
    with not_there("nobody.invalid:80", 1) as tunnel:
        assert resets(tunnel, 3) == 3


@pytest.mark.fault(54)
def test_a_target_whose_backlog_is_full_is_a_reset_at_the_dial_timeout():
    with socket.socket() as full, contextlib.ExitStack() as stack:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        with not_there(f"127.0.0.1:{full.getsockname()[1]}", 1) as tunnel:
            began = time.monotonic()
            assert resets(tunnel, 20) == 20
            assert time.monotonic() - began < SLACK * LIMITS["target_timeout_s"]


@contextlib.contextmanager
def not_there(address, tls):
    """A tunnel to a target that cannot be reached: what each user sees is its reset."""
    tunnel = Tunnel(address, tls)
    try:
        tunnel.start_server()
        tunnel.start_client()
        tunnel.client.wait_for_line("connected to")
        yield tunnel
        assert not [
            line for line in tunnel.client.lines + tunnel.server.lines if "ERROR" in line or "Traceback" in line
        ]
    finally:
        tunnel.stop()


def resets(tunnel, count):
    """Count the users who are reset, of several at once."""

    def visit(_):
        try:
            with dial(tunnel.public_port, timeout=20) as user:
                return how_it_ends(user) == (b"", "reset")
        except ConnectionResetError:  # before connect() had returned
            return True

    with ThreadPoolExecutor(count) as users:
        return sum(users.map(visit, range(count)))


@pytest.mark.fault(37)
@pytest.mark.parametrize("tls", [0, 1], ids="tls={}".format)
def test_five_hundred_users_at_once_are_all_served_from_a_small_pool(target, tls, record_property):
    with Tunnel(target.address, tls, env={"MAX_POOL_CAPACITY": "1024"}, limits={"pool_wait_s": 10.0}) as tunnel:
        waits = []

        def visit(number):
            began = time.monotonic()
            word = payload(1000, seed=number)
            assert talk(tunnel.public, word, timeout=30) == word
            waits.append(time.monotonic() - began)

        with ThreadPoolExecutor(500) as users:
            list(users.map(visit, range(500)))
        record_property("p99_s", sorted(waits)[494])
        assert sorted(waits)[494] < 10


@pytest.mark.fault(74)
@pytest.mark.parametrize("tls", [0, 1], ids="tls={}".format)
def test_descriptors_that_are_used_again_never_mix_users_up(target, tls):
    grown_kib = 48 * 1024  # a new process grows with its first crowd, once
    with Tunnel(target.address, tls) as tunnel, standing(tunnel, grown_kib=grown_kib):
        assert not mixed_up(tunnel, 2000)


def mixed_up(tunnel, count):
    """Send users who leave in the middle, by reset, a third of them; give those who got bytes of somebody else's."""
    wrong = []

    def visit(number):
        word = b"%08d" % number * random.Random(number).choice((2, 200, 5000))
        with contextlib.suppress(OSError), dial(tunnel.public_port, timeout=20) as user:
            user.sendall(word)
            if number % 3 == 0:
                user.recv(8)
                reset(user)
                return
            got = b""
            while len(got) < len(word) and (piece := user.recv(65536)):
                got += piece
            if got != word:
                wrong.append((number, got[:40]))

    with ThreadPoolExecutor(16) as users:
        list(users.map(visit, range(count)))
    return wrong
