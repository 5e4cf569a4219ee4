"""The process: what its signals do, its log, and the tunnels that it runs until it is told to stop."""

import gc
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field

import gevent
from gevent import monkey
from gevent.event import Event
from gevent.lock import Semaphore
from gevent.pool import Group

from . import log as logs
from .config import LOG_LEVELS, Config, Process
from .descriptors import make_room
from .errors import ConfigError, TunnelsRefused, reason
from .net import end_by_reset
from .notify import Notifier
from .pipes import pipes
from .state import Ended
from .status import Status
from .status_server import StatusServer
from .tunnels import MakeRole, Tunnels
from .values import Address

log = logging.getLogger(__name__)

STOP_SLACK_S = 5.0  # of a machine that is busy, beyond what the settings allow
GC_THRESHOLD = 20_000  # objects more than there were: a tunnel that grows, or a leak


@dataclass(frozen=True)
class Plan:
    """What the process is to do: checked, and made to fit."""

    process: Process
    configs: tuple[Config, ...]
    warnings: tuple[str, ...] = ()
    descriptors: int = 1  # at most, without those of pipes
    pipes: int = 0  # for bulky exchanges, at most
    status_token: str | None = field(default=None, repr=False)

    @property
    def log_level(self) -> str:
        """The level that serves every tunnel."""
        return min((config.log for config in self.configs), key=LOG_LEVELS.index)


def run(plan: Plan, load: Callable[[], Plan], make: MakeRole) -> int:
    """Run the tunnels of a plan until SIGTERM or SIGINT, then drain them; give the exit code.

    ``load`` makes the plan anew for SIGHUP, or raises ConfigError.
    """
    if not monkey.is_module_patched("socket"):
        raise RuntimeError("gevent.monkey.patch_all() must run before a service starts")
    _calm_garbage_collection()
    gevent.config.track_greenlet_tree = False  # who spawned whom is for debuggers, and costs as much as a greenlet
    gevent.get_hub().print_exception = _log_exception
    tunnels = Tunnels(make)
    stop = Event()
    notifier = Notifier(os.environ)
    running = _Running(tunnels, stop, load, notifier)
    _set_up_log(plan)
    running.listen()
    with running.changing:
        running.follow(plan)
    reports = _report(notifier, tunnels)
    stop.wait()
    with running.changing:
        notifier.stopping(tunnels.stop_s + STOP_SLACK_S)
        log.info("stopping: exchanges %d", tunnels.exchanges())
        cut = tunnels.stop()
    reports.kill()
    notifier.close()
    log.info("stopped, exchanges cut: %d", cut)
    return 0


def take_signals() -> None:
    """Let those signals come that the entry point keeps back."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2))


def _report(notifier: Notifier, tunnels: Tunnels) -> Group:
    """Tell the service manager when all tunnels have begun, and from then on how they are."""
    reports = Group()

    def tell() -> None:
        tunnels.wait_begun()
        notifier.ready()

    if notifier:
        reports.spawn(tell)
        reports.spawn(notifier.report_for_ever, tunnels.describe)
    return reports


def _set_up_log(plan: Plan) -> None:
    """Log as a plan says, or raise ConfigError."""
    process = plan.process
    try:
        logs.setup(plan.log_level, process.log_to, process.log_format, process.log_rate)
    except OSError as exc:
        raise process.fault("log_to", f"cannot be opened: {reason(exc)}") from exc


class _Running:
    """The running process: it follows plans, and does what signals say."""

    def __init__(self, tunnels: Tunnels, stop: Event, load: Callable[[], Plan], notifier: Notifier) -> None:
        self._notifier = notifier
        self._tunnels = tunnels
        self._stop = stop
        self._load = load
        self._status = Status(tunnels, logs.recent, logs.dropped)
        self._status_server: StatusServer | None = None
        self._served: tuple[Address | None, str | None] = (None, None)  # what it was made with
        self._hang_up_waits = False  # for its turn
        self.changing = Semaphore()  # held while tunnels are started and stopped

    def listen(self) -> None:
        """Obey signals from now on."""
        gevent.signal_handler(signal.SIGTERM, self._end, signal.SIGTERM)
        gevent.signal_handler(signal.SIGINT, self._end, signal.SIGINT)
        gevent.signal_handler(signal.SIGHUP, self._hang_up)
        gevent.signal_handler(signal.SIGUSR1, logs.reopen)
        gevent.signal_handler(signal.SIGUSR2, self._dump)
        take_signals()

    def follow(self, plan: Plan) -> int:
        """Make the process what a plan says; give the number of tunnels that were added, changed or removed."""
        for warning in plan.warnings:
            log.warning("%s", warning)
        make_room(plan.descriptors)
        pipes.most = plan.pipes
        try:
            return self._tunnels.apply(plan.configs)
        finally:
            self._serve_status(plan.process.status, plan.status_token)

    def _serve_status(self, address: Address | None, token: str | None) -> None:
        """Let the status server be where a plan says, with its token; it goes on where neither has changed."""
        if (address, token) == self._served:
            return
        self._served = address, token
        if self._status_server:
            self._status_server.stop()
        self._status_server = StatusServer(address, token, self._status) if address else None
        if self._status_server:
            self._status_server.start()

    def _end(self, number: int) -> None:
        if self._stop.is_set():
            log.warning("second signal: ending at once, exchanges cut: %d", self._tunnels.exchanges())
            logs.flush()
            end_by_reset()
            os._exit(128 + number)
        self._stop.set()

    def _hang_up(self) -> None:
        """Read the configuration again: a good one is followed, a bad one, or tunnel, changes nothing.

        However many come meanwhile, it is read once more; the end waits for no reading that has not begun.
        """
        if self._hang_up_waits:
            return
        self._hang_up_waits = True
        with self.changing:
            self._hang_up_waits = False
            if self._stop.is_set():
                return
            self._notifier.reloading()
            log.info("SIGHUP: reading configuration, certificates and keys again")
            try:
                plan = self._load()
                _set_up_log(plan)
                changed = self.follow(plan)
            except ConfigError as exc:
                why = str(exc)
                if isinstance(exc, TunnelsRefused) and exc.others:
                    why += f"; of the other tunnels, taken up: {exc.others}"
                log.error("configuration refused, the old one goes on: %s", why)
                self._status.refused = Ended(why)
            else:
                log.info("configuration taken up; tunnels added, changed or removed: %d", changed)
                self._status.refused = None
            finally:
                self._tunnels.reload()
                self._notifier.reloaded()

    def _dump(self) -> None:
        """Log what there is."""
        for service in self._tunnels:
            role = service.role
            logs.of(role.config.name).info(
                "%s: exchanges %d; since the start: %s", role, len(role.exchanges), role.counters
            )


def _calm_garbage_collection() -> None:
    """Look for cycles seldom, and not among what stays: exchanges leave none, and a full search holds up everybody."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)


def _log_exception(_context: object, _kind: type, value: BaseException, _trace: object) -> None:
    log.error("unexpected error in a greenlet", exc_info=value)
