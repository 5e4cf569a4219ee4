"""One-time data connections kept ready on the side that dials them; see ``pool`` for the other side.

It is refilled the moment one is used. How a dial goes on until it works is for ``dials``.
"""

import logging
import time
from collections import deque
from collections.abc import Callable

import gevent
from gevent.event import AsyncResult

from .alarm import Alarm, soon
from .dials import AtOnce, Dialled, Dials
from .errors import NoDataConnection, PolicyError, PoolClosed, ProtocolError
from .idle import ROUND_S, Idle
from .transport import Transport

log = logging.getLogger(__name__)

SHRINK_BELOW, GROW_ABOVE = 0.2, 0.8  # of the capacity dialled in a round
GATHER_S = 0.001  # with TLS, or others to serve: dials in a batch cost both sides less, fewer wake-ups
QUIET_ROUNDS = 60  # behind which a crowd has passed: one like it, as of a page that is opened, finds what it left
DIALS_AT_ONCE = 128  # in flight; a peer's backlog of handshakes is longer
LINE_S = 0.1  # as many more for each that the quickest dial takes: most of a stream of them is on the line
NEAR_S = 0.01  # a quickest dial of less: one that begins when a connection is used comes early enough


class DialingPool:
    """Data connections that this side dials, refilled the moment one is used.

    ``dial()`` blocks and gives (id, transport), or raises OSError or NodePassError; it runs in a greenlet, unless
    ``at_once`` gets by without one. ``capacity`` starts at ``minimum``; after each ROUND_S it goes down by one when
    less than a fifth of it was dialled in that round, up by one when more than four fifths were, to ``maximum`` at most
    (protocol v1). As many more are kept as were launched while a dial to a peer far away takes, if they are more than
    half of the capacity: users who come as often find one ready. That time is ``lead_s`` longer, where the peer
    launches none before it has been ready for some time.
    """

    def __init__(
        self,
        dial: Callable[[], Dialled],
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
        self._dials = Dials(dial, at_once, self._check_new, self._add, lambda: self._missing() >= 0, sleep, log)
        self._sleep = sleep
        self._lead_s = lead_s
        self._used_at: deque[float] = deque(maxlen=maximum)  # when connections were launched, lately
        self._dialled = 0  # in this round
        self._quiet_rounds = 0  # in a row, in which none was dialled
        self._owed = 0  # dials that the peer asked for, not begun yet
        self._fills_now = False  # in this turn of the event loop
        # not in a lull where a dial takes a TLS handshake: it would hold up the answer to who has just been launched
        self._gathering = Alarm(lead_s / 6 or GATHER_S, in_lull=bool(at_once and not lead_s))
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
        while not self._dials.refusal:
            self._fill()
            self._sleep(ROUND_S)
            self._adapt()
            self._forget_ended()
            self._dials.finish_late()
        return self._dials.refusal

    def take(self, id: bytes, timeout_s: float) -> Transport:
        """Give connection ``id``, waiting for it when its launch has overtaken it; NoDataConnection, PoolClosed.

        For one that was here and is gone there is no wait.
        """
        if id in self._outliving:
            return self._outliving.pop(id)
        if self._closed:
            raise PoolClosed("the session has ended")
        self._kept.discard(id)
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
        self._dials.leave()

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
        self._dials.close()
        if self._leaving:
            self._outliving = {id: transport for id in self._kept if (transport := self._give(id))}
        self._idle.close()
        self._kept.clear()
        self._forget_ended()
        self._forget_ended()  # those of this round, too
        for taker in self._takers.values():
            taker.set_exception(PoolClosed("the session has ended"))

    def _missing(self) -> int:
        wanted = self.capacity + self._ahead() + len(self._takers)
        return wanted - len(self._idle) - self._dials.count

    def _ahead(self) -> int:
        """Say how many more than the capacity to keep: few launches are no stream of them."""
        line_s = self._dials.quickest_s
        past = time.monotonic() - self._lead_s - (line_s if line_s >= NEAR_S else 0)
        while self._used_at and self._used_at[0] < past:
            self._used_at.popleft()
        launched = len(self._used_at)
        return min(launched, self._most_in_flight()) if 2 * launched > self.capacity else 0

    def _most_in_flight(self) -> int:
        return int(DIALS_AT_ONCE * max(self._dials.quickest_s / LINE_S, 1))

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
        if wanted <= 0 or self._dials.refusal or self._leaving or self._closed:
            return
        held = len(self._idle) + len(self._ended) + len(self._ended_before)
        before = self._dials.count
        for _ in range(min(wanted, self._most_in_flight() - before, self._maximum - held - before)):
            self._dials.begin()
        self._owed = max(self._owed - (self._dials.count - before), 0)

    def _check_new(self, id: bytes, transport: Transport) -> None:
        """Make sure that no other connection has this id: of two the first is kept."""
        if id in self._idle or id in self._ended or id in self._ended_before:
            transport.reset()
            raise ProtocolError(f"the server gives the id {id.decode()} twice")

    def _add(self, id: bytes, transport: Transport) -> None:
        self._dialled += 1
        try:
            self._place(id, transport)
        except MemoryError:  # nobody else closes it; the next round dials another one
            transport.reset()
        else:
            self._fill()

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
        self._quiet_rounds = 0 if self._dialled else self._quiet_rounds + 1
        if self._quiet_rounds >= QUIET_ROUNDS:
            self._drop_surplus()
        if self._dialled < self.capacity * SHRINK_BELOW:
            self.capacity = max(self.capacity - 1, self._minimum)
        elif self._dialled > self.capacity * GROW_ABOVE:
            self.capacity = min(self.capacity + 1, self._maximum)
        self._dialled = 0

    def _drop_surplus(self) -> None:
        """Let go what a crowd that has passed left beyond the capacity: the newest, which the peer hands out last."""
        for id in [id for id in self._idle if id not in self._kept][self.capacity + self._ahead() :]:
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
