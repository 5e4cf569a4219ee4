import errno
import logging
import re
from dataclasses import replace

import gevent
import pytest
from gevent.event import Event
from support import bounded, wait_until

from nodepass_gevent import service
from nodepass_gevent.config import Address, Config
from nodepass_gevent.crew import Crew
from nodepass_gevent.errors import Busy, ConnectError, PeerSilent, PolicyError, SessionEnded, SessionLost
from nodepass_gevent.metrics import Counters
from nodepass_gevent.service import Backoff, Service

CONFIG = {"role": "client", "tunnel": Address("127.0.0.1", 1), "target": Address("127.0.0.1", 2)}


class Failing:
    """A role whose runs end as told, one by one; after the last it works on."""

    def __init__(self, *ends, cooldown_s=0.15):
        self.config = Config(**CONFIG, service_cooldown_s=cooldown_s)
        self.counters = Counters()
        self.exchanges = Crew()
        self.begun = Event()
        self.peers = 0
        self.ends = list(ends)
        self.works = Event()
        self.reloads = 0

    def __str__(self):
        return "role"

    def run(self):
        if self.ends:
            raise self.ends.pop(0)
        self.works.set()
        Event().wait()

    def reload(self):
        self.reloads += 1

    def dismiss(self):
        pass

    def retire(self):
        pass


def pauses(caplog):
    """Read from the log how long each pause was announced to be."""
    return re.findall(r"trying again (now|(?:in|every) [\d.]+ s)", "\n".join(caplog.messages))


@pytest.fixture
def serve(spawn, caplog):
    """Run a role until it works; give its service."""
    caplog.set_level(logging.DEBUG, "nodepass_gevent")

    def run(role):
        served = Service(role, lambda: 0)
        spawn(served.run)
        assert role.works.wait(5)
        return served

    return run


# (how long each try worked, the pause that follows)
@pytest.mark.parametrize(
    ("longest_s", "tries"),
    [
        (5, [(0, 0), (0, 0.1), (0, 0.2), (0, 0.4), (0, 0.8), (0, 1.6), (0, 3.2), (0, 5), (0, 5)]),
        (0.3, [(0, 0), (0, 0.1), (0, 0.2), (0, 0.3), (0, 0.3)]),
        (0.05, [(0, 0), (0, 0.05), (0, 0.05)]),
        (5, [(0, 0), (0, 0.1), (100, 0), (0, 0.1), (0, 0.2)]),  # a healthy run ends the row
        (5, [*[(0, None)] * 8, (59.9, 5), (60, 0), (0, 0.1)]),  # healthy: a minute at a pause of 5 s
        (5, [(0, 0), (0, 0.1), (2.3, 0.2), (4.9, 0), (0, 0.1)]),  # and less at a shorter one
    ],
)
def test_pauses_double_and_start_again_after_health(longest_s, tries):
    backoff = Backoff(lambda: longest_s, lambda: 0)
    for lived_s, expected_s in tries:
        pause_s = backoff.pause_s(lived_s)
        assert expected_s is None or pause_s == pytest.approx(expected_s)


# (how long each session lived until its clean end, the pause that follows)
@pytest.mark.parametrize(
    "tries",
    [
        [(1, 0), (1, 0), (1, 0), (1, 0)],  # at once, again and again
        [(0.5, 0), (0.5, 0.1), (0.5, 0.2), (0.5, 0.4), (1, 0)],  # but no peer makes it turn without pause
    ],
)
def test_after_a_clean_end_the_next_try_is_at_once(tries):
    backoff = Backoff(lambda: 5, lambda: 0)
    for lived_s, expected_s in tries:
        assert backoff.pause_s(lived_s, clean=True) == pytest.approx(expected_s)


@pytest.mark.parametrize(("drawn", "pauses_s"), [(0, [0, 0.1, 0.2]), (0.5, [0, 0.075, 0.15]), (1, [0, 0.05, 0.1])])
def test_pauses_are_shortened_by_up_to_a_half(drawn, pauses_s):
    backoff = Backoff(lambda: 5, lambda: drawn)
    assert [backoff.pause_s(0) for _ in range(3)] == pytest.approx(pauses_s)


