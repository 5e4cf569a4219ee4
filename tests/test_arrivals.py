from unittest.mock import Mock

import gevent
import pytest
from support import wait_until

from nodepass_gevent.arrivals import Arrivals, Crowd, turn


class Waiting:
    """What waits at a socket: each call of ``take`` takes one, and where there is none it is BlockingIOError."""

    def __init__(self):
        self.left = self.calls = self.turn = 0
        self.crowd = Crowd()

    def arrive(self, count, *, turns_later):
        """Let so many come, and then be taken, after so many turns of the event loop; give how many were taken."""
        self.turn += turns_later
        self.left += count
        before = self.left
        self.calls = 0
        self.crowd.take(self.take, 64)
        return before - self.left

    def take(self):
        self.calls += 1
        if not self.left:
            raise BlockingIOError
        self.left -= 1


@pytest.fixture
def waiting(monkeypatch):
    waiting = Waiting()
    monkeypatch.setattr("nodepass_gevent.arrivals.turn", lambda: waiting.turn)
    return waiting


def test_the_number_of_a_turn_grows_when_the_event_loop_looks_for_arrivals():
    before = turn()
    gevent.sleep(0)  # others have their turn, and no descriptor is looked at
    assert turn() == before
    gevent.sleep(0.001)
    assert turn() > before


def test_who_comes_alone_is_taken_and_nobody_else_is_asked_for(waiting):
    for _ in range(3):
        assert waiting.arrive(1, turns_later=2) == 1
        assert waiting.calls == 1


def test_what_is_left_behind_the_first_is_taken_in_the_next_turn_to_the_last(waiting):
    assert waiting.arrive(5, turns_later=2) == 1
    assert waiting.arrive(0, turns_later=1) == 4


def test_a_crowd_is_expected_until_only_one_has_come(waiting):
    waiting.arrive(2, turns_later=2)
    assert waiting.arrive(2, turns_later=1) == 3
    assert waiting.arrive(2, turns_later=5) == 2
    assert waiting.arrive(1, turns_later=5) == 1 and waiting.calls == 2
    assert waiting.arrive(1, turns_later=5) == 1 and waiting.calls == 1


def test_of_a_crowd_no_more_are_taken_than_there_may_be_and_the_others_the_next_time(waiting):
    waiting.arrive(2, turns_later=2)
    waiting.arrive(1, turns_later=1)
    waiting.left = 5
    waiting.crowd.take(waiting.take, 3)
    assert waiting.left == 2
    assert waiting.arrive(0, turns_later=5) == 2


def test_where_nothing_waits_nothing_is_taken(waiting):
    assert waiting.arrive(0, turns_later=5) == 0


def test_an_error_is_the_callers_and_the_others_are_taken_the_next_time(waiting):
    waiting.left = 3
    with pytest.raises(OSError, match="no descriptor"):
        waiting.crowd.take(Mock(side_effect=OSError("no descriptor")), 64)
    assert waiting.arrive(0, turns_later=1) == 3


class Watcher:
    """A watcher that tells of an arrival when a test says so, in the event loop."""

    callback = None

    def start(self, callback):
        self.callback = callback

    def stop(self):
        self.callback = None

    def tell(self):
        gevent.get_hub().loop.run_callback(self.callback)
        gevent.idle()


def test_arrivals_are_taken_until_it_is_enough_and_may_be_taken_again(spawn):
    watcher, answers = Watcher(), [True, True, False]
    arrivals = Arrivals(watcher.start, watcher.stop, lambda: answers.pop(0))
    for _ in (1, 2):
        answers[:] = [True, True, False]
        running = spawn(arrivals.run)
        wait_until(lambda: watcher.callback)
        watcher.tell()
        watcher.tell()
        assert not running.ready()
        watcher.tell()
        assert running.successful() and watcher.callback is None


def test_an_error_of_what_takes_is_raised_where_it_is_waited_for(spawn):
    watcher = Watcher()
    arrivals = Arrivals(watcher.start, watcher.stop, lambda: 1 // 0)

    def run():
        with pytest.raises(ZeroDivisionError):
            arrivals.run()

    running = spawn(run)
    wait_until(lambda: watcher.callback)
    watcher.tell()
    assert running.successful() and watcher.callback is None


def test_what_is_watched_no_more_is_an_error_behind_what_was_there(spawn):
    watcher, taken = Watcher(), []

    def run():
        with pytest.raises(OSError, match="Cannot allocate memory"):
            Arrivals(watcher.start, watcher.stop, lambda: not taken.append(1), lambda: len(taken) < 2).run()

    running = spawn(run)
    wait_until(lambda: watcher.callback)
    watcher.tell()
    assert not running.ready()
    watcher.tell()
    assert running.successful() and len(taken) == 2


def test_who_is_killed_takes_no_more(spawn):
    watcher = Watcher()
    running = spawn(Arrivals(watcher.start, watcher.stop, lambda: True).run)
    wait_until(lambda: watcher.callback)
    running.kill()
    assert watcher.callback is None
