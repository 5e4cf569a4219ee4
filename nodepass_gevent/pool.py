"""One-time data connections kept ready, as they arrive from a peer that dials them.

A pool is about readiness alone. It gives a connection away once and never takes it back; one whose end
arrives while it is idle is dropped and never given to anybody. State changes first, then comes I/O.
"""

import logging
from collections import deque
from collections.abc import Callable

import gevent
from gevent.event import AsyncResult, Event

from .alarm import soon
from .errors import NoDataConnection, PoolClosed
from .idle import Idle
from .transport import Transport

log = logging.getLogger(__name__)


class AcceptingPool:
    """Data connections that a peer dialled. Nothing may arrive on one before it is launched."""

    def __init__(
        self,
        capacity: int,
        on_shortage: Callable[[int], object] = lambda takers: None,
        log: logging.Logger = log,
        user_timeout_s: float = 0,
    ) -> None:
        self.capacity = capacity
        self._log = log
        self._on_shortage = on_shortage  # told, once a turn of the event loop, how many more takers have to wait
        self._short = 0
        self._idle = Idle(self._drop, user_timeout_s)
        self._takers: deque[AsyncResult] = deque()
        self.ended = Event()  # set when it is closed
        self._why: str | TimeoutError = "the pool was closed"

    def __len__(self) -> int:
        return len(self._idle)

    def __contains__(self, id: bytes) -> bool:
        return id in self._idle

    @property
    def closed(self) -> bool:
        return self.ended.is_set()

    @property
    def room(self) -> int:
        """How many more connections are welcome."""
        return self.capacity + len(self._takers) - len(self._idle)

    def add(self, id: bytes, transport: Transport) -> None:
        """Keep a connection, or hand it to whoever has waited longest; PoolClosed when it came too late."""
        if self.closed:
            raise PoolClosed("the session has ended")
        while self._takers:
            taker = self._takers.popleft()
            if not taker.ready():
                taker.set((id, transport))
                return
        self._idle.put(id, transport)

    def take_ready(self) -> tuple[bytes, Transport] | None:
        """Give the oldest live connection, if there is one."""
        while self._idle:
            id, transport = self._idle.give_oldest()
            if transport.peek() is None:
                return id, transport
            transport.reset()
        return None

    def take(self, timeout_s: float) -> tuple[bytes, Transport]:
        """Give the oldest live connection, or wait for one; NoDataConnection, PoolClosed.

        Does not switch when there is one, or no time to wait.
        """
        if ready := self.take_ready():
            return ready
        if self.closed:
            raise PoolClosed("the session has ended")
        if timeout_s <= 0:
            raise NoDataConnection("no data connection is ready")
        taker = AsyncResult()
        if not self._short:
            soon(self._tell_shortage)  # first: without memory for that nobody waits, and the next one tells
        self._short += 1
        self._takers.append(taker)
        try:
            with gevent.Timeout(timeout_s, NoDataConnection(f"no data connection within {round(timeout_s, 3):g} s")):
                return taker.get()
        except BaseException:
            self._give_up(taker)
            raise

    def _tell_shortage(self) -> None:
        self._short, takers = 0, self._short
        self._on_shortage(takers)

    def _give_up(self, taker: AsyncResult) -> None:
        if taker in self._takers:
            self._takers.remove(taker)
        elif taker.successful():  # handed over in the very moment of giving up
            taker.get()[1].reset()

    def _drop(self, id: bytes, transport: Transport) -> None:
        if transport.peek() is None:
            return
        self._idle.give(id).reset()
        self._log.debug("idle data connection %s dropped: its peer closed it or spoke out of turn", id.decode())

    def leave(self) -> None:
        """Give no more away: the session is about to end."""
        self.close()

    def settle(self) -> None:
        """Nothing that was launched waits here."""

    def run(self) -> str | TimeoutError:
        """Live until closed; nothing to do meanwhile."""
        self.ended.wait()
        return self._why

    def forsake(self, why: str) -> None:
        """Close it because the peer is silent."""
        self._why = TimeoutError(why)
        self.close()

    def close(self) -> None:
        """Reset what is idle; whoever waits is told PoolClosed."""
        self.ended.set()
        self._idle.close()
        while self._takers:
            self._takers.popleft().set_exception(PoolClosed("the session has ended"))
