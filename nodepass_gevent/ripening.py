"""Data connections of v1 clients, between their id and their pool.

The original's client drops a launch that comes right behind its id (protocol v1). So each connection waits here until
its id is acknowledged, and a moment more. One timer looks after all of them.
"""

import time
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, NamedTuple

import gevent

from .config import Limits
from .errors import PoolClosed, reason
from .pool import AcceptingPool
from .transport import Stream, Transport

RIPEN_S = 0.005  # after the acknowledgement (protocol v1)
GATHER_S = 0.001  # what is ripe within that goes on together
ACK_POLL_S, ACK_POLL_MAX_S = 0.001, 0.05  # the kernel does not tell when an acknowledgement is in


class _Entry(NamedTuple):
    due: float  # when to look, on the monotonic clock; the earliest stands first in the heap
    id: bytes
    stream: Stream
    data: Transport  # the stream, or TLS over it
    pool: AcceptingPool
    pause_s: float  # since the last look; 0 when the id is acknowledged
    too_late: float  # to be acknowledged


class Ripening:
    """Owns what waits in it. ``on_refused(stream, why)`` is told of each that does not reach its pool."""

    def __init__(self, limits: Limits, on_refused: Callable[[Stream, str], None]) -> None:
        self._limits = limits
        self._on_refused = on_refused
        self._entries: list[_Entry] = []  # a heap
        self._timer: Any = None  # runs while anything waits
        self._waits_until = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, id: bytes, stream: Stream, data: Transport, pool: AcceptingPool) -> None:
        """Bring a connection whose id is sent into its pool when it is ripe."""
        now = time.monotonic()
        pause_s = ACK_POLL_S if stream.unacknowledged() else 0
        too_late = now + self._limits.id_timeout_s
        heappush(self._entries, _Entry(now + (pause_s or RIPEN_S), id, stream, data, pool, pause_s, too_late))
        if self._timer is None or self._waits_until > self._entries[0].due + GATHER_S:
            self._wait(now)

    def close(self) -> None:
        """Reset what is not ripe yet."""
        self._stop_timer()
        entries, self._entries = self._entries, []
        for entry in entries:
            entry.data.reset()

    def _wait(self, now: float) -> None:
        """Look again when the first is due, and what comes right behind it."""
        self._stop_timer()
        self._waits_until = max(self._entries[0].due, now) + GATHER_S
        self._timer = gevent.get_hub().loop.timer(self._waits_until - now)
        self._timer.start(self._on_time)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.stop()
            self._timer.close()
            self._timer = None

    def _on_time(self) -> None:
        self._stop_timer()
        now = time.monotonic()
        while self._entries and self._entries[0].due <= now:
            entry = heappop(self._entries)
            try:
                if entry.pause_s:
                    self._look(entry, now)
                else:
                    entry.pool.add(entry.id, entry.data)
            except (PoolClosed, MemoryError) as exc:
                self._refuse(entry, reason(exc))
        if self._entries:
            self._wait(now)

    def _look(self, entry: _Entry, now: float) -> None:
        """Look whether the id is acknowledged by now."""
        if not entry.stream.unacknowledged():
            heappush(self._entries, entry._replace(due=now + RIPEN_S, pause_s=0))
        elif entry.stream.peek() is False:  # a reset connection never acknowledges
            self._refuse(entry, "it closed before its id was acknowledged")
        elif now >= entry.too_late:
            self._refuse(entry, f"acknowledgement of the id: timed out after {self._limits.id_timeout_s:g} s")
        else:
            pause_s = min(entry.pause_s * 2, ACK_POLL_MAX_S)
            heappush(self._entries, entry._replace(due=now + pause_s, pause_s=pause_s))

    def _refuse(self, entry: _Entry, why: str) -> None:
        entry.data.reset()
        self._on_refused(entry.stream, why)
