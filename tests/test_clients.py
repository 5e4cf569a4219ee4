"""What a v2 client may say once it is welcome, and what the server tells it: fail, bye, from."""

import re
import socket
import time
from types import SimpleNamespace
from unittest.mock import Mock

import gevent
import pytest
from support import BOUND_S, LIMITS, bounded, is_reset, read_all, read_exactly, reload, reset, wait_until
from test_v2_server import call, closed  # noqa: F401  the fixture
from tunnel import is_served, quiet, read_line

from nodepass_gevent import log as logs
from nodepass_gevent.clients import Clients
from nodepass_gevent.config import Address
from nodepass_gevent.errors import NoDataConnection
from nodepass_gevent.hearing import Answers
from nodepass_gevent.metrics import Counters

ALL = b"//?v=2&c=need,fail,bye,from#hello\n"


@pytest.fixture
def client(serve, call):  # noqa: F811
    """Start a server with a client that can everything."""

    def start(count=1, **settings):
        return call(serve(**settings), ALL).join(count)

    return start


def launch_of(client):
    """Wait for a launch; give its id, its data connection and the user it names."""
    line = client.signal()
    while b"need" in line:
        line = client.signal()
    id, user = re.fullmatch(rb"//([0-9a-f]{8})(?:\?from=([^#]+))?#1", line).groups()
    return id, client.idle.pop(id), user


def say(client, *lines):
    client.control.sendall(b"".join(lines))


# from


def test_a_launch_tells_who_the_user_is(client, connect):
    client = client()
    user = connect(client.running, "user")
    _, data, named = launch_of(client)
    assert named == b"127.0.0.1%%3A%d" % user.getsockname()[1]
    data.close()


@pytest.mark.parametrize(("address", "named"), [("127.0.0.1", b"127.0.0.1%%3A%d"), ("::1", b"%%5B%%3A%%3A1%%5D%%3A%d")])
def test_on_a_public_port_of_both_families_ipv4_users_are_named_by_ipv4(client, address, named):
    client = client(target=Address("::", 0))
    with socket.create_connection((address, client.running.public)) as user:
        _, data, told = launch_of(client)
        assert told == named % user.getsockname()[1]
        data.close()


def test_a_client_that_has_not_agreed_is_not_told(serve, connect, call):  # noqa: F811
    running = serve()
    client = call(running).join()
    connect(running, "user")
    _, data, user = launch_of(client)
    assert user is None
    data.close()


# fail


@pytest.mark.parametrize(
    ("why", "in_words"),
    [
        (b"refused", "its client's target refuses, or its setting network does"),
        (b"timeout", "its client's target does not answer"),
        (b"resolve", "its client could not resolve the target's name"),
        (b"unreachable", "its client cannot reach the target"),
        (b"busy", "its client has no place for it"),
        (b"what-comes-later", "its client could not begin the exchange: what-comes-later"),
        (b"", "its client could not begin the exchange: no reason given"),
    ],
)
def test_a_launch_that_fails_resets_its_user_at_once_and_nobody_else(client, connect, said, why, in_words):
    client = client(3)
    other, user = connect(client.running, "user"), None
    _, others, _ = launch_of(client)
    user = connect(client.running, "user")
    user.sendall(b"question")
    id, data, _ = launch_of(client)
    say(client, b"//%b?why=%b#fail\n" % (id, why))
    assert is_reset(user) and is_reset(data)
    assert said.find(rf"WARNING user 127\.0\.0\.1:\d+ reset: {in_words}$")
    assert client.running.counters.launches_failed == 1
    others.sendall(b"answer")
    assert read_exactly(other, 6) == b"answer"
    assert len(client.idle) == 1
    data.close()
    others.close()


def test_what_a_client_gives_as_its_reason_is_escaped_in_the_log(client, connect, said):
    client = client()
    user = connect(client.running, "user")
    id, data, _ = launch_of(client)
    say(client, b"//%b?why=%%1B%%5B2J%%0A#fail\n" % id)
    assert is_reset(user)
    assert said.find(r"the exchange: \\x1b\[2J\\n$")
    data.close()


