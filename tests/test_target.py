"""The target's addresses: when they are looked up, and for whom."""

import contextlib
import gc
import socket
import weakref

import gevent
import pytest
from gevent.event import Event
from support import wait_until

from nodepass_gevent import target
from nodepass_gevent.config import Address
from nodepass_gevent.errors import ConnectError
from nodepass_gevent.target import RENEW_S, STALE_S, TargetAddresses


class Resolver:
    """Answers with what ``hosts`` are, or fails without any; waits for ``go_on``."""

    def __init__(self):
        self.hosts = ["192.0.2.1", "192.0.2.2"]
        self.asked = 0
        self.go_on = Event()
        self.go_on.set()

    def __call__(self, host, port, **options):
        self.asked += 1
        self.go_on.wait()
        if not self.hosts:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in self.hosts]


@pytest.fixture
def resolver(monkeypatch, no_leaks):
    made = Resolver()
    monkeypatch.setattr(socket, "getaddrinfo", made)
    yield made
    made.go_on.set()


@pytest.fixture
def clock(monkeypatch):
    """The time, to be set."""
    now = [1000.0]
    monkeypatch.setattr(target.time, "monotonic", lambda: now[0])
    return now


def hosts(endpoints):
    return [endpoint.sockaddr[0] for endpoint in endpoints]


def failure(addresses):
    with pytest.raises(ConnectError) as caught:
        addresses.get()
    return str(caught.value)


def test_a_crowd_shares_one_look_up(resolver, spawn):
    addresses = TargetAddresses(Address("name", 80))
    resolver.go_on.clear()
    crowd = [spawn(addresses.get) for _ in range(20)]
    gevent.idle()
    assert not any(each.ready() for each in crowd)
    resolver.go_on.set()
    assert all(hosts(each.get(timeout=5)) == resolver.hosts for each in crowd)
    assert hosts(addresses.get()) == resolver.hosts
    assert resolver.asked == 1


def test_a_crowd_shares_its_failure_and_who_comes_later_tries_again(resolver, spawn):
    addresses = TargetAddresses(Address("name", 80))
    resolver.go_on.clear()
    working, resolver.hosts = resolver.hosts, []
    crowd = [spawn(failure, addresses) for _ in range(20)]
    gevent.idle()
    resolver.go_on.set()
    assert {each.get(timeout=5) for each in crowd} == {"resolve name: no such name"}
    resolver.hosts = working
    assert hosts(addresses.get()) == working
    assert resolver.asked == 2


def test_a_failure_keeps_nobody_who_met_it(resolver, monkeypatch):
    monkeypatch.setattr(gevent.config, "track_greenlet_tree", False)  # as the process has it

    class Waiting:
        """Something that who waits holds."""

    resolver.hosts = []
    addresses = TargetAddresses(Address("name", 80))

    def wait(waiting):
        with contextlib.suppress(ConnectError):
            addresses.get()
        return weakref.ref(waiting)

    gc.disable()
    try:
        left = wait(Waiting())
        assert left() is None
    finally:
        gc.enable()


def test_who_is_ended_while_it_waits_takes_nobody_with_it(resolver, spawn):
    addresses = TargetAddresses(Address("name", 80))
    resolver.go_on.clear()
    first, second = spawn(addresses.get), spawn(addresses.get)
    gevent.idle()
    first.kill()
    resolver.go_on.set()
    assert hosts(second.get(timeout=5)) == resolver.hosts


def test_a_name_is_looked_up_again_now_and_then_while_nobody_waits(resolver, clock):
    addresses = TargetAddresses(Address("name", 80))
    assert hosts(addresses.get()) == ["192.0.2.1", "192.0.2.2"]
    resolver.hosts = ["192.0.2.3"]
    resolver.go_on.clear()
    clock[0] += RENEW_S - 1
    addresses.get()
    gevent.idle()
    assert resolver.asked == 1
    clock[0] += 1
    for _ in range(3):
        assert hosts(addresses.get()) == ["192.0.2.1", "192.0.2.2"]
        gevent.idle()
    assert resolver.asked == 2
    resolver.go_on.set()
    wait_until(lambda: hosts(addresses.get()) == ["192.0.2.3"])
    assert resolver.asked == 2


def test_who_comes_after_a_long_pause_waits_for_the_look_up(resolver, clock):
    addresses = TargetAddresses(Address("name", 80))
    addresses.get()
    resolver.hosts = ["192.0.2.3"]
    clock[0] += RENEW_S + STALE_S
    assert hosts(addresses.get()) == ["192.0.2.3"]
    resolver.hosts = []
    clock[0] += RENEW_S + STALE_S
    assert hosts(addresses.get()) == ["192.0.2.3"]
    assert resolver.asked == 3


def test_a_resolver_that_fails_takes_no_address_away(resolver, clock):
    addresses = TargetAddresses(Address("name", 80))
    found = addresses.get()
    resolver.hosts = []
    for asked in (2, 3):
        clock[0] += RENEW_S
        assert addresses.get() == found
        wait_until(lambda asked=asked: resolver.asked == asked)
    assert addresses.get() == found


def test_the_address_that_has_answered_stays_the_first_one_when_it_is_still_there(resolver, clock):
    addresses = TargetAddresses(Address("name", 80))
    addresses.get()
    addresses.prefer(("192.0.2.2", 80))
    assert hosts(addresses.get()) == ["192.0.2.2", "192.0.2.1"]
    resolver.hosts = ["192.0.2.1", "192.0.2.2", "192.0.2.3"]
    clock[0] += RENEW_S
    addresses.get()
    wait_until(lambda: hosts(addresses.get()) == ["192.0.2.2", "192.0.2.1", "192.0.2.3"])


def test_what_is_forgotten_is_looked_up_before_it_is_used_again(resolver):
    addresses = TargetAddresses(Address("name", 80))
    addresses.get()
    resolver.hosts = ["192.0.2.3"]
    addresses.forget()
    addresses.prefer(("192.0.2.1", 80))  # by who had it before
    assert hosts(addresses.get()) == ["192.0.2.3"]


def test_a_literal_never_visits_the_resolver(resolver, clock):
    addresses = TargetAddresses(Address("192.0.2.9", 80))
    for _ in range(2):
        assert hosts(addresses.get()) == ["192.0.2.9"]
        clock[0] += 10 * RENEW_S
        addresses.forget()
    assert resolver.asked == 0
