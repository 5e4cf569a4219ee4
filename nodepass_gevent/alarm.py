"""Work that is put off: until a time, or until the event loop has nothing else to do."""

from collections.abc import Callable

import gevent


class Alarm:
    """Calls once, ``seconds`` after it was set, and may be set again: libev's one-shot timers would ring at once.

    ``in_lull``: earlier, as soon as the event loop has nothing else to do.
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
