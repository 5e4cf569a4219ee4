"""TCP addresses and ports: resolve, listen, connect, and the options of every socket; ``accepting`` has who calls."""

import errno
import ipaddress
import os
import random
import socket
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from itertools import zip_longest
from select import POLLOUT
from typing import NamedTuple

from gevent.select import poll
from gevent.socket import wait_write

from .alarm import Alarm
from .config import Limits
from .deadlines import deadline
from .errors import ConnectError, reason
from .transport import RESET, RawSocket, Stream
from .values import Address, is_literal, unmapped

BACKLOG = 4096  # users that wait in the kernel while the limit of exchanges is reached
RESOLVE_TIMEOUT_S = 5.0
DESCRIPTORS = 65536  # that are looked at where nothing tells which there are: a tenth of a second
ATTEMPT_DELAY_S = 0.25  # before the next address of a name is tried as well: RFC 8305, 5
LASTS_S = 1.0  # a connection that is open then is more than one short request

_BIND_HINTS = {
    errno.EADDRNOTAVAIL: ", which is no address of this machine; for all that it has, give only :{}",
    errno.EACCES: ", and ports below 1024 need root or the capability CAP_NET_BIND_SERVICE",
}
_NO_DESCRIPTORS = {errno.EMFILE, errno.ENFILE}
_NO_RESOURCES = _NO_DESCRIPTORS | {errno.ENOBUFS, errno.ENOMEM}
NONBLOCKING = socket.SOCK_STREAM | socket.SOCK_NONBLOCK


class Endpoint(NamedTuple):
    """A resolved address: what ``socket`` and ``connect`` take."""

    family: int
    sockaddr: tuple

    def __str__(self) -> str:
        return str(Address(self.sockaddr[0], self.sockaddr[1]))


def resolve(address: Address, *, passive: bool = False) -> list[Endpoint]:
    """Give the endpoints of ``address`` in the order to try, of IPv4 and IPv6 in turn; ConnectError when it has none.

    Literals never visit the resolver. An empty host means all interfaces when ``passive``, else loopback.
    """
    if not is_literal(address.host):
        flags = socket.AI_PASSIVE if passive else 0
        try:
            with deadline(RESOLVE_TIMEOUT_S, "resolve"):
                found = socket.getaddrinfo(address.host or None, address.port, type=socket.SOCK_STREAM, flags=flags)
        except (OSError, UnicodeError, RuntimeError) as exc:  # RuntimeError: the system gives no thread for it
            raise ConnectError(f"resolve {address.host}: {reason(exc)}", "resolve") from exc
        return _in_turn([Endpoint(family, sockaddr) for family, _, _, _, sockaddr in found])
    literal = ipaddress.ip_address(address.host)
    if literal.version == 4:
        return [Endpoint(socket.AF_INET, (address.host, address.port))]
    return [Endpoint(socket.AF_INET6, (str(literal).partition("%")[0], address.port, 0, _zone(literal.scope_id)))]


def _in_turn(endpoints: list[Endpoint]) -> list[Endpoint]:
    """Let families take turns, in the order of the resolver otherwise: one that leads nowhere costs one delay."""
    first = [endpoint for endpoint in endpoints if endpoint.family == endpoints[0].family]
    others = [endpoint for endpoint in endpoints if endpoint.family != endpoints[0].family]
    return [endpoint for pair in zip_longest(first, others) for endpoint in pair if endpoint]


def _zone(name: str | None) -> int:
    """Give the number of an interface by its name, or that number (RFC 4007, 11.2); ConnectError."""
    if not name:
        return 0
    try:
        return int(name) if name.isdecimal() and int(name) < 1 << 32 else socket.if_nametoindex(name)
    except OSError as exc:
        raise ConnectError(f"there is no interface {name}", "unreachable") from exc


@lru_cache(1024)
def origin_of(host: str) -> str:
    """Give what counts as one address: IPv4 (mapped too) as it is, IPv6 by its /64."""
    address = unmapped(host)
    return str(address) if address.version == 4 else str(ipaddress.ip_network((address, 64), strict=False))


