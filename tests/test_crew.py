import weakref
from unittest.mock import Mock

import gevent
import pytest
from gevent.event import Event
from support import bounded, wait_until

from nodepass_gevent import crew as crews
from nodepass_gevent.alarm import soon
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


def test_a_greenlet_that_has_done_its_work_goes_on_with_what_is_due(crew):
    done, gate = [], Event()

    def work(number):
        done.append(number)
        gate.wait()

    crew.spawn(list)
    crew.spawn(work, 1)
    gevent.idle()  # one waits for work, and one is at work
    gate.set()  # it ends before the other one is woken
    soon(done.append, "soon")
    crew.spawn(work, 2)
    assert len(crew) == 2
    gevent.idle()
    assert done == [1, 2, "soon"] and len(crew) == 0


def test_who_waits_for_work_keeps_nothing_of_what_is_done(crew):
    class Argument:
        pass

    kept = []
    for _ in range(2):  # a new greenlet's, and one's that is used again
        argument = Argument()
        kept.append(weakref.ref(argument))
        crew.spawn(lambda argument: None, argument)
        del argument
        gevent.idle()
    assert [reference() for reference in kept] == [None, None]


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

    for _ in range(3):
        crew.spawn(list)
    gevent.idle()
    crew.spawn(work)
    crew.spawn(work)
    gevent.idle()
    crew.spawn(started.append, 1)  # begins only in the next turn
    assert len(crew) == 3
    crew.kill()
    assert ended == [True, True]
    assert not started and len(crew) == 0


def test_beyond_the_limit_a_spawn_waits(spawn):
    crew, gates, began = Crew(2), [Event(), Event(), Event()], []

    def work(number):
        began.append(number)
        gates[number].wait()

    crew.spawn(list)  # leaves a spare one behind
    gevent.idle()
    assert (len(crew), crew.free_count(), crew.full()) == (0, 2, False)
    crew.spawn(work, 0)
    crew.spawn(work, 1)
    gevent.idle()
    assert (len(crew), crew.free_count(), crew.full()) == (2, 0, True)
    waits, spawns = spawn(crew.wait_available), spawn(crew.spawn, work, 2)
    gevent.idle()
    assert began == [0, 1]
    assert not waits.ready()
    gates[0].set()
    waits.get(timeout=5)
    spawns.get(timeout=5)
    wait_until(lambda: began == [0, 1, 2])
    crew.kill()
    assert len(crew) == 0


@pytest.fixture
def promised(crew):
    """A spare greenlet, one at work that is about to end, and work for one of them that is to begin behind that."""
    crew = Crew(3)
    gates, done = [Event(), Event()], []
    crew.spawn(list)
    crew.spawn(gates[0].wait)
    gevent.idle()
    gates[0].set()
    crew.spawn(lambda: (done.append(True), gates[1].wait()))
    yield crew, gates[1], done
    crew.kill()


def test_work_that_is_promised_to_a_spare_one_uses_a_place(promised):
    crew, _, _ = promised
    assert (len(crew), crew.free_count(), crew.full()) == (2, 1, False)
    crew.spawn(list)
    assert (len(crew), crew.free_count(), crew.full()) == (3, 0, True)


@pytest.mark.parametrize("wait", [Crew.wait_available, Crew.enter])
def test_who_waits_for_a_place_gets_that_of_the_one_that_ends_before_work_is_begun(promised, spawn, wait):
    crew, _, done = promised
    crew.spawn(Event().wait)  # the last place
    waiting = spawn(wait, crew)
    waiting.get(timeout=5)
    assert done == [True]


def test_who_enters_takes_no_spare_one_that_has_a_promise(crew, spawn):
    done = []
    crew.spawn(list)
    gevent.idle()
    entering = spawn(crew.enter)
    crew.spawn(done.append, True)
    entering.get(timeout=5)
    gevent.idle()
    assert done == [True]


def test_join_ends_all_that_are_spare_behind_work_that_was_promised(promised, spawn):
    crew, gate, done = promised
    joining = spawn(crew.join, None)
    gate.set()
    joining.get(timeout=5)
    assert done == [True] and len(crew) == 0


