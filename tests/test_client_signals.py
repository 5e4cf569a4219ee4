"""What the client tells a v2 server, and obeys: fail, bye, from; against a scripted server, tls 0."""

import contextlib
import select
import socket
from dataclasses import replace
from unittest.mock import Mock

import gevent
import pytest
from support import BOUND_S, LIMITS, is_reset, read_all, read_exactly, reload, reset, wait_until
from test_client import port_of, server  # noqa: F401  the fixture
from test_v2_client import OFFER, SESSION, Offering

from nodepass_gevent import hearing, net
from nodepass_gevent.config import Address
from nodepass_gevent.errors import ConnectError, PolicyError, SessionEnded, SessionLost
from nodepass_gevent.hearing import Silence

ID = b"0123abcd"
ALL = b"need,fail,bye,from"


@pytest.fixture
def v2(server):  # noqa: F811
    """Welcome a client with everything it can, or with less."""

    def start(agreed=ALL, **settings):
        offering = Offering(server).run(**settings)
        assert (b"from" in offering.line()) == bool(settings.get("proxy_protocol"))
        server.say(b"//%b?c=%b&i=5&p=100#welcome\n" % (SESSION, agreed))
        return offering

    return start


@pytest.fixture
def nowhere(no_leaks):
    """Give an address at which nobody listens, and nobody will."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield Address(*held.getsockname())


# fail


def test_a_target_that_refuses_is_told_and_the_reset_is_left_to_the_server(v2, nowhere):
    v2 = v2(target=nowhere)
    data = v2.join(ID)
    data.sendall(b"a question that nobody reads" * 1000)
    v2.server.say(b"//%b#1\n" % ID)
    assert v2.line() == b"//0123abcd?why=refused#fail\n"
    data.settimeout(0.05)
    with pytest.raises(TimeoutError):  # no end and no reset, so that neither overtakes the word
        data.recv(1)
    reset(data)
    wait_until(lambda: not v2.server.client.exchanges)
    assert v2.server.client.counters.exchanges_failed == 1


def test_a_server_that_does_not_end_the_user_meets_a_reset_after_a_moment(v2, nowhere):
    v2 = v2(target=nowhere, drain_linger_s=0.05)
    data = v2.join(ID)
    v2.server.say(b"//%b#1\n" % ID)
    assert v2.line().endswith(b"#fail\n")
    assert is_reset(data)


def test_a_server_that_knows_no_fail_meets_a_reset_at_once(v2, nowhere):
    v2 = v2(b"need,bye,from", target=nowhere)
    data = v2.join(ID)
    v2.server.say(b"//%b#1\n" % ID)
    assert is_reset(data)
    v2.server.say(b"\n")
    assert v2.line() == b"\n"  # the first that it says


@pytest.mark.parametrize(
    ("failure", "why"),
    [
        (ConnectError("connect: timed out", "timeout"), b"timeout"),
        (ConnectError("resolve: no such name", "resolve"), b"resolve"),
        (ConnectError("connect: no route to host", "unreachable"), b"unreachable"),
        (OSError(24, "Too many open files"), b"busy"),
    ],
)
def test_the_reason_of_a_failed_dial_is_told(v2, monkeypatch, failure, why):
    v2 = v2()
    data = v2.join(ID)
    wait_until(lambda: len(v2.server.client.exchanges) == 0)

    def connect(*_arguments, **_options):
        raise failure

    monkeypatch.setattr("nodepass_gevent.egress.connect", connect)
    v2.server.say(b"//%b#1\n" % ID)
    assert v2.line() == b"//0123abcd?why=%b#fail\n" % why
    reset(data)


def test_connecting_tells_refusal_silence_and_no_route_apart(nowhere, monkeypatch):
    with pytest.raises(ConnectError) as caught:
        net.connect(net.resolve(nowhere), 1, LIMITS)
    assert caught.value.why == "refused"
    for failure, why in ((TimeoutError("connect"), "timeout"), (OSError(113, "No route to host"), "unreachable")):

        def fail(*_arguments, failure=failure, **_options):
            raise failure

        monkeypatch.setattr(net, "begin_to_connect", fail)
        with pytest.raises(ConnectError) as caught:
            net.connect(net.resolve(nowhere), 1, LIMITS)
        assert caught.value.why == why
    with pytest.raises(ConnectError) as caught:
        net.resolve(Address("no-such-name.invalid", 1))
    assert caught.value.why == "resolve"


def test_a_launch_whose_id_never_comes_is_answered_gone(v2):
    v2 = v2(pool_wait_s=0.05)
    v2.join(ID)
    v2.server.say(b"//ffffffff#1\n")
    assert v2.line() == b"//ffffffff?why=gone#fail\n"


def test_launches_beyond_all_limits_are_answered_busy(v2):
    v2 = v2(semaphore_limit=1, min_pool_capacity=1, max_pool_capacity=1, drain_linger_s=0.1)
    v2.join(ID)
    v2.server.say(b"".join(b"//0000000%d#1\n" % number for number in range(4)))
    assert v2.line() + v2.line() == b"//00000002?why=busy#fail\n//00000003?why=busy#fail\n"


# Silence of a v1 server


@pytest.mark.parametrize(
    ("heard_at", "limits_s"),
    [
        ([100, 160, 165], [None, 180, 180]),  # one that came late
        ([100, 160, 250, 251, 280, 340, 400, 460], [None, 180, 270, 180, 180, 180, 180, 180]),  # an outage, from 220 on
        ([100, 105, 130, 130.1, 135, 140, 145], [None, 15, 75, 15, 15, 15, 15]),
    ],
)
def test_the_usual_one_of_its_intervals_says_how_long_a_server_may_be_silent(monkeypatch, heard_at, limits_s):
    silence = Silence(replace(LIMITS, dead_timeout_s=1, dead_intervals=3))
    monkeypatch.setattr(hearing, "time", Mock(monotonic=Mock(side_effect=heard_at)))
    for limit_s in limits_s:
        silence.note_ping()
        assert silence.limit_s() == limit_s


# bye


def test_at_the_servers_bye_it_answers_and_is_ready_for_the_next_call(v2):
    v2 = v2()
    data = v2.join(ID)
    v2.server.say(b"//%b#1\n" % ID)
    assert v2.server.carries(data)
    v2.server.say(b"//#bye\n")
    v2.server.control.shutdown(socket.SHUT_WR)
    assert v2.line() == b"//#bye\n"
    assert read_all(v2.server.control) == b""
    ended = v2.server.ended()
    assert isinstance(ended, SessionEnded) and str(ended) == "the server said bye"


@pytest.mark.parametrize("late", [False, True], ids=["id in time", "id late"])
def test_launches_before_the_servers_bye_are_honoured_and_exchanges_go_on(v2, late):
    v2 = v2()
    joining = v2.server.take(v2.server.tunnel)
    read_exactly(joining, 28)
    word = b"//1234%b#0\n%b" % (OFFER, ID)
    if not late:
        joining.sendall(word)
        wait_until(lambda: v2.server.tunnel.fileno() > 0)
    v2.server.say(b"//%b#1\n//#bye\n" % ID)
    v2.server.control.shutdown(socket.SHUT_WR)
    assert v2.line() == b"//#bye\n"
    if late:
        joining.sendall(word)
    assert v2.server.carries(joining)
    assert isinstance(v2.server.ended(), SessionEnded)


def test_idle_data_connections_are_reset_at_a_bye(v2):
    v2 = v2()
    data = v2.join(ID)
    v2.server.say(b"//#bye\n")
    v2.server.control.shutdown(socket.SHUT_WR)
    assert is_reset(data)


def test_a_server_that_has_become_busy_is_refused_by_policy(v2):
    v2 = v2()
    v2.server.say(b"//?why=busy#bye\n")
    ended = v2.server.ended()
    assert isinstance(ended, PolicyError) and str(ended) == "the server has another client, and takes one at a time"


def test_a_reason_of_a_later_version_to_take_no_client_is_shown(server):  # noqa: F811
    offering = Offering(server).run()
    assert offering.line().endswith(b"#hello\n")
    server.say(b"//?why=moved%1B#bye\n")
    ended = server.ended()
    assert isinstance(ended, PolicyError) and str(ended) == r"the server takes no client now: 'moved\x1b'"


def test_a_client_that_stops_says_bye_and_obeys_until_the_servers_own(v2, spawn):
    v2 = v2()
    data = v2.join(ID)
    stopping = spawn(v2.server.running.kill)
    assert v2.line() == b"//#bye\n"
    v2.server.say(b"//%b#1\n" % ID)  # it was on its way
    assert v2.server.carries(data)
    v2.server.say(b"//#bye\n")
    v2.server.control.shutdown(socket.SHUT_WR)
    assert read_all(v2.server.control) == b""
    stopping.join(5)
    assert stopping.ready()
    assert not select.select([v2.server.tunnel], [], [], 0)[0]  # for what was used, no other one is dialled


def test_a_client_that_stops_does_not_wait_for_a_server_that_says_nothing(v2, spawn):
    v2 = v2(drain_linger_s=60, shutdown_timeout_s=60)
    v2.join(ID)
    reload(v2.server.client, drain_linger_s=0.05)
    stopping = spawn(v2.server.running.kill)
    assert v2.line() == b"//#bye\n"
    stopping.join(5)
    assert stopping.ready()


def test_a_server_without_the_capability_is_told_no_bye(v2, spawn):
    v2 = v2(b"need")
    v2.join(ID)
    spawn(v2.server.running.kill)
    assert read_all(v2.server.control) == b""


def wait_for_room(v2):
    """Let one launch be carried, and a second one wait for its place; give both of their data connections."""
    first, second = v2.join(ID), v2.join(b"00000002")
    v2.server.say(b"//%b#1\n//00000002#1\n" % ID)
    first.sendall(b"question")
    target = v2.server.take(v2.server.target)
    assert read_exactly(target, 8) == b"question"
    return first, second, target


@pytest.mark.parametrize("first", ["server", "client"])
def test_launches_that_wait_for_room_at_a_bye_are_honoured(v2, spawn, first):
    v2 = v2(semaphore_limit=1, min_pool_capacity=2)
    running, waiting, target = wait_for_room(v2)
    if first == "client":
        spawn(v2.server.running.kill)
    else:
        v2.server.say(b"//#bye\n")
    assert v2.line() == b"//#bye\n"
    if first == "client":
        v2.server.say(b"//#bye\n")
    v2.server.control.shutdown(socket.SHUT_WR)
    v2.server.running.join(5)
    running.close()
    target.close()
    assert v2.server.carries(waiting)


def test_launches_that_wait_for_room_are_lost_at_once_when_the_session_is(v2):
    v2 = v2(semaphore_limit=1, min_pool_capacity=2)
    _, waiting, _ = wait_for_room(v2)
    v2.server.control.close()
    assert is_reset(waiting)
    assert isinstance(v2.server.ended(), SessionLost)
    wait_until(lambda: v2.server.client.counters.launches_lost == 1)


def test_launches_that_wait_for_room_after_a_bye_end_with_all_exchanges(v2):
    v2 = v2(semaphore_limit=1, min_pool_capacity=2)
    _, waiting, _ = wait_for_room(v2)
    v2.server.say(b"//#bye\n")
    v2.server.control.shutdown(socket.SHUT_WR)
    assert isinstance(v2.server.ended(), SessionEnded)
    v2.server.client.exchanges.kill()
    assert is_reset(waiting)


# Control loss


def test_exchanges_outlive_the_control_channel_and_what_is_idle_is_reset(v2):
    v2 = v2(min_pool_capacity=2)
    data, idle = v2.join(ID), v2.join(b"00000002")
    v2.server.say(b"//%b#1\n" % ID)
    data.sendall(b"question")
    with v2.server.take(v2.server.target) as target:
        assert read_exactly(target, 8) == b"question"
        v2.server.control.close()
        assert isinstance(v2.server.ended(), SessionLost)
        assert is_reset(idle)
        target.sendall(b"answer")
        assert read_exactly(data, 6) == b"answer"


# from, and the header for the target


@pytest.mark.parametrize(
    ("version", "launch", "header"),
    [
        (1, b"//0123abcd?from=192.0.2.1%%3A443#1\n", b"PROXY TCP4 192.0.2.1 127.0.0.1 443 %d\r\n"),
        (1, b"//0123abcd?from=%%5B2001%%3Adb8%%3A%%3A1%%5D%%3A443#1\n", b"PROXY TCP6 2001:db8::1 "),
        (1, b"//0123abcd?from=192.0.2.1%%3A1%%0D%%0Ax#1\n", b"PROXY UNKNOWN\r\n"),
        (1, b"//0123abcd#1\n", b"PROXY UNKNOWN\r\n"),
        (2, b"//0123abcd#1\n", b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"),
    ],
)
def test_the_target_is_told_who_the_user_is_before_anything_else(v2, caplog, version, launch, header):
    v2 = v2(proxy_protocol=version)
    data = v2.join(ID)
    data.sendall(b"question")
    v2.server.say(launch.replace(b"%%", b"%"))
    expected = header % port_of(v2.server.target) if b"%d" in header else header
    with v2.server.take(v2.server.target) as target:
        assert read_exactly(target, len(expected)) == expected
        if header.startswith(b"PROXY TCP6"):
            target.recv(1024)
        else:
            assert read_exactly(target, 8) == b"question"
        target.sendall(b"answer")
        assert read_exactly(data, 6) == b"answer"
    data.close()
    wait_until(lambda: v2.server.client.counters.bytes_down == 6)
    assert v2.server.client.counters.bytes_up in (0, 8)  # the header is not the user's
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_without_the_setting_the_target_gets_the_users_bytes_alone(v2):
    v2 = v2()
    data = v2.join(ID)
    v2.server.say(b"//0123abcd?from=192.0.2.1%3A443#1\n")
    assert v2.server.carries(data)


def forget_callers(*listeners):
    """Let go who has connected and was not accepted."""
    for listener in listeners:
        listener.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                listener.accept()[0].close()
        listener.settimeout(BOUND_S)


@pytest.mark.parametrize("profile", [1, 2])
def test_a_server_that_tells_no_addresses_is_warned_of_once(server, caplog, profile):  # noqa: F811
    def warnings():
        return [record for record in caplog.records if "does not tell users' addresses" in record.getMessage()]

    server.run(proxy_protocol=1)
    for _ in range(2):
        if profile == 1:
            server.greet()
            data = server.join(ID)
        else:
            server.say(b"//off%b#0\n" % OFFER)
            offering = Offering(server)
            offering.line()
            server.say(b"//%b?c=need&i=5&p=100#welcome\n" % SESSION)
            data = offering.join(ID)
        server.say(b"//%b?from=192.0.2.1%%3A443#1\n" % ID)
        data.sendall(b"question")
        with server.take(server.target) as target:
            assert read_exactly(target, 15) == b"PROXY UNKNOWN\r\n"
        server.control.close()
        server.ended()
        forget_callers(server.tunnel, server.data)
        server.running = gevent.spawn(server._run)
        server.control = server.take(server.tunnel)
    assert [record.levelname for record in warnings()] == ["WARNING"]
