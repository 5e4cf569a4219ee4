"""TCP on the event loop: resolve, listen, serve, connect, and Stream, a connected socket.

A transport (Stream here, TLSStream in ``tls``) has blocking verbs for code that reads from top to bottom
and, beneath them, a non-blocking engine for the relay's pump. Who opens a transport closes it, in
``with``; leaving the block by an exception resets the connection, so that a cut never looks like an end.
The deadline of a wait stands at the call: ``with deadline(5, "TLS handshake"): ...``.
"""

import errno
import fcntl
import ipaddress
import os
import socket
import struct
import sys
import termios
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import gevent
from gevent import monkey
from gevent.socket import wait_read, wait_write

from .config import Address, Limits
from .errors import ConnectError, ProtocolError

READ, WRITE = 1, 2  # libev's event masks
BACKLOG = 4096  # users that wait in the kernel while the limit of exchanges is reached
ACCEPT_BATCH = 64  # connections per wake-up, then everybody else has a turn
PAUSE_MIN_S, PAUSE_MAX_S = 0.05, 1.0  # of an accept loop that is out of descriptors or memory
RESOLVE_TIMEOUT_S = 5.0
DISCARD = 65536  # bytes per read when what comes is thrown away

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 s: close sends RST
_NONBLOCKING = socket.SOCK_STREAM | socket.SOCK_NONBLOCK

if TYPE_CHECKING:
    from _socket import socket as RawSocket
else:
    # The plain C socket, not gevent's: that one costs two watchers and some fcntl calls per connection, and
    # would block where the engine must not.
    RawSocket = monkey.get_original("socket", "SocketType")


class Endpoint(NamedTuple):
    """A resolved address: what ``socket`` and ``connect`` take."""

    family: int
    sockaddr: tuple

    def __str__(self) -> str:
        return str(Address(self.sockaddr[0], self.sockaddr[1]))


def deadline(seconds: float, what: str) -> gevent.Timeout:
    """Bound the block: ``TimeoutError("<what>: timed out after <seconds> s")`` at its end."""
    return gevent.Timeout(seconds, TimeoutError(f"{what}: timed out after {seconds:g} s"))


def resolve(address: Address, *, passive: bool = False) -> list[Endpoint]:
    """Give the endpoints of ``address`` in the order to try; raise ConnectError when it has none.

    Literals never visit the resolver. An empty host means all interfaces when ``passive``, else loopback.
    """
    flags = socket.AI_PASSIVE if passive else 0
    try:
        literal = ipaddress.ip_address(address.host)
    except ValueError:
        try:
            with deadline(RESOLVE_TIMEOUT_S, "resolve"):
                found = socket.getaddrinfo(address.host or None, address.port, type=socket.SOCK_STREAM, flags=flags)
        except (OSError, UnicodeError) as exc:
            raise ConnectError(f"resolve {address.host}: {reason(exc)}") from exc
        return [Endpoint(family, sockaddr) for family, _, _, _, sockaddr in found]
    if literal.version == 4:
        return [Endpoint(socket.AF_INET, (address.host, address.port))]
    scope = socket.if_nametoindex(literal.scope_id) if literal.scope_id else 0
    return [Endpoint(socket.AF_INET6, (str(literal).partition("%")[0], address.port, 0, scope))]


def peer_key(host: str) -> str:
    """Give what counts as one address: IPv4 (mapped too) as it is, IPv6 by its /64."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if address.version == 4:
        return str(address)
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))


def reason(exc: BaseException) -> str:
    """Say why, in a few words: the text of an errno, or the exception's own."""
    if isinstance(exc, OSError) and exc.strerror:
        return exc.strerror.lower()
    return str(exc) or type(exc).__name__


