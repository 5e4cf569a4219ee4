"""Who has connected and is not known yet: a bounded table, and a verdict for each.

A caller of the tunnel port holds nothing and displaces nobody until it is known. This table decides who
is a candidate and who must go when it is full; it reads and writes no socket.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import gevent
from gevent.event import AsyncResult

CANDIDATES = 128  # as many as our client dials at once


@dataclass(eq=False)
class Caller:
    """One connection that waits for its verdict. ``origin`` is its address as ``net.origin_of`` gives it."""

    origin: str
    connection: Any
    greenlet: Any = None  # serves it, and is interrupted when the caller must go
    verdict: AsyncResult = field(default_factory=AsyncResult)

    def decide(self, verdict: Any) -> bool:
        """Settle what becomes of this caller; False when that is settled already."""
        if self.verdict.ready():
            return False
        self.verdict.set(verdict)
        return True


def most_candidates(max_pool_capacity: int) -> int:
    """Say how many TLS handshakes, of who may be a v1 client, go on at once: an honest one dials its whole pool."""
    return min(CANDIDATES, max_pool_capacity)


class Callers:
    """At most ``limit`` callers, in the order of their arrival."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: dict[Caller, None] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, caller: Caller) -> Caller | None:
        """Note a newcomer. When that is one too many, give the one to close: the longest-waiting of
        the address that has the most, so that no crowd from one address keeps an honest caller out."""
        self._waiting[caller] = None
        if len(self._waiting) <= self._limit:
            return None
        crowd = Counter(waiting.origin for waiting in self._waiting).most_common(1)[0][0]
        evicted = next(waiting for waiting in self._waiting if waiting.origin == crowd)
        del self._waiting[evicted]
        return evicted

    @contextmanager
    def noted(self, origin: str, connection: Any) -> Iterator[Caller]:
        """Keep who calls from ``origin`` here while it is unknown, and is served by this greenlet.

        One that must go for it is interrupted by ConnectionAbortedError.
        """
        caller = Caller(origin, connection, gevent.getcurrent())
        evicted = self.add(caller)
        if evicted:
            why = ConnectionAbortedError("too many callers, and most of them from its address")
            gevent.kill(evicted.greenlet, why)
        try:
            yield caller
        finally:
            self.remove(caller)

    def remove(self, caller: Caller) -> None:
        self._waiting.pop(caller, None)

    def youngest(self, origin: str) -> Caller | None:
        """Give the last caller of an address that still waits, or None."""
        for caller in reversed(self._waiting):
            if caller.origin == origin and not caller.verdict.ready():
                return caller
        return None
