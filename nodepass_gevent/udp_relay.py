"""The datagrams of one UDP session, both ways over its data connection, with a bounded queue.

``send(datagram)`` never blocks; ``run(data, ...)`` blocks its greenlet until the session has ended. Underneath
everything runs in callbacks of watchers, as in ``relay``: no greenlet and no task per datagram. The first of a turn of
the event loop leaves at once, what follows in that turn in one write.
"""

import errno
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import gevent
from gevent.hub import Waiter

from .arrivals import Crowd, turn
from .config import Config
from .crew import Crew
from .errors import reason
from .frames import LENGTH, MAX_DATAGRAM, Frames, format_frame
from .metrics import Counters
from .transport import READ, WRITE, Transport

QUEUE = 262144  # bytes that wait for a data connection which is full: 200 datagrams as the Internet has them
QUEUE_DATAGRAMS = 4096  # so that many tiny ones do not take more memory than that
WRITE_AT = 65536  # bytes; written at once, where less waits for more of the same turn
CHUNK = 16384  # bytes per read, of 8,192 empty datagrams at most; then everybody else has a turn
RECEIVE_BATCH = 64  # datagrams of a target per wake-up, then the same
TICK_S = 0.5  # between two looks at the time that a session has been idle
DRAINED_S = 1.0  # of silence that ends a session while the process is about to end
LOST = frozenset((errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.EMSGSIZE, errno.EPERM))  # one datagram alone

ENDED = "ended"  # how a session ends in good order
IDLE = "idle for "  # how one begins to be told that ends by silence

_buffer = memoryview(bytearray(CHUNK))  # a callback never yields


class Target(Protocol):
    """Where datagrams come from that are not handed over by ``send``: a socket to the target."""

    def fileno(self) -> int:
        """Give the descriptor, for a watcher."""

    def pull(self) -> bytes:
        """Give a datagram that is there, or raise OSError: BlockingIOError when there is none."""


def longest_silence_s(config: Config, exchanges: Crew) -> float:
    """Say for how long a session may be silent now."""
    timeout_s = config.limits.udp_session_timeout_s
    return min(timeout_s, DRAINED_S) if exchanges.draining else timeout_s


