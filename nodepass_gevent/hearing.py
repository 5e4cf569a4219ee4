"""What is heard on a control channel, and done at once.

By a client: launches, pings, needs and bye, and how long it may hear nothing. By a server: what its client answers.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, MutableMapping

from gevent.event import Event

from . import wire
from .config import Limits
from .egress import Egress
from .errors import GONE, Busy, LaunchFailed, PeerLeft, ProtocolError
from .launching import Abortable
from .metrics import Counters
from .wire import Bye, Fail, Launch, Need, Ping

LATELY_S = 1.0  # a UDP session that has had an answer within that works, whatever becomes of the control channel


class Signals:
    """What the server says once the control channel is up; ``lines`` cuts it, as it has cut what came before."""

    def __init__(
        self,
        egress: Egress,
        counters: Counters,
        log: logging.Logger,
        lines: wire.Lines,
        on_ping: Callable[[], object],
        on_need: Callable[[int], object] = lambda users: None,
        *,
        obeys_bye: bool = False,
    ) -> None:
        self._egress = egress
        self._counters = counters
        self._log = log
        self._lines = lines
        self._on_ping = on_ping
        self._on_need = on_need
        self._obeys_bye = obeys_bye  # a v1 server knows none

    def receive(self, data: bytes) -> None:
        """Take what came on the control channel; ProtocolError for a line without end, PeerLeft or Busy at a bye."""
        self.obey(self._lines.feed(data))

    def obey(self, lines: list[bytes]) -> None:
        """Do what lines say; count and pass over what is malformed or unknown."""
        for line in lines:
            try:
                signal = wire.parse_signal(line)
            except ProtocolError as exc:
                self._counters.signals_malformed += 1
                self._log.debug("signal passed over: %s", exc)
                continue
            match signal:
                case Launch():
                    self._egress.launch(signal)
                case Ping():
                    self._on_ping()
                case Need():
                    self._on_need(signal.users)
                case Bye() if self._obeys_bye:
                    raise refusal(signal) if signal.why == wire.BUSY else PeerLeft("the server said bye")
                case _:
                    self._counters.signals_unknown += 1


class Silence:
    """How long a v1 server may be silent: its own interval tells, for an old one may have set it long."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._last_ping = 0.0
        self._intervals_s: deque[float] = deque(maxlen=5)  # between keep-alives

    def note_ping(self) -> None:
        now = time.monotonic()
        if self._last_ping:
            self._intervals_s.append(now - self._last_ping)
        self._last_ping = now

    def limit_s(self) -> float | None:
        if not self._intervals_s:
            return None
        # an outage makes one of them long, and the next ones short
        median_s = sorted(self._intervals_s)[len(self._intervals_s) // 2]
        return max(self._limits.dead_intervals * median_s, self._limits.dead_timeout_s)


def refusal(bye: Bye) -> Busy:
    """Say why a server sends a client away."""
    if bye.why == wire.BUSY:
        return Busy("the server has another client, and takes one at a time")
    return Busy(f"the server takes no client now: {wire.printable(bye.why)}")


class Answers:
    """What a v2 client says once it is welcome: answers to pings, launches that failed, bye."""

    def __init__(self, launched: MutableMapping[bytes, Abortable], counters: Counters, log: logging.Logger) -> None:
        self._log = log
        self.heard = Event()  # set by whatever comes
        self._lines = wire.Lines()
        self._known: set[bytes] = set()  # what ran when it was last heard
        self._launched = launched
        self._counters = counters

    def receive(self, data: bytes) -> None:
        """Take what came on the control channel; ProtocolError for what is no line, PeerLeft at a bye."""
        self.heard.set()
        self._known = set(self._launched)
        for line in self._lines.feed(data):
            match wire.parse_signal(line):
                case Ping():
                    pass
                case Fail() as fail:
                    self._fail(fail)
                case Bye():
                    raise PeerLeft("it said bye")
                case _:
                    self._counters.signals_unknown += 1

    def forsake(self) -> None:
        """End what was launched since the client was last heard, and has not been answered: nobody may be there.

        A frozen client's kernel goes on acknowledging, so that nothing else would ever end its users. UDP sessions that
        have heard nothing lately end too: with a user who speaks on they would never be idle.
        """
        silent = LaunchFailed("silent")
        for id in self._launched.keys() - self._known:
            self._launched[id].abort(silent)
        for running in self._launched.values():
            running.forsake(time.monotonic() - LATELY_S, silent)

    def _fail(self, fail: Fail) -> None:
        """End the exchange of a launch that failed; one that has been answered only if its data connection is gone."""
        running, error = self._launched.get(fail.id), LaunchFailed(wire.printable(fail.why, wire.MAX_LINE)[1:-1])
        if running and running.abort(error):
            return
        if running and error.why == GONE:
            running.lose(error)
            return
        self._counters.signals_stale += 1
        self._log.debug("launch %s failed, says its client: it has ended, or works", fail.id.decode())
