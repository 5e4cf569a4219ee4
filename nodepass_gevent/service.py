"""Running roles: start, pause, start again, drain, and the signals of the process. Knows no role by name."""

import gc
import logging
import math
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import gevent
from gevent import monkey
from gevent.event import Event
from gevent.pool import Group

from . import log as log_lines
from .config import Config
from .crew import Crew
from .errors import NodePassError, PolicyError, SessionEnded, SessionLost
from .metrics import Counters
from .transport import reason

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.1  # after a second failure in a row; the first is followed by a try at once
GC_THRESHOLD = 20_000  # objects more than there were: a tunnel that grows, or a leak
REPEAT_S = 60.0  # a reason that stays the same is logged that often
CLEAN_S = 1.0  # a session that lived this long and ended in good order is followed by a try at once
HEALTHY_PER_PAUSE = 12  # a session that lived this many pauses ends the row: a minute at a pause of 5 s


class Role(Protocol):
    """What is kept running: a server or a client."""

    config: Config
    counters: Counters
    exchanges: Crew

    def run(self) -> None:
        """Work until something fails, and raise it."""

    def reload(self) -> None:
        """Read again what stands in files."""


class Backoff:
    """Pauses between tries: none at first, then FIRST_PAUSE_S, doubled each time up to ``longest_s``.

    Each is shortened by up to a half, as ``draw`` (0 to 1) says: the clients of a lost server do not come all at once.
    """

    def __init__(self, longest_s: float, draw: Callable[[], float]) -> None:
        self._longest_s = longest_s
        self._draw = draw
        self._next_s = 0.0

    def pause_s(self, lived_s: float, *, clean: bool = False) -> float:
        """Give the pause after a try that worked for ``lived_s`` seconds, and ended in good order when ``clean``."""
        healthy_s = min(HEALTHY_PER_PAUSE * self._next_s, CLEAN_S if clean else math.inf)
        if lived_s and lived_s >= healthy_s:
            self._next_s = 0.0
        pause_s = self._next_s
        self._next_s = min(max(pause_s * 2, FIRST_PAUSE_S), self._longest_s)
        return round(pause_s * (1 - self._draw() / 2), 3)


class Service:
    """One role, kept running."""

    def __init__(self, role: Role, draw: Callable[[], float] = random.random) -> None:
        self.role = role
        self._backoff = Backoff(role.config.service_cooldown_s, draw)
        self._retry_now = Event()
        self._said = ""  # the last reason that was logged above DEBUG, and when
        self._said_at = -REPEAT_S

    def run(self) -> None:
        """Run the role for ever; whatever ends it is logged and followed by the next try."""
        while True:
            pause_s = self._try()
            self._retry_now.clear()
            self._retry_now.wait(pause_s)

    def reload(self) -> None:
        """Read files again, and cut a pause short."""
        self.role.reload()
        self._retry_now.set()

    def reload_for_ever(self) -> None:
        """Let the role look at its files every RELOAD_INTERVAL."""
        while True:
            gevent.sleep(self.role.config.reload_interval_s)
            self.role.reload()

    def _try(self) -> float:
        """Run the role once, say how it ended, and give the pause before the next time."""
        lived_s, level, clean = 0.0, logging.WARNING, False
        try:
            self.role.run()
            why = "it ended"
        except PolicyError as exc:  # trying sooner changes nothing
            return self._say(logging.ERROR, str(exc), self.role.config.service_cooldown_s)
        except SessionEnded as exc:
            lived_s, why, level, clean = exc.lived_s, str(exc), logging.INFO, True
        except SessionLost as exc:
            lived_s, why = exc.lived_s, str(exc)
        except (OSError, NodePassError) as exc:
            why = reason(exc)
        except Exception:  # a fault of ours: say so, and go on serving
            log.exception("%s: unexpected error", self.role)
            why = "unexpected error"
        return self._say(level, why, self._backoff.pause_s(lived_s, clean=clean))

    def _say(self, level: int, why: str, pause_s: float) -> float:
        """Log why a try ended, the same reason above DEBUG at most every REPEAT_S; give the pause back."""
        now = time.monotonic()
        if why == self._said and now - self._said_at < REPEAT_S:
            level = logging.DEBUG
        else:
            self._said, self._said_at = why, now
        log.log(level, "%s: %s; trying again %s", self.role, why, f"in {pause_s:g} s" if pause_s else "now")
        return pause_s


def run(roles: Sequence[Role]) -> int:
    """Keep ``roles`` running until SIGTERM or SIGINT, drain them, and give the exit code."""
    if not monkey.is_module_patched("socket"):
        raise RuntimeError("gevent.monkey.patch_all() must run before a service starts")
    _calm_garbage_collection()
    gevent.get_hub().print_exception = _log_exception
    services = [Service(role) for role in roles]
    stop = Event()
    _handle_signals(stop, services)
    running = Group()
    for service in services:
        running.spawn(service.run)
        running.spawn(service.reload_for_ever)
    stop.wait()
    _drain(roles, running)
    return 0


def _drain(roles: Sequence[Role], running: Group) -> None:
    """Stop accepting; let exchanges end within SHUTDOWN_TIMEOUT; then end them."""
    timeout_s = max(role.config.shutdown_timeout_s for role in roles)
    log.info("stopping: exchanges %d, given %g s to end", sum(len(role.exchanges) for role in roles), timeout_s)
    for role in roles:
        role.exchanges.draining = True
    end = time.monotonic() + timeout_s
    running.kill()
    for role in roles:
        role.exchanges.join(max(end - time.monotonic(), 0))
    cut = sum(len(role.exchanges) for role in roles)
    for role in roles:
        role.exchanges.kill()
        log.info("%s: %s", role, role.counters)
    log.info("stopped, exchanges cut: %d", cut)


def _handle_signals(stop: Event, services: Sequence[Service]) -> None:
    def end(number: int) -> None:
        if stop.is_set():
            cut = sum(len(service.role.exchanges) for service in services)
            log.warning("second signal: ending at once, exchanges cut: %d", cut)
            log_lines.flush()
            os._exit(128 + number)
        stop.set()

    def hang_up() -> None:
        log.info("SIGHUP: reading files again")
        for service in services:
            service.reload()

    gevent.signal_handler(signal.SIGTERM, end, signal.SIGTERM)
    gevent.signal_handler(signal.SIGINT, end, signal.SIGINT)
    gevent.signal_handler(signal.SIGHUP, hang_up)


def _calm_garbage_collection() -> None:
    """Look for cycles seldom, and not among what stays: exchanges leave none, and a full search holds up everybody."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)


def _log_exception(_context: object, _kind: type, value: BaseException, _trace: object) -> None:
    log.error("unexpected error in a greenlet", exc_info=value)