class UDPRelay:
    """One session. ``deliver(datagram)`` is called for each datagram that comes out of the data connection.

    It must not block, nor keep the datagram, and raises OSError: with an errno of LOST that datagram is lost, with any
    other the session. What happened stands in the attributes: ``framed`` datagrams went into the data connection,
    ``delivered`` ones came out of it.
    """

    __slots__ = (
        "_answers", "_blocked", "_data", "_deliver", "_end", "_frames", "_gathers", "_loop", "_queue", "_queued",
        "_rest", "_target", "_watchers", "_writer", "_written_in", "active_at", "answered_at", "delivered",
        "delivered_bytes", "dropped_network", "dropped_queue", "dropped_size", "failed", "framed", "framed_bytes",
        "how", "refused", "running", "timed_out",
    )  # fmt: skip

    def __init__(self, deliver: Callable[[memoryview | bytes], object]) -> None:
        self._deliver = deliver
        self._queue: list[bytes] = []  # frames
        self._queued = 0  # bytes of datagrams in them
        self._rest: memoryview | bytes = b""  # of what is being written, not taken yet
        self._frames = Frames()
        self._loop = gevent.get_hub().loop
        self._data: Transport | None = None
        self._target: Target | None = None
        self._answers = Crowd()
        self._blocked = True  # nothing can be written now
        self._written_in = -1  # the turn of the event loop in which one was written: further ones wait for its end
        self._gathers = False  # some do
        self._end: Any = Waiter()
        self._writer: Any = None  # made when the data connection first has to be waited for
        self._watchers: list[Any] = []
        self.active_at: float = time.monotonic()  # when a datagram last came or went; the loop's clock may be set
        self.answered_at = self.active_at  # when the peer last had a datagram for this side
        self.framed = self.framed_bytes = self.delivered = self.delivered_bytes = 0
        self.dropped_queue = 0  # the data connection was full, or ended
        self.dropped_size = 0
        self.dropped_network = 0  # not taken where they were to be delivered
        self.running = False  # there is a data connection
        self.how = ""  # it ended, when it has: ENDED, IDLE and for how long, or what ended it
        self.failed = False
        self.refused = False  # the peer says that nothing came of its launch
        self.timed_out = False  # the data connection has: its peer may not know

    def send(self, datagram: bytes) -> None:
        """Put a datagram into the data connection before long; drop and count it when too much waits already."""
        size = len(datagram)
        if size > MAX_DATAGRAM:
            self.dropped_size += 1
            return
        if self._queued + size >= WRITE_AT and not self._blocked:
            self._guard(self._write)
        if self._queued + size > QUEUE or len(self._queue) >= QUEUE_DATAGRAMS or self.how:
            self.dropped_queue += 1
            return
        self._queue.append(format_frame(datagram))
        self._queued += size
        self.active_at = time.monotonic()
        if self._blocked:
            return
        now = turn()
        if now != self._written_in:
            self._written_in = now
            self._guard(self._write)
        elif not self._gathers:
            self._loop.run_callback(self._guard, self._write_gathered)
            self._gathers = True

    def take_waiting(self) -> list[bytes]:
        """Take back the datagrams that are not written yet."""
        frames, self._queue, self._queued = self._queue, [], 0
        return [frame[LENGTH:] for frame in frames]

    def idle_s(self) -> float:
        """Say for how long no datagram has come or gone."""
        return time.monotonic() - self.active_at

    def end(self, how: str, *, failed: bool = False) -> None:
        """End the session; the first reason counts. May be called from anywhere, and before ``run``."""
        if not self.how:
            self._loop.run_callback(self._end.switch, None)  # first: without memory for that it has not ended
            self.how, self.failed = how, failed
            self._blocked = True

    def count_failures(self, counters: Counters) -> None:
        """Count what has gone wrong, at the end."""
        counters.exchanges_failed += self.failed
        counters.datagrams_dropped_queue += self.dropped_queue
        counters.datagrams_dropped_size += self.dropped_size
        counters.datagrams_dropped_network += self.dropped_network

    def abort(self, error: Exception) -> bool:
        """End by the peer's word that the launch failed; False when it has answered, and then the session goes on."""
        if self.delivered:
            return False
        self.refused = True
        self.lose(error)
        return True

    def lose(self, error: Exception) -> None:
        """End: the user's next datagram finds another data connection."""
        self.end(str(error), failed=True)

    def forsake(self, since: float, error: Exception) -> None:
        """End, unless the peer has been heard ``since`` then: the user's next datagram finds another peer."""
        if self.answered_at < since:
            self.lose(error)

    def run(self, data: Transport, idle_timeout_s: Callable[[], float], target: Target | None = None) -> None:
        """Carry datagrams until a side ends or fails, or none has come for ``idle_timeout_s()``; the caller closes."""
        self._data, self._target = data, target
        self._blocked = bool(self.how)
        self.running = True
        data.watch(self._guard, self._on_readable)
        tick_s = min(TICK_S, idle_timeout_s() / 4)
        self._watch(self._loop.timer(tick_s, tick_s), self._check_idle, idle_timeout_s)
        if target is not None:
            self._watch(self._loop.io(target.fileno(), READ), self._guard, self._on_target_readable)
        try:
            self._guard(self._write)
            if data.buffered:
                self._guard(self._on_readable)
            self._end.get()
            if not self.failed:
                with suppress(OSError):  # an end that is not taken for a cut, in TLS too
                    data.finish()
        finally:
            self.running = False
            self.how = self.how or "killed"
            self._blocked = True
            self.dropped_queue += len(self.take_waiting())
            data.unwatch()
            for watcher in self._watchers:
                watcher.stop()
                watcher.close()

    def _watch(self, watcher: Any, callback: Callable[..., None], *args: object) -> None:
        self._watchers.append(watcher)
        watcher.start(callback, *args)

    def _guard(self, step: Callable[[], None]) -> None:
        """Run one step in the event loop, which must not see an exception."""
        try:
            step()
        except BlockingIOError:
            pass
        except Exception as exc:  # ours or a peer's: it ends this session and no other
            self.timed_out = isinstance(exc, TimeoutError)
            self.end(reason(exc), failed=True)

    def _check_idle(self, idle_timeout_s: Callable[[], float]) -> None:
        timeout_s = idle_timeout_s()
        if self.idle_s() >= timeout_s:
            self.end(f"{IDLE}{timeout_s:g} s")

    # Into the data connection

    def _write_gathered(self) -> None:
        self._gathers = False
        self._write()

    def _write(self) -> None:
        """Write what waits, as far as the data connection takes it now."""
        data = self._data
        assert data
        while not self._blocked and (self._queue or self._rest):
            if not self._rest:
                self.framed += len(self._queue)
                self.framed_bytes += self._queued
                self._rest = self._queue[0] if len(self._queue) == 1 else b"".join(self._queue)
                self._queue.clear()
                self._queued = 0
            taken = data.push(self._rest)
            self._rest = memoryview(self._rest)[taken:] if taken < len(self._rest) else b""
            if (self._rest and not taken) or data.unsent:
                self._wait_for_data_connection()

    def _wait_for_data_connection(self) -> None:
        assert self._data
        self._blocked = True
        if self._writer is None:
            self._writer = self._loop.io(self._data.fileno(), WRITE)
            self._watchers.append(self._writer)
        self._writer.start(self._guard, self._on_writable)

    def _on_writable(self) -> None:
        assert self._data
        if self._data.flush():
            self._writer.stop()
            self._blocked = False
            self._write()

    def _on_target_readable(self) -> None:
        assert self._target
        self._answers.take(self._receive, RECEIVE_BATCH)

    def _receive(self) -> None:
        assert self._target
        self.send(self._target.pull())

    # Out of the data connection

    def _on_readable(self) -> None:
        if self.how:  # it has ended since this was put off
            return
        assert self._data
        count = self._data.pull(_buffer)
        if not count:
            self.end(ENDED)
            return
        datagrams = self._frames.feed(_buffer[:count])
        if datagrams:
            self.active_at = self.answered_at = time.monotonic()
            for datagram in datagrams:
                self._deliver_one(datagram)
        if self._data.buffered:  # no descriptor will tell
            self._loop.run_callback(self._guard, self._on_readable)

    def _deliver_one(self, datagram: memoryview | bytes) -> None:
        try:
            self._deliver(datagram)
        except OSError as exc:
            if exc.errno not in LOST:
                raise
            self.dropped_network += 1
        else:
            self.delivered += 1
            self.delivered_bytes += len(datagram)