def test_each_service_draws_its_pauses_for_itself(spawn, caplog):
    for _ in range(4):
        role = Failing(ConnectError("no route"), ConnectError("no way"))
        spawn(Service(role).run)
        assert role.works.wait(5)
    drawn = [pause for pause in pauses(caplog) if pause != "now"]
    assert len(drawn) == 4 and len(set(drawn)) > 1


def test_a_clean_end_is_no_failure_and_no_warning_and_followed_by_a_try_at_once(serve, caplog):
    served = serve(Failing(SessionEnded("the server said bye", 1.0), SessionEnded("the server said bye", 1.0)))
    first, _ = caplog.records
    assert (first.levelname, first.getMessage()) == ("INFO", "role: the server said bye; trying again now")
    assert served.failures == 0


def test_a_role_that_fails_twice_is_started_again_at_once_and_then_after_a_pause(serve, caplog):
    serve(Failing(ConnectError("no route"), SessionLost("control channel lost", 0.0)))
    assert pauses(caplog) == ["now", "in 0.1 s"]


def test_who_has_tried_once_in_vain_has_begun(serve):
    role = Failing(OSError("no"))
    serve(role)
    assert role.begun.is_set()


def test_the_pause_grows_to_the_cooldown_and_no_further(serve, caplog):
    serve(Failing(*[OSError("broken")] * 4, cooldown_s=0.12))
    assert pauses(caplog) == ["now", "in 0.1 s", "in 0.12 s", "in 0.12 s"]


def test_a_session_that_lived_is_followed_by_a_try_at_once(serve, caplog):
    serve(Failing(OSError("broken"), OSError("broken"), SessionLost("control channel lost", 100.0)))
    assert pauses(caplog) == ["now", "in 0.1 s", "now"]


def test_a_reason_that_stays_the_same_is_said_once_a_minute(serve, caplog):
    serve(Failing(*[OSError("broken")] * 3, OSError("worse"), cooldown_s=0.1))
    assert [record.levelname for record in caplog.records] == ["WARNING", "DEBUG", "DEBUG", "WARNING"]


def test_reasons_that_alternate_are_each_said_once_a_minute(serve, caplog):
    serve(Failing(*[OSError("broken"), OSError("worse")] * 3, cooldown_s=0.01))
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2 + ["DEBUG"] * 4


def test_what_was_said_is_said_again_after_a_minute_and_then_forgotten(serve, caplog, monkeypatch):
    monkeypatch.setattr(service, "REPEAT_S", 0)
    served = serve(Failing(OSError("broken"), OSError("worse"), OSError("broken"), cooldown_s=0.01))
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3
    assert len(served._said) <= 1


# (how a try ends twice, the cooldown, what is behind "trying again" in its lines)
@pytest.mark.parametrize(
    ("end", "cooldown_s", "again"),
    [
        (OSError("broken"), 0.05, ["now, then with pauses of up to 0.05 s; said once a minute", "in 0.05 s"]),
        (PolicyError("no"), 0.05, ["every 0.05 s; said once a minute", "every 0.05 s"]),
        (PeerSilent("silent for 15 s", 0.01), 0.05, ["now", "in 0.05 s"]),  # of what worked a new try may say more
        (OSError("broken"), 60, ["now, then with pauses of up to 60 s"]),  # each is said
        (PolicyError("no"), 60, ["every 60 s"]),
    ],
)
def test_the_first_line_with_a_reason_says_how_it_goes_on(spawn, caplog, end, cooldown_s, again):
    caplog.set_level(logging.DEBUG, "nodepass_gevent")
    spawn(Service(Failing(*[end] * len(again), cooldown_s=cooldown_s), lambda: 0).run)
    wait_until(lambda: len(caplog.messages) == len(again))
    assert [message.partition("; trying again ")[2] for message in caplog.messages] == again


@pytest.mark.parametrize(("kind", "level"), [(PolicyError, "ERROR"), (Busy, "WARNING")])
def test_a_refusal_waits_the_whole_cooldown_and_is_an_error_unless_it_may_mend_itself(serve, caplog, kind, level):
    serve(Failing(kind("the server offers tls 0"), cooldown_s=0.07))
    assert pauses(caplog) == ["every 0.07 s"]
    assert [record.levelname for record in caplog.records if "offers" in record.getMessage()] == [level]


