"""Work that is put off: to the end of the event loop's turn, until a time, or until the loop has nothing else to do."""

import os
import time
from collections import deque
from collections.abc import Callable

import gevent

TURN_S = 0.01  # of calls that were put off; then the event loop looks for arrivals before the others


class Alarm:
    """Calls once, ``seconds`` after it was set, and may be set again: libev's one-shot timers would ring at once.

    ``in_lull``: earlier, as soon as the event loop has nothing else to do, and other processes had their turn.
    """

    __slots__ = ("_lull", "_timer")

    def __init__(self, seconds: float, *, in_lull: bool = False) -> None:
        loop = gevent.get_hub().loop
        self._timer = loop.timer(seconds, seconds, ref=False)
        self._lull = loop.idle(ref=False) if in_lull else None

    @property
    def is_set(self) -> bool:
        """Whether it is going to call."""
        return self._timer.active

    def set(self, callback: Callable[[], None]) -> None:
        """Call ``callback()`` in the event loop when it is time; it must not block."""
        self._timer.again(self._ring, callback)
        if self._lull:
            self._lull.start(self._give_way, callback)

    def _give_way(self, callback: Callable[[], None]) -> None:
        """Let others that wait for this processor run first: they may have the answer that we wait for."""
        os.sched_yield()
        assert self._lull
        self._lull.start(self._ring, callback)

    def _ring(self, callback: Callable[[], None]) -> None:
        self._timer.stop()
        if self._lull:
            self._lull.stop()
        callback()

    def close(self) -> None:
        """Call nothing any more; it may not be set again."""
        self._timer.close()
        if self._lull:
            self._lull.close()


class _Soon:
    """Calls that were put off in one turn of the event loop: one callback for all costs less than one for each."""

    def __init__(self) -> None:
        self._due: deque[tuple[Callable[..., object], tuple]] = deque()
        self._planned = False

    @property
    def busy(self) -> bool:
        """Whether calls wait for their turn."""
        return bool(self._due)

    def __call__(self, callback: Callable[..., object], *args: object) -> None:
        """Call ``callback(*args)`` before the event loop looks for more input, if it has the time; must not block."""
        if not self._planned:
            gevent.get_hub().loop.run_callback(self._call)
            self._planned = True
        self._due.append((callback, args))

    def _call(self) -> None:
        due, end = self._due, time.monotonic() + TURN_S
        try:
            while due and time.monotonic() < end:
                callback, args = due.popleft()
                callback(*args)
        finally:  # an error is told by the event loop; it is of one call, and the others are still to come
            self._planned = False
            if due:
                gevent.get_hub().loop.timer(0, priority=-1).start(self._call)  # behind what has arrived
                self._planned = True


soon = _Soon()
