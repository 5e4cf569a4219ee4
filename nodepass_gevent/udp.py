"""Datagrams: the public socket, which answers from the address it was asked at, and a socket to the target."""

import errno
import socket
import struct
from collections import OrderedDict
from collections.abc import Callable
from contextlib import closing, suppress
from functools import lru_cache, partial
from typing import NamedTuple

import gevent
from gevent.socket import wait_read, wait_write

from . import net
from .arrivals import Arrivals, Crowd
from .net import Endpoint
from .transport import READ, RawSocket
from .values import Address

USERS = 1024  # whose replies are kept
REFUSALS = 64  # passed over in a row; from another machine they come at any time, also meanwhile
BATCH = 64  # datagrams per wake-up, then everybody else has a turn
RECEIVE_BUFFER = 4 << 20  # bytes asked of the kernel (it may give less): bursts wait there
TARGET_BUFFER = 1 << 20  # the same for the replies of one target in a session
MEMORY_PAUSE_S = 0.05  # after a receive that failed for lack of memory: the datagram waits, and so would a loop spin
PORTS_IN_VAIN = 8192  # that are remembered, at most: the last ones from which was asked in vain
PORTS_DRAWN = 8  # for one socket; that all of them are remembered ones happens once in 65,000 times at most
IP_PKTINFO = 8  # <linux/in.h>; missing in Python's socket module before 3.14
_ANCILLARY = socket.CMSG_SPACE(20)  # struct in6_pktinfo, the larger of the two

_buffer = memoryview(bytearray(65536))  # nobody switches while it is in use


class PublicSocket:
    """The public UDP socket, which is bound; on a wildcard address it remembers where each datagram was sent to.

    What comes from a host that ``admits`` does not take is dropped.
    """

    def __init__(self, bound: RawSocket, admits: Callable[[str], bool] = lambda host: True) -> None:
        self._socket = bound
        self._admits = admits
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        self._reply = lru_cache(USERS)(partial(Reply, self._socket))  # who comes again costs no new one
        self._ancillary = 0
        if self._socket.getsockname()[0] in ("0.0.0.0", "::"):
            self._ancillary = _ANCILLARY
            if self._socket.family == socket.AF_INET6:
                self._socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            else:
                self._socket.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)

    @property
    def port(self) -> int:
        return self._socket.getsockname()[1]

    def serve(self, handle: Callable[[bytes, "Reply"], None]) -> None:
        """Receive for ever: ``handle(datagram, reply)`` must not block; ``reply(bytes)`` answers the sender."""
        crowd = Crowd()

        def receive() -> None:
            if self._ancillary:
                size, ancillary, _, sender = self._socket.recvmsg_into([_buffer], self._ancillary)
                source = tuple(_as_source(*entry) for entry in ancillary)
            else:
                (size, sender), source = self._socket.recvfrom_into(_buffer), ()
            if self._admits(sender[0]):
                handle(bytes(_buffer[:size]), self._reply(sender, source))

        def receive_some() -> bool:
            crowd.take(receive, BATCH)
            return True

        with closing(gevent.get_hub().loop.io(self._socket.fileno(), READ)) as arrival:
            arrivals = Arrivals(arrival.start, arrival.stop, receive_some, lambda: arrival.active)
            while True:
                try:
                    arrivals.run()
                except MemoryError:
                    gevent.sleep(MEMORY_PAUSE_S)
                except OSError as exc:  # an ICMP error of an earlier reply, or no memory: for no sender in particular
                    gevent.sleep(MEMORY_PAUSE_S if exc.errno in (errno.ENOMEM, errno.ENOBUFS) else 0)

    def close(self) -> None:
        self._socket.close()


class Reply(NamedTuple):
    """How to answer one user; equal for all datagrams from one address that were sent to one local address."""

    socket: RawSocket
    sender: tuple
    source: tuple  # ancillary data: the local address that was asked

    def __call__(self, datagram: memoryview | bytes) -> None:
        """Send; OSError when the network does not take it, and then it is lost, as datagrams may be."""
        if self.source:
            self.socket.sendmsg([datagram], self.source, 0, self.sender)
        else:
            self.socket.sendto(datagram, self.sender)

    def __str__(self) -> str:
        return str(Address(*self.sender[:2]))


