import gevent
import pytest
from support import bounded

from nodepass_gevent.callers import Caller, Callers, most_candidates
from nodepass_gevent.dialing_pool import DIALS_AT_ONCE


def call(callers, key):
    caller = Caller(key, connection=None)
    return caller, callers.add(caller)


def test_callers_below_the_limit_all_wait():
    callers = Callers(3)
    assert [call(callers, key)[1] for key in "abc"] == [None] * 3
    assert len(callers) == 3


def test_one_too_many_costs_the_longest_waiting_of_the_biggest_crowd_its_place():
    callers = Callers(4)
    honest, _ = call(callers, "honest")
    oldest_of_crowd, _ = call(callers, "crowd")
    call(callers, "crowd")
    call(callers, "crowd")
    newcomer, evicted = call(callers, "newcomer")
    assert evicted is oldest_of_crowd
    assert callers.youngest("newcomer") is newcomer
    assert callers.youngest("honest") is honest
    assert len(callers) == 4


def test_a_crowd_from_one_address_pushes_out_only_itself():
    callers = Callers(8)
    honest, _ = call(callers, "honest")
    evicted = [call(callers, "crowd")[1] for _ in range(100)]
    assert {caller.origin for caller in evicted if caller} == {"crowd"}
    assert callers.youngest("honest") is honest


def test_with_one_caller_from_each_address_the_longest_waiting_goes():
    callers = Callers(2)
    first, _ = call(callers, "a")
    call(callers, "b")
    assert call(callers, "c")[1] is first


def test_the_youngest_of_an_address_is_found():
    callers = Callers(8)
    call(callers, "a")
    youngest, _ = call(callers, "a")
    call(callers, "b")
    assert callers.youngest("a") is youngest
    assert callers.youngest("nobody") is None


def test_a_caller_that_is_decided_is_not_the_youngest_any_more():
    callers = Callers(8)
    older, _ = call(callers, "a")
    younger, _ = call(callers, "a")
    younger.decide("closed")
    assert callers.youngest("a") is older
    older.decide("closed")
    assert callers.youngest("a") is None


def test_a_removed_caller_makes_room_and_may_be_removed_twice():
    callers = Callers(1)
    first, _ = call(callers, "a")
    callers.remove(first)
    callers.remove(first)
    assert len(callers) == 0
    assert call(callers, "b")[1] is None


def test_the_first_verdict_stands():
    caller = Caller("a", connection=None)
    assert caller.decide("the client")
    assert not caller.decide("silent for 10 s")
    assert caller.verdict.get() == "the client"


def test_who_waits_for_a_verdict_is_told():
    caller = Caller("a", connection=None)
    waiting = gevent.spawn(caller.verdict.get)
    gevent.idle()
    caller.decide("the client")
    with bounded():
        assert waiting.get() == "the client"


@pytest.mark.parametrize("limit", [1, 2, 64])
def test_there_are_never_more_callers_than_the_limit(limit):
    callers = Callers(limit)
    for number in range(3 * limit):
        call(callers, str(number % 7))
        assert len(callers) <= limit


def test_a_whole_pool_that_a_client_dials_at_once_has_room_and_no_more_than_that():
    assert most_candidates(16) == 16
    assert most_candidates(100_000) == DIALS_AT_ONCE