def test_join_waits_for_those_that_run_and_for_no_spare_one(crew):
    gate = Event()
    crew.spawn(list)
    gevent.idle()
    crew.spawn(list)
    crew.spawn(gate.wait)
    crew.join(0.01)
    assert len(crew) == 1
    gate.set()
    with bounded():
        crew.join(5)
    assert len(crew) == 0


def test_join_ends_each_spare_one_although_another_one_ends_in_the_same_turn(spawn):
    crew, gate = Crew(), Event()
    crew.spawn(list)
    crew.spawn(gate.wait)
    gevent.idle()
    joining = spawn(crew.join, None)
    gate.set()
    joining.get(timeout=5)
    assert len(crew) == 0


def test_a_greenlet_that_enters_waits_for_room_and_counts_until_it_ends(spawn):
    crew, gates = Crew(1), [Event(), Event()]

    def enter():
        crew.enter()
        gates[1].wait()

    crew.spawn(gates[0].wait)
    entering = spawn(enter)
    gevent.idle()
    assert (len(crew), crew.full()) == (1, True)
    joining = spawn(crew.join, 5)
    gates[0].set()
    wait_until(lambda: crew.full() and not entering.ready())
    gevent.idle()
    assert not joining.ready()
    gates[1].set()
    joining.get(timeout=5)
    assert len(crew) == 0


def test_no_place_that_is_left_stays_empty_while_a_greenlet_waits_to_enter(spawn):
    crew, gate, entered = Crew(2), Event(), []

    def enter():
        crew.enter()
        entered.append(gevent.getcurrent())
        Event().wait()

    def end_a_turn_later():
        gate.wait()
        gevent.sleep(0)  # when the place of the first is free, and nobody has taken it yet

    crew.spawn(gate.wait)
    crew.spawn(end_a_turn_later)
    gevent.idle()
    for _ in range(2):
        spawn(enter)
    gevent.idle()
    gate.set()
    wait_until(lambda: len(entered) == 2)
    crew.kill()


def test_a_greenlet_that_has_nothing_to_do_gives_its_place_to_one_that_enters(spawn):
    crew = Crew(1)
    crew.spawn(list)
    gevent.idle()
    spawn(crew.enter).get(timeout=5)


def test_greenlets_that_enter_get_the_place_of_a_spare_one(spawn, said):
    crew, entered = Crew(2), []

    def enter():
        crew.enter()
        entered.append(True)
        Event().wait()

    crew.spawn(list)
    gevent.idle()
    for _ in range(2):
        spawn(enter)
    wait_until(lambda: len(entered) == 2)
    crew.kill()


def test_a_greenlet_for_whose_start_there_is_no_memory_keeps_no_place(monkeypatch):
    class Unstarted(gevent.Greenlet):
        def start(self):
            raise MemoryError

    crew = Crew(1)
    with monkeypatch.context() as without, pytest.raises(MemoryError):
        without.setattr(gevent, "Greenlet", Unstarted)
        crew.spawn(list)
    assert len(crew) == 0 and not crew.full()
    with bounded():
        crew.join(None)


def test_who_may_not_enter_for_want_of_memory_is_not_waited_for(monkeypatch):
    crew = Crew(2)
    crew.spawn(list)
    gevent.idle()
    monkeypatch.setattr(crews, "soon", Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        crew.enter()
    with bounded():
        crew.kill()  # which waits for those that enter


def test_a_kill_waits_until_those_that_were_to_enter_have_been_told(spawn):
    crew, told = Crew(1), []

    def enter():
        try:
            crew.enter()
        except gevent.GreenletExit as exc:
            told.append(str(exc))

    crew.spawn(Event().wait)
    for _ in range(5):
        spawn(enter)
    gevent.idle()
    crew.kill()
    assert told == ["all exchanges are ended"] * 5


@pytest.mark.parametrize("waits", [True, False])
def test_a_greenlet_that_enters_is_killed_with_those_that_run(spawn, waits):
    crew = Crew(1)
    went_on = []

    def enter():
        crew.enter()
        went_on.append("entered")
        Event().wait()
        went_on.append("lived")

    if waits:
        crew.spawn(Event().wait)
    entering = spawn(enter)
    gevent.idle()
    crew.kill()
    entering.join(5)
    assert entering.ready()
    assert went_on == ([] if waits else ["entered"])
