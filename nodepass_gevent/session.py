"""One control channel and its pool: whichever ends first ends both.

After the handshake the two sides of a tunnel are alike here: a reader that hands on what comes, a writer
that sends signals and keep-alives, and a pool that keeps itself ready. What the bytes mean is for ``receive``,
which the role above supplies. Where the peer knows it, an orderly end is a bye each way: whoever means to end says it
and goes on obeying until the peer's own bye, so that no launch is lost between the two.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import gevent
from gevent.event import Event

from . import wire
from .alarm import Alarm, soon
from .arrivals import Arrivals, turn
from .errors import NodePassError, PeerLeft, PeerSilent, PolicyError, ProtocolError, SessionEnded, SessionLost, reason
from .transport import Transport
from .wire import Bye

CHUNK = 4096  # bytes per read: many lines at once, little memory
GATHERED = 4  # lines per segment behind the first of a turn: fewer cost more segments, more let the peer begin late
FAR_S = 0.01  # a round trip of more: the kernel has ten segments on the way at first, and holds what is beyond for that
AT_ONCE, SPACED = 4, 10  # segments there: of a crowd, and then for each round trip
MAX_DUE = 65536  # lines; a peer that reads leaves at most as many as it has data connections

_buffer = memoryview(bytearray(CHUNK))  # nobody switches while it is in use


class ReadyPool(Protocol):
    """What a session needs of its pool."""

    def run(self) -> str | PolicyError | TimeoutError:
        """Live; give how it ended: TimeoutError when the peer is silent."""

    def leave(self) -> None:
        """Begin nothing new: the session is about to end."""

    def settle(self) -> None:
        """Wait until what is launched is taken."""

    def close(self) -> None:
        """End it at once."""


class Session:
    """A live control channel.

    ``receive(data)`` takes what the peer sends and raises ProtocolError when it may not, PeerLeft or PolicyError at its
    bye; ``silence_s()`` is how long the peer may stay silent (None: for ever); ``ping_interval_s`` None sends no
    keep-alives; ``leave_s()`` is how long an orderly end may take (None: the peer knows no bye). ``begin()`` is called
    before anything is read, and may raise what ``receive`` may.
    """

    def __init__(
        self,
        control: Transport,
        pool: ReadyPool,
        receive: Callable[[bytes], None],
        *,
        ping_interval_s: float | None = None,
        silence_s: Callable[[], float | None] = lambda: None,
        leave_s: Callable[[], float | None] = lambda: None,
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        self._control = control
        self._pool = pool
        self._receive = receive
        self._ping_interval_s = ping_interval_s
        self._silence_s = silence_s
        self._leave_s = leave_s
        self._begin = begin
        self._due: list[bytes] = []
        self._sent_in = -1  # the turn of the event loop in which a line was sent: more wait for others, or its end
        self._gathers = False  # some do
        self._spacing: Alarm | None = None  # between segments, where the peer is far away
        self._at_once = 0  # segments of a crowd that were not spaced
        self._heard_at = 0.0
        self._limit_s: float | None = None  # of silence
        self._wake = Event()  # what is due is for the writer: the peer reads slowly, or not at all
        self._ending = False  # no line follows those that are due

    def send(self, line: bytes) -> bool:
        """Send a line; what follows it in the same turn of the event loop goes out in groups of GATHERED. Never blocks.

        To a peer that is far away what follows AT_ONCE lines within a part of the round trip goes out together. False:
        the session is ending, and the line is not sent.
        """
        if self._ending:
            return False
        self._due.append(line)
        if self._spacing:
            if self._at_once < AT_ONCE:
                self._at_once += 1
                self._spacing.set(self._send_spaced)
                self._send_now()
            return True
        now = turn()
        if now != self._sent_in or len(self._due) >= GATHERED:
            self._sent_in = now
            self._send_now()  # the peer can begin with the first while the others of a crowd are got ready
        elif not self._gathers:
            soon(self._send_gathered)
            self._gathers = True
        return True

    def _send_gathered(self) -> None:
        self._gathers = False
        if self._due:
            self._send_now()

    def _send_spaced(self) -> None:
        """Send what is due to a peer that is far away; what follows waits for its turn, until nothing has followed."""
        if self._spacing and self._due and not self._wake.is_set():
            self._spacing.set(self._send_spaced)
            self._send_now()
        else:
            self._at_once = 0

    def _send_now(self) -> None:
        """Send what is due, without the writer as long as the kernel takes everything."""
        if self._wake.is_set():
            return
        lines, taken = b"".join(self._due), 0
        try:
            taken = self._control.push(lines)
        except OSError:  # the writer meets it again, and ends
            pass
        if taken == len(lines) and not self._control.unsent:
            self._due.clear()
        else:
            self._due = [lines[taken:]]
            self._wake.set()

    def run(self) -> None:
        """Live until the channel or the pool ends, and end the other too; raises SessionLost or PolicyError."""
        started = time.monotonic()
        greenlets: list[gevent.Greenlet] = []
        try:
            round_trip_s = self._control.round_trip_s()
            if round_trip_s > FAR_S:
                self._spacing = Alarm(round_trip_s / SPACED)
            greenlets.extend(gevent.spawn(part) for part in (self._read, self._write, self._pool.run))
            first = gevent.wait(greenlets, count=1)[0]
            how = first.value if first.successful() else repr(first.exception)
            if isinstance(how, PeerLeft):
                self._leave(*greenlets)
                raise SessionEnded(str(how), time.monotonic() - started)
            if isinstance(how, PolicyError):
                raise how
            lost = PeerSilent if isinstance(how, TimeoutError) else SessionLost
            raise lost(f"control channel lost: {how}", time.monotonic() - started)
        except gevent.GreenletExit:  # an orderly stop on this side
            self._leave(*greenlets)
            raise
        finally:
            self._ending = True
            if self._spacing:
                self._spacing.close()
            self._pool.close()
            gevent.killall(greenlets)

    def _leave(self, reader: gevent.Greenlet, writer: gevent.Greenlet, pool: gevent.Greenlet) -> None:
        """End in good order: the peer sees an end, and no reset; where it knows it, after a bye each way."""
        leave_s = self._leave_s()
        with suppress(OSError), gevent.Timeout(leave_s, False):
            self._pool.leave()
            if leave_s is None or self._ending:
                self._ending = True
                self._send_gathered()
                gevent.killall([reader, writer])
            else:
                self.send(wire.format_bye(Bye()))
                self._ending = True
                self._wake.set()
                gevent.joinall([reader, writer])
                self._pool.settle()
                self._control.linger(leave_s)
            self._control.finish()
        gevent.killall([reader, writer, pool])
        self._control.close()

    def _read(self) -> str | TimeoutError | NodePassError:
        """Let what comes be taken in the event loop, until it ends, may not be, or nothing comes for too long."""
        try:
            self._begin()
            self._heard_at = time.monotonic()
            if self._control.buffered:
                self._take()
            arrivals = Arrivals(self._control.watch, self._control.unwatch, self._take)
            while True:
                self._limit_s = limit_s = self._silence_s()
                left_s = limit_s and max(self._heard_at + limit_s - time.monotonic(), 0)
                if left_s == 0:
                    return TimeoutError(f"silent for {limit_s:g} s")
                with gevent.Timeout(left_s, False):
                    arrivals.run()
        except (PeerLeft, PolicyError) as exc:
            return exc
        except TimeoutError as exc:  # what was sent is not acknowledged
            return TimeoutError(reason(exc))
        except (OSError, ProtocolError) as exc:
            return reason(exc)

    def _take(self) -> bool:
        """Take what is here; what this raises ends the session. False while the limit of silence is to be asked for."""
        while True:
            try:
                count = self._control.pull(_buffer)
            except BlockingIOError:
                return True
            if not count:
                raise ConnectionError("closed by the peer")
            self._heard_at = time.monotonic()
            self._receive(bytes(_buffer[:count]))
            if len(self._due) > MAX_DUE:
                raise ConnectionError("the peer makes us speak and does not read")
            if not self._control.buffered:
                return self._limit_s is not None

    def _write(self) -> str:
        ping_due = time.monotonic()
        while True:
            if self._ping_interval_s and time.monotonic() >= ping_due:
                self._due.append(wire.PING)
                ping_due = time.monotonic() + self._ping_interval_s
            try:
                while self._due or self._wake.is_set():
                    self._wake.set()  # what comes meanwhile waits its turn
                    lines, self._due = b"".join(self._due), []
                    self._control.sendall(lines)
                    if not self._due:
                        self._wake.clear()
                if self._ending:
                    self._control.shutdown_write()
                    return "it has said bye"
            except OSError as exc:
                return reason(exc)
            self._wake.wait(self._ping_interval_s and max(ping_due - time.monotonic(), 0))
