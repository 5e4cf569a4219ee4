"""Connections: what a transport is, and Stream, a connected TCP socket.

A transport (Stream here, TLSStream in ``tls``) has blocking verbs for code that reads from top to bottom
and, beneath them, a non-blocking engine for ``relay``. Who opens a transport closes it, in
``with``; leaving the block by an exception resets the connection, so that a cut never looks like an end.
The deadline of a wait stands at the call (``deadlines``).
"""

import errno
import fcntl
import os
import socket
import struct
import sys
import termios
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

import gevent
from gevent import monkey
from gevent.socket import wait_write

from .errors import ProtocolError
from .values import Address

READ, WRITE = 1, 2  # libev's event masks
DISCARD = 65536  # bytes per read when what comes is thrown away

_LOOPBACK = ("127.", "[::1]", "[::ffff:127.")  # where BBR, which paces, takes up to 40 % of the rate
RESET = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 s: close sends RST
_RTO_MAX_MS = 44  # <linux/tcp.h>; not in Python's socket module
_CLOSED = 7  # a state of TCP, the first byte of its info: reset, or given up
_MIN_RTT, _UNKNOWN = slice(148, 152), b"\xff\xff\xff\xff"  # of its info, in µs

if TYPE_CHECKING:
    from _socket import socket as RawSocket
else:
    # The plain C socket, not gevent's: that one costs two watchers and some fcntl calls per connection, and
    # would block where the engine must not.
    RawSocket = monkey.get_original("socket", "SocketType")


