"""Guards by address: lists of networks, users per address, datagrams per address; the clock is the test's own."""

from dataclasses import replace

import pytest
from support import LIMITS, LOOPBACK, is_reset, tcp_pair

from nodepass_gevent import admission
from nodepass_gevent.admission import Admission, Lists, Rate
from nodepass_gevent.config import Config
from nodepass_gevent.metrics import Counters
from nodepass_gevent.values import Networks

HERE, ELSEWHERE = "192.0.2.1", "198.51.100.7"


def networks(text):
    return Networks.parse(text) if text else None


@pytest.mark.parametrize(
    ("allow", "deny", "admitted", "kept_out"),
    [
        ("", "", [HERE, "::1"], []),
        ("192.0.2.0/24", "", [HERE, "::ffff:192.0.2.9"], [ELSEWHERE, "::1"]),
        ("", "192.0.2.0/24", [ELSEWHERE, "::1"], [HERE, "::ffff:192.0.2.9"]),
        ("192.0.2.0/24", "192.0.2.1", ["192.0.2.2"], [HERE, ELSEWHERE]),
        ("192.0.2.1", "192.0.2.0/24", [], [HERE]),
        ("::/0", "fe80::/10", ["2001:db8::1"], ["fe80::1%eth0", HERE]),
    ],
)
def test_deny_wins_and_an_allow_list_admits_nobody_else(allow, deny, admitted, kept_out):
    lists = Lists(networks(allow), networks(deny))
    for _ in range(2):  # from the networks, then from memory
        assert [host for host in admitted + kept_out if lists.admits(host)] == admitted
    assert lists.admits_all is (not allow and not deny)


# Datagrams per address


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def test_a_bucket_holds_one_second_and_fills_with_time():
    clock = Clock()
    rate = Rate(10, clock)

    def burst(key):
        return sum(rate.takes(key) for _ in range(100))

    assert (burst("a"), burst("b")) == (10, 10)
    clock.now += 0.5625
    assert burst("a") == 5
    clock.now += 0.0625
    assert burst("a") == 1  # nothing of what is between is lost
    clock.now += 3600
    assert burst("a") == 10


def test_a_rate_of_one_takes_one_a_second():
    clock = Clock()
    rate = Rate(1, clock)
    taken = 0
    for _ in range(100):
        taken += rate.takes("a")
        clock.now += 0.125
    assert taken == 13  # 12.5 s


def test_the_table_of_buckets_is_bounded_and_forgets_who_was_silent_longest(monkeypatch):
    monkeypatch.setattr(admission, "BUCKETS", 100)
    rate = Rate(1, Clock())
    assert rate.takes("loud") and not rate.takes("loud")
    for number in range(1000):
        rate.takes(str(number))
        assert not rate.takes("loud")
    assert len(rate) == 100


# The guards


@pytest.fixture
def guards():
    """Make guards; settings of Config and of Limits by name."""

    def make(**settings):
        limits = {name: settings.pop(name) for name in list(settings) if hasattr(LIMITS, name)}
        lists = {name: networks(text) for name, text in settings.items()}
        config = Config(role="server", tunnel=LOOPBACK, target=LOOPBACK, limits=replace(LIMITS, **limits), **lists)
        made = Admission(config, Counters(), Clock())
        made.counters = made._counters
        return made

    return make


class Door:
    """What a guard leads to: users stay until they are told to leave."""

    def __init__(self, guard):
        self.admit = guard(self._start)
        self.inside = []  # what to call when one leaves
        self.sockets = []

    def _start(self, stream, ended=None):
        self.inside.append(ended)

    def come(self, host):
        """Let somebody come from an address; say whether the way in was free."""
        stream, peer = tcp_pair()
        stream.peer = (host, 1)
        self.sockets += [stream, peer]
        before = len(self.inside)
        self.admit(stream)
        if len(self.inside) == before:
            assert is_reset(peer)
        return len(self.inside) > before

    def close(self):
        for sock in self.sockets:
            sock.close()


@pytest.fixture
def door(no_leaks):
    doors = []

    def make(guard):
        doors.append(Door(guard))
        return doors[-1]

    yield make
    for each in doors:
        each.close()


