"""Who is kept out, for how long, and that a crowd cannot change that; the clock is the test's own."""

from dataclasses import replace

import pytest
from support import LIMITS

from nodepass_gevent import log as logs
from nodepass_gevent import penalties
from nodepass_gevent.penalties import Penalties

ME, OTHER = "192.0.2.1", "2001:db8::/64"


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class World:
    """Penalties, their clock, and the addresses that have a live session."""

    def __init__(self, **limits):
        self.clock = Clock()
        self.live = set()
        self.penalties = Penalties(replace(LIMITS, **limits), self.live.__contains__, logs.of(""), self.clock)

    def wrong(self, times, key=ME):
        for _ in range(times):
            self.penalties.report(key)

    def kept_out_s(self, key=ME):
        """Let time pass until the address may call; give how long that took, in whole seconds."""
        start = self.clock.now
        while self.penalties.keeps_out(key):
            self.clock.now += 1
        return self.clock.now - start


def test_two_wrong_proofs_cost_nothing():
    world = World()
    assert world.kept_out_s() == 0
    world.wrong(2)
    assert world.kept_out_s() == 0


def test_from_the_third_on_each_keeps_out_twice_as_long_up_to_ten_minutes():
    world = World()
    world.wrong(2)
    penalties_s = []
    for _ in range(10):
        world.wrong(1)
        penalties_s.append(world.kept_out_s())
    assert penalties_s == [5, 10, 20, 40, 80, 160, 320, 600, 600, 600]


def test_two_thousand_wrong_proofs_keep_out_no_longer():
    world = World()
    world.wrong(2_000)  # doubled so often no float holds the time
    assert world.kept_out_s() == 600


def test_each_address_answers_for_itself():
    world = World()
    world.wrong(3)
    world.wrong(2, OTHER)
    assert (world.kept_out_s(OTHER), world.kept_out_s(ME)) == (0, 5)


def test_who_has_been_good_for_the_longest_penalty_starts_anew():
    world = World()
    world.wrong(4)
    world.clock.now += 10 + 599
    world.wrong(1)
    assert world.kept_out_s() == 20
    world.clock.now += 601
    world.wrong(2)
    assert world.kept_out_s() == 0
    world.clock.now += 601
    world.wrong(2)
    assert world.kept_out_s() == 0
    world.wrong(1)
    assert world.kept_out_s() == 5


def test_it_is_since_the_last_wrong_proof_that_an_address_has_been_good():
    world = World()
    world.wrong(1)
    for _ in range(2):
        world.clock.now += 400
        world.wrong(1)
    assert world.kept_out_s() == 5


def test_an_address_with_a_live_session_is_never_kept_out():
    world = World()
    world.live.add(ME)
    world.wrong(10)
    world.live.clear()
    assert not world.penalties.keeps_out(ME)
    world.wrong(3)
    world.live.add(ME)
    assert not world.penalties.keeps_out(ME)
    world.live.clear()
    assert world.penalties.keeps_out(ME)


def test_who_has_proven_the_key_is_forgiven():
    world = World()
    world.wrong(3)
    world.wrong(2, OTHER)
    for key in (ME, OTHER):
        world.penalties.forgive(key)
        world.wrong(2, key)
        assert world.kept_out_s(key) == 0


def test_wrong_proofs_count_on_in_the_server_that_comes_in_the_place_of_another():
    before, after = World(), World()
    before.wrong(2)
    before.wrong(3, OTHER)
    after.penalties.follow(before.penalties)
    after.wrong(1)
    assert after.penalties.keeps_out(ME) and after.penalties.keeps_out(OTHER)


def test_penalties_follow_the_settings():
    world = World(penalty_after=1, penalty_first_s=3, penalty_longest_s=7)
    taken = []
    for _ in range(4):
        world.wrong(1)
        taken.append(world.kept_out_s())
    assert taken == [3, 6, 7, 7]


def test_penalties_may_be_off():
    world = World(penalty_after=0)
    world.wrong(100)
    assert world.kept_out_s() == 0


@pytest.mark.parametrize("each", [1, 3])
def test_the_tables_are_bounded(each):
    world = World()
    for number in range(3 * penalties.TABLE):
        world.wrong(each, f"2001:db8:0:{number:x}::/64")
    assert len(world.penalties._suspects) + len(world.penalties._punished) <= 2 * penalties.TABLE


def test_a_crowd_with_two_wrong_proofs_each_frees_nobody_who_is_kept_out():
    world = World()
    world.wrong(10)
    for number in range(2 * penalties.TABLE):
        world.wrong(2, f"2001:db8:0:{number:x}::/64")
    assert world.penalties.keeps_out(ME)


def test_when_too_many_are_kept_out_the_one_goes_that_was_good_for_longest():
    world = World()
    world.wrong(9)
    world.wrong(9, OTHER)
    world.wrong(1)
    for number in range(penalties.TABLE - 1):
        world.wrong(3, f"2001:db8:0:{number:x}::/64")
    assert world.penalties.keeps_out(ME) and not world.penalties.keeps_out(OTHER)


def test_a_penalty_is_told_once_with_address_time_and_number(caplog):
    world = World()
    world.wrong(3)
    assert caplog.messages == ["address 192.0.2.1 is kept out for 5 s: wrong proofs of the tunnel key: 3"]
