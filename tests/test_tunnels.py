import errno
import logging
import time
from dataclasses import replace

import gevent
import pytest
from gevent.event import Event
from support import wait_until

from nodepass_gevent import log as logs
from nodepass_gevent.config import Address, Config, Limits
from nodepass_gevent.crew import Crew
from nodepass_gevent.errors import ConfigError, SessionEnded, TunnelsRefused
from nodepass_gevent.metrics import Counters
from nodepass_gevent.tunnels import Tunnels

CONFIG = Config(role="server", tunnel=Address("h", 1), target=Address("h", 2), name="a", shutdown_timeout_s=30.0)


class Role:
    """A role that works until it is killed, and notes what happens to it."""

    def __init__(self, config, before):
        self.config = config
        self.before = before
        self.counters = Counters()
        self.exchanges = Crew()
        self.begun = Event()
        self.peers = 0
        self.done = []
        self.bye = Event()  # its peer has answered
        self.bye.set()
        self.ends = Event()

    def __str__(self):
        return f"role {self.config.name}"

    def run(self):
        self.done.append("run")
        try:
            self.ends.wait()
            raise SessionEnded("the server said bye", 1.0)
        finally:
            self.done.append("killed")
            self.bye.wait()

    def reload(self):
        self.done.append("reload")

    def dismiss(self):
        self.done.append("dismiss")

    def retire(self):
        self.done.append("retire")


class World:
    def __init__(self):
        self.roles = []
        self.bad = {}  # what cannot be made, by name, and why
        self.tunnels = Tunnels(self.make)

    def make(self, config, before):
        if config.name in self.bad:
            raise self.bad[config.name]
        self.roles.append(Role(config, before))
        return self.roles[-1]

    def apply(self, *configs):
        changed = self.tunnels.apply(configs)
        gevent.idle()
        return changed

    def running(self):
        return [service.role for service in self.tunnels]


@pytest.fixture
def world(caplog):
    caplog.set_level(logging.INFO, "nodepass_gevent")
    made = World()
    yield made
    for role in made.roles:
        role.exchanges.kill()
        logs.of(role.config.name).setLevel(logging.NOTSET)
    made.tunnels.stop()


def test_each_tunnel_is_started_once(world):
    other = replace(CONFIG, name="b")
    world.apply(CONFIG, other)
    world.apply(CONFIG, other)
    assert [(role.config.name, role.before, role.done) for role in world.roles] == [
        ("a", None, ["run"]),
        ("b", None, ["run"]),
    ]


def test_a_tunnel_with_a_name_has_its_own_level_from_its_start(world):
    world.apply(replace(CONFIG, log="debug"), replace(CONFIG, name="b", log="error"))
    assert [logs.of(name).level for name in "ab"] == [logging.DEBUG, logging.ERROR]


def test_a_tunnel_that_is_added_disturbs_no_other(world):
    world.apply(CONFIG)
    world.apply(CONFIG, replace(CONFIG, name="b"))
    assert [role.done for role in world.roles] == [["run"], ["run"]]


def test_how_many_tunnels_have_changed_is_counted(world):
    first, other = replace(CONFIG), replace(CONFIG, name="b")  # the first is changed in its place
    assert world.apply(first, other) == 2
    assert world.apply(first, other) == 0
    assert world.apply(replace(CONFIG, log="debug"), replace(other, semaphore_limit=7)) == 2
    assert world.apply(replace(CONFIG, log="debug"), replace(CONFIG, name="c")) == 2


@pytest.mark.parametrize("failure", [ConfigError("crt: gone"), OSError(errno.EMFILE, "too many open files")])
def test_a_tunnel_that_cannot_be_made_stays_as_it_was_and_all_others_follow(world, failure):
    names = "abcd"
    before, after = ([replace(CONFIG, name=name, network=network) for name in names] for network in ("tcp", "udp"))
    world.apply(*before)
    world.bad = {"b": failure, "new": failure}
    why = failure.args[-1]
    with pytest.raises(TunnelsRefused, match=f"^b: {why}; new: {why}$") as refused:
        world.apply(*after[:3], replace(CONFIG, name="new"), replace(CONFIG, name="e"))
    assert refused.value.others == len("ac" + "d" + "e")
    gevent.idle()
    assert [(role.config.name, role.config.network) for role in world.running()] == [
        ("a", "udp"), ("b", "tcp"), ("c", "udp"), ("e", CONFIG.network),
    ]  # fmt: skip
    assert all(role.done[-1] == "run" for role in world.running())
    world.bad = {}
    assert world.apply(*after[:3], replace(CONFIG, name="e")) == 1


def test_a_tunnel_that_is_removed_says_what_it_will_cut(world, caplog):
    world.apply(replace(CONFIG, shutdown_timeout_s=0.01))
    world.roles[0].exchanges.spawn(gevent.sleep, 3600)
    world.apply()
    assert "tunnel removed; exchanges: 1, cut in 0.01 s if they last" in caplog.messages


