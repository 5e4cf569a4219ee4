"""The two-way copy of one exchange, with half-close, back-pressure and exact counts.

``Exchange(a, b, ...).run()`` blocks its greenlet until both directions have ended. Underneath, a Flow per direction
runs in callbacks of watchers that are started once: an idle exchange costs no buffer and no second
greenlet. All flows share one buffer, for a callback never yields: what the receiver does not take at
once is kept by its flow, and the flow stops reading until it is gone. A flow between two plain sockets that proves
bulky goes on by ``splice`` through a pipe of its own, so that its bytes never visit this process.
"""

import errno
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import Any

import gevent
from gevent.hub import Waiter

from .alarm import soon
from .metrics import Traffic
from .pipes import Pipe, pipes
from .transport import WRITE, Stream, Transport

BUFFER = 65536  # bytes; one read
BULKY = 3  # full reads in a row that make a flow bulky
SMALL, SMALL_IN_A_ROW = (16384, 16)  # bytes and moves after which a bulky flow gives its pipe back
LOOK_S = 1.0  # between two looks at the sources that are not read
LOOKS = 4  # at the counters within the time that an exchange may be silent: bytes cost no timer

_NEVER_LOOKED_AT = (None, 0)  # most exchanges end before the first look
_buffer = memoryview(bytearray(BUFFER))


def _nobody(_error: Exception | None) -> None:
    """Tell nobody: the exchange is over."""


