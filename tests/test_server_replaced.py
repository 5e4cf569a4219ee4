"""A server that comes in the place of another one, with other settings: what it takes over."""

from contextlib import closing
from dataclasses import replace

import pytest
from support import is_reset, read_exactly, wait_until
from test_public_port import free_address
from test_v2_server import V2Client, datagram_user
from tunnel import ELSEWHERE, connect, is_served, said, serve  # noqa: F401  fixtures

from nodepass_gevent.server import Server


def test_it_listens_where_the_one_before_did_at_ports_that_the_system_chose(serve):  # noqa: F811
    before = serve()
    after = serve(before, semaphore_limit=7)
    assert (after.tunnel, after.public) == (before.tunnel, before.public)


def test_it_shows_the_certificate_that_the_one_before_has_made(serve):  # noqa: F811
    before = serve(tls=1)
    after = serve(before, tls=1, semaphore_limit=7)
    assert after.server.describe().certificate == before.server.describe().certificate is not None


def test_one_that_does_not_listen_any_more_hands_over_nothing(serve):  # noqa: F811
    before = serve()
    before.greenlet.kill()  # and it might try again
    assert before.server._sockets.duplicate() == {}
    serve(before, semaphore_limit=7)


@pytest.fixture
def waits(serve, connect):  # noqa: F811
    """Give a server without a client, and a user who waits for one there."""
    running = serve()
    user = connect(running, "user")
    wait_until(lambda: running.counters.tcp_exchanges == 1)
    return running, user


def never_listening(before):
    """Put a server in the place of another one, and let it not come to listen."""
    server = Server(replace(before.server.config, semaphore_limit=7), before.server)
    before.greenlet.kill()
    before.server.retire()
    return replace(before, server=server)


def test_users_who_wait_for_a_client_are_served_by_the_next_one(serve, connect, waits):  # noqa: F811
    before, user = waits
    after = serve(serve(before, semaphore_limit=7), semaphore_limit=8)
    assert is_served(user, connect(after).join())


def test_users_who_wait_are_served_although_the_next_server_never_came_to_listen(serve, connect, waits):  # noqa: F811
    before, user = waits
    never = never_listening(before)
    after = serve(never, semaphore_limit=8)
    never.server.dismiss()
    assert is_served(user, connect(after).join())


def test_users_who_wait_are_reset_at_once_when_the_next_server_is_dismissed(waits):
    before, user = waits
    never = never_listening(before).server
    never.dismiss()
    never.retire()
    assert is_reset(user)


def test_users_who_wait_at_a_server_whose_ports_are_not_taken_over_are_reset(serve, waits):  # noqa: F811
    before, user = waits
    serve(before, reuse_port=1, tunnel=free_address(), target=free_address())
    assert is_reset(user)


def test_users_who_wait_for_a_data_connection_are_served_by_the_next_client(serve, connect):  # noqa: F811
    before = serve()
    client = connect(before).join().known()
    assert is_served(connect(before, "user"), client)
    waiting = connect(before, "user")
    wait_until(lambda: before.counters.tcp_exchanges == 2)
    client.control.close()
    after = serve(before, semaphore_limit=7, data_port=before.data)
    assert is_served(waiting, connect(after).join())


def test_users_who_are_here_count_among_those_of_their_address(serve, connect):  # noqa: F811
    before = serve(users_per_address=1)
    client = connect(before).join().known()
    user = connect(before, "user")
    user.sendall(b"question")
    data, _ = client.launched()
    with data:
        assert read_exactly(data, 8) == b"question"
        after = serve(before, users_per_address=1, semaphore_limit=7)
        assert is_reset(connect(after, "user"))
        user.close()
    wait_until(lambda: not len(before.server.exchanges))
    assert is_served(connect(after, "user"), connect(after).join())


def test_who_is_kept_out_for_wrong_proofs_stays_out(serve):  # noqa: F811
    before = serve()
    for _ in range(before.server.config.limits.penalty_after + 1):
        before.server.penalties.report(ELSEWHERE)
    after = serve(before, semaphore_limit=7)
    assert after.server.penalties.keeps_out(ELSEWHERE)


def test_udp_sessions_end_and_the_next_datagram_begins_one_there(serve):  # noqa: F811
    before = serve(network="udp")
    with datagram_user(before) as user:

        def asks(running):
            """Be a client with UDP, whom the user's datagram comes to; give what it came by."""
            client = V2Client(running, b"//?v=2&c=udp#hello\n").join()
            user.send(b"question")
            data, _ = client.launched()
            assert read_exactly(data, 10) == b"\0\x08question"
            return client, data

        client, data = asks(before)
        with closing(client), data:
            after = serve(before, network="udp", semaphore_limit=7)
            wait_until(lambda: not len(before.server.exchanges))
        client, data = asks(after)
        with closing(client), data:
            assert len(after.server.exchanges) == 1