def test_expected_failures_are_warnings_that_say_why_and_have_no_traceback(serve, caplog):
    serve(Failing(OSError(98, "Address already in use"), ConnectError("connect 192.0.2.1:1: timed out")))
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert [record.getMessage() for record in warnings] == [
        "role: address already in use; trying again now, then with pauses of up to 0.15 s; said once a minute",
        "role: connect 192.0.2.1:1: timed out; trying again in 0.1 s, then with pauses of up to 0.15 s; "
        "said once a minute",
    ]
    assert not any(record.exc_info for record in caplog.records)


def test_an_unexpected_error_is_logged_with_its_traceback_and_survived(serve, caplog):
    serve(Failing(ZeroDivisionError("ours")))
    (record,) = [record for record in caplog.records if record.exc_info]
    assert record.levelname == "ERROR"
    assert record.exc_info[0] is ZeroDivisionError


class FailsToLeave(Failing):
    """A role that fails once more on its way out."""

    def run(self):
        try:
            super().run()
        finally:
            raise OSError(errno.ENOPROTOOPT, "Protocol not available")


def test_an_error_on_the_way_out_does_not_hide_that_the_role_is_stopped(caplog):
    role = FailsToLeave()
    service = Service(role)
    service.start()
    assert role.works.wait(5)
    with bounded():
        service.stop()
    assert caplog.messages == ["role: protocol not available"]


def test_files_are_looked_at_again_and_again_and_no_pause_is_cut_short_by_that(spawn):
    role = Failing(PolicyError("no"), cooldown_s=3600)
    role.config = replace(role.config, reload_interval_s=0.01)
    service = Service(role)
    spawn(service.run)
    spawn(service.reload_for_ever)
    wait_until(lambda: role.reloads >= 3)
    assert not role.works.is_set()


def test_an_error_while_files_are_read_again_is_logged_and_they_are_looked_at_again(spawn, caplog):
    role = Failing()
    role.config = replace(role.config, reload_interval_s=0.01)
    read, errors = role.reload, [RuntimeError("can't start new thread")]

    def reload():
        if errors:
            raise errors.pop()
        read()

    role.reload = reload
    spawn(Service(role).reload_for_ever)
    wait_until(lambda: role.reloads)
    assert caplog.messages == ["role: files are not read again"]


class Short(Event):
    """There is no memory for the first waits."""

    missing = 2

    def wait(self, timeout=None):
        self.missing -= 1
        if self.missing >= 0:
            raise MemoryError
        return super().wait(timeout)


def test_without_memory_for_a_pause_the_next_try_comes_all_the_same(spawn):
    role = Failing(OSError(1, "first"), OSError(2, "second"))
    served = Service(role)
    served._retry_now = Short()
    spawn(served.run)
    with bounded():
        assert role.works.wait()


def test_a_service_that_is_started_runs_its_role_and_looks_at_its_files_until_it_is_stopped():
    role = Failing()
    assert role.config.adopt(replace(role.config, reload_interval_s=0.01))
    served = Service(role)
    served.start()
    wait_until(lambda: role.works.is_set() and role.reloads > 1)
    served.stop()
    reloads = role.reloads
    gevent.sleep(0.05)
    assert role.reloads == reloads


def test_an_interval_that_a_reload_has_changed_counts_at_once(spawn):
    role = Failing(PolicyError("no"), cooldown_s=3600)
    service = Service(role)
    spawn(service.reload_for_ever)
    gevent.sleep(0)  # it waits for the long one
    role.config = replace(role.config, reload_interval_s=0.01)
    service.reload()
    wait_until(lambda: role.reloads >= 3)


def test_a_reload_cuts_the_pause_short(spawn, caplog):
    role = Failing(PolicyError("no"), cooldown_s=3600)
    service = Service(role)
    spawn(service.run)
    gevent.sleep(0)  # the first run has failed, and the service pauses
    assert not role.ends and not role.works.is_set()
    service.reload()
    assert role.works.wait(5)
    assert role.reloads == 1


def test_a_reload_cuts_one_pause_short_and_not_the_next(spawn):
    role = Failing(PolicyError("no"), PolicyError("no"), cooldown_s=3600)
    service = Service(role)
    spawn(service.run)
    gevent.sleep(0)
    service.reload()
    wait_until(lambda: not role.ends)
    gevent.sleep(0.01)
    assert not role.works.is_set() and service.next_try_at is not None
