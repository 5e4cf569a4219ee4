import errno
import os
import select
import socket
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import gevent
import pytest
from gevent.event import Event
from listeners import dial, keepalives, keeps_alive, refuse_to_pause
from support import LIMITS, LOOPBACK, endpoint_of, out_of_descriptors, wait_until

from nodepass_gevent import accepting, net
from nodepass_gevent.config import Address

SO_GET_FILTER = 26  # <asm-generic/socket.h>


def no_rest():
    pass


# serve_last


@pytest.fixture
def shared(no_leaks):
    """Make listeners on one port."""
    with ExitStack() as stack:
        first = stack.enter_context(closing(net.listen(LOOPBACK, LIMITS, shared=True)))
        address = Address("127.0.0.1", first.getsockname()[1])
        yield first, lambda: stack.enter_context(closing(net.listen(address, LIMITS, shared=True)))


def calling(sock, stack):
    """Begin to connect, and do not wait for it."""
    caller = stack.enter_context(closing(net.RawSocket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)))
    caller.connect_ex(sock.getsockname())
    return caller


def is_through(caller):
    """Whether a connect has come to its end."""
    return bool(select.select([], [caller], [], 0)[1])


def test_a_shared_port_is_bound_several_times_and_each_listener_has_its_callers(shared, accepted):
    first, listen = shared
    listeners = first, listen()
    with ExitStack() as stack:
        for _ in range(64):
            stack.enter_context(dial(first))
        counts = []
        for listener in listeners:
            accepting.serve_last(listener, accepted.append, no_rest)
            counts.append(len(accepted) - sum(counts))
    assert sum(counts) == 64 and min(counts) > 8


def test_who_waits_in_a_queue_is_accepted_before_the_end_while_there_is_room(listener, accepted):
    def wait_in_vain_for_the_last():
        if len(accepted) == 69:
            raise TimeoutError

    with ExitStack() as stack:
        for _ in range(70):
            stack.enter_context(dial(listener))
        with pytest.raises(TimeoutError):
            accepting.serve_last(listener, accepted.append, wait_in_vain_for_the_last)
        assert len(accepted) == 69
        accepting.serve_last(listener, accepted.append, no_rest)
        assert len(accepted) == 70


def test_who_waits_in_a_queue_at_the_end_is_accepted_although_there_was_no_memory_for_another(listener, accepted):
    def handle(caller):
        accepted.append(caller)
        if len(accepted) == 1:
            raise MemoryError

    with dial(listener), dial(listener):
        accepting.serve_last(listener, handle, no_rest)
        assert len(accepted) == 2


def test_who_waits_in_a_queue_at_the_end_is_given_up_where_no_descriptor_is_left(listener, accepted):
    with dial(listener), out_of_descriptors():
        accepting.serve_last(listener, accepted.append, no_rest)
    assert not accepted


def test_a_kernel_that_has_no_filters_loses_nobody_who_waits(listener, accepted, monkeypatch):
    monkeypatch.setattr(accepting, "_SO_ATTACH_FILTER", 9999)
    with dial(listener):
        accepting.serve_last(listener, accepted.append, no_rest, 60)
        assert len(accepted) == 1


def test_who_begins_to_call_a_listener_at_its_end_is_answered_by_another_one(shared, accepted, spawn):
    first, listen = shared
    second = listen()
    with ExitStack() as stack:
        last = spawn(accepting.serve_last, second, accepted.append, no_rest, 0.1)
        gevent.sleep(0)
        callers = [calling(first, stack) for _ in range(32)]
        unanswered = [caller for caller in callers if not is_through(caller)]
        assert 0 < len(unanswered) < 32
        wait_until(last.ready)
        assert not accepted
        second.close()
        wait_until(lambda: all(map(is_through, callers)))  # their SYN is sent again after a second
        assert not any(caller.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) for caller in callers)
        accepting.serve_last(first, accepted.append, no_rest)
        assert len(accepted) == 32


