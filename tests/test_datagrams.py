"""Datagrams at the ingress: exchanges of one, and the table of sessions."""

import errno
import os
import select
import time
from unittest.mock import Mock

import gevent
import pytest
from exchanges import ID, LIMIT, SHORT_S, FakeLink, happened
from support import bounded, is_reset, read_all, read_exactly, wait_until

from nodepass_gevent import opening
from nodepass_gevent.errors import LaunchFailed
from nodepass_gevent.frames import MAX_DATAGRAM, format_frame


def test_a_datagram_is_launched_and_answered(ingress):
    side = ingress()
    client = side.add_data()
    side.datagram(b"question")
    assert read_all(client) == b"question"  # and a half-close behind it
    assert side.link.sent == [b"//0a1b2c3d#2\n"]
    client.sendall(b"an ans")
    gevent.idle()
    client.sendall(b"wer")
    client.close()
    assert side.counted == {"udp_exchanges": 1, "datagrams_up": 1, "bytes_up": 8, "datagrams_down": 1, "bytes_down": 9}
    assert side.answers == [b"an answer"]


def test_a_launch_goes_before_its_datagram_so_that_its_client_need_not_look_twice(ingress):
    side = ingress()
    client = side.add_data()
    side.datagram(b"question")
    assert side.link.sent == [b"//0a1b2c3d#2\n"] and is_quiet(client)
    assert read_all(client) == b"question"


@pytest.mark.parametrize("capabilities", [(), (b"udp",)])
def test_a_datagram_for_which_there_is_no_memory_is_dropped_and_leaves_nothing(ingress, monkeypatch, capabilities):
    side, user = ingress(*capabilities), User("a")
    taken = side.add_data()
    for number in range(1, 4):  # more than there are places
        with monkeypatch.context() as without:
            without.setattr(side.exchanges, "spawn", Mock(side_effect=MemoryError))
            with pytest.raises(MemoryError):
                side.ingress.udp.datagram(b"question", user)
        assert side.counters.datagrams_dropped_busy == number and side.entrance.inside == 0
        if not capabilities:
            assert is_reset(taken)
            taken = side.add_data()
    side.ingress.udp.datagram(b"another", user)
    assert taken.recv(9)[-7:] == b"another"


def is_quiet(sock):
    """Whether nothing has come; does not switch."""
    return not select.select([sock.fileno()], [], [], 0)[0]


def test_datagrams_wait_in_their_turn_while_no_data_connection_is_ready(ingress):
    side = ingress()
    side.datagram(b"first")
    side.datagram(b"second")
    gevent.idle()
    assert not side.link.sent
    for id, datagram in ((b"0000000a", b"first"), (b"0000000b", b"second")):
        client = side.add_data(id)
        assert read_all(client) == datagram
        client.close()
    assert side.link.sent == [b"//0000000a#2\n", b"//0000000b#2\n"]


@pytest.mark.parametrize("size", [0, LIMIT + 1, 65507])
def test_an_empty_or_oversized_datagram_is_dropped_and_counted(size, ingress):
    side = ingress()
    side.add_data()
    side.datagram(bytes(size))
    assert side.counted == {"datagrams_dropped_size": 1}
    assert len(side.link.pool) == 1


def test_datagrams_and_answers_of_the_greatest_size_arrive_whole(ingress):
    side = ingress()
    client = side.add_data()
    datagram, answer = os.urandom(LIMIT), os.urandom(LIMIT)
    side.datagram(datagram)
    assert read_all(client) == datagram
    client.sendall(answer)
    client.close()
    counted = {"datagrams_up": 1, "datagrams_down": 1, "bytes_up": LIMIT, "bytes_down": LIMIT}
    assert side.counted == {"udp_exchanges": 1, **counted}
    assert side.answers == [answer]


def test_datagrams_take_half_of_the_slots_at_most(ingress):
    side = ingress(semaphore_limit=4)
    clients = [side.add_data(id) for id in (b"0000000a", b"0000000b", b"0000000c")]
    for datagram in (b"first", b"second", b"third"):
        side.datagram(datagram)
    assert happened(side.counters) == {"udp_exchanges": 2, "datagrams_dropped_busy": 1}
    assert side.exchanges.free_count() == 2
    assert read_all(clients[0]) == b"first"
    clients[0].close()
    wait_until(lambda: side.exchanges.free_count() == 3)
    side.datagram(b"fourth")  # the slot is free again
    assert read_all(clients[2]) == b"fourth"