class Transport(ABC):
    """One connection. The verbs block; the engine under them never does.

    Engine: ``pull`` and ``push`` move what can be moved now; ``buffered``: ``pull`` has more than the descriptor
    shows; ``unsent``: what is kept because the kernel did not take it yet.
    """

    __slots__ = ()
    buffered = False
    unsent = b""

    @abstractmethod
    def fileno(self) -> int:
        """Give the descriptor, for watchers."""

    @abstractmethod
    def pull(self, buffer: memoryview) -> int:
        """Read what is there; 0 at the end of stream; BlockingIOError when there is nothing."""

    @abstractmethod
    def push(self, data: memoryview | bytes) -> int:
        """Take as many bytes as can be kept or sent now, and give their number (0 when none)."""

    @abstractmethod
    def push_more(self, data: memoryview | bytes) -> int:
        """Do as ``push``; what is taken may be kept back until more, or ``finish``, follows."""

    @abstractmethod
    def flush(self) -> bool:
        """Send what ``push`` kept; True when nothing is left."""

    @abstractmethod
    def finish(self) -> None:
        """Say end of stream to the peer, behind all that was pushed; reading goes on. Flush what is ``unsent``."""

    @abstractmethod
    def peek(self) -> bool | None:
        """None while nothing has arrived, True when bytes have, False when the peer has ended."""

    @abstractmethod
    def at_end(self) -> bool:
        """Whether the end of stream is known to be all that there is to read."""

    @abstractmethod
    def is_dead(self) -> bool:
        """Whether TCP has given it up, at a reset or for want of an answer, be it behind bytes that nobody reads."""

    @abstractmethod
    def round_trip_s(self) -> float:
        """Give the shortest round trip that TCP has measured lately; 0 where it has not, or does not tell."""

    @abstractmethod
    def watch(self, callback: Callable[..., None], *args: object) -> None:
        """Call ``callback(*args)`` in the event loop whenever bytes, or an end, wait; it must not block.

        It replaces what was called before. Every wait for arrival uses the same watcher: it ends a watch.
        """

    @abstractmethod
    def unwatch(self) -> None:
        """Call nothing any more."""

    @abstractmethod
    def wait_for_arrival(self) -> None:
        """Wait until bytes or an end are there."""

    @abstractmethod
    def fail_when_unacknowledged(self, seconds: float) -> None:
        """Let sent bytes, or keepalives, without an acknowledgement for ``seconds`` end the connection (RFC 5482)."""

    @abstractmethod
    def close(self) -> None:
        """Close with FIN; more than once does no harm."""

    @abstractmethod
    def reset(self) -> None:
        """Close with RST, so that the peer cannot take a cut for an end."""

    def unacknowledged(self) -> int:
        """Count the bytes sent that the peer's kernel has not acknowledged."""
        return int.from_bytes(fcntl.ioctl(self.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)

    def recv_into(self, buffer: memoryview) -> int:
        """Wait for bytes; 0 at the end of stream."""
        while True:
            try:
                return self.pull(buffer)
            except BlockingIOError:
                self.wait_for_arrival()

    def recv(self, size: int) -> bytes:
        """Wait for at most ``size`` bytes; empty at the end of stream."""
        buffer = memoryview(bytearray(size))
        return bytes(buffer[: self.recv_into(buffer)])

    def recv_next(self, size: int) -> bytes:
        """Receive as ``recv``, for who has just emptied the stream: not tried before something arrives."""
        if not self.buffered:
            self.wait_for_arrival()
        return self.recv(size)

    def recv_exactly(self, size: int) -> bytes:
        """Wait for ``size`` bytes; ConnectionError when the stream ends before."""
        data = b""
        while len(data) < size:
            piece = self.recv(size - len(data))
            if not piece:
                raise ConnectionAbortedError(f"the peer closed after {len(data)} of {size} bytes")
            data += piece
        return data

    def sendall(self, data: bytes) -> None:
        """Send everything, as fast as the peer reads."""
        view = memoryview(data)
        while True:
            view = view[self.push(view) :]
            if self.flush() and not view:
                return
            wait_write(self.fileno())

    def shutdown_write(self) -> None:
        """Send end of stream; the other direction goes on."""
        self.finish()
        while not self.flush():
            wait_write(self.fileno())

    def send_last(self, data: bytes) -> None:
        """Send everything and then end of stream, together where that can be; the other direction goes on."""
        view = memoryview(data)
        while view := view[self.push_more(view) :]:
            wait_write(self.fileno())
        self.shutdown_write()

    def linger(self, timeout_s: float) -> None:
        """End without losing what was sent: end of stream, read to the peer's own, within ``timeout_s``.

        Closing while unread bytes sit in the receive queue makes the kernel send RST, and that throws
        away what the peer has not read yet. The caller closes.
        """
        with gevent.Timeout(timeout_s, False):
            self.shutdown_write()
            while self.recv_next(DISCARD):  # a wait for each: who sends without a pause stops neither clock nor others
                pass

    def __enter__(self):
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if exc is None:
            self.close()
        else:
            self.reset()


class Stream(Transport):
    """A connected TCP socket."""

    __slots__ = ("_broken", "_finished", "_reader", "peer", "socket")

    def __init__(self, sock: RawSocket, peer: tuple = ("", 0)) -> None:
        self.socket = sock
        self.peer = peer  # sockaddr of the other end
        self._finished = False
        self._broken: int | None = None  # errno that is still to be told: the kernel tells it once, then of an end
        self._reader: Any = None  # the one watcher for arrival, made when first needed

    def fileno(self) -> int:
        return self.socket.fileno()

    def watch(self, callback: Callable[..., None], *args: object) -> None:
        if self._reader is None:
            self._reader = gevent.get_hub().loop.io(self.socket.fileno(), READ)
        self._reader.start(callback, *args)  # on a watcher that runs, this costs no system call

    def unwatch(self) -> None:
        if self._reader is not None:
            self._reader.stop()

    def wait_for_arrival(self) -> None:
        hub = gevent.get_hub()
        if self._reader is None:
            self._reader = hub.loop.io(self.socket.fileno(), READ)
        hub.wait(self._reader)

    def pull(self, buffer: memoryview) -> int:
        count = self.socket.recv_into(buffer)
        if not count:
            self._tell_broken()
        return count

    def _tell_broken(self) -> None:
        """Raise what is still to be told of a connection that broke: an end it is not."""
        if self._broken is not None:
            raise OSError(self._broken, os.strerror(self._broken))

    def push(self, data: memoryview | bytes) -> int:
        try:
            return self.socket.send(data)
        except BlockingIOError:
            return 0

    def push_more(self, data: memoryview | bytes) -> int:
        try:
            return self.socket.send(data, socket.MSG_MORE)  # an end of stream behind it needs no segment then
        except BlockingIOError:
            return 0

    def sendall(self, data: bytes) -> None:
        taken = self.push(data)
        if taken < len(data):  # seldom: short lines need no more
            super().sendall(data[taken:])

    def say(self, line: bytes) -> None:
        """Send something short, without a wait; OSError where there is no memory for it, and a part may be sent."""
        if self.push(line) < len(line):
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))

    def flush(self) -> bool:
        return True

    def finish(self) -> None:
        if not self._finished:
            self._finished = True
            self.socket.shutdown(socket.SHUT_WR)

    def peek(self) -> bool | None:
        try:
            return bool(self.socket.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return None
        except OSError as exc:
            self._broken = exc.errno
            return False

    def at_end(self) -> bool:
        return self.peek() is False and self._broken is None

    def is_dead(self) -> bool:
        return self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _CLOSED

    def round_trip_s(self) -> float:
        info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _MIN_RTT.stop)[_MIN_RTT]
        return 0 if info == _UNKNOWN else int.from_bytes(info, sys.byteorder) / 1e6

    def close(self) -> None:
        if self._reader is not None:  # before its descriptor goes, or libev ends the process
            self._reader.close()
            self._reader = None
        self.socket.close()

    def reset(self) -> None:
        if self.socket.fileno() >= 0:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self.close()

    def recv(self, size: int) -> bytes:
        while True:
            try:
                data = self.socket.recv(size)
            except BlockingIOError:
                self.wait_for_arrival()
                continue
            if not data:
                self._tell_broken()
            return data

    def recv_ready(self, size: int) -> bytes:
        """Receive what is here, at most ``size`` bytes; of an end, or an error, the next read tells."""
        try:
            return self.socket.recv(size)
        except BlockingIOError:
            return b""
        except OSError as exc:
            self._broken = exc.errno
            return b""

    def seen(self, size: int) -> bytes:
        """Give what has arrived, at most ``size`` bytes, and leave it there; empty for nothing, and for an end."""
        try:
            return self.socket.recv(size, socket.MSG_PEEK)
        except BlockingIOError:
            return b""

    def read_line(self, limit: int) -> bytes:
        """Wait for a line of less than ``limit`` bytes; take it without its newline, and not a byte behind it."""
        line = b""
        while True:
            try:
                seen = self.socket.recv(limit - len(line), socket.MSG_PEEK)
            except BlockingIOError:
                self.wait_for_arrival()
                continue
            line += self.socket.recv(seen.find(b"\n") + 1 or len(seen))
            if line.endswith(b"\n"):
                return line[:-1]
            if not seen:
                self._tell_broken()
                raise ConnectionAbortedError("the peer closed before a whole line")
            if len(line) >= limit:
                raise ProtocolError(f"a line of more than {limit} bytes")

    def read_behind_line(self, limit: int, size: int) -> bytes:
        """Wait for a line of less than ``limit`` bytes and ``size`` bytes behind it; give these, and take no more."""
        if taken := self.take_behind_line(limit, size):  # as a rule
            return taken
        self.read_line(limit)
        return self.recv_exactly(size)

    def take_behind_line(self, limit: int, size: int) -> bytes:
        """Give ``size`` bytes behind a line, if all has arrived; else take nothing. ``limit`` 0: without a line."""
        try:
            seen = self.seen(limit + size)
        except OSError as exc:  # told to who reads next
            self._broken = exc.errno
            return b""
        behind = seen.find(b"\n") + 1 if limit else 0
        if len(seen) < behind + size or (limit and not behind):
            return b""
        return self.socket.recv(behind + size)[-size:]

    def __str__(self) -> str:
        return str(Address(*self.peer[:2]))

    def fail_when_unacknowledged(self, seconds: float) -> None:
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))

    def retransmit_soon(self) -> None:
        """Send again each second what is not acknowledged, and not later and later: for who waits behind an outage."""
        with suppress(OSError):  # since Linux 6.15
            self.socket.setsockopt(socket.IPPROTO_TCP, _RTO_MAX_MS, 1000)

    def expect_bulk(self) -> None:
        """Make ready for many bytes to be sent."""
        if str(self).startswith(_LOOPBACK):
            with suppress(OSError):  # a sandbox may refuse
                if self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).startswith(b"bbr"):
                    self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
