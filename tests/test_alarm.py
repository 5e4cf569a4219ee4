import time

import gevent
import pytest
from gevent.event import Event
from support import bounded

from nodepass_gevent.alarm import Alarm, Lull

SHORT_S, FOREVER_S = 0.05, 3600


@pytest.fixture
def busy(spawn):
    """Give the event loop work without a pause."""

    def work():
        while True:
            gevent.sleep(0)

    spawn(work)


@pytest.mark.parametrize("kind", [Alarm, Lull])
@pytest.mark.usefixtures("busy")
def test_an_alarm_calls_once_when_it_is_time_and_may_be_set_again(kind):
    alarm, called = kind(SHORT_S), []
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
    lull, called = Lull(FOREVER_S), Event()
    for _ in (1, 2):
        lull.set(called.set)
        with bounded():
            called.wait()
        called.clear()
        assert not lull.is_set


@pytest.mark.parametrize("kind", [Alarm, Lull])
def test_an_alarm_that_is_closed_calls_nothing(kind):
    alarm, called = kind(SHORT_S), []
    alarm.set(lambda: called.append(None))
    alarm.close()
    gevent.sleep(3 * SHORT_S)
    assert not called