@pytest.mark.parametrize("capabilities", [(), (b"udp",)])
def test_a_datagram_for_which_no_slot_is_left_is_dropped_and_counted(ingress, capabilities):
    side = ingress(*capabilities, semaphore_limit=2)
    for _ in range(2):
        side.user()
    side.datagram(b"question")
    assert happened(side.counters) == {"tcp_exchanges": 2, "datagrams_dropped_busy": 1}


def test_with_a_single_slot_a_datagram_may_have_it(ingress):
    side = ingress(semaphore_limit=1)
    client = side.add_data()
    side.datagram(b"question")
    assert read_all(client) == b"question"


def test_a_datagram_whose_answer_never_comes_is_given_up(ingress):
    side = ingress(udp_read_timeout_s=SHORT_S)
    client = side.add_data()
    side.datagram(b"question")
    assert read_all(client) == b"question"
    assert side.counted == {"udp_exchanges": 1, "datagrams_up": 1, "bytes_up": 8, "datagrams_unanswered": 1}


def test_an_end_of_stream_without_an_answer_frees_the_slot(ingress):
    side = ingress()
    client = side.add_data()
    side.datagram(b"question")
    assert read_all(client) == b"question"
    client.close()
    assert side.counted == {"udp_exchanges": 1, "datagrams_up": 1, "bytes_up": 8, "datagrams_unanswered": 1}
    assert side.answers == []


def test_a_datagram_for_which_no_data_connection_comes_is_unanswered(ingress):
    side = ingress(udp_read_timeout_s=SHORT_S)
    side.datagram(b"question")
    assert side.counted == {"udp_exchanges": 1, "datagrams_unanswered": 1}


def test_a_datagram_without_a_client_is_unanswered(ingress):
    side = ingress()
    side.link = None
    side.datagram(b"question")
    assert side.counted == {"datagrams_unanswered": 1}


def test_an_answer_that_is_too_long_is_dropped_and_counted(ingress):
    side = ingress()
    client = side.add_data()
    side.datagram(b"question")
    assert read_all(client) == b"question"
    client.sendall(bytes(LIMIT + 1))
    counted = {
        "udp_exchanges": 1,
        "datagrams_up": 1,
        "bytes_up": 8,
        "datagrams_dropped_size": 1,
        "datagrams_unanswered": 1,
    }
    assert side.counted == counted
    assert side.answers == []


# Sessions


class User:
    """A user as the public socket names it: a reply that is equal for all of its datagrams."""

    sender = ("192.0.2.1", 443)

    def __init__(self, name):
        self.name = name
        self.answers = []

    def __call__(self, datagram):
        self.answers.append(bytes(datagram))

    def __eq__(self, other):
        return self.name == other.name

    def __hash__(self):
        return hash(self.name)


@pytest.fixture
def framed(ingress):
    """Make an ingress whose peer has UDP sessions."""
    return lambda **settings: ingress(opening.UDP, **settings)


def frames(*datagrams):
    return b"".join(map(format_frame, datagrams))


def test_all_datagrams_of_a_user_go_through_one_data_connection_and_all_answers_come_back(framed):
    side, user = framed(), User("a")
    client = side.add_data()
    for datagram in (b"one", b"", b"three"):
        side.ingress.udp.datagram(datagram, user)
    assert read_exactly(client, 14) == frames(b"one", b"", b"three")
    assert side.link.sent == [b"//0a1b2c3d#3\n"]
    client.sendall(frames(b"first", b"", b"third", b"fourth"))
    wait_until(lambda: len(user.answers) == 4)
    assert user.answers == [b"first", b"", b"third", b"fourth"]
    client.close()
    assert side.counted == {
        "udp_sessions": 1, "datagrams_up": 3, "datagrams_down": 4, "bytes_up": 8, "bytes_down": 16
    }  # fmt: skip


def test_each_user_has_a_session_of_its_own(framed):
    side, users = framed(), [User("a"), User("b")]
    clients = [side.add_data(id) for id in (b"0000000a", b"0000000b")]
    for user in (*users, *users):
        side.ingress.udp.datagram(user.name.encode(), user)
    for client, user in zip(clients, users, strict=True):
        assert read_exactly(client, 6) == frames(user.name.encode()) * 2
        client.sendall(frames(b"for " + user.name.encode()))
    wait_until(lambda: users[0].answers and users[1].answers)
    assert [user.answers for user in users] == [[b"for a"], [b"for b"]]


