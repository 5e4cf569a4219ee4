"""Greenlets that are used again: a new one costs a stack and several system calls, a waiting one a switch."""

from collections.abc import Callable

import gevent
from gevent.hub import Waiter
from gevent.pool import Group

SPARE = 64  # greenlets that wait for work, at most


class Crew:
    """Runs functions, each in a greenlet that is its own until it returns. They must not raise."""

    def __init__(self) -> None:
        self._greenlets = Group()
        self._spare: list[Waiter] = []
        self._killed = False

    def spawn(self, function: Callable[..., object], *args: object) -> None:
        """Start ``function(*args)`` soon; never blocks."""
        if self._spare:
            gevent.get_hub().loop.run_callback(self._spare.pop().switch, (function, args))
        else:
            self._greenlets.spawn(self._work, function, args)

    def kill(self) -> None:
        """End all of them soon, and start no more."""
        self._killed = True
        self._greenlets.kill(block=False)

    def _work(self, function: Callable[..., object], args: tuple) -> None:
        while not self._killed:
            function(*args)
            if len(self._spare) >= SPARE:
                return
            waiter = Waiter()
            self._spare.append(waiter)
            function, args = waiter.get()
