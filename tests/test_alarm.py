import time

import gevent
import pytest
from gevent.event import Event
from support import bounded, wait_until

from nodepass_gevent import alarm as alarms
from nodepass_gevent.alarm import TURN_S, Alarm, soon

SHORT_S, FOREVER_S = 0.05, 3600


@pytest.fixture
def busy(spawn):
    """Give the event loop work without a pause."""

    def work():
        while True:
            gevent.sleep(0)

    spawn(work)


@pytest.mark.parametrize("in_lull", [False, True])
@pytest.mark.usefixtures("busy")
def test_an_alarm_calls_once_when_it_is_time_and_may_be_set_again(in_lull):
    alarm, called = Alarm(SHORT_S, in_lull=in_lull), []
    rung = Event()
    for number in (1, 2):
        begin = time.monotonic()
        alarm.set(lambda: (called.append(time.monotonic()), rung.set()))
        assert alarm.is_set
        with bounded():
            rung.wait()
        rung.clear()
        assert called[-1] - begin > SHORT_S / 2
        gevent.sleep(3 * SHORT_S)
        assert len(called) == number and not alarm.is_set


def test_in_a_lull_nobody_waits_for_the_time():
    alarm, called = Alarm(FOREVER_S, in_lull=True), Event()
    for _ in (1, 2):
        alarm.set(called.set)
        with bounded():
            called.wait()
        called.clear()
        assert not alarm.is_set


def test_in_a_lull_it_calls_once():
    alarm, called = Alarm(FOREVER_S, in_lull=True), []
    alarm.set(lambda: called.append(None))
    wait_until(lambda: called)
    gevent.sleep(SHORT_S)  # there is nothing else to do
    assert len(called) == 1


@pytest.mark.parametrize("in_lull", [False, True])
def test_an_alarm_that_is_closed_calls_nothing(in_lull):
    alarm, called = Alarm(SHORT_S, in_lull=in_lull), []
    alarm.set(lambda: called.append(None))
    alarm.close()
    gevent.sleep(3 * SHORT_S)
    assert not called


def test_a_lull_gives_way_and_then_sees_to_what_has_arrived_before_it_calls(monkeypatch, pair):
    stream, peer = pair()
    alarm, done = Alarm(FOREVER_S, in_lull=True), []
    rung = Event()
    stream.watch(lambda: done.append(stream.recv(1)))

    def others_run():
        monkeypatch.undo()
        peer.sendall(b"x")

    monkeypatch.setattr(alarms.os, "sched_yield", others_run)
    alarm.set(lambda: (done.append("rung"), rung.set()))
    with bounded():
        rung.wait()
    assert done == [b"x", "rung"]


def test_what_is_put_off_is_done_in_its_order_before_anything_that_arrives(pair):
    stream, peer = pair()
    done, arrived = [], Event()
    stream.watch(lambda: (done.append(stream.recv(1)), arrived.set()))
    peer.sendall(b"x")
    for number in range(3):
        soon(done.append, number)
    soon(lambda: soon(done.append, 3))
    with bounded():
        arrived.wait()
    assert done == [0, 1, 2, 3, b"x"]


def test_what_takes_long_lets_arrivals_come_before_the_rest(pair):
    stream, peer = pair()
    done, last = [], Event()
    stream.watch(lambda: done.append(stream.recv(1)))
    peer.sendall(b"x")

    def work():
        done.append("work")
        end = time.monotonic() + 2 * TURN_S
        while time.monotonic() < end:
            pass

    soon(work)
    soon(work)
    soon(last.set)
    with bounded():
        last.wait()
    assert done == ["work", b"x", "work"]


def test_it_is_busy_while_calls_wait_for_their_turn():
    seen = []
    for _ in range(3):
        soon(lambda: seen.append(soon.busy))
    gevent.sleep(0)
    assert seen == [True, True, False]


def test_an_error_is_of_one_call_and_the_others_follow(monkeypatch):
    told, last = [], Event()
    monkeypatch.setattr(gevent.get_hub(), "handle_error", lambda context, kind, *_: told.append(kind))
    soon(lambda: 1 / 0)
    soon(last.set)
    with bounded():
        last.wait()
    soon(last.clear)
    gevent.sleep(0)
    assert told == [ZeroDivisionError] and not last.is_set()


def test_what_there_is_no_memory_for_is_told_and_keeps_nothing_else_back(monkeypatch):
    done = []

    def fail():
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(alarms.gevent, "get_hub", fail)
        with pytest.raises(MemoryError):
            soon(done.append, 1)
    soon(done.append, 2)
    gevent.sleep(0)
    assert done == [2]