def test_what_a_session_carries_counts_while_it_does_and_what_it_drops_at_its_end(framed):
    class Deaf(User):
        def __call__(self, datagram):
            super().__call__(datagram)
            if datagram == b"lost":
                raise OSError(errno.ENOBUFS, "no buffer space available")

    side, user = framed(), Deaf("a")
    client = side.add_data()
    side.ingress.udp.datagram(b"question", user)
    side.ingress.udp.datagram(bytes(MAX_DATAGRAM + 1), user)
    assert read_exactly(client, 10) == frames(b"question")
    client.sendall(frames(b"lost", b"answer"))
    wait_until(lambda: user.answers == [b"lost", b"answer"])
    carried = {"datagrams_up": 1, "bytes_up": 8, "datagrams_down": 1, "bytes_down": 6}
    assert carried.items() <= side.counters.total().items()
    client.close()
    dropped = {"datagrams_dropped_size": 1, "datagrams_dropped_network": 1}
    assert side.counted == {"udp_sessions": 1, **carried, **dropped}


def test_a_session_takes_datagrams_longer_than_the_limit_of_v1(framed):
    side, user = framed(), User("a")
    client = side.add_data()
    side.ingress.udp.datagram(bytes(65507), user)
    assert read_exactly(client, 65509) == frames(bytes(65507))


def test_datagrams_wait_for_a_data_connection_without_holding_up_the_listener(framed):
    side, users = framed(), [User("a"), User("b")]
    side.ingress.udp.datagram(b"one", users[0])
    gevent.idle()
    side.ingress.udp.datagram(b"two", users[0])
    side.ingress.udp.datagram(b"three", users[1])
    gevent.idle()
    assert side.link.sent == []
    first = side.add_data(b"0000000a")
    assert read_exactly(first, 10) == frames(b"one", b"two")
    assert read_exactly(side.add_data(b"0000000b"), 7) == frames(b"three")


def test_a_session_for_which_no_data_connection_comes_is_unanswered(framed):
    side = framed(pool_wait_s=SHORT_S)
    for _ in range(3):
        side.ingress.udp.datagram(b"question", User("a"))
    assert side.counted == {"datagrams_unanswered": 3}


@pytest.mark.parametrize("peer", [[opening.UDP], []])
def test_a_user_whose_peer_is_lost_while_it_waits_is_carried_as_the_next_peer_does_it(framed, peer):
    side, user = framed(), User("a")
    side.ingress.udp.datagram(b"question", user)
    gevent.idle()
    lost, side.link = side.link, FakeLink(*peer)
    lost.pool.close()
    client = side.add_data()
    question = read_exactly(client, 10) if peer else read_all(client)
    assert question == (frames(b"question") if peer else b"question")
    client.sendall(frames(b"answer") if peer else b"answer")
    client.close()
    wait_until(lambda: user.answers == [b"answer"])
    assert side.link.sent == ([b"//0a1b2c3d#3\n"] if peer else [b"//0a1b2c3d#2\n"])


def test_the_end_of_a_session_frees_everything_and_the_next_datagram_opens_another(framed):
    side, user = framed(udp_session_timeout_s=SHORT_S), User("a")
    for id in (b"0000000a", b"0000000b"):
        client = side.add_data(id)
        side.ingress.udp.datagram(b"question", user)
        assert read_all(client) == frames(b"question")  # and an end of stream: it is idle
        client.close()
        wait_until(lambda: len(side.exchanges) == 0)
    assert side.counted == {"udp_sessions": 2, "datagrams_up": 2, "bytes_up": 16}


def test_a_client_that_breaks_the_frames_loses_the_session(framed):
    side, user = framed(), User("a")
    client = side.add_data()
    side.ingress.udp.datagram(b"question", user)
    assert read_exactly(client, 10) == frames(b"question")
    client.sendall(b"\xff\xff" + bytes(100))
    assert side.counted == {"udp_sessions": 1, "datagrams_up": 1, "bytes_up": 8, "exchanges_failed": 1}
    assert user.answers == []


def test_sessions_take_half_of_the_slots_at_most(framed, caplog):
    side = framed(semaphore_limit=4)
    clients = [side.add_data(b"%08x" % number) for number in range(4)]
    for name in "abcd":
        side.ingress.udp.datagram(name.encode(), User(name))
    assert [read_exactly(client, 3) for client in clients[:2]] == [frames(b"a"), frames(b"b")]
    assert happened(side.counters) == {"udp_sessions": 2, "datagrams_dropped_busy": 2}
    assert caplog.messages == ["no place is left for datagrams of further users: of 4 (semaphore-limit) UDP has half"]
    side.ingress.udp.datagram(b"again", User("a"))
    assert read_exactly(clients[0], 7) == frames(b"again")


