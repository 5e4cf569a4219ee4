"""Keeping one tunnel running: start, pause, start again, drain. Knows no role by name."""

import logging
import math
import random
import time
from collections.abc import Callable
from typing import Protocol

from gevent import monkey
from gevent.event import Event
from gevent.pool import Group

from . import log as logs
from .config import Config
from .crew import Crew
from .errors import Busy, NodePassError, PolicyError, SessionEnded, SessionLost, reason
from .metrics import Counters
from .state import Description, Ended, wall_clock

FIRST_PAUSE_S = 0.1  # after a second failure in a row; the first is followed by a try at once
REPEAT_S = 60.0  # a reason that stays the same is logged that often
CLEAN_S = 1.0  # a session that lived this long and ended in good order is followed by a try at once
NO_MEMORY_S = 0.05  # the process stands still for that long when there is no memory to wait
HEALTHY_PER_PAUSE = 12  # a session that lived this many pauses ends the row: a minute at a pause of 5 s


class Role(Protocol):
    """What is kept running: a server or a client."""

    config: Config
    counters: Counters
    exchanges: Crew
    begun: Event  # set by the first success, or the end of the first try

    @property
    def peers(self) -> int:
        """How many are connected."""

    def run(self) -> None:
        """Work until something fails, and raise it."""

    def reload(self) -> None:
        """Read again what stands in files."""

    def describe(self) -> Description:
        """Say what there is now."""

    def dismiss(self) -> None:
        """Let nobody wait for this one any more: ``run`` was killed, and does not come again."""

    def retire(self) -> None:
        """Leave the place, once ``run`` was killed, to another one with other settings; exchanges go on."""


class Backoff:
    """Pauses between tries: none at first, then FIRST_PAUSE_S, doubled each time up to ``longest_s()``.

    Each is shortened by up to a half, as ``draw`` (0 to 1) says: the clients of a lost server do not come all at once.
    """

    def __init__(self, longest_s: Callable[[], float], draw: Callable[[], float]) -> None:
        self._longest_s = longest_s
        self._draw = draw
        self._next_s = 0.0

    def pause_s(self, lived_s: float, *, clean: bool = False) -> float:
        """Give the pause after a try that worked for ``lived_s`` seconds, and ended in good order when ``clean``."""
        healthy_s = min(HEALTHY_PER_PAUSE * self._next_s, CLEAN_S if clean else math.inf)
        if lived_s >= healthy_s:
            self._next_s = 0.0
        pause_s = self._next_s
        self._next_s = min(max(pause_s * 2, FIRST_PAUSE_S), self._longest_s())
        return round(pause_s * (1 - self._draw() / 2), 3)


class Service:
    """One role, kept running until it is stopped."""

    def __init__(self, role: Role, draw: Callable[[], float] = random.random) -> None:
        self.role = role
        self.former: set[Service] = set()  # in whose place it has come, while their exchanges go on
        self._log = logs.of(role.config.name)
        self._running = Group()
        self._backoff = Backoff(lambda: role.config.service_cooldown_s, draw)
        self._retry_now = Event()
        self._reloaded = Event()
        self._said: dict[str, float] = {}  # when reasons were logged above DEBUG, of late
        self.failures = 0  # tries that did not end in good order
        self.ended: Ended | None = None  # how the last try ended
        self.next_try_at: float | None = None  # Unix time; None while the role runs

    @property
    def exchanges(self) -> int:
        """Count the exchanges, with those that began under former settings."""
        return len(self.role.exchanges) + sum(len(former.role.exchanges) for former in self.former)

    def start(self) -> None:
        """Run the role, and look at its files, in greenlets."""
        self._running.spawn(self.run)
        self._running.spawn(self.reload_for_ever)

    def stop(self) -> None:
        """Accept nobody any more, and say bye; what runs goes on."""
        self.role.exchanges.draining = True
        self._running.kill()
        self.role.dismiss()

    def drain(self, timeout_s: float | None) -> int:
        """Wait for exchanges to end, then cut those that are left; give their number."""
        exchanges = self.role.exchanges
        exchanges.join(timeout_s)
        cut = len(exchanges)
        exchanges.kill()
        return cut

    def run(self) -> None:
        """Run the role until it is stopped; whatever else ends it is logged and followed by the next try."""
        while True:
            self.next_try_at = None
            pause_s = self._try()
            self.role.begun.set()
            if self.role.exchanges.draining:  # an error on the way out hid that it is stopped
                return
            self._retry_now.clear()
            self.next_try_at = wall_clock() + pause_s
            _wait(self._retry_now, pause_s)

    def reload(self) -> None:
        """Read files again, and cut a pause short."""
        self.role.reload()
        self._retry_now.set()
        self._reloaded.set()

    def reload_for_ever(self) -> None:
        """Let the role look at its files every RELOAD_INTERVAL, which a reload may have changed."""
        while True:
            self._reloaded.clear()
            if not _wait(self._reloaded, self.role.config.reload_interval_s):
                try:
                    self.role.reload()
                except (RuntimeError, MemoryError):  # no thread for a passphrase, no memory: the next look may have it
                    self._log.exception("%s: files are not read again", self.role)

    def _try(self) -> float:
        """Run the role once, say how it ended, and give the pause before the next time."""
        lived_s, level, clean, longest_s = 0.0, logging.WARNING, False, self.role.config.service_cooldown_s
        once = "; said once a minute" if longest_s < REPEAT_S else ""
        try:
            self.role.run()
            why = "it ended"
        except PolicyError as exc:  # trying sooner changes nothing
            level = logging.WARNING if isinstance(exc, Busy) else logging.ERROR
            self._say(level, str(exc), f"every {longest_s:g} s", once)
            return longest_s
        except SessionEnded as exc:
            lived_s, why, level, clean = exc.lived_s, str(exc), logging.INFO, True
        except SessionLost as exc:
            lived_s, why = exc.lived_s, str(exc)
        except (OSError, NodePassError) as exc:
            why = reason(exc)
        except Exception:  # a fault of ours: say so, and go on serving
            self._log.exception("%s: unexpected error", self.role)
            why = "unexpected error"
        pause_s = self._backoff.pause_s(lived_s, clean=clean)
        then = "" if lived_s else f", then with pauses of up to {longest_s:g} s{once}"
        self._say(level, why, f"in {pause_s:g} s" if pause_s else "now", then)
        return pause_s

    def _say(self, level: int, why: str, when: str, then: str) -> None:
        """Log why a try ended, the same reason above DEBUG at most every REPEAT_S.

        The first line with a reason says what comes ``then``: there is silence after it.
        """
        now, again = time.monotonic(), f"; trying again {when}{'' if why in self._said else then}"
        self.failures += level > logging.INFO
        self.ended = Ended(why)
        if now - self._said.get(why, -REPEAT_S) < REPEAT_S:
            level = logging.DEBUG
        else:
            self._said = {each: at for each, at in self._said.items() if now - at < REPEAT_S} | {why: now}
        self._log.log(level, "%s: %s%s", self.role, why, "" if self.role.exchanges.draining else again)


def _wait(event: Event, seconds: float) -> bool:
    """Wait for an event; without memory for that only a moment, in which nobody has a turn: who waits must not spin."""
    try:
        return event.wait(seconds)
    except MemoryError:
        monkey.get_original("time", "sleep")(NO_MEMORY_S)
        return False
