"""Work that is put off: until a time, or until the event loop has nothing else to do."""

from collections.abc import Callable

import gevent


class Alarm:
    """Calls once, ``seconds`` after it was set, and may be set again: libev's one-shot timers would ring at once."""

    __slots__ = ("_timer",)

    def __init__(self, seconds: float) -> None:
        self._timer = gevent.get_hub().loop.timer(seconds, seconds, ref=False)

    @property
    def is_set(self) -> bool:
        """Whether it is going to call."""
        return self._timer.active

    def set(self, callback: Callable[[], None]) -> None:
        """Call ``callback()`` in the event loop when it is time; it must not block."""
        self._timer.again(self._ring, callback)

    def _ring(self, callback: Callable[[], None]) -> None:
        self._timer.stop()
        callback()

    def close(self) -> None:
        """Call nothing any more."""
        self._timer.close()


class Lull(Alarm):
    """Calls once, when the event loop has nothing else to do, and ``seconds`` after it was set at the latest."""

    __slots__ = ("_idle",)

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self._idle = gevent.get_hub().loop.idle(ref=False)

    def set(self, callback: Callable[[], None]) -> None:
        super().set(callback)
        self._idle.start(self._ring, callback)

    def _ring(self, callback: Callable[[], None]) -> None:
        self._idle.stop()
        super()._ring(callback)

    def close(self) -> None:
        super().close()
        self._idle.close()
