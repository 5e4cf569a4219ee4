"""One-time data connections kept ready on the side that dials them; see ``pool`` for the other side.

It is refilled the moment one is used. What a dial need not wait for is done at once, and costs no greenlet.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NoReturn, Protocol

import gevent
from gevent.event import AsyncResult

from .alarm import Alarm, soon
from .crew import Crew
from .errors import NoDataConnection, NodePassError, PolicyError, PoolClosed, ProtocolError, reason
from .idle import ROUND_S, Idle
from .transport import Stream, Transport

log = logging.getLogger(__name__)

SHRINK_BELOW, GROW_ABOVE = 0.2, 0.8  # of the capacity dialled in a round
GATHER_S = 0.001  # while there are others to serve: dials in a batch cost both sides less, fewer wake-ups
DIALS_AT_ONCE = 128  # in flight; a peer's backlog of handshakes is longer
RETRY_MIN_S, RETRY_MAX_S = (0.05, 5.0)  # pause after a failed dial, doubled for each further one


class AtOnce(Protocol):
    """How to dial without a wait, where a connection needs no more than its id."""

    def begin(self) -> tuple[Stream, bool]:
        """Dial; give the connection, and whether nothing but its id is missing yet. OSError, NodePassError."""

    def take_id(self, stream: Stream) -> bytes:
        """Take the id, if it is here; empty when it is not, or never comes. ProtocolError."""

    def finish(self, stream: Stream, *, only_id: bool) -> tuple[bytes, Transport]:
        """Wait for what is missing; OSError, NodePassError, and then the connection is closed."""


class DialingPool:
    """Data connections that this side dials, refilled the moment one is used.

    ``dial()`` blocks and gives (id, transport), or raises OSError or NodePassError; it runs in a greenlet, unless
    ``at_once`` gets by without one. ``capacity`` starts at ``minimum``; after each ROUND_S it goes down by one when
    less than a fifth of it was dialled in that round, up by one when more than four fifths were, to ``maximum`` at most
    (protocol v1). Where the peer does not launch a connection before it has been ready for some time, ``lead_s`` says
    how long to be ahead of it: as many more are kept as were launched within that time.
    """

    def __init__(
        self,
        dial: Callable[[], tuple[bytes, Transport]],
        minimum: int,
        maximum: int,
        sleep: Callable[[float], object] = gevent.sleep,
        lead_s: float = 0.0,
        log: logging.Logger = log,
        user_timeout_s: float = 0,
        at_once: AtOnce | None = None,
    ) -> None:
        self.capacity = self._minimum = minimum
        self._maximum = maximum
        self._log = log
        self._dial = dial
        self._at_once = at_once
        self._awaited: set[Stream] = set()  # begun at once, and watched for their id
        self._awaited_before: set[Stream] = set()  # in the round before
        self._handed_over: set[Stream] = set()  # to greenlets that have not begun
        self._sleep = sleep
        self._lead_s = lead_s
        self._used_at: deque[float] = deque(maxlen=DIALS_AT_ONCE)  # when connections were launched, in the last lead_s
        self._dials = Crew()  # sized by _fill
        self._dialling = 0
        self._dialled = 0  # in this round
        self._taken = 0  # in this round
        self._owed = 0  # dials that the peer asked for, not begun yet
        self._fills_now = False  # in this turn of the event loop
        self._gathering = Alarm(lead_s / 6 or GATHER_S, in_lull=not lead_s)
        self._failing = False
        self._refusal: PolicyError | None = None  # trying again would change nothing
        self._idle = Idle(self._look, user_timeout_s)
        self._ended: dict[bytes, Transport] = {}  # end of stream has come, in this round
        self._ended_before: dict[bytes, Transport] = {}  # and in the round before
        self._takers: dict[bytes, AsyncResult] = {}
        self._kept: set[bytes] = set()  # launched, and not taken yet
        self._outliving: dict[bytes, Transport] = {}  # those of them that were here at an end in good order
        self._dropped: deque[bytes] = deque(maxlen=maximum)  # launched in vain before they came
        self._gone: dict[bytes, None] = {}  # let go of before a launch, the oldest first; no more than the maximum
        self._leaving = False
        self._closed = False

    def __len__(self) -> int:
        return len(self._idle)

    def run(self) -> PolicyError:
        """Fill the pool and let its capacity follow the demand, until killed, or until a dial is refused by policy."""
        while not self._refusal:
            self._fill()
            self._sleep(ROUND_S)
            self._adapt()
            self._forget_ended()
            self._finish_late()
        return self._refusal

    def take(self, id: bytes, timeout_s: float) -> Transport:
        """Give connection ``id``, waiting for it when its launch has overtaken it; NoDataConnection, PoolClosed.

        For one that was here and is gone there is no wait.
        """
        if id in self._outliving:
            return self._outliving.pop(id)
        if self._closed:
            raise PoolClosed("the session has ended")
        self._kept.discard(id)
        self._taken += 1
        if self._lead_s:
            self._used_at.append(time.monotonic())
        if transport := self._give(id):
            self._fill_soon()
            return transport
        if id in self._gone:  # the peer may not know yet; once per id: a launch costs it few bytes
            del self._gone[id]
            raise NoDataConnection(f"data connection {id.decode()} is gone")
        if id in self._takers:
            raise ProtocolError(f"data connection {id.decode()} launched twice")
        taker = self._takers[id] = AsyncResult()
        self._fill()  # the connection is used the moment it is here
        too_late = NoDataConnection(f"no data connection {id.decode()} within {timeout_s:g} s")
        try:
            with gevent.Timeout(timeout_s, too_late):
                return taker.get()
        except BaseException:
            if taker.successful():  # it came in the very moment of giving up
                taker.get().reset()
            else:
                self.drop(id)
            raise
        finally:
            self._takers.pop(id, None)

    def _give(self, id: bytes) -> Transport | None:
        """Give connection ``id``, if it is here."""
        if id in self._idle:
            return self._idle.give(id)
        return self._ended.pop(id, None) or self._ended_before.pop(id, None)

    def keep(self, id: bytes) -> None:
        """Let connection ``id`` stay, though it is surplus or ends: it is launched, and will be taken."""
        self._kept.add(id)

    def drop(self, id: bytes) -> None:
        """Reset connection ``id``, or the next one that comes with it: its launch comes to nothing."""
        self._kept.discard(id)
        if id in self._outliving:
            self._outliving.pop(id).reset()
        elif transport := self._give(id):
            transport.reset()
            self._fill_soon()
        else:
            self._dropped.append(id)

    def outlives(self, id: bytes) -> bool:
        """Whether connection ``id`` has outlived the session."""
        return id in self._outliving

    def dial_more(self, count: int) -> None:
        """Dial ``count`` connections beyond the capacity: that many users wait at the peer."""
        self._owed = min(self._owed + count, self._maximum)
        self._fill()

    def leave(self) -> None:
        """Dial no more: the session is about to end. What is launched is given still."""
        self._leaving = True

    def settle(self) -> None:
        """Wait until nobody waits for a connection that was launched, nor is about to."""
        while soon.busy:  # a launch in a crowd begins later
            gevent.sleep(0)
        gevent.wait(list(self._takers.values()))

    def close(self) -> None:
        """Reset what is idle, end the dials; whoever waits is told PoolClosed.

        What is kept stays to be taken, where the end is in good order: what was launched before it is honoured.
        """
        self._closed = True
        self._gathering.close()
        self._dials.kill(block=False)
        for stream in self._awaited | self._handed_over:
            stream.reset()
        self._awaited.clear()
        self._handed_over.clear()
        if self._leaving:
            self._outliving = {id: transport for id in self._kept if (transport := self._give(id))}
        self._idle.close()
        self._kept.clear()
        self._forget_ended()
        self._forget_ended()  # those of this round, too
        for taker in self._takers.values():
            taker.set_exception(PoolClosed("the session has ended"))

    def _missing(self) -> int:
        if self._used_at:
            past = time.monotonic() - self._lead_s
            while self._used_at and self._used_at[0] < past:
                self._used_at.popleft()
        return self.capacity + len(self._used_at) + len(self._takers) - len(self._idle) - self._dialling

    def _fill_soon(self) -> None:
        """Replace what is used: behind what is launched now when less than half is left, else a little later."""
        if 2 * len(self._idle) < self.capacity:
            if not self._fills_now:
                soon(self._fill_now)
                self._fills_now = True
        elif not self._gathering.is_set:
            self._gathering.set(self._fill)

    def _fill_now(self) -> None:
        self._fills_now = False
        self._fill()

    def _fill(self) -> None:
        wanted = max(self._missing(), self._owed)
        if wanted <= 0 or self._refusal or self._leaving or self._closed:
            return
        held = len(self._idle) + len(self._ended) + len(self._ended_before)
        before = self._dialling
        for _ in range(min(wanted, DIALS_AT_ONCE - before, self._maximum - held - before)):
            self._begin()
        self._owed = max(self._owed - (self._dialling - before), 0)

    def _begin(self) -> None:
        """Dial one more; what there is no memory for, the next round dials."""
        self._dialling += 1
        stream, only_id = None, False
        if self._at_once:
            try:
                stream, only_id = self._at_once.begin()
            except (OSError, NodePassError, MemoryError):  # a greenlet dials again, and tells
                pass
        if stream is None:
            self._hand_over(self._dial)
        elif not only_id:
            self._finish(stream, only_id=False)
        else:
            try:
                stream.watch(self._id_arrived, stream)
            except MemoryError:
                self._dialling -= 1
                stream.reset()
            else:
                self._awaited.add(stream)

    def _finish(self, stream: Stream, *, only_id: bool) -> None:
        """Let a greenlet wait for what is missing."""
        assert self._at_once
        stream.unwatch()
        self._handed_over.add(stream)
        self._hand_over(partial(self._at_once.finish, stream, only_id=only_id), stream)

    def _hand_over(self, dial: Callable[[], tuple[bytes, Transport]], stream: Stream | None = None) -> None:
        """Let a greenlet dial until it works, at first by ``dial()``, with a connection that is begun."""
        try:
            self._dials.spawn(self._add_one, dial, stream)
        except MemoryError:
            self._dialling -= 1
            if stream:
                self._handed_over.remove(stream)
                stream.reset()

    def _id_arrived(self, stream: Stream) -> None:
        """Keep a connection whose id is here; whatever else has arrived, a greenlet meets, and tells."""
        assert self._at_once
        if stream not in self._awaited:  # its taker does not watch it yet
            stream.unwatch()
            return
        self._awaited.remove(stream)
        try:
            id = self._at_once.take_id(stream)
            if id:
                self._check_new(id, stream)
        except NodePassError as exc:
            stream.reset()
            self._hand_over(partial(_fail, exc))
        except MemoryError:
            stream.reset()
            self._dialling -= 1
        else:
            if id:
                self._add(id, stream)
            else:
                self._finish(stream, only_id=True)

    def _finish_late(self) -> None:
        """Let greenlets wait for ids that have not come within a round: their deadline begins there."""
        for stream in self._awaited & self._awaited_before:
            self._awaited.remove(stream)
            self._finish(stream, only_id=True)
        self._awaited_before = set(self._awaited)

    def _add_one(self, dial: Callable[[], tuple[bytes, Transport]], stream: Stream | None) -> None:
        self._handed_over.discard(stream)
        dialled = None
        try:
            dialled = self._dial_until_it_works(dial)
        finally:
            if not dialled:
                self._dialling -= 1
        if dialled:
            self._add(*dialled)

    def _add(self, id: bytes, transport: Transport) -> None:
        self._dialling -= 1
        self._dialled += 1
        self._failing = False
        self._place(id, transport)
        self._fill()

    def _dial_until_it_works(self, dial: Callable[[], tuple[bytes, Transport]]) -> tuple[bytes, Transport] | None:
        """Dial, with a longer pause after each failure; None when no more connections are wanted."""
        pause_s = RETRY_MIN_S
        while True:
            try:
                dialled = dial()
                self._check_new(*dialled)
                return dialled
            except PolicyError as exc:
                self._refusal = exc
            except (OSError, NodePassError) as exc:
                quiet = self._failing or self._leaving
                (self._log.debug if quiet else self._log.warning)("no data connection: %s", reason(exc))
                self._failing = True
            dial = self._dial
            self._sleep(pause_s)
            pause_s = min(pause_s * 2, RETRY_MAX_S)
            if self._refusal or self._missing() < 0:
                return None

    def _check_new(self, id: bytes, transport: Transport) -> None:
        """Make sure that no other connection has this id: of two the first is kept."""
        if id in self._idle or id in self._ended or id in self._ended_before:
            transport.reset()
            raise ProtocolError(f"the server gives the id {id.decode()} twice")

    def _place(self, id: bytes, transport: Transport) -> None:
        if self._closed:
            transport.reset()
        elif id in self._dropped:  # idle, it would wait for ever for a launch that was
            self._dropped.remove(id)
            transport.reset()
        elif id in self._takers:
            self._takers.pop(id).set(transport)
        else:
            self._idle.put(id, transport)

    def _adapt(self) -> None:
        if not self._taken and not self._dialled:
            self._drop_surplus()
        if self._dialled < self.capacity * SHRINK_BELOW:
            self.capacity = max(self.capacity - 1, self._minimum)
        elif self._dialled > self.capacity * GROW_ABOVE:
            self.capacity = min(self.capacity + 1, self._maximum)
        self._dialled = self._taken = 0

    def _drop_surplus(self) -> None:
        """Let go what a crowd that has passed left beyond the capacity: the newest, which the peer hands out last."""
        for id in [id for id in self._idle if id not in self._kept][self.capacity :]:
            self._let_go(id, self._idle.give(id))

    def _look(self, id: bytes, transport: Transport) -> None:
        """Look what has arrived on an idle connection. If it is the user's, it has overtaken the launch, which is
        on its way; an end is either a user who said nothing, or the server's, and then no launch will come."""
        arrived = transport.peek()
        if arrived:
            self._idle.ignore(id)
        elif arrived is False:  # not replaced before it is launched, or the round ends: a server could go on and on
            self._ended[id] = self._idle.give(id)

    def _forget_ended(self) -> None:
        """Drop what ended more than a round ago and was never launched."""
        ended, self._ended, self._ended_before = self._ended_before, {}, self._ended
        for id, transport in ended.items():
            if id in self._kept:
                self._ended[id] = transport
            else:
                self._let_go(id, transport)

    def _let_go(self, id: bytes, transport: Transport) -> None:
        """Reset a connection that was never launched, and remember that it is gone."""
        self._gone[id] = None
        if len(self._gone) > self._maximum:
            del self._gone[next(iter(self._gone))]
        transport.reset()


def _fail(exc: Exception) -> NoReturn:
    raise exc
