"""One control channel and its pool: whichever ends first ends both.

After the handshake the two sides of a tunnel are alike here: a reader that hands on what comes, a writer
that sends signals and keep-alives, and a pool that keeps itself ready. What the bytes mean is for ``receive``,
which the role above supplies.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import gevent
from gevent.event import Event

from . import wire
from .errors import PolicyError, ProtocolError, SessionLost
from .transport import Transport, reason, soon

CHUNK = 4096  # bytes per read: many lines at once, little memory


class ReadyPool(Protocol):
    """What a session needs of its pool."""

    def run(self) -> str | PolicyError:
        """Live; give how it ended."""

    def close(self) -> None:
        """End it at once."""


class Session:
    """A live control channel.

    ``receive(data)`` takes what the peer sends and raises ProtocolError when it may not; ``silence_s()`` is how
    long the peer may stay silent (None: for ever); ``ping_interval_s`` None sends no keep-alives.
    """

    def __init__(
        self,
        control: Transport,
        pool: ReadyPool,
        receive: Callable[[bytes], None],
        *,
        ping_interval_s: float | None = None,
        silence_s: Callable[[], float | None] = lambda: None,
    ) -> None:
        self.control = control
        self.pool = pool
        self._receive = receive
        self._ping_interval_s = ping_interval_s
        self._silence_s = silence_s
        self._due: list[bytes] = []
        self._wake = Event()  # what is due is for the writer: the peer reads slowly, or not at all

    def send(self, line: bytes) -> None:
        """Queue a line; all lines of one turn of the event loop go out in one segment. Never blocks."""
        self._due.append(line)
        if len(self._due) == 1:
            soon(self._send_now)

    def _send_now(self) -> None:
        """Send what is due, without the writer as long as the kernel takes everything."""
        if self._wake.is_set():
            return
        lines, taken, sent = b"".join(self._due), 0, False
        with suppress(OSError):  # the writer meets it again, and ends
            taken = self.control.push(lines)
            sent = self.control.flush() and taken == len(lines)
        self._due = [] if sent else [lines[taken:]]
        if not sent:
            self._wake.set()

    def run(self) -> None:
        """Live until the channel or the pool ends, end the other too, and raise SessionLost, or PolicyError."""
        started = time.monotonic()
        greenlets = [gevent.spawn(part) for part in (self._read, self._write, self.pool.run)]
        try:
            first = gevent.wait(greenlets, count=1)[0]
            if isinstance(first.value, PolicyError):
                raise first.value
            how = first.value if first.successful() else repr(first.exception)
            raise SessionLost(f"control channel lost: {how}", time.monotonic() - started)
        except gevent.GreenletExit:  # an orderly stop on this side: the peer sees an end, and no reset
            gevent.killall(greenlets)
            with suppress(OSError):
                self.control.finish()
            self.control.close()
            raise
        finally:
            self.pool.close()
            gevent.killall(greenlets)

    def _read(self) -> str:
        while True:
            limit_s, data = self._silence_s(), None
            try:
                with gevent.Timeout(limit_s, False):
                    data = self.control.recv_next(CHUNK)
                if data is None:
                    return f"silent for {limit_s:g} s"
                if not data:
                    return "closed by the peer"
                self._receive(data)
            except (OSError, ProtocolError) as exc:
                return reason(exc)

    def _write(self) -> str:
        ping_due = time.monotonic()
        while True:
            if self._ping_interval_s and time.monotonic() >= ping_due:
                self._due.append(wire.PING)
                ping_due = time.monotonic() + self._ping_interval_s
            try:
                while self._due or self._wake.is_set():
                    self._wake.set()  # what comes meanwhile waits its turn
                    lines, self._due = b"".join(self._due), []
                    self.control.sendall(lines)
                    if not self._due:
                        self._wake.clear()
            except OSError as exc:
                return reason(exc)
            self._wake.wait(self._ping_interval_s and max(ping_due - time.monotonic(), 0))
