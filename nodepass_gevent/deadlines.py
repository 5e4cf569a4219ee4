"""The deadline of a wait, which stands at the call: ``with deadline(5, "TLS handshake"): ...``."""

import time
from functools import lru_cache

import gevent

LOOKS = 8  # at what waits within a shared deadline


def deadline(seconds: float, what: str) -> gevent.Timeout:
    """Bound the block: ``TimeoutError("<what>: timed out after <seconds> s")`` at its end."""
    return gevent.Timeout(seconds, TimeoutError(f"{what}: timed out after {seconds:g} s"))


class _SharedDeadline:
    """One timer for all who wait for as long: what ends in time costs two lookups. A greenlet may be in it once."""

    def __init__(self, seconds: float, what: str) -> None:
        self._seconds, self._what = seconds, what
        self._due: dict[gevent.Greenlet, float] = {}  # when the wait of each has to end
        look_s = seconds / LOOKS
        # of less priority than arrivals: what is here counts, also when we are late ourselves
        self._timer = gevent.get_hub().loop.timer(look_s, look_s, ref=False, priority=-1)

    def __enter__(self) -> None:
        if not self._timer.active:
            self._timer.start(self._look)
        self._due[gevent.getcurrent()] = time.monotonic() + self._seconds

    def __exit__(self, *_: object) -> None:
        del self._due[gevent.getcurrent()]

    def _look(self) -> None:
        now = time.monotonic()
        for waiting in [waiting for waiting, due in self._due.items() if due <= now]:
            waiting.throw(TimeoutError(f"{self._what}: timed out after {self._seconds:g} s"))
        if not self._due:
            self._timer.stop()


shared_deadline = lru_cache(64)(_SharedDeadline)  # as ``deadline``, for what is frequent; up to an eighth later
