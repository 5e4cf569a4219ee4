"""What arrives, one by one as a rule and at times as a crowd, and how it is taken in the event loop."""

import errno
import os
from collections.abc import Callable

import gevent
from gevent.hub import Waiter


def turn() -> int:
    """Number the event loop's turn: the number stays between two looks for arrivals, and then grows by one."""
    return gevent.get_hub().loop.iteration


class Crowd:
    """Takes what waits: one thing per wake-up, and all of them as long as there is more than one.

    To ask for another one when there is none costs as much as to take one. ``one()`` takes one, and raises
    BlockingIOError where nothing waits; what else it raises is for the caller.
    """

    __slots__ = ("_many", "_turn")

    def __init__(self) -> None:
        self._many = False  # the last time
        self._turn = -1  # of the last time

    def take(self, one: Callable[[], object], most: int) -> None:
        """Call ``one()`` once, or, where a crowd is to be expected, until nothing waits, ``most`` times at most."""
        now = turn()
        crowd = self._many or now == self._turn + 1  # woken again at once: perhaps something was left
        self._turn = now
        taken = 0
        try:
            while taken < (most if crowd else 1):
                one()
                taken += 1
        except BlockingIOError:
            crowd = taken > 1
        self._many = crowd


class Arrivals:
    """Lets what arrives be taken in the event loop, which costs no switch, while a greenlet waits for its end.

    From ``start(callback)`` on ``callback()`` is called at each arrival, until ``stop()``. ``take()`` must not block.
    ``watched()``: whether that is so still. For want of memory libev calls once and then nevermore.
    """

    def __init__(
        self,
        start: Callable[[Callable[[], None]], object],
        stop: Callable[[], object],
        take: Callable[[], bool],
        watched: Callable[[], bool] = lambda: True,
    ) -> None:
        self._start, self._stop, self._take, self._watched = start, stop, take, watched
        self._over = Waiter()

    def run(self) -> None:
        """Wait while ``take()`` gives True; raise what it raises, and OSError when nothing would be heard any more."""
        self._start(self._arrived)
        try:
            self._over.get()
        finally:
            self._stop()

    def _arrived(self) -> None:
        try:
            goes_on = self._take()
            if not self._watched():
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        except Exception as exc:  # the event loop must not see it: it is raised where ``run`` waits
            self._over.throw(exc)
        else:
            if not goes_on:
                self._over.switch(None)