def test_who_is_in_the_middle_of_calling_a_listener_at_its_end_is_accepted(listener, accepted, spawn):
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 5)  # a handshake ends with a first byte
    with dial(listener) as caller:
        last = spawn(accepting.serve_last, listener, accepted.append, no_rest, 5)
        gevent.sleep(0)
        caller.sendall(b"question")
        wait_until(lambda: accepted)
        last.kill()
        assert accepted[0].recv(8) == b"question"
        assert not accepted[0].socket.getsockopt(socket.SOL_SOCKET, SO_GET_FILTER, 0)


# serve


def test_whoever_connects_is_handed_on_with_its_address(listener, accepted, spawn):
    spawn(accepting.serve, listener, accepted.append, refuse_to_pause)
    with dial(listener) as user:
        wait_until(lambda: accepted)
        assert accepted[0].peer == user.getsockname()
        assert not os.get_blocking(accepted[0].fileno())
        assert str(accepted[0]) == "{}:{}".format(*user.getsockname())
        user.sendall(b"hello")
        assert accepted[0].recv_exactly(5) == b"hello"


def test_more_callers_than_one_batch_are_all_accepted(listener, accepted, spawn):
    with ExitStack() as users:
        for _ in range(2 * accepting.ACCEPT_BATCH + 1):
            users.enter_context(dial(listener))
        spawn(accepting.serve, listener, accepted.append, refuse_to_pause)
        wait_until(lambda: len(accepted) == 2 * accepting.ACCEPT_BATCH + 1)


def test_behind_each_batch_of_a_crowd_comes_a_rest(listener, accepted, spawn, monkeypatch):
    monkeypatch.setattr(accepting, "ACCEPT_BATCH", 2)
    rests = []
    with ExitStack() as users:
        for _ in range(5):
            users.enter_context(dial(listener))
        serve = partial(accepting.serve, room=lambda: 9, rest=lambda: rests.append(len(accepted)))
        spawn(serve, listener, accepted.append, refuse_to_pause)
        wait_until(lambda: len(accepted) == 5)
    assert rests == [2, 4]


def test_accepting_stops_where_there_is_no_room_and_goes_on_when_there_is(listener, accepted, spawn):
    places, freed, rests = [2], Event(), []

    def room():
        return places[0] - len(accepted)

    def rest():
        rests.append(len(accepted))
        if not room():
            freed.wait()

    with ExitStack() as users:
        for _ in range(5):
            users.enter_context(dial(listener))
        spawn(accepting.serve, listener, accepted.append, refuse_to_pause, room, rest)
        wait_until(lambda: rests and rests[-1] == 2)
        gevent.idle()
        assert len(accepted) == 2
        places[0] = 5
        freed.set()
        wait_until(lambda: len(accepted) == 5)


def test_the_accept_loop_outlives_a_lack_of_descriptors(listener, accepted, spawn):
    pauses = []
    with dial(listener), dial(listener):
        with out_of_descriptors():
            loop = spawn(accepting.serve, listener, accepted.append, pauses.append)
            wait_until(lambda: len(pauses) == 2)
            assert not accepted
        wait_until(lambda: len(accepted) == 2)
    assert {exc.errno for exc in pauses} == {errno.EMFILE}
    assert not loop.ready()


def test_the_accept_loop_outlives_a_lack_of_memory(listener, accepted, spawn):
    pauses = []
    no_memory = MemoryError("no memory for this one")

    def handle(caller):
        accepted.append(caller)
        if len(accepted) == 1:
            raise no_memory

    with dial(listener), dial(listener):
        spawn(accepting.serve, listener, handle, pauses.append)
        wait_until(lambda: len(accepted) == 2)
    assert pauses == [no_memory]


def test_a_listener_that_the_event_loop_lacks_the_memory_to_watch_is_not_deaf_for_ever(listener, accepted, spawn, deaf):
    pauses, watcher = [], deaf(accepting)
    spawn(accepting.serve, listener, accepted.append, pauses.append)
    wait_until(lambda: watcher.watches == 2)
    with dial(listener):
        wait_until(lambda: accepted)
    assert [exc.errno for exc in pauses] == [errno.ENOMEM]