def _keep_alive(sock: RawSocket, limits: Limits) -> None:
    """Notice a dead peer; on a listener, its connections inherit it."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, limits.keepalive_count)
    scatter_keepalives(sock, limits)


def scatter_keepalives(sock: RawSocket, limits: Limits) -> None:
    """Draw when a silent peer is asked, from half the time on: a crowd that came together is not asked together.

    A kernel drops what exceeds its queue (``netdev_max_backlog``, 1,000 packets): of thousands of keepalives in one
    tick the same ones each time, until peers that live count as dead.
    """
    longest_s = {socket.TCP_KEEPIDLE: limits.keepalive_idle_s, socket.TCP_KEEPINTVL: limits.keepalive_interval_s}
    for option, seconds in longest_s.items():
        earlier_s = int(random.random() * (seconds // 2 + 1))
        sock.setsockopt(socket.IPPROTO_TCP, option, seconds - earlier_s)


class _Dialled:
    """Connections that were dialled lately. Those that last are given keepalives: most end before, and cost nothing."""

    def __init__(self) -> None:
        self._lately: dict[int, tuple[RawSocket, Limits]] = {}  # by descriptor; one that comes again was closed
        self._alarm: Alarm | None = None  # for all of them

    def add(self, sock: RawSocket, limits: Limits) -> None:
        if not self._lately:
            if self._alarm is None:
                self._alarm = Alarm(LASTS_S)
            self._alarm.set(self._look)
        self._lately[sock.fileno()] = sock, limits

    def _look(self) -> None:
        lately, self._lately = self._lately, {}
        for sock, limits in lately.values():
            if sock.fileno() >= 0:
                with suppress(OSError):  # it is broken: who uses it will see
                    _keep_alive(sock, limits)


_dialled = _Dialled()


def bind(address: Address, kind: int, *, shared: bool = False) -> RawSocket:
    """Bind a non-blocking socket of ``kind``; an empty host or ``::`` takes both families.

    A name is bound at its first address, IPv4 before IPv6, as the original does. What is ``shared`` may be bound by
    several processes of one user, and the kernel spreads over them who comes. Raises OSError with
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
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if endpoint.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address.host not in ("", "::"))
        sock.bind(endpoint.sockaddr)
    except OSError as exc:
        sock.close()
        hint = _BIND_HINTS.get(exc.errno or 0, "").format(address.port)
        if shared and exc.errno == errno.EADDRINUSE:
            hint = ", taken by a process without reuse-port, or of another user"
        raise OSError(exc.errno, f"{reason(exc)}: {address}{hint}") from exc
    return sock


def listen(address: Address, limits: Limits, *, shared: bool = False) -> RawSocket:
    """Listen on ``address``; see ``bind`` for the errors."""
    sock = bind(address, socket.SOCK_STREAM, shared=shared)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # its connections inherit it: small writes do not wait
    _keep_alive(sock, limits)
    sock.listen(BACKLOG)
    return sock


def duplicate(sock: RawSocket) -> RawSocket:
    """Give a second descriptor of a socket: it stays open until both are closed."""
    twin = RawSocket(sock.family, sock.type, sock.proto, os.dup(sock.fileno()))
    twin.setblocking(False)
    return twin


def begin_to_connect(
    endpoint: Endpoint, limits: Limits, says: bytes = b"", *, speaks_first: bool = False
) -> tuple[Stream, bool]:
    """Connect without a wait; give the connection, and whether it stands already, as on the same machine. OSError.

    If it does, it has said what it ``says``. That, and what a caller that ``speaks_first`` sends at once, travels with
    the last acknowledgement of the TCP handshake: the peer is woken once, and has it when it accepts.
    """
    sockaddr = endpoint.sockaddr
    sock = RawSocket(endpoint.family, NONBLOCKING)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # before: what it says follows the handshake at once
        if says or speaks_first:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
        code = sock.connect_ex(sockaddr)
        if code and code != errno.EINPROGRESS:
            raise OSError(code, os.strerror(code))
        stream = Stream(sock, sockaddr)
        _dialled.add(sock, limits)
        try:
            _say_first(stream, says)  # on the same machine it stands by now, and behind this nothing can fail
        except BlockingIOError:
            return stream, False
        return stream, True
    except BaseException:
        sock.close()
        raise


