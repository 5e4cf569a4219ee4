"""The access log: one line per exchange, on both sides, about who was served, how much, and how it ended.

Its level is a setting of the tunnel; a line that nobody will see costs a look at that level. What a line says stands in
its message, and in fields of their own beside it.
"""

import errno
import logging
import time
from collections.abc import Callable
from typing import Any

import gevent

from . import log as logs
from . import udp_relay
from .config import Config
from .errors import LaunchFailed, reason
from .metrics import Traffic
from .transport import Transport
from .udp_relay import UDPRelay
from .values import Address

LEVELS = {"off": 0, "debug": logging.DEBUG, "info": logging.INFO}

PUBLIC, TARGET = "public", "target"  # where an exchange leaves the tunnel: at its ingress, at its egress

# How an exchange ended; besides these it is "reset by" the user, the target, or the tunnel between them.
ENDED = "ended"  # both sides said so
TIMEOUT = "timeout"
CUT = "cut"  # by this process, which stops, or needs the place
NO_DATA_CONNECTION = "no data connection"
NO_TARGET = "no target"
REFUSED_BY_PEER = "refused by peer"  # which could not begin it
UNANSWERED = "unanswered"  # a datagram of profile v1
FAILED = "failed"

End = tuple[str, str]  # one of these, and more words where there are any


class AccessLog:
    """The lines of one tunnel's ingress (``place`` PUBLIC) or egress (TARGET).

    Up is from the user to the target; a user is a socket address, None where unknown.
    """

    def __init__(self, config: Config, place: str) -> None:
        self._place = place
        self._config = config
        self._log = logs.of(config.name)
        self._sides = ("user", "tunnel") if place == PUBLIC else ("tunnel", "target")

    def tcp(
        self,
        id: bytes,
        user: tuple | None,
        sides: tuple[Transport, Transport],
        started: float,
        traffic: Callable[[], Traffic],
        error: BaseException | None,
    ) -> None:
        """Tell of an exchange before its ``sides``, towards the user and towards the target, are closed."""
        if level := self._level():
            bytes_up, bytes_down, *_ = traffic()
            counts = {"bytes_up": bytes_up, "bytes_down": bytes_down}
            self._write(level, "tcp", id, user, started, self._end_of(error, sides), counts)

    def session(self, id: bytes, user: tuple | None, session: UDPRelay, started: float) -> None:
        """Tell of a UDP session that has ended."""
        if level := self._level():
            into, out = (session.framed, session.framed_bytes), (session.delivered, session.delivered_bytes)
            up, down = (into, out) if self._place == PUBLIC else (out, into)
            dropped = session.dropped_queue + session.dropped_size + session.dropped_network
            counts = _datagrams(up, down) | {"datagrams_dropped": dropped}
            self._write(level, "udp", id, user, started, _end_of_session(id, session), counts)

    def datagram(self, id: bytes, user: tuple | None, datagram: bytes, answer: bytes, started: float, end: End) -> None:
        """Tell of an exchange of profile v1: a datagram and its answer, each empty when there was none."""
        if level := self._level():
            up, down = ((int(bool(data)), len(data)) for data in (datagram, answer))
            self._write(level, "udp", id, user, started, end, _datagrams(up, down))

    def nothing(self, protocol: str, id: bytes, user: tuple | None, started: float, end: End) -> None:
        """Tell of an exchange that did not begin."""
        if level := self._level():
            self._write(level, protocol, id, user, started, end, {"bytes_up": 0, "bytes_down": 0})

    def _level(self) -> int:
        """Give the level of a line, or 0 when nobody will see it."""
        level = LEVELS[self._config.access_log]
        return level if level and self._log.isEnabledFor(level) else 0

    def _end_of(self, error: BaseException | None, sides: tuple[Transport, Transport]) -> End:
        if error is None:
            return ENDED, ""
        if isinstance(error, gevent.GreenletExit):
            return CUT, ""
        if isinstance(error, LaunchFailed):
            return REFUSED_BY_PEER, error.why
        if isinstance(error, TimeoutError) and error.errno is None:
            return TIMEOUT, str(error)
        for name, side in zip(self._sides, sides, strict=True):
            # an end in good order leaves the connection in another state than a break does
            if isinstance(error, OSError) and side.fileno() >= 0 and side.is_dead():
                return (TIMEOUT, name) if error.errno == errno.ETIMEDOUT else (f"reset by {name}", "")
        return FAILED, reason(error)

    def _write(
        self,
        level: int,
        protocol: str,
        id: bytes,
        user: tuple | None,
        started: float,
        end: End,
        counts: dict[str, int],
    ) -> None:
        fields: dict[str, Any] = {"event": "exchange", "protocol": protocol}
        if id:
            fields["id"] = id.decode()
        if user:
            fields["user"] = str(Address(*user[:2]))
        fields[self._place] = str(self._config.target)
        duration_s = round(time.monotonic() - started, 3)
        fields |= counts | {"duration_s": duration_s, "end": end[0]}
        if end[1]:
            fields["reason"] = end[1]
        self._log.log(
            level,
            "exchange %s: %s %s -> %s: %s after %.3f s, %s",
            fields.get("id", "-"),
            protocol,
            fields.get("user", "-"),
            fields[self._place],
            f"{end[0]} ({end[1]})" if end[1] else end[0],
            duration_s,
            _amounts(counts),
            extra=fields,
        )


def _datagrams(up: tuple[int, int], down: tuple[int, int]) -> dict[str, int]:
    return {"bytes_up": up[1], "bytes_down": down[1], "datagrams_up": up[0], "datagrams_down": down[0]}


def _amounts(counts: dict[str, int]) -> str:
    text = f"{counts['bytes_up']} bytes up, {counts['bytes_down']} down"
    if "datagrams_up" in counts:
        text += f", {counts['datagrams_up']} datagrams up, {counts['datagrams_down']} down"
    if counts.get("datagrams_dropped"):
        text += f", {counts['datagrams_dropped']} dropped"
    return text


def _end_of_session(id: bytes, session: UDPRelay) -> End:
    how = session.how
    if how == udp_relay.ENDED:
        return ENDED, ""
    if session.refused:
        return REFUSED_BY_PEER, how
    if session.failed:
        return FAILED, how
    if how.startswith(udp_relay.IDLE):
        return TIMEOUT, how
    if not id and how:
        return NO_DATA_CONNECTION, how
    return CUT, how
