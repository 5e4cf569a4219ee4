"""How many lines of one kind there are within a window."""

import logging

from nodepass_gevent.log_limit import WINDOW_S, Limit


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def record(text="kind %d", *arguments, name="n", level=logging.INFO, **fields):
    made = logging.LogRecord(name, level, "", 0, text, arguments, None)
    vars(made).update(fields)
    return made


def limited(per_second):
    clock = Clock()
    limit = Limit(clock)
    limit.per_second = per_second
    return limit, clock


def admitted(limit, count, **what):
    return sum(limit.admits(record("kind %d", number, **what)) for number in range(count))


def said(records):
    return [(each.name, each.levelno, each.getMessage(), each.held_back) for each in records]


def test_without_a_limit_all_are_admitted_and_nothing_is_kept():
    limit, _ = limited(0)
    assert admitted(limit, 1000) == 1000
    assert (limit.due_s(), limit.close(everything=True), limit.held) == (None, [], 0)


def test_of_each_kind_as_many_are_admitted_as_the_rate_allows_in_a_window():
    limit, _ = limited(2)
    assert admitted(limit, 30) == 20
    assert admitted(limit, 30, level=logging.WARNING) == 20
    assert admitted(limit, 30, name="m") == 20
    assert limit.admits(record("another kind"))
    assert limit.held == 30


def test_what_was_held_back_is_told_once_with_the_first_of_it_when_the_window_ends():
    limit, clock = limited(1)
    admitted(limit, 15)
    clock.now += WINDOW_S - 0.1
    assert limit.close() == []
    clock.now += 0.1
    assert said(limit.close()) == [("n", logging.INFO, "5 more like it in the last 10 s, the first: kind 10", 5)]
    assert limit.close() == []


def test_after_a_window_the_next_lines_open_another():
    limit, clock = limited(1)
    assert admitted(limit, 30) == 10
    clock.now += WINDOW_S
    limit.close()
    assert admitted(limit, 30) == 10


def test_a_window_in_which_nothing_was_held_back_is_not_told():
    limit, clock = limited(1)
    admitted(limit, 10)
    clock.now += WINDOW_S
    assert limit.close() == [] and limit.due_s() is None


def test_the_time_until_the_oldest_window_ends_is_known():
    limit, clock = limited(1)
    assert limit.due_s() is None
    admitted(limit, 1)
    clock.now += 4
    admitted(limit, 1, name="m")
    assert limit.due_s() == WINDOW_S - 4
    clock.now += 2 * WINDOW_S
    assert limit.due_s() == 0


def test_at_the_end_all_windows_are_closed_with_the_time_that_they_lasted():
    limit, clock = limited(1)
    admitted(limit, 11)
    clock.now += 3
    ((_, _, text, _),) = said(limit.close(everything=True))
    assert text == "1 more like it in the last 3 s, the first: kind 10"


def test_lines_with_an_event_are_not_limited():
    limit, _ = limited(1)
    assert admitted(limit, 100, event="exchange") == 100
    assert limit.due_s() is None


def test_a_rate_that_is_set_later_counts_for_the_window_that_is_open():
    limit, _ = limited(1)
    assert admitted(limit, 20) == 10
    limit.per_second = 2
    assert admitted(limit, 20) == 10