def test_when_all_places_are_taken_the_session_that_was_idle_makes_room(framed):
    side = framed(semaphore_limit=4)
    clients = [side.add_data(b"%08x" % number) for number in range(3)]
    for name in "ab":
        side.ingress.udp.datagram(name.encode(), User(name))
    assert [read_exactly(client, 3) for client in clients[:2]] == [frames(b"a"), frames(b"b")]
    end = time.monotonic() + 1.0
    while time.monotonic() <= end:  # a second without a datagram of b
        side.ingress.udp.datagram(b"a", User("a"))
        gevent.sleep(0.05)
    side.ingress.udp.datagram(b"c", User("c"))
    assert read_exactly(clients[2], 3) == frames(b"c")
    assert read_all(clients[1]) == b""
    side.ingress.udp.datagram(b"still here", User("a"))
    wait_until(lambda: clients[0].recv(65536).endswith(b"still here"))


def test_who_is_one_too_many_of_an_address_takes_nobodys_place(framed, monkeypatch):
    monkeypatch.setattr("nodepass_gevent.datagrams.EVICTABLE_S", 0)
    side = framed(semaphore_limit=2)
    client, user = side.add_data(), User("a")
    side.ingress.udp.datagram(b"one", user)
    assert read_exactly(client, 5) == frames(b"one")
    side.entrance.full = True
    side.ingress.udp.datagram(b"x", User("b"))
    side.ingress.udp.datagram(b"two", user)
    assert read_exactly(client, 5) == frames(b"two")
    assert side.counters.datagrams_kept_out == 1


def test_users_who_wait_for_a_data_connection_keep_their_places(framed):
    side = framed(semaphore_limit=4)
    for name in "ab":
        side.ingress.udp.datagram(name.encode(), User(name))
    gevent.sleep(1.05)  # idle for longer than one that is served might be
    side.ingress.udp.datagram(b"c", User("c"))
    gevent.idle()
    assert len(side.exchanges) == 2
    assert happened(side.counters) == {"datagrams_dropped_busy": 1}


def test_a_session_tells_who_its_user_is_where_that_is_agreed(ingress):
    side = ingress(opening.UDP, opening.FROM)
    client = side.add_data()
    side.ingress.udp.datagram(b"question", User("a"))
    assert read_exactly(client, 10) == frames(b"question")
    assert side.link.sent == [b"//0a1b2c3d?from=192.0.2.1%3A443#3\n"]


def test_a_session_that_is_answered_goes_on_whatever_its_peer_says(framed):
    side, user = framed(), User("a")
    client = side.add_data()
    side.ingress.udp.datagram(b"question", user)
    assert read_exactly(client, 10) == frames(b"question")
    client.sendall(frames(b"answer"))
    wait_until(lambda: user.answers == [b"answer"])
    assert not side.link.launched[ID].abort(LaunchFailed("refused"))
    side.ingress.udp.datagram(b"more", user)
    assert read_exactly(client, 6) == frames(b"more")


def test_a_refused_user_is_dropped_for_a_while_and_then_served_again(framed):
    side, user = framed(), User("a")
    client = side.add_data()
    side.ingress.udp.datagram(b"question", user)
    assert read_exactly(client, 10) == frames(b"question")
    assert side.link.launched[ID].abort(LaunchFailed("refused"))
    assert read_all(client) == b""
    side.ingress.udp.datagram(b"dropped", user)
    assert len(side.link.sent) == 1
    wait_until(lambda: len(side.exchanges) == 0)
    again = side.add_data(b"0000000b")
    side.ingress.udp.datagram(b"question", user)
    assert read_exactly(again, 10) == frames(b"question")
    assert (side.counters.datagrams_dropped_queue, side.counters.launches_failed) == (1, 1)
    assert ID not in side.link.launched


def test_while_the_process_ends_a_session_stays_only_as_long_as_something_moves(framed):
    side, user = framed(udp_session_timeout_s=3600), User("a")
    client = side.add_data()
    side.ingress.udp.datagram(b"question", user)
    assert read_exactly(client, 10) == frames(b"question")
    side.exchanges.draining = True
    with bounded(3):
        assert read_all(client) == b""


class FakePublic:
    """A public socket that nobody sends to."""

    def __init__(self):
        self.closed = False

    def serve(self, handle):
        gevent.get_hub().switch()

    def close(self):
        self.closed = True


