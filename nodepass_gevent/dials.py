"""The dials of a pool that are on their way, each until it works.

What a dial need not wait for is done at once, and costs no greenlet; for the rest one waits, and tries again.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import NoReturn, Protocol

from .crew import Crew
from .errors import NodePassError, PolicyError, reason
from .transport import Stream, Transport

RETRY_MIN_S, RETRY_MAX_S = (0.05, 5.0)  # pause after a failed dial, doubled for each further one

Dialled = tuple[bytes, Transport]  # a data connection, behind its id


class AtOnce(Protocol):
    """How to dial without a wait, where a connection needs no more than its id."""

    def begin(self) -> tuple[Stream, bool]:
        """Dial; give the connection, and whether nothing but its id is missing yet. OSError, NodePassError."""

    def take_id(self, stream: Stream) -> bytes:
        """Take the id, if it is here; empty when it is not, or never comes. ProtocolError."""

    def finish(self, stream: Stream, *, only_id: bool) -> Dialled:
        """Wait for what is missing; OSError, NodePassError, and then the connection is closed."""


class Dials:
    """The dials that a pool has begun; ``count`` of them have not ended. The quickest one ever took ``quickest_s``.

    ``dial()`` blocks, and raises OSError or NodePassError; it runs in a greenlet, unless ``at_once`` gets by without
    one. ``check(id, transport)`` resets what has an id that is taken, and raises ProtocolError; all else is for
    ``add(id, transport)``. ``wanted()`` says whether a dial that has failed is to be tried again.
    """

    def __init__(
        self,
        dial: Callable[[], Dialled],
        at_once: AtOnce | None,
        check: Callable[[bytes, Transport], None],
        add: Callable[[bytes, Transport], None],
        wanted: Callable[[], bool],
        sleep: Callable[[float], object],
        log: logging.Logger,
    ) -> None:
        self._dial = dial
        self._at_once = at_once
        self._check = check
        self._add = add
        self._wanted = wanted
        self._sleep = sleep
        self._log = log
        self.count = 0
        self.quickest_s = 0.0  # what the line takes, without a crowd; 0 before the first one has ended
        self.refusal: PolicyError | None = None  # trying again would change nothing
        self._failing = False  # and it was said
        self._leaving = False
        self._awaited: dict[Stream, float] = {}  # begun at once, and watched for their id; when that was
        self._awaited_before: set[Stream] = set()  # in the round before
        self._handed_over: set[Stream] = set()  # to greenlets that have not begun
        self._greenlets = Crew()  # as many as the pool begins

    def begin(self) -> None:
        """Dial one more; what there is no memory for, the pool's next round dials."""
        self.count += 1
        began = time.monotonic()
        stream, only_id = None, False
        if self._at_once:
            try:
                stream, only_id = self._at_once.begin()
            except (OSError, NodePassError, MemoryError):  # a greenlet dials again, and tells
                pass
        if stream is None:
            self._hand_over(self._dial, began)
        elif not only_id:
            self._finish(stream, began, only_id=False)
        else:
            try:
                stream.watch(self._id_arrived, stream)
            except MemoryError:
                self.count -= 1
                stream.reset()
            else:
                self._awaited[stream] = began

    def finish_late(self) -> None:
        """Let greenlets wait for ids that have not come within a round: their deadline begins there."""
        for stream in self._awaited.keys() & self._awaited_before:
            self._finish(stream, self._awaited.pop(stream), only_id=True)
        self._awaited_before = set(self._awaited)

    def leave(self) -> None:
        """Warn of no failure any more: the session is about to end."""
        self._leaving = True

    def close(self) -> None:
        """End all of them."""
        self._greenlets.kill(block=False)
        for stream in self._awaited.keys() | self._handed_over:
            stream.reset()
        self._awaited.clear()
        self._handed_over.clear()

    def _finish(self, stream: Stream, began: float, *, only_id: bool) -> None:
        """Let a greenlet wait for what is missing."""
        assert self._at_once
        stream.unwatch()
        self._handed_over.add(stream)
        self._hand_over(partial(self._at_once.finish, stream, only_id=only_id), began, stream)

    def _hand_over(self, dial: Callable[[], Dialled], began: float, stream: Stream | None = None) -> None:
        """Let a greenlet dial until it works, at first by ``dial()``, with a connection that is begun."""
        try:
            self._greenlets.spawn(self._add_one, dial, began, stream)
        except MemoryError:
            self.count -= 1
            if stream:
                self._handed_over.remove(stream)
                stream.reset()

    def _id_arrived(self, stream: Stream) -> None:
        """Add a connection whose id is here; whatever else has arrived, a greenlet meets, and tells."""
        assert self._at_once
        if stream not in self._awaited:  # its taker does not watch it yet
            stream.unwatch()
            return
        began = self._awaited.pop(stream)
        try:
            id = self._at_once.take_id(stream)
            if id:
                self._check(id, stream)
        except NodePassError as exc:
            stream.reset()
            self._hand_over(partial(_fail, exc), began)
        except MemoryError:
            stream.reset()
            self.count -= 1
        else:
            if id:
                self.count -= 1
                self._failing = False
                self._note_duration(began)
                self._add(id, stream)
            else:
                self._finish(stream, began, only_id=True)

    def _note_duration(self, began: float) -> None:
        took_s = time.monotonic() - began
        self.quickest_s = min(took_s, self.quickest_s or took_s)

    def _add_one(self, dial: Callable[[], Dialled], began: float, stream: Stream | None) -> None:
        self._handed_over.discard(stream)
        try:
            dialled = self._dial_until_it_works(dial, began)
        finally:
            self.count -= 1
        if dialled:
            self._failing = False
            self._add(*dialled)

    def _dial_until_it_works(self, dial: Callable[[], Dialled], began: float) -> Dialled | None:
        """Dial, with a longer pause after each failure; None when no more connections are wanted."""
        pause_s = RETRY_MIN_S
        while True:
            try:
                dialled = dial()
                self._check(*dialled)
                self._note_duration(began)
                return dialled
            except PolicyError as exc:
                self.refusal = exc
            except (OSError, NodePassError) as exc:
                quiet = self._failing or self._leaving
                (self._log.debug if quiet else self._log.warning)("no data connection: %s", reason(exc))
                self._failing = True
            dial = self._dial
            self._sleep(pause_s)
            pause_s = min(pause_s * 2, RETRY_MAX_S)
            if self.refusal or not self._wanted():
                return None
            began = time.monotonic()


def _fail(exc: Exception) -> NoReturn:
    raise exc
