import time

import gevent
import pytest
from gevent.event import Event
from support import bounded

from nodepass_gevent.alarm import Alarm

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


@pytest.mark.parametrize("in_lull", [False, True])
def test_an_alarm_that_is_closed_calls_nothing(in_lull):
    alarm, called = Alarm(SHORT_S, in_lull=in_lull), []
    alarm.set(lambda: called.append(None))
    alarm.close()
    gevent.sleep(3 * SHORT_S)
    assert not called