class _Flow:
    """One direction: what ``source`` says, ``sink`` gets.

    What was read and not taken is in ``_rest`` or in the pipe, never in both, while it ``_waits`` for the sink. It does
    not watch the source then, nor once that has ended.
    """

    __slots__ = (
        "_calm", "_done", "_ending", "_full", "_on_first", "_pipe", "_rest", "_waits", "_writer",
        "began", "ended", "moved", "sink", "source",
    )  # fmt: skip

    def __init__(
        self,
        source: Transport,
        sink: Transport,
        done: Callable[[Exception | None], None],
        on_first: Callable[[], object] | None = None,
    ) -> None:
        self.source, self.sink, self._done = source, sink, done
        self._on_first = on_first  # of the direction that answers: called when the first byte is read
        self.moved = 0  # bytes that the sink has taken
        self.began = False  # something was read
        self.ended = False  # end of stream is passed on, and all bytes before it
        self._ending = False  # it is read
        self._rest: bytes | memoryview = b""  # read, and not taken yet
        self._full = 0  # full reads in a row that the sink took at once
        self._calm = 0  # small splices in a row
        self._pipe: Pipe | None = None
        self._waits = False  # for the sink, and does not read meanwhile
        self._writer: Any = None  # made when the sink first has to be waited for

    def start(self, *, at_once: bool = False) -> None:
        self.source.watch(self._go_on)
        if at_once or self.source.buffered:
            self._go_on()

    def stop(self) -> None:
        _waiting.remove(self)
        if not self._ending:
            self.source.unwatch()
        if self._writer is not None:
            self._writer.stop()
            self._writer.close()
        if self._pipe:
            self._drop_pipe(self._pipe)
        self._done = _nobody  # the exchange holds this flow: without a cycle both go at once

    def _go_on(self) -> None:
        """Move what can be moved. The event loop must not see an exception: it ends this exchange, and no other."""
        try:
            if self._waits and not self._catch_up():
                return
            while (self._splice(self._pipe) if self._pipe else self._copy()) and self.source.buffered:
                pass
        except BlockingIOError:
            pass
        except Exception as exc:
            self._done(exc)

    def _catch_up(self) -> bool:
        """Give the sink what it did not take; True when more can be moved at once."""
        if self._rest:
            self._take(self._rest)
        elif self._pipe:
            self._drain(self._pipe)
        if self._rest or not self.sink.flush():
            return False
        self._waits = False
        _waiting.remove(self)
        self._writer.stop()
        if self._ending:
            return self._end()
        self.source.watch(self._go_on)
        return self.source.buffered

    def _copy(self) -> bool:
        """Move one bufferful; True when more may be moved at once."""
        count = self.source.pull(_buffer)
        if not self.began:
            self.began = True
            if count and self._on_first:
                self._on_first()
                if self.source.at_end():  # as where a server closes behind its answer
                    return self._copy_last(count)
        if not count:
            return self._end()
        taken = self.sink.push(_buffer[:count])
        self.moved += taken
        if taken < count or self.sink.unsent:
            self._rest = bytes(_buffer[taken:count])
            return self._wait_for_sink()
        self._full = self._full + 1 if count == BUFFER else 0
        if self._full >= BULKY:
            self._start_splicing()
        return True

    def _copy_last(self, count: int) -> bool:
        """Move a bufferful, and the end of stream with it: together they cost every receiver on the way one wake-up."""
        taken = self.sink.push_more(_buffer[:count])
        self.moved += taken
        if taken == count:
            return self._end()
        self._rest = bytes(_buffer[taken:count])
        return self._wait_for_sink()

    def _take(self, data: bytes | memoryview) -> None:
        taken = self.sink.push(data)
        self.moved += taken
        self._rest = memoryview(data)[taken:] if taken < len(data) else b""

    def _wait_for_sink(self) -> bool:
        """Read no more until the sink has what is kept: that is owed to it although the source may break meanwhile."""
        self._waits = True
        _waiting.add(self)
        self.source.unwatch()
        if self._writer is None:
            self._writer = gevent.get_hub().loop.io(self.sink.fileno(), WRITE)
        self._writer.start(self._go_on)
        return False

    def look_at_source(self) -> bool:
        """Whether the source is dead, which a flow is not told that does not read: the exchange is half-closed then.

        An end in order may stand there for as long as the sink likes.
        """
        dead = self.source.is_dead()
        if dead:
            self._done(None)
        return dead

    def _end(self) -> bool:
        """Pass the end of stream on, after all bytes before it."""
        self.source.unwatch()
        self._ending = True
        self.sink.finish()
        if self.sink.unsent:
            return self._wait_for_sink()
        self.ended = True
        self._done(None)
        return False

    def _start_splicing(self) -> None:
        self._full = self._calm = 0
        if type(self.source) is Stream and type(self.sink) is Stream:
            with suppress(OSError):  # none to be had: copying needs none
                self._pipe = pipes.take()
                self.sink.expect_bulk()

    def _splice(self, pipe: Pipe) -> bool:
        """Move one pipeful, as ``_copy`` does with the buffer."""
        try:
            count = pipe.fill(self.source.fileno())
        except OSError as exc:
            if exc.errno not in (errno.EAGAIN, errno.EINVAL):
                raise
            count = 0
        if not count:  # the end, or what cannot be spliced, as all behind an urgent byte: a read says which
            self._drop_pipe(pipe)
            return self._copy()
        try:
            self._drain(pipe)
        except BlockingIOError:
            return self._wait_for_sink()
        self._calm = self._calm + 1 if count < SMALL else 0
        if self._calm >= SMALL_IN_A_ROW:
            self._drop_pipe(pipe)
        return True

    def _drain(self, pipe: Pipe) -> None:
        """Give the sink all that the pipe holds; BlockingIOError when it does not take it now."""
        while pipe.held:
            self.moved += pipe.drain(self.sink.fileno())

    def _drop_pipe(self, pipe: Pipe) -> None:
        self._pipe = None
        pipes.give_back(pipe)


class _Waiting:
    """The flows that wait for their sink. One timer looks at the sources of all: a sink may take nothing for ever."""

    def __init__(self) -> None:
        self._flows: dict[_Flow, None] = {}
        self._timer: Any = None

    def add(self, flow: _Flow) -> None:
        if self._timer is None:
            self._timer = gevent.get_hub().loop.timer(LOOK_S, LOOK_S, ref=False)
        if not self._timer.active:
            self._timer.start(self._look)
        self._flows[flow] = None

    def remove(self, flow: _Flow) -> None:
        self._flows.pop(flow, None)

    def _look(self) -> None:
        if not self._flows:
            self._timer.stop()
        for flow in list(self._flows):
            if flow.look_at_source():
                self.remove(flow)


_waiting = _Waiting()  # in this process


