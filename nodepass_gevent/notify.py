"""What systemd is told: ready, reloading, stopping, a line of status, and that the event loop turns (sd_notify(3)).

Nothing is sent where NOTIFY_SOCKET is unset, and nothing ever waits: what the socket does not take is sent again later.
"""

import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping

import gevent

from .transport import RawSocket

log = logging.getLogger(__name__)

STATUS_S = 5.0  # at most so long is the line of status out of date
MAX_STATUS = 200  # characters
MAX_UNSENT = 8  # messages; what comes later counts


class Notifier:
    """The process's line to its service manager; does nothing where there is none."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        name = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + name[1:] if name.startswith("@") else name
        self._watched_s = _watchdog_s(environ)
        self._socket: RawSocket | None = None
        self._ready = False
        self._unsent: deque[str] = deque(maxlen=MAX_UNSENT)
        if name.startswith(("/", "@")):
            self._socket = RawSocket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)

    def __bool__(self) -> bool:
        return self._socket is not None

    def ready(self) -> None:
        """All tunnels have begun."""
        self._ready = True
        self._tell("READY=1")

    def reloading(self) -> None:
        """The configuration is being read."""
        self._tell(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def reloaded(self) -> None:
        """The configuration has been read, and followed or refused."""
        if self._ready:
            self._tell("READY=1")

    def stopping(self, longest_s: float) -> None:
        """The process drains, for ``longest_s`` at most: so much time is asked for."""
        self._tell(f"STOPPING=1\nSTATUS=stopping\nEXTEND_TIMEOUT_USEC={int(longest_s * 1_000_000)}")

    def report_for_ever(self, status: Callable[[], str]) -> None:
        """Send the status when it has changed, and feed the watchdog twice in its time: a stuck loop does not."""
        said = ""
        while self:
            text = status()[:MAX_STATUS]
            fields = ["WATCHDOG=1"] * bool(self._watched_s) + [f"STATUS={text}"] * (text != said)
            if self._send_unsent() and fields and self._send("\n".join(fields)):
                said = text
            gevent.sleep(min(self._watched_s / 2 or STATUS_S, STATUS_S))

    def close(self) -> None:
        """Say nothing any more."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _tell(self, text: str) -> None:
        """Send what must not be lost."""
        if self:
            self._unsent.append(text)
            self._send_unsent()

    def _send_unsent(self) -> bool:
        while self._unsent:
            if not self._send(self._unsent[0]):
                return False
            self._unsent.popleft()
        return True

    def _send(self, text: str) -> bool:
        """Send a message, if it is taken at once."""
        assert self._socket
        try:
            self._socket.sendto(text.encode(), self._address)
        except OSError as exc:
            log.debug("service manager not told %r: %s", text, exc)
            return False
        return True


def _watchdog_s(environ: Mapping[str, str]) -> float:
    """Give the time within which the manager wants to hear of this process, 0 for never."""
    text = environ.get("WATCHDOG_USEC", "")
    ours = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    return int(text) / 1_000_000 if ours and text.isdecimal() and len(text) < 16 else 0.0