def test_where_nothing_is_set_nothing_stands_in_the_way(guards):
    def start(stream):
        raise AssertionError

    assert guards().guard_users(start) is start
    assert guards().guard_callers(start) is start


def test_users_from_elsewhere_are_reset_and_counted(guards, door, caplog):
    guard = guards(allow_users="192.0.2.0/24", deny_users="192.0.2.9")
    users = door(guard.guard_users)
    assert [users.come(host) for host in (HERE, ELSEWHERE, "192.0.2.9", "::ffff:192.0.2.1")] == [
        True,
        False,
        False,
        True,
    ]
    assert guard.counters.users_kept_out == 2
    assert caplog.messages == [f"users from {ELSEWHERE} are kept out by allow-users or deny-users"]  # one of them
    assert door(guard.guard_callers).come(ELSEWHERE)  # clients have lists of their own


def test_callers_from_elsewhere_are_reset_and_counted(guards, door, caplog):
    guard = guards(allow_clients="192.0.2.0/24", deny_clients="192.0.2.9")
    callers = door(guard.guard_callers)
    assert [callers.come(host) for host in (HERE, ELSEWHERE, "192.0.2.9")] == [True, False, False]
    assert guard.counters.callers_kept_out == 2
    assert caplog.messages == [f"caller {ELSEWHERE}:1 is kept out by allow-clients or deny-clients"]  # one of them
    assert door(guard.guard_users).come(ELSEWHERE)


def test_datagrams_from_elsewhere_are_told_and_users_beyond_the_limit_of_their_address(guards, caplog):
    guard = guards(deny_users=ELSEWHERE, users_per_address=1)
    assert not guard.admits_datagram(ELSEWHERE)
    assert guard.enter(HERE) and not guard.enter(HERE) and not guard.enter(HERE)
    assert caplog.messages == [
        f"users from {ELSEWHERE} are kept out by allow-users or deny-users",
        f"users from {HERE} are kept out by users-per-address",  # one of them
    ]


def test_callers_with_a_penalty_are_reset_by_their_key(guards, door):
    guard = guards()
    kept_out = {"2001:db8::/64", HERE}
    callers = door(lambda start: guard.guard_callers(start, kept_out.__contains__))
    hosts = ("2001:db8::7", f"::ffff:{HERE}", "2001:db8:0:1::7", ELSEWHERE)
    assert [callers.come(host) for host in hosts] == [False, False, True, True]
    assert guard.counters.callers_kept_out == 2


def test_an_address_has_no_more_users_than_the_limit(guards, door):
    guard = guards(users_per_address=2)
    users = door(guard.guard_users)
    assert [users.come(HERE) for _ in range(4)] == [True, True, False, False]
    assert users.come(ELSEWHERE)
    assert [users.come(f"2001:db8::{number}") for number in range(3)] == [True, True, False]
    assert guard.counters.users_kept_out == 3


def test_a_user_who_leaves_makes_room_for_another_of_the_address(guards, door):
    guard = guards(users_per_address=1)
    users = door(guard.guard_users)
    assert [users.come(HERE), users.come(HERE), users.come(ELSEWHERE)] == [True, False, True]
    users.inside[0]()
    assert [users.come(HERE), users.come(HERE), users.come(ELSEWHERE)] == [True, False, False]
    for leave in users.inside[1:]:
        leave()
    assert not guard._present  # nothing is kept about who has left


def test_datagrams_are_taken_by_address_and_by_rate(guards):
    guard = guards(deny_users="198.51.100.0/24", udp_rate_per_address=3)
    assert [guard.admits_datagram(HERE) for _ in range(5)] == [True, True, True, False, False]
    assert guard.admits_datagram("192.0.2.2") and not guard.admits_datagram(ELSEWHERE)
    assert [guard.admits_datagram(f"2001:db8::{number}") for number in range(4)] == [True, True, True, False]
    assert (guard.counters.datagrams_dropped_rate, guard.counters.datagrams_kept_out) == (3, 1)


def test_without_settings_every_datagram_is_taken(guards):
    guard = guards()
    assert all(guard.admits_datagram(host) for host in (HERE, "::1", "fe80::1%lo") * 1000)