def answered(client, connect):
    """Let a user ask and have an answer; give it, and the id and the client's end of its data connection."""
    user = connect(client.running, "user")
    user.sendall(b"question")
    id, data, _ = launch_of(client)
    data.sendall(b"first ")
    assert read_exactly(user, 6) == b"first "
    return user, id, data


def test_an_exchange_that_is_answered_goes_on_whatever_its_client_says(client, connect):
    client = client()
    user, id, data = answered(client, connect)
    say(client, b"//%b?why=refused#fail\n//%b?why=busy#fail\n" % (id, id))
    wait_until(lambda: client.running.counters.signals_stale == 2)
    data.sendall(b"second")
    assert read_exactly(user, 6) == b"second"
    assert client.running.counters.launches_failed == 0
    data.close()


def test_an_exchange_whose_data_connection_its_client_has_lost_ends_although_it_was_answered(client, connect, said):
    client = client()
    user, id, data = answered(client, connect)
    say(client, b"//%b?why=gone#fail\n" % id)
    assert is_reset(user)
    assert said.find(r"WARNING user 127\.0\.0\.1:\d+ reset: its data connection is gone$")
    assert (client.running.counters.launches_failed, client.running.counters.signals_stale) == (1, 0)
    data.close()


def test_a_fail_behind_an_end_without_an_answer_resets_the_user(client, connect):
    client = client(2)
    user = connect(client.running, "user")
    id, data, _ = launch_of(client)
    data.shutdown(socket.SHUT_WR)
    assert user.recv(1) == b""
    say(client, b"//%b?why=gone#fail\n" % id)
    wait_until(lambda: not client.running.server.exchanges)
    assert client.running.counters.launches_failed == 1
    assert (len(client.idle), client.running.counters.launches_repeated) == (1, 0)
    data.close()


def test_a_fail_of_nothing_that_runs_is_counted_and_passed_over(client, connect):
    client = client(2)
    user = connect(client.running, "user")
    id, data, _ = launch_of(client)
    say(client, b"//%b?why=refused#fail\n" % id)
    assert is_reset(user)
    idle = next(iter(client.idle))
    say(client, b"//%b?why=refused#fail\n//ffffffff?why=gone#fail\n//%b?why=gone#fail\n" % (id, idle))
    wait_until(lambda: client.running.counters.signals_stale == 3)
    assert client.running.counters.launches_failed == 1
    assert is_served(connect(client.running, "user"), client)
    data.close()


# A data connection that proves dead before a byte


def by_its_word(client, id, data):
    say(client, b"//%b?why=gone#fail\n" % id)


def by_reset(client, id, data):
    reset(data)


DEATHS = pytest.mark.parametrize("die", [by_its_word, by_reset])


@DEATHS
def test_it_is_replaced_and_not_a_byte_is_lost_or_comes_twice(client, connect, die):
    client = client(2)
    user = connect(client.running, "user")
    id, data, _ = launch_of(client)
    die(client, id, data)
    again, second, _ = launch_of(client)
    assert again != id
    user.sendall(b"question")
    user.shutdown(socket.SHUT_WR)
    assert read_all(second) == b"question"
    second.sendall(b"answer")
    second.close()
    assert read_all(user) == b"answer"
    wait_until(lambda: not client.running.server.exchanges)
    counters = client.running.counters
    assert (counters.launches_repeated, counters.tcp_exchanges, counters.exchanges_failed) == (1, 1, 0)
    data.close()


@DEATHS
def test_it_is_replaced_once_and_no_more(client, connect, die):
    client = client(3)
    user = connect(client.running, "user")
    dead = []
    for _ in range(2):
        id, data, _ = launch_of(client)
        die(client, id, data)
        dead.append(data)
    assert is_reset(user)
    assert len(client.idle) == 1
    assert client.running.counters.exchanges_failed == 1
    for data in dead:
        data.close()