class _Silences:
    """Ends each exchange in which nothing moves for ``timeout_s``, or up to one LOOKS-th of it later.

    One timer looks at the counters of all: neither a byte nor an exchange costs one.
    """

    def __init__(self, timeout_s: float, what: str) -> None:
        self._what = f"{what} for {timeout_s:g} s"
        self._looked_at: dict[Exchange, tuple[int | None, int]] = {}  # bytes delivered, and looks since that was less
        self._timer = gevent.get_hub().loop.timer(timeout_s / LOOKS, timeout_s / LOOKS, ref=False)

    def add(self, exchange: "Exchange") -> None:
        if not self._looked_at:
            self._timer.start(self._look)
        self._looked_at[exchange] = _NEVER_LOOKED_AT

    def remove(self, exchange: "Exchange") -> None:
        self._looked_at.pop(exchange, None)

    def _look(self) -> None:
        if not self._looked_at:
            self._timer.stop()
        for exchange, (moved_before, looks) in list(self._looked_at.items()):
            moved = exchange.delivered
            looks = looks + 1 if moved == moved_before else 0
            self._looked_at[exchange] = moved, looks
            if looks >= LOOKS:
                exchange.end(TimeoutError(self._what))


def _on_the_way(sink: Transport) -> int:
    """Give the number of bytes that the kernel keeps because the other end has not acknowledged them."""
    with suppress(OSError):
        return sink.unacknowledged()
    return 0


_silences = lru_cache(64)(_Silences)  # by timeout


class Exchange:
    """Both flows, and the greenlet that waits for their end.

    ``run`` copies both ways until both sides have ended, or one fails; the caller closes both. An exchange in which
    nothing moves for ``idle_timeout_s`` (0: no limit), or, half-closed, for ``half_closed_timeout_s``, ends with
    TimeoutError. ``on_answer()`` is called when the first byte has come from ``b``. ``said`` bytes of ``a`` have gone
    to ``b`` before.
    """

    __slots__ = ("_ended", "_flows", "_half_closed", "_over")

    def __init__(
        self,
        a: Transport,
        b: Transport,
        half_closed_timeout_s: float,
        on_answer: Callable[[], object] | None = None,
        said: int = 0,
    ) -> None:
        self._flows = there, _ = _Flow(a, b, self.end), _Flow(b, a, self.end, on_answer)
        if said:
            there.began, there.moved = True, said
        self._ended = Waiter()
        self._over = False
        self._half_closed: _Silences = _silences(half_closed_timeout_s, "half-closed and idle")

    @property
    def began(self) -> bool:
        """Whether something was read from a side, if only its end."""
        there, back = self._flows
        return there.began or back.began

    @property
    def delivered(self) -> int:
        """Bytes that have come to the other ends: a slow reader takes what was moved a minute ago.

        With TLS the bytes on the way are cipher text: whether it changes is all that this says.
        """
        return sum(flow.moved - _on_the_way(flow.sink) for flow in self._flows)

    @property
    def complete(self) -> tuple[bool, bool]:
        """Whether ``a``, and ``b``, was sent all that there is for it, and the end of stream behind it."""
        there, back = self._flows
        return back.ended, there.ended

    def traffic(self) -> Traffic:
        """Give the bytes that each sink has taken so far; ``a`` is the user's side."""
        there, back = self._flows
        return there.moved, back.moved, 0, 0

    def run(self, idle_timeout_s: float) -> Exception | None:
        """Copy; give the error that has ended it, if one did."""
        there, back = self._flows
        idle: _Silences | None = _silences(idle_timeout_s, "idle") if idle_timeout_s else None
        try:
            # a request is here by now, as a rule, and needs no turn of the event loop; or it was said before
            there.start(at_once=not there.began)
            if not self._over:
                back.start()
            if idle:
                idle.add(self)
            return self._ended.get()
        finally:
            there.stop()
            back.stop()
            self._half_closed.remove(self)
            if idle:
                idle.remove(self)

    def abort(self, error: Exception) -> bool:
        """End with ``error``; False, and no end, when bytes have come from b already."""
        back = self._flows[1]
        if back.moved or back._rest:
            return False
        self.lose(error)
        return True

    def lose(self, error: Exception) -> None:
        """End with ``error``: nothing comes from b any more."""
        soon(self.end, error)

    def forsake(self, since: float, error: Exception) -> None:
        """Go on: bytes are not lost while TCP may deliver them."""

    def end(self, error: Exception | None) -> None:
        """Note that one flow has ended, or why both must."""
        there, back = self._flows
        if error is not None or (there.ended and back.ended):
            if self._over:
                return
            if error is None:
                soon(self._ended.switch, None)  # what has arrived for others is passed on first
            self._over = True  # not before: where there is no memory for that, it ends by the error
            if error is not None:
                self._ended.switch(error)  # now: a reset is told once, and the other flow would be told an end
        else:
            self._half_closed.add(self)