@pytest.mark.parametrize(("role", "word"), [("server", "public"), ("client", "target")])
def test_an_address_that_has_changed_is_told(world, caplog, role, word):
    config = replace(CONFIG, role=role)
    world.apply(config)
    world.apply(replace(config, target=Address("h", 3), semaphore_limit=7))
    assert f"settings changed: {word} {CONFIG.target} -> h:3, semaphore-limit" in caplog.messages


LIVE = {
    "log": "debug",
    "access_log": "info",
    "service_cooldown_s": 7.0,
    "shutdown_timeout_s": 8.0,
    "udp_read_timeout_s": 9.0,
    "reload_interval_s": 10.0,
    "limits": Limits(idle_timeout_s=11.0, pool_wait_s=12.0, dead_intervals=4, penalty_after=5, tcp_user_timeout_s=13.0),
}


@pytest.mark.parametrize("name", LIVE)
def test_levels_and_times_change_in_the_running_tunnel(world, caplog, name):
    world.apply(replace(CONFIG, limits=Limits()))  # of its own: it changes
    (role,) = world.roles
    limits = role.config.limits  # as its parts hold them
    world.apply(replace(CONFIG, **{name: LIVE[name]}, sources={"x": "y"}))
    assert world.running() == [role] and role.done == ["run"]
    assert getattr(role.config, name) == LIVE[name]
    assert role.config.limits is limits
    assert role.config.sources == {"x": "y"}
    changed = {"limits": "pool-wait, idle-timeout, dead-intervals, penalty-after, tcp-user-timeout"}
    assert caplog.messages == [f"settings changed: {changed.get(name, name.removesuffix('_s').replace('_', '-'))}"]


@pytest.mark.parametrize(
    "change",
    [
        {"semaphore_limit": 7},
        {"min_pool_capacity": 3},
        {"max_pool_capacity": 70},
        {"tls": 1},
        {"target": Address("h", 3)},
        {"limits": Limits(callers=7)},
        {"limits": Limits(keepalive_idle_s=7)},
        {"log": "debug", "semaphore_limit": 7},
    ],
)
def test_other_changes_put_a_new_role_in_the_place_of_the_old_one(world, change):
    world.apply(CONFIG)
    (old,) = world.roles
    world.apply(replace(CONFIG, **change))
    (new,) = world.running()
    assert new is not old and new.before is old
    assert old.done == ["run", "killed", "dismiss", "retire"] and new.done == ["run"]
    assert old.config == CONFIG  # nothing of it was taken


def test_peers_that_are_slow_to_answer_a_bye_are_waited_for_all_at_once(world):
    configs = CONFIG, replace(CONFIG, name="b")
    world.apply(*configs)
    slow, quick = world.roles
    for role in world.roles:
        role.bye.clear()
    applying = gevent.spawn(world.apply, *(replace(config, semaphore_limit=7) for config in configs))
    wait_until(lambda: "killed" in slow.done and "killed" in quick.done)
    quick.bye.set()
    wait_until(lambda: world.roles[3].done == ["run"])
    assert not applying.ready()
    slow.bye.set()
    assert applying.get(timeout=5) == 2


def test_a_tunnel_with_another_name_starts_when_the_one_before_has_left_its_addresses(world):
    world.apply(CONFIG)
    (before,) = world.roles
    before.bye.clear()
    applying = gevent.spawn(world.apply, replace(CONFIG, name="b"))
    wait_until(lambda: "killed" in before.done)
    assert len(world.roles) == 1
    before.bye.set()
    applying.get(timeout=5)
    assert before.done == ["run", "killed", "dismiss", "retire"]
    wait_until(lambda: world.roles[1].done == ["run"])


def test_a_server_that_becomes_a_client_leaves_it_nothing(world):
    world.apply(CONFIG)
    world.apply(replace(CONFIG, role="client"))
    assert [role.before for role in world.roles] == [None, None]


def test_exchanges_of_a_replaced_tunnel_go_on_for_as_long_as_they_like(world):
    config = replace(CONFIG, shutdown_timeout_s=0.01)
    world.apply(config)
    (old,) = world.roles
    go_on = Event()
    old.exchanges.spawn(go_on.wait)
    world.apply(replace(config, semaphore_limit=7))
    world.apply(replace(config, semaphore_limit=8))
    gevent.sleep(0.05)  # longer than a removed one would be given
    (service,) = world.tunnels
    assert (world.tunnels.exchanges(), service.exchanges, len(service.role.exchanges)) == (1, 1, 0)
    go_on.set()
    wait_until(lambda: world.tunnels.exchanges() == 0)
    wait_until(lambda: not service.former)


def test_a_tunnel_that_is_removed_is_drained_within_its_shutdown_timeout(world, caplog):
    config = replace(CONFIG, shutdown_timeout_s=0.05)
    world.apply(config)
    (role,) = world.roles
    role.exchanges.spawn(Event().wait)
    world.apply()
    assert world.running() == [] and role.done == ["run", "killed", "dismiss", "retire"]
    wait_until(lambda: world.tunnels.exchanges() == 0)
    assert "role a: exchanges cut: 1" in caplog.messages
    wait_until(lambda: world.tunnels.stop_s == 0)  # nothing of it is left