@DEATHS
def test_after_a_byte_of_the_user_it_is_not_replaced(client, connect, die):
    client = client(2)
    user = connect(client.running, "user")
    user.sendall(b"q")
    id, data, _ = launch_of(client)
    assert read_exactly(data, 1) == b"q"
    die(client, id, data)
    assert is_reset(user)
    assert (len(client.idle), client.running.counters.launches_repeated) == (1, 0)
    data.close()


@DEATHS
def test_after_a_byte_of_the_answer_it_is_not_replaced(client, connect, die):
    client = client(2)
    user = connect(client.running, "user")
    id, data, _ = launch_of(client)
    data.sendall(b"a")
    assert read_exactly(user, 1) == b"a"
    if die is by_reset:
        die(client, id, data)
        assert is_reset(user)
    assert client.running.counters.launches_repeated == 0
    data.close()


def test_a_user_who_resets_before_a_byte_is_not_launched_again(client, connect):
    client = client(2)
    user = connect(client.running, "user")
    _, data, _ = launch_of(client)
    reset(user)
    assert is_reset(data)
    wait_until(lambda: not client.running.server.exchanges)
    assert (len(client.idle), client.running.counters.launches_repeated) == (1, 0)
    data.close()


def test_a_reset_long_after_the_user_came_is_the_targets_own_and_passed_on(client, connect):
    client = client(2, pool_wait_s=0.05)
    user = connect(client.running, "user")
    _, data, _ = launch_of(client)
    gevent.sleep(0.06)  # until it has waited as long as a user may
    reset(data)
    assert is_reset(user)
    assert client.running.counters.launches_repeated == 0


def test_when_no_other_connection_comes_the_user_is_reset(client, connect):
    client = client(1, pool_wait_s=0.1)
    user = connect(client.running, "user")
    id, data, _ = launch_of(client)
    by_its_word(client, id, data)
    assert is_reset(user)
    data.close()


# silence


def test_a_client_that_falls_silent_loses_users_who_came_since_it_was_heard_and_no_others(client, connect, said):
    client = client(3, report_interval_s=0.5, dead_intervals=1)
    early = connect(client.running, "user")
    _, earlier, _ = launch_of(client)
    say(client, b"//x#later\n")
    wait_until(lambda: client.running.counters.signals_unknown == 1)  # it is heard while that exchange runs
    answered, late = (connect(client.running, "user") for _ in range(2))
    (_, data, _), (_, unused, _) = launch_of(client), launch_of(client)
    data.sendall(b"answer")
    assert read_exactly(answered, 6) == b"answer"
    assert is_reset(late) and is_reset(unused)  # nobody is heard any more
    assert said.find(r"WARNING user .* reset: its client is silent$")
    for user, other in ((early, earlier), (answered, data)):
        other.sendall(b"still here")
        assert read_exactly(user, 10) == b"still here"
    for each in (earlier, data, unused):
        each.close()


def test_a_client_that_falls_silent_loses_what_has_heard_nothing_from_it_for_a_second():
    forsaken = []
    session = SimpleNamespace(forsake=lambda since, error: forsaken.append((time.monotonic() - since, str(error))))
    answers = Answers({b"0a1b2c3d": session}, Counters(), logs.of(""))
    answers.receive(b"\n")
    answers.forsake()
    ((ago_s, why),) = forsaken
    assert 1 <= ago_s < 2 and why == "its client is silent"


# bye


def test_a_client_that_says_bye_is_answered_and_its_exchanges_go_on(client, connect, said, call):  # noqa: F811
    client = client(2)
    user = connect(client.running, "user")
    user.sendall(b"question")
    _, data, _ = launch_of(client)
    (idle,) = client.idle.values()
    say(client, b"//#bye\n")
    assert client.signal() == b"//#bye"
    client.control.shutdown(socket.SHUT_WR)
    assert closed(client.control)
    assert is_reset(idle)
    wait_until(lambda: said.find(r"INFO client 127\.0\.0\.1:\d+ left: it said bye"))
    wait_until(lambda: client.running.server.peers == 0)
    data.sendall(b"answer")
    assert read_exactly(user, 6) == b"answer"
    second = connect(client.running, "user")  # waits for the next client
    assert is_served(second, call(client.running, ALL).join())
    assert not said.find("WARNING")
    data.close()


