"""Greenlets that are used again: a new one costs a stack and several system calls, a waiting one a switch."""

from collections import deque
from collections.abc import Callable

import gevent
from gevent.hub import Waiter
from gevent.pool import Pool

from .alarm import soon

SPARE = 128  # greenlets that wait for work, at most: users who come at once by the hundred find them

Work = tuple[Callable[..., object] | None, tuple]  # nothing to do: the greenlet ends


class Crew:
    """Runs functions, each in a greenlet that is its own until it returns; ``limit`` of them at once (None: no limit).

    They must not raise. Whoever is about to join or kill sets ``draining``, and they see it: no more are to come, and
    what is idle should end.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._greenlets = Pool(limit)
        self._spare: list[Waiter] = []  # of greenlets that wait for work
        self._due: deque[Work] = deque()  # never more than there are spare ones, and for each a _begin is planned
        self._most_spare = SPARE  # so many may wait for work
        self._entering = 0  # greenlets that wait for room
        self._killed = False
        self.draining = False

    def __len__(self) -> int:
        """Count those that run."""
        return len(self._greenlets) - self._free

    @property
    def _free(self) -> int:
        """How many wait for work, and there is none for them."""
        return len(self._spare) - len(self._due)

    def full(self) -> bool:
        """Whether ``spawn`` would wait."""
        return len(self._spare) <= len(self._due) and self._all_used()

    def free_count(self) -> int:
        """Count those that may be spawned without a wait."""
        return self._free + self._greenlets.free_count()

    def wait_available(self) -> None:
        """Wait until there is room for one."""
        if not self._free:
            self._greenlets.wait_available()

    def spawn(self, function: Callable[..., object], *args: object) -> None:
        """Start ``function(*args)`` soon; waits for room when there is none."""
        if len(self._spare) > len(self._due):
            soon(self._begin)
            self._due.append((function, args))
        else:
            greenlet = gevent.Greenlet(self._work, [(function, args)])
            self._greenlets.add(greenlet)
            try:
                greenlet.start()
            except MemoryError:
                self._greenlets.discard(greenlet)  # or it would keep its place for ever
                raise

    def enter(self) -> None:
        """Wait for room, and count the calling greenlet until it ends; GreenletExit when all are killed."""
        if self._free:  # it keeps a place
            self._let_go()
        self._entering += 1
        try:
            self._greenlets.add(gevent.getcurrent())
        finally:
            self._entering -= 1
        if self._killed:
            raise gevent.GreenletExit("all exchanges are ended")

    def join(self, timeout_s: float | None) -> None:
        """Wait until none runs or enters, for ``timeout_s`` at most (None: for ever); none is kept for more work."""
        self._most_spare = 0
        while self._free:
            self._let_go()
        with gevent.Timeout(timeout_s, False):
            while self._entering or self._greenlets.greenlets:
                self._greenlets.join()
                gevent.sleep(0)  # who waits for room enters where another one has ended

    def kill(self, *, block: bool = True) -> None:
        """End all of them; what is spawned from now on, or has not begun, never runs."""
        self._killed = True
        self._spare.clear()
        self._due.clear()
        self._greenlets.kill(block=block)
        while block and self._entering:
            gevent.sleep(0)

    def _all_used(self) -> bool:
        """Do as the pool's own ``full``, with half of its calls."""
        size = self._greenlets.size
        return size is not None and len(self._greenlets.greenlets) >= size

    def _let_go(self) -> None:
        """Let a greenlet end that waits for work."""
        soon(self._spare[-1].switch, (None, ()))
        self._spare.pop()

    def _begin(self) -> None:
        """Wake a greenlet for work that is due, unless one that was awake has taken it."""
        if self._due:
            self._spare.pop().switch(self._due.popleft())

    def _work(self, first: list[Work]) -> None:
        function, args = first.pop()  # out of the greenlet's own arguments: nothing keeps what is done
        waiter = Waiter()  # for all its waits: nobody switches to one that does not wait
        while function and not self._killed:
            function(*args)
            function, args = None, ()
            # somebody may wait for this one's place
            if self._entering or self._free >= self._most_spare or self._all_used():
                return
            if self._due:
                function, args = self._due.popleft()
            else:
                self._spare.append(waiter)
                function, args = waiter.get()