def test_a_tunnel_that_is_removed_takes_exchanges_of_former_settings_with_it(world):
    config = replace(CONFIG, shutdown_timeout_s=0.05)
    world.apply(config)
    world.roles[0].exchanges.spawn(Event().wait)
    world.apply(replace(config, semaphore_limit=7))
    world.apply()
    wait_until(lambda: world.tunnels.exchanges() == 0)


def test_exchanges_of_former_settings_are_drained_for_as_long_as_those_of_now_say(world):
    world.apply(replace(CONFIG, shutdown_timeout_s=0.01))
    go_on = Event()
    world.roles[0].exchanges.spawn(go_on.wait)
    world.apply(replace(CONFIG, shutdown_timeout_s=0.01, semaphore_limit=7))
    world.apply(replace(CONFIG, shutdown_timeout_s=20.0, semaphore_limit=7))
    assert len(world.roles) == 2 and world.tunnels.stop_s > 20
    stopping = gevent.spawn(world.tunnels.stop)
    gevent.sleep(0.05)  # longer than it was given formerly
    assert len(world.roles[0].exchanges) == 1
    go_on.set()
    assert stopping.get(timeout=10) == 0


def test_at_the_end_all_are_drained_each_within_its_own_time(world):
    quick, slow = replace(CONFIG, shutdown_timeout_s=0.05), replace(CONFIG, name="b", shutdown_timeout_s=20.0)
    world.apply(slow, quick)
    second, first = world.roles
    go_on = Event()
    first.exchanges.spawn(Event().wait)
    second.exchanges.spawn(go_on.wait)
    stopping = gevent.spawn(world.tunnels.stop)
    wait_until(lambda: len(first.exchanges) == 0)
    assert len(second.exchanges) == 1
    go_on.set()
    assert stopping.get(timeout=10) == 1
    assert [role.done for role in world.roles] == [["run", "killed", "dismiss"]] * 2


def test_at_the_end_the_times_of_tunnels_are_not_added_up(world):
    world.apply(*(replace(CONFIG, name=name, shutdown_timeout_s=0.5) for name in "abcd"))
    for role in world.roles:
        role.exchanges.spawn(Event().wait)
    begun = time.monotonic()
    assert world.tunnels.stop() == 4
    assert 0.5 <= time.monotonic() - begun < 1.5


@pytest.mark.parametrize("after", [(replace(CONFIG, shutdown_timeout_s=0.05, semaphore_limit=7),), ()])
def test_exchanges_of_replaced_and_removed_tunnels_are_drained_at_the_end_too(world, after):
    world.apply(replace(CONFIG, shutdown_timeout_s=0.05))
    world.roles[0].exchanges.spawn(Event().wait)
    world.apply(*after)
    gevent.sleep(0.02)  # what was removed would end before the others, and be counted by nobody
    assert world.tunnels.stop() == 1
    assert world.tunnels.exchanges() == 0


def test_what_ends_in_the_moment_of_the_stop_is_not_tried_again(world, caplog):
    world.apply(CONFIG)
    world.roles[0].ends.set()  # its peer stops in the same moment
    world.tunnels.stop()
    assert [message for message in caplog.messages if "said bye" in message] == ["role a: the server said bye"]
    assert world.roles[0].done.count("run") == 1


def test_a_reload_reaches_those_that_run(world):
    world.apply(CONFIG, replace(CONFIG, name="b"))
    world.apply(CONFIG)
    world.tunnels.reload()
    assert world.roles[0].done == ["run", "reload"]
    assert "reload" not in world.roles[1].done


def test_all_have_begun_when_each_that_is_there_has_even_if_one_was_replaced(world):
    world.apply(CONFIG, replace(CONFIG, name="b"))
    waiting = gevent.spawn(world.tunnels.wait_begun)
    gevent.idle()  # it waits for the first one
    first, other = world.roles
    other.begun.set()
    world.apply(replace(CONFIG, semaphore_limit=7), other.config)
    gevent.idle()
    assert not waiting.ready()
    world.roles[-1].begun.set()
    waiting.get(timeout=5)
    assert not first.begun.is_set()


def test_what_there_is_is_told_in_words(world):
    assert world.tunnels.describe() == "0 tunnels, 0 peers connected, 0 exchanges"
    world.apply(CONFIG)
    world.roles[0].peers = 1
    assert world.tunnels.describe() == "1 tunnel, 1 peer connected, 0 exchanges"


def test_a_stop_may_take_as_long_as_the_slowest_tunnel(world):
    world.apply(replace(CONFIG, shutdown_timeout_s=1.0), replace(CONFIG, name="b", shutdown_timeout_s=9.0))
    assert world.tunnels.stop_s == 11.0
    world.apply(replace(CONFIG, shutdown_timeout_s=1.0))
    assert world.tunnels.stop_s == 2.0  # for the bye, too, no longer than that