def test_launches_in_the_moment_of_a_bye_come_before_the_answer_to_it(client, connect):
    client = client(1)
    user = connect(client.running, "user")
    say(client, b"//#bye\n")
    lines = []
    while b"//#bye" not in lines:
        lines.append(read_line(client.control))
    launches = [line for line in lines if line.endswith(b"#1")]
    assert len(launches) <= 1 and lines[-1] == b"//#bye"
    assert closed(client.control) or quiet(client.control)
    user.close()


def test_a_server_that_stops_says_bye_behind_its_launches_and_closes_without_a_reset(client, connect, spawn):
    client = client(2)
    user = connect(client.running, "user")
    user.sendall(b"question")
    _, data, _ = launch_of(client)
    stopping = spawn(client.running.greenlet.kill)
    assert client.signal() == b"//#bye"
    say(client, b"//#bye\n")
    client.control.shutdown(socket.SHUT_WR)
    assert read_all(client.control).strip(b"\n") == b""
    stopping.join(BOUND_S)
    data.sendall(b"answer")  # the exchange outlives it
    assert read_exactly(user, 6) == b"answer"
    data.close()


def test_a_server_that_stops_does_not_wait_for_a_client_that_says_nothing(client, spawn):
    client = client(1, drain_linger_s=60, shutdown_timeout_s=60)
    reload(client.running.server, drain_linger_s=0.05)
    stopping = spawn(client.running.greenlet.kill)
    assert client.signal() == b"//#bye"
    stopping.join(BOUND_S)
    assert stopping.ready()


def test_a_client_without_the_capability_is_told_no_bye(serve, call, spawn):  # noqa: F811
    client = call(serve())
    spawn(client.running.greenlet.kill)
    assert read_all(client.control).strip(b"\n") == b""


def test_a_client_that_is_ending_is_none_that_is_connected():
    clients = Clients(LIMITS, logs.of(""))
    clients.admit(Mock(alive=False), b"former")
    clients.admit(alive := Mock(alive=True), b"present")
    assert clients.describe() == (alive.describe(),)


def test_at_a_server_that_tries_again_users_wait_for_a_client_as_before():
    clients = Clients(LIMITS, logs.of(""))
    clients.close()
    with pytest.raises(NoDataConnection, match="the server is stopping"):
        clients.wait(0)
    clients.open()
    with pytest.raises(NoDataConnection, match="no client is connected"):
        clients.wait(0)


def test_users_who_go_on_waiting_at_the_next_server_do_so_for_the_time_that_they_have():
    before, heirs = Clients(LIMITS, logs.of("")), Clients(LIMITS, logs.of(""))
    before.heirs = heirs
    before.close()
    with bounded(), pytest.raises(NoDataConnection, match="no client is connected"):
        before.wait(0.01)


def test_users_who_wait_while_the_server_stops_are_reset_and_not_kept_until_its_client_answers(client, connect, spawn):
    client = client(0, drain_linger_s=60)
    user = connect(client.running, "user")
    assert client.signal() == b"//1#need"
    stopping = spawn(client.running.greenlet.kill)
    assert is_reset(user)
    assert not stopping.ready()
    client.control.close()
    stopping.join(BOUND_S)


def test_users_who_wait_while_the_server_stops_have_no_longer_than_its_shutdown_timeout(client, connect, spawn):
    client = client(0, shutdown_timeout_s=0.1)
    user = connect(client.running, "user")
    assert client.signal() == b"//1#need"
    began = time.monotonic()
    spawn(client.running.greenlet.kill)
    assert is_reset(user) and time.monotonic() - began < 0.9


def test_a_client_of_which_nobody_can_be_told_for_want_of_memory_is_not_kept(monkeypatch):
    clients = Clients(LIMITS, logs.of(""))
    monkeypatch.setattr(clients, "_came", Mock(set=Mock(side_effect=MemoryError)))
    with pytest.raises(MemoryError):
        clients.admit(Mock(), b"session")
    assert len(clients) == 0