def finish_connecting(stream: Stream, timeout_s: float, says: bytes = b"") -> None:
    """Wait until a connection that was begun stands, and say what it ``says``; OSError, and then it is closed."""
    try:
        with deadline(timeout_s, "connect"):
            wait_write(stream.fileno())
        _say_first(stream, says)
    except BaseException:
        stream.close()
        raise


def _say_first(stream: Stream, says: bytes) -> None:
    """Say something short, if only nothing: BlockingIOError while the connection does not stand.

    OSError if it failed, or reached its own socket. Where only a part was taken, for want of memory, it is reset, and
    nothing may be said elsewhere.
    """
    sock, sockaddr = stream.socket, stream.peer
    if sock.send(says) < len(says):
        stream.reset()
        raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
    if sockaddr[1] in ports_drawn():
        own = sock.getsockname()
        if own[1] == sockaddr[1] and own == sock.getpeername():
            # nobody listens, and of all ports the kernel has drawn that one
            raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))


def connect(
    endpoints: Iterable[Endpoint], timeout_s: float, limits: Limits, says: bytes = b"", *, speaks_first: bool = False
) -> Stream:
    """Connect to the first of ``endpoints`` that answers, within ``timeout_s`` in all; see ``begin_to_connect``.

    One is tried when those before have failed, or have been silent for ATTEMPT_DELAY_S: the first that answers is
    taken (RFC 8305). Raises ConnectError with the last address and reason.
    """
    end = time.monotonic() + timeout_s
    left, running = deque(endpoints), list[Stream]()
    failure, why = ("no address", "resolve")
    try:
        while (left or running) and (now := time.monotonic()) < end:
            tried: Endpoint | Stream
            try:
                if left:
                    tried = left.popleft()
                    stream, connected = begin_to_connect(tried, limits, says, speaks_first=speaks_first)
                    if connected:
                        return stream
                    running.append(stream)
                if answered := _first_to_answer(running, min(end - now, ATTEMPT_DELAY_S) if left else end - now):
                    tried = answered
                    running.remove(answered)
                    finish_connecting(answered, end - now, says)
                    return answered
            except OSError as exc:
                if exc.errno in _NO_DESCRIPTORS and running:  # one that was begun may answer still
                    left.clear()
                elif exc.errno in _NO_RESOURCES:  # the next address changes nothing
                    raise
                failure, why = (f"{tried}: {reason(exc)}", _word(exc))
    finally:
        for stream in running:
            stream.close()
    if running:
        failure, why = (f"{running[-1]}: connect: timed out after {timeout_s:g} s", "timeout")
    raise ConnectError(f"connect {failure}", why)


def _first_to_answer(streams: list[Stream], timeout_s: float) -> Stream | None:
    """Wait until one of the connections that were begun stands, or has failed; None when none does in time."""
    waiting = poll()
    for stream in streams:
        waiting.register(stream.fileno(), POLLOUT)
    answered = {descriptor for descriptor, _ in waiting.poll(timeout_s * 1000)}
    return next((stream for stream in streams if stream.fileno() in answered), None)


def _word(exc: OSError) -> str:
    """Name the reason of a failed connection as signals do."""
    if isinstance(exc, TimeoutError):
        return "timeout"
    return "refused" if isinstance(exc, ConnectionRefusedError) else "unreachable"


@lru_cache(1)
def ports_drawn() -> range:
    """Give the ports of which the kernel draws those of connections, as it was told when the first one was made."""
    try:
        with open("/proc/sys/net/ipv4/ip_local_port_range") as setting:
            first, last = map(int, setting.read().split())
    except (OSError, ValueError):  # not Linux, or hidden: it may be any
        return range(1, 65536)
    return range(first, last + 1)


def end_by_reset() -> None:
    """Let the end of this process reset its TCP connections: by itself the kernel ends them as if all had been said."""
    try:
        numbers: Iterable[int] = map(int, os.listdir("/proc/self/fd"))
    except OSError:  # no descriptor is left, or no /proc is there
        numbers = range(DESCRIPTORS)
    for number in numbers:
        with suppress(OSError):  # no socket, or the descriptor of the directory
            sock = RawSocket(fileno=number)
            try:
                if sock.type == socket.SOCK_STREAM and sock.family in (socket.AF_INET, socket.AF_INET6):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            finally:
                sock.detach()