@pytest.fixture
def speaking(framed, spawn):
    """A user in the middle of a session: the side, the user, the public socket, who receives on it, the client."""
    side, user, public = framed(), User("a"), FakePublic()
    serving = spawn(side.ingress.udp.serve, public)
    client = side.add_data()
    side.ingress.udp.datagram(b"question", user)
    assert read_exactly(client, 10) == frames(b"question")
    return side, user, public, serving, client


def test_the_public_socket_stays_open_until_the_last_session_and_takes_no_new_user(speaking):
    side, user, public, serving, client = speaking
    serving.kill()
    side.ingress.udp.datagram(b"more", user)
    side.ingress.udp.datagram(b"hello", User("b"))
    assert read_exactly(client, 6) == frames(b"more")
    assert not public.closed
    client.sendall(frames(b"answer"))
    client.close()
    wait_until(lambda: public.closed)
    assert user.answers == [b"answer"]
    assert side.counters.datagrams_dropped_busy == 1


def test_the_public_socket_stays_open_until_the_last_exchange_of_one_datagram(ingress, spawn):
    side, public, users = ingress(), FakePublic(), [User("a"), User("b")]
    serving = spawn(side.ingress.udp.serve, public)
    clients = [side.add_data(b"0000000%d" % number) for number in range(2)]
    for user in users:
        side.ingress.udp.datagram(b"question", user)
    assert [read_all(client) for client in clients] == [b"question"] * 2
    serving.kill()
    for client, user in zip(clients, users, strict=True):
        assert not public.closed
        client.sendall(b"answer")
        client.close()
        wait_until(lambda user=user: user.answers == [b"answer"])
        gevent.idle()
    assert public.closed


def test_sessions_that_are_ended_let_the_public_socket_go_at_once(speaking):
    side, _, public, serving, _ = speaking
    serving.kill()
    assert not public.closed
    side.ingress.udp.end("it is to be bound anew")
    assert public.closed


def test_a_session_that_is_ended_while_it_waits_for_a_client_keeps_no_place(framed):
    side = framed()
    side.ingress.udp.datagram(b"question", User("a"))
    gevent.idle()
    assert side.entrance.inside == 1
    side.ingress.udp.end("the tunnel is given new settings")
    assert side.entrance.inside == 0
    client = side.add_data()
    assert read_all(client) == b""
    side.ingress.udp.datagram(b"another", User("a"))
    assert side.entrance.inside == 1
    side.ingress.udp.end("the test is over")


def test_a_session_that_is_ended_while_it_waits_leaves_its_users_next_one_alone(framed):
    side, user = framed(), User("a")
    side.ingress.udp.datagram(b"question", user)
    gevent.idle()
    side.ingress.udp.end("the tunnel is given new settings")
    side.ingress.udp.datagram(b"another", user)
    gevent.idle()
    lost, side.link = side.link, FakeLink()  # that comes has no sessions
    lost.pool.close()
    for id in (b"0000000a", b"0000000b"):
        client = side.add_data(id)
        client.sendall(b"answer to " + read_all(client))
        client.close()
    wait_until(lambda: sorted(user.answers) == [b"answer to another", b"answer to question"])
    assert side.counted.keys() == {"udp_exchanges", "datagrams_up", "datagrams_down", "bytes_up", "bytes_down"}
    assert side.entrance.inside == 0


def test_where_receiving_has_ended_by_itself_nobody_counts_as_leaving(framed, spawn):
    side, failed = framed(), FakePublic()
    failed.serve = Mock(side_effect=gevent.GreenletExit)
    client = side.add_data()
    side.ingress.udp.datagram(b"question", User("a"))
    assert read_exactly(client, 10) == frames(b"question")
    side.ingress.udp.serve(failed)
    side.ingress.udp.datagram(b"hello", User("b"))
    gevent.idle()
    assert side.counters.datagrams_dropped_busy == 0


def test_the_public_socket_is_closed_at_once_when_there_is_no_session(framed, spawn):
    side, public = framed(), FakePublic()
    serving = spawn(side.ingress.udp.serve, public)
    gevent.idle()
    serving.kill()
    assert public.closed


def test_a_killed_session_is_a_reset_for_the_client(framed):
    side, user = framed(), User("a")
    client = side.add_data()
    side.ingress.udp.datagram(b"question", user)
    assert read_exactly(client, 10) == frames(b"question")
    side.exchanges.kill()
    assert is_reset(client)
