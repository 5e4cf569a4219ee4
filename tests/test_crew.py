import gevent
import pytest
from gevent.event import Event
from support import wait_until

from nodepass_gevent.crew import SPARE, Crew


@pytest.fixture
def crew():
    crew = Crew()
    yield crew
    crew.kill()
    gevent.idle()


def test_each_function_gets_its_arguments_and_a_greenlet_that_may_block(crew):
    gate, done = Event(), []

    def work(number):
        gate.wait()
        done.append(number)

    for number in range(SPARE + 10):
        crew.spawn(work, number)
    gevent.idle()
    assert not done
    gate.set()
    wait_until(lambda: sorted(done) == list(range(SPARE + 10)))


def test_a_greenlet_that_has_finished_is_used_again(crew):
    used = []
    for _ in range(3):
        crew.spawn(lambda: used.append(gevent.getcurrent()))
        gevent.idle()
    assert len(used) == 3
    assert len(set(used)) == 1


def test_no_more_than_some_wait_for_work(crew):
    used = []
    for _ in range(3 * SPARE):
        crew.spawn(lambda: used.append(gevent.getcurrent()))
    gevent.idle()
    assert sum(not greenlet.dead for greenlet in used) == SPARE


def test_kill_ends_what_runs_and_starts_nothing_more(crew):
    ended, started = [], []

    def work():
        try:
            Event().wait()
        finally:
            ended.append(True)

    crew.spawn(list)
    gevent.idle()
    crew.spawn(work)
    crew.spawn(work)
    gevent.idle()
    crew.spawn(started.append, 1)  # begins only in the next turn
    crew.kill()
    gevent.idle()
    assert ended == [True, True]
    assert not started
