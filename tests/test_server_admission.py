"""Who may come in at the ports of a running server: users, callers, data connections, datagrams, penalties."""

import contextlib
import socket

import pytest
from support import is_reset, wait_until
from tunnel import ELSEWHERE, HERE, is_served, quiet, read_line

from nodepass_gevent.config import Address
from nodepass_gevent.values import Networks


def test_a_user_from_elsewhere_is_reset_and_costs_no_data_connection(serve, connect):
    running = serve(allow_users=Networks.parse(HERE))
    client = connect(running).join().known()
    assert is_reset(connect(running, "user", ELSEWHERE))
    assert running.counters.users_kept_out == 1
    assert running.counters.tcp_exchanges == 0
    assert is_served(connect(running, "user"), client)


def test_a_denied_caller_hears_not_a_byte_on_either_port(serve, connect):
    running = serve(deny_clients=Networks.parse(f"{ELSEWHERE},::1"))
    for kind in ("caller", "data"):
        stranger = connect(running, kind, ELSEWHERE)
        with pytest.raises(ConnectionResetError):
            stranger.recv(1)
    assert running.counters.callers_kept_out == 2
    assert running.counters.callers_refused == 0
    assert is_served(connect(running, "user", ELSEWHERE), connect(running).join())


def test_a_listener_for_both_families_knows_an_ipv4_caller_by_its_ipv4_address(serve, connect):
    everywhere, elsewhere = Address("", 0), Networks.parse(ELSEWHERE)
    running = serve(tunnel=everywhere, target=everywhere, deny_clients=elsewhere, deny_users=elsewhere)
    for kind in ("caller", "data", "user"):
        assert is_reset(connect(running, kind, ELSEWHERE))


def test_users_over_the_limit_of_their_address_are_reset_and_others_are_served(serve, connect):
    running = serve(users_per_address=2)
    client = connect(running).join(4).known()
    users = [connect(running, "user") for _ in range(2)]
    exchanges = [client.launched()[0] for _ in users]
    assert is_reset(connect(running, "user"))
    assert is_served(connect(running, "user", ELSEWHERE), client)
    for sock in (*users, *exchanges):
        sock.close()
    wait_until(lambda: len(running.server.exchanges) == 1)  # the one from elsewhere
    assert is_served(connect(running, "user"), client)


def test_a_user_who_is_refused_makes_room_for_another_of_the_address(serve, connect):
    running = serve(users_per_address=1, pool_wait_s=0.05)  # nobody serves them
    for _ in range(3):
        assert is_reset(connect(running, "user"))
    wait_until(lambda: running.counters.exchanges_failed == 3)
    assert running.counters.users_kept_out == 0


@pytest.mark.parametrize("kind", ["caller", "data"])
def test_an_address_with_a_penalty_is_closed_at_once_on_the_tunnel_port(serve, connect, kind):
    running = serve()
    for _ in range(3):
        running.server.penalties.report(ELSEWHERE)
    if kind == "caller":
        with pytest.raises(ConnectionResetError):
            connect(running, "caller", ELSEWHERE).recv(1)
        assert running.counters.callers_kept_out == 1
    else:
        stranger = connect(running, "data", ELSEWHERE)  # held as ever: closed, an old client would dial without pause
        wait_until(lambda: running.counters.data_connections_refused)
        assert quiet(stranger)
    assert is_served(connect(running, "user", ELSEWHERE), connect(running).join())


def test_the_address_of_a_live_session_gets_no_penalty(serve, connect):
    running = serve()
    connect(running).join().known()
    for _ in range(10):
        running.server.penalties.report(HERE)
    assert read_line(connect(running, "caller"))


def ask(running, count, source):
    """Send datagrams to the public port from an address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((source, 0))
        for _ in range(count):
            sock.sendto(b"x", ("127.0.0.1", running.public))


def test_datagrams_from_elsewhere_are_dropped_and_counted(serve):
    running = serve(network="udp", deny_users=Networks.parse(ELSEWHERE), pool_wait_s=0.05)
    ask(running, 5, ELSEWHERE)
    wait_until(lambda: running.counters.datagrams_kept_out == 5)
    ask(running, 1, HERE)
    wait_until(lambda: running.counters.datagrams_unanswered == 1)


def test_datagrams_over_the_rate_of_their_address_are_dropped_and_counted(serve):
    running = serve(network="udp", udp_rate_per_address=2, pool_wait_s=0.05)
    ask(running, 10, ELSEWHERE)
    wait_until(lambda: running.counters.datagrams_unanswered + running.counters.datagrams_dropped_rate == 10)
    assert running.counters.datagrams_unanswered in (2, 3)  # a third, when the machine was slow
    before = running.counters.datagrams_unanswered
    ask(running, 2, HERE)
    wait_until(lambda: running.counters.datagrams_unanswered == before + 2)


def sessions(running, count, source, stack):
    """Let as many UDP users of an address ask."""
    for _ in range(count):
        user = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        user.bind((source, 0))
        user.sendto(b"x", ("127.0.0.1", running.public))


def test_udp_users_over_the_limit_of_their_address_are_dropped_until_one_has_left(serve):
    running = serve(network="udp", users_per_address=2, pool_wait_s=0.1)  # nobody serves them
    with contextlib.ExitStack() as stack:
        sessions(running, 5, ELSEWHERE, stack)
        wait_until(lambda: running.counters.datagrams_kept_out == 3)
        sessions(running, 1, HERE, stack)
        wait_until(lambda: running.counters.datagrams_unanswered == 3)
        sessions(running, 2, ELSEWHERE, stack)
        wait_until(lambda: running.counters.datagrams_unanswered == 5)
    assert running.counters.datagrams_kept_out == 3


def test_tcp_and_udp_users_of_an_address_are_counted_together(serve, connect):
    running = serve(network="both", users_per_address=1, pool_wait_s=1)
    user = connect(running, "user", ELSEWHERE)
    wait_until(lambda: running.counters.tcp_exchanges)
    ask(running, 1, ELSEWHERE)
    wait_until(lambda: running.counters.datagrams_kept_out == 1)
    assert quiet(user)


def test_datagrams_to_a_v1_client_count_while_they_wait_for_their_answer(serve, connect):
    running = serve(network="udp", users_per_address=2)
    client = connect(running).join(6).known()
    ask(running, 3, HERE)
    wait_until(lambda: running.counters.datagrams_kept_out == 1)
    for unanswered in (2, 4):
        for _ in range(2):
            data, kind = client.launched()
            with data:
                assert kind == b"2"
        wait_until(lambda unanswered=unanswered: running.counters.datagrams_unanswered == unanswered)
        ask(running, 2, HERE)
    assert running.counters.datagrams_kept_out == 1