class Transport(ABC):
    """One connection. The verbs block; the engine under them never does.

    Engine: ``pull`` and ``push`` move what can be moved now, ``flush`` and ``finish`` say whether
    everything is with the kernel, ``buffered`` that ``pull`` has more than the descriptor shows.
    """

    __slots__ = ()
    buffered = False

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
    def flush(self) -> bool:
        """Send what ``push`` kept; True when nothing is left."""

    @abstractmethod
    def finish(self) -> None:
        """Say end of stream to the peer, after all that was pushed; reading goes on. ``flush`` follows."""

    @abstractmethod
    def peek(self) -> bool | None:
        """None while nothing has arrived, True when bytes have, False when the peer has ended."""

    @abstractmethod
    def close(self) -> None:
        """Close with FIN; more than once does no harm."""

    @abstractmethod
    def reset(self) -> None:
        """Close with RST, so that the peer cannot take a cut for an end."""

    def recv_into(self, buffer: memoryview) -> int:
        """Wait for bytes; 0 at the end of stream."""
        while True:
            try:
                return self.pull(buffer)
            except BlockingIOError:
                wait_read(self.fileno())

    def recv(self, size: int) -> bytes:
        """Wait for at most ``size`` bytes; empty at the end of stream."""
        buffer = memoryview(bytearray(size))
        return bytes(buffer[: self.recv_into(buffer)])

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

    def linger(self, timeout_s: float) -> None:
        """End without losing what was sent: end of stream, read to the peer's own, within ``timeout_s``.

        Closing while unread bytes sit in the receive queue makes the kernel send RST, and that throws
        away what the peer has not read yet. The caller closes.
        """
        buffer = memoryview(bytearray(DISCARD))
        with gevent.Timeout(timeout_s, False):
            self.shutdown_write()
            while self.recv_into(buffer):
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

    __slots__ = ("_finished", "peer", "socket")

    def __init__(self, sock: RawSocket, peer: tuple = ("", 0)) -> None:
        self.socket = sock
        self.peer = peer  # sockaddr of the other end
        self._finished = False

    def fileno(self) -> int:
        return self.socket.fileno()

    def pull(self, buffer: memoryview) -> int:
        return self.socket.recv_into(buffer)

    def push(self, data: memoryview | bytes) -> int:
        try:
            return self.socket.send(data)
        except BlockingIOError:
            return 0

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
        except OSError:
            return False

    def close(self) -> None:
        self.socket.close()

    def reset(self) -> None:
        if self.socket.fileno() >= 0:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self.socket.close()

    def read_line(self, limit: int) -> bytes:
        """Take one line of less than ``limit`` bytes, without its newline, and not a byte behind it."""
        line = b""
        while True:
            try:
                seen = self.socket.recv(limit - len(line), socket.MSG_PEEK)
            except BlockingIOError:
                wait_read(self.fileno())
                continue
            line += self.socket.recv(seen.find(b"\n") + 1 or len(seen))
            if line.endswith(b"\n"):
                return line[:-1]
            if not seen:
                raise ConnectionAbortedError("the peer closed before a whole line")
            if len(line) >= limit:
                raise ProtocolError(f"a line of more than {limit} bytes")

    def __str__(self) -> str:
        return str(Endpoint(self.socket.family, self.peer))

    def unacknowledged(self) -> int:
        """Count the bytes sent that the peer's kernel has not acknowledged."""
        return int.from_bytes(fcntl.ioctl(self.fileno(), termios.TIOCOUTQ, b"\0" * 4), sys.byteorder)

    def fail_when_unacknowledged(self, seconds: float) -> None:
        """Let sent bytes without an acknowledgement for ``seconds`` end the connection (RFC 5482)."""
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))


class ArrivalWatch:
    """Call ``callback(*args)`` in the event loop whenever bytes, or an end, wait on a transport. It must not block."""

    __slots__ = ("_watcher",)

    def __init__(self, transport: Transport, callback: Callable[..., None], *args: object) -> None:
        self._watcher = gevent.get_hub().loop.io(transport.fileno(), READ)
        self._watcher.start(callback, *args)

    def close(self) -> None:
        """Stop; do so before the transport is closed."""
        self._watcher.stop()
        self._watcher.close()


