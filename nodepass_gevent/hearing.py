"""What a client hears on its control channel: launches, pings, needs and bye; and how long it may hear nothing."""

import logging
import time
from collections.abc import Callable

from . import wire
from .config import Limits
from .errors import Busy, PeerLeft, ProtocolError
from .forward import Egress
from .metrics import Counters
from .wire import Bye, Launch, Need, Ping


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
        self._interval_s = 0.0  # the longest between two keep-alives; 0 while unknown

    def note_ping(self) -> None:
        now = time.monotonic()
        if self._last_ping:
            self._interval_s = max(self._interval_s, now - self._last_ping)
        self._last_ping = now

    def limit_s(self) -> float | None:
        if not self._interval_s:
            return None
        return max(self._limits.dead_intervals * self._interval_s, self._limits.dead_timeout_s)


def refusal(bye: Bye) -> Busy:
    """Say why a server sends a client away."""
    if bye.why == wire.BUSY:
        return Busy("the server has another client, and takes one at a time")
    return Busy(f"the server takes no client now: {wire.printable(bye.why)}")