def test_a_caller_for_whom_there_is_no_memory_leaves_no_descriptor(listener, monkeypatch):
    with dial(listener) as caller:
        monkeypatch.setattr(accepting, "RawSocket", Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            accepting._accept(listener)
        assert caller.recv(1) == b""


def test_out_of_descriptors_the_accept_loop_pauses_and_does_not_spin(listener, accepted, spawn):
    pauses = []
    with dial(listener), out_of_descriptors():
        spawn(accepting.serve, listener, accepted.append, pauses.append)
        wait_until(lambda: pauses)
        for _ in range(100):
            gevent.idle()
        assert len(pauses) == 1


def test_the_pauses_of_the_accept_loop_follow_the_settings(listener, accepted, spawn):
    pauses = []
    limits = replace(LIMITS, accept_pause_s=0.001, accept_pause_longest_s=0.002)
    with dial(listener), out_of_descriptors():
        spawn(partial(accepting.serve, limits=limits), listener, accepted.append, pauses.append)
        wait_until(lambda: len(pauses) == 30)  # with the defaults that takes half a minute


def test_a_caller_who_is_gone_again_is_no_reason_to_pause(listener, accepted, spawn, monkeypatch):
    accept = accepting._accept
    gone = [ConnectionAbortedError(errno.ECONNABORTED, "software caused connection abort")]

    def accept_or_find_gone(listener):
        if gone:
            raise gone.pop()
        return accept(listener)

    monkeypatch.setattr(accepting, "_accept", accept_or_find_gone)
    with dial(listener):
        spawn(accepting.serve, listener, accepted.append, refuse_to_pause)
        wait_until(lambda: accepted)
    assert not gone


def test_after_an_accept_that_works_the_pauses_begin_anew(listener, spawn, monkeypatch):
    monkeypatch.setattr(accepting, "gevent", Mock(wraps=gevent))
    fails = [True, True, True, False, True]
    limits = replace(LIMITS, accept_pause_s=0.001, accept_pause_longest_s=1.0)

    def handle(caller):
        caller.close()
        if fails.pop(0):
            raise MemoryError

    with ExitStack() as users:
        for _ in range(5):
            users.enter_context(dial(listener))
        spawn(partial(accepting.serve, limits=limits), listener, handle, lambda exc: None)
        wait_until(lambda: not fails)
        gevent.sleep(0)
    assert [call.args[0] for call in accepting.gevent.sleep.call_args_list] == [0.001, 0.002, 0.004, 0.001]


def test_the_first_connection_of_an_inherited_listener_has_the_keepalives_of_now(listener, accepted, spawn):
    now = replace(LIMITS, keepalive_idle_s=400, keepalive_interval_s=300)
    spawn(partial(accepting.serve, limits=now), listener, accepted.append, refuse_to_pause)
    gevent.sleep(0)  # it begins
    with net.connect([endpoint_of(listener)], 5, LIMITS):
        wait_until(lambda: accepted)
        idle_s, interval_s = keepalives(accepted[0].socket)
        assert idle_s >= 200 and interval_s >= 150


def test_the_keepalives_of_a_crowd_do_not_come_all_at_once(listener, accepted, spawn, monkeypatch):
    monkeypatch.setattr(accepting, "ACCEPT_BATCH", 2)
    spawn(accepting.serve, listener, accepted.append, refuse_to_pause)
    with ExitStack() as users:
        dialled = []
        for _ in range(50):  # in more than one batch
            dialled.append(users.enter_context(net.connect([endpoint_of(listener)], 5, LIMITS)))
            wait_until(lambda: len(accepted) == len(dialled))
        for streams in (dialled, accepted):
            wait_until(lambda streams=streams: all(keeps_alive(stream.socket) for stream in streams))
            assert len({keepalives(stream.socket) for stream in streams}) > 10