def _as_source(level: int, kind: int, data: bytes) -> tuple[int, int, bytes]:
    """Turn the packet info of what was received into that of its answer: the same local address."""
    if level == socket.IPPROTO_IP:  # struct in_pktinfo: interface, local address, destination
        return level, kind, struct.pack("=i4s4s", 0, data[4:8], b"\0" * 4)
    return level, kind, data


class _PortsInVain:
    """Ports from which a target was asked more often than it had answered when the socket was closed, the last ones.

    Its answer, if it is only late, must not find another user there. Of the ports that the kernel draws from, no more
    than a quarter is remembered.
    """

    def __init__(self) -> None:
        self._ports: OrderedDict[int, None] = OrderedDict()  # the oldest first

    def has(self, sock: RawSocket) -> bool:
        """Whether that of a socket is one of them."""
        return bool(self._ports) and sock.getsockname()[1] in self._ports

    def add(self, sock: RawSocket) -> None:
        """Remember that of a socket."""
        port = sock.getsockname()[1]
        self._ports[port] = None
        self._ports.move_to_end(port)
        if len(self._ports) > min(PORTS_IN_VAIN, len(net.ports_drawn()) // 4):
            self._ports.popitem(last=False)


_in_vain = _PortsInVain()


class TargetSocket:
    """A fresh UDP socket, connected to the target: its answers only, and its ICMP refusals as OSError.

    Its port is not one from which another socket has asked in vain of late.

    ``send`` and ``recv`` wait, ``push`` and ``pull`` do not, and pass over refusals: a target that restarts refuses for
    a moment; ``on_refusal`` is called for each.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.on_refusal: Callable[[], object] = lambda: None
        self._asked = 0  # datagrams that no answer has come for
        self._socket = _connect(endpoint)
        for _ in range(PORTS_DRAWN - 1):
            if not _in_vain.has(self._socket):
                break
            self._socket.close()
            self._socket = _connect(endpoint)

    def send(self, datagram: bytes) -> None:
        self._asked += 1
        while True:
            try:
                self._socket.send(datagram)
                return
            except BlockingIOError:
                wait_write(self._socket.fileno())

    def recv(self) -> bytes:
        """Wait for one datagram; the caller sets the deadline."""
        while True:
            wait_read(self._socket.fileno())  # first: it takes the target longer than one system call
            try:
                count = self._socket.recv_into(_buffer)
            except BlockingIOError:
                continue
            self._answered()
            return bytes(_buffer[:count])

    def fileno(self) -> int:
        return self._socket.fileno()

    def expect_many(self) -> None:
        """Ask the kernel for room for bursts."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, TARGET_BUFFER)

    def push(self, datagram: memoryview | bytes) -> None:
        """Send at once, or raise OSError; then it is lost."""
        self._asked += 1
        try:
            self._socket.send(datagram)
        except ConnectionRefusedError:
            self._pass_over(lambda: self._socket.send(datagram))

    def pull(self) -> bytes:
        """Give a datagram that is there; BlockingIOError when there is none."""
        try:
            count = self._socket.recv_into(_buffer)
        except ConnectionRefusedError:
            count = self._pass_over(lambda: self._socket.recv_into(_buffer))
        self._answered()
        return bytes(_buffer[:count])

    def _answered(self) -> None:
        if self._asked:  # some questions have several answers
            self._asked -= 1

    def _pass_over(self, again: Callable[[], int]) -> int:
        """Do again what was refused: the kernel tells of an earlier datagram, and has done nothing."""
        for _ in range(REFUSALS):
            self.on_refusal()
            with suppress(ConnectionRefusedError):
                return again()
        raise BlockingIOError(errno.EAGAIN, "refusals come faster than they are passed over")

    def __str__(self) -> str:
        return str(self.endpoint)

    def __enter__(self) -> "TargetSocket":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._asked:
            _in_vain.add(self._socket)
        self._socket.close()


def _connect(endpoint: Endpoint) -> RawSocket:
    sock = RawSocket(endpoint.family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        sock.connect(endpoint.sockaddr)
    except BaseException:
        sock.close()
        raise
    return sock