def set_options(sock: RawSocket, limits: Limits) -> None:
    """Send small writes at once and notice a dead peer; on a listener, its connections inherit it."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, int(limits.keepalive_idle_s))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, int(limits.keepalive_interval_s))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, limits.keepalive_count)


def bind(address: Address, kind: int) -> RawSocket:
    """Bind a non-blocking socket of ``kind``; an empty host or ``::`` takes both families.

    A name is bound at its first address, IPv4 before IPv6, as the original does. Raises OSError with
    the address in its text, or ConnectError for a name without an address.
    """
    if address.host in ("", "::") and socket.has_dualstack_ipv6():
        endpoint = Endpoint(socket.AF_INET6, ("::", address.port, 0, 0))
    else:
        endpoint = min(resolve(address, passive=True), key=lambda found: found.family)
    sock = RawSocket(endpoint.family, kind | socket.SOCK_NONBLOCK)
    try:
        if kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if endpoint.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address.host not in ("", "::"))
        sock.bind(endpoint.sockaddr)
    except OSError as exc:
        sock.close()
        raise OSError(exc.errno, f"{reason(exc)}: {address}") from exc
    return sock


def listen(address: Address, limits: Limits) -> RawSocket:
    """Listen on ``address``; see ``bind`` for the errors."""
    sock = bind(address, socket.SOCK_STREAM)
    set_options(sock, limits)
    sock.listen(BACKLOG)
    return sock


def serve(
    listener: RawSocket,
    handle: Callable[[Stream], object],
    on_pause: Callable[[OSError], None],
    room: Callable[[], int] = lambda: ACCEPT_BATCH,
) -> None:
    """Accept for ever and do nothing else: ``handle`` must not block, ``room`` may, and says for how many.

    When accepting fails (out of descriptors or memory), the loop pauses, longer each time, and tells
    ``on_pause``. Kill the greenlet before the listener is closed.
    """
    pause_s = PAUSE_MIN_S
    while True:
        wait_read(listener.fileno())
        try:
            for _ in range(min(room(), ACCEPT_BATCH)):
                handle(_accept(listener))
        except (BlockingIOError, ConnectionAbortedError):  # all accepted; or the caller is gone again
            pass
        except OSError as exc:
            on_pause(exc)
            gevent.sleep(pause_s)
            pause_s = min(pause_s * 2, PAUSE_MAX_S)
            continue
        pause_s = PAUSE_MIN_S


def _accept(listener: RawSocket) -> Stream:
    descriptor, peer = listener._accept()  # type: ignore[attr-defined]  # what socket.accept() itself calls, without its wrapper
    sock = RawSocket(listener.family, _NONBLOCKING, 0, descriptor)
    sock.setblocking(False)
    return Stream(sock, peer)


def connect(endpoints: Sequence[Endpoint], timeout_s: float, limits: Limits) -> Stream:
    """Connect to the first of ``endpoints`` that answers, within ``timeout_s`` in all.

    Raises ConnectError with the last address and reason.
    """
    share_s = timeout_s / max(len(endpoints), 1)
    failure = "no address"
    for endpoint in endpoints:
        sock = RawSocket(endpoint.family, _NONBLOCKING)
        try:
            with deadline(share_s, "connect"):
                _connect(sock, endpoint)
            set_options(sock, limits)
            return Stream(sock, endpoint.sockaddr)
        except OSError as exc:
            sock.close()
            failure = f"{endpoint}: {reason(exc)}"
        except BaseException:
            sock.close()
            raise
    raise ConnectError(f"connect {failure}")


def _connect(sock: RawSocket, endpoint: Endpoint) -> None:
    code = sock.connect_ex(endpoint.sockaddr)
    if code == errno.EINPROGRESS:
        wait_write(sock.fileno())
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, os.strerror(code))
