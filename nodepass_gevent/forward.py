"""The way of a user: Ingress, from the public port to a launch; Egress, from a launch to the target.

Neither knows which side of the tunnel it runs on. Each exchange is one greenlet of ``exchanges``, the pool
that is the limit of them all; it outlives the session that launched it.
"""

import logging
import time
from collections.abc import Callable
from typing import Protocol

import gevent
from gevent.pool import Pool

from . import relay, wire
from .config import Config
from .crew import Crew
from .errors import ConnectError, NodePassError, TunnelError
from .metrics import Counters
from .net import Endpoint, connect, resolve
from .transport import Stream, Transport, deadline, reason
from .udp import MAX_DATAGRAM, TargetSocket
from .wire import Kind, Launch

log = logging.getLogger(__name__)

ONE_SEGMENT = 512  # bytes; what is shorter fits IPv4's least TCP segment and was not cut in pieces
END_OF_DATAGRAM_S = 0.02  # silence that ends a longer one, where the sender does not half-close


class OldestFirst(Protocol):
    """The pool that Ingress takes from."""

    def take(self, timeout_s: float) -> tuple[bytes, Transport]:
        """Give a data connection and its id, or raise a TunnelError."""


class ById(Protocol):
    """The pool that Egress takes from."""

    def take(self, id: bytes, timeout_s: float) -> Transport:
        """Give the data connection of that id, or raise a NodePassError."""


class Link(Protocol):
    """The way to a peer: a control channel to launch on, and its pool."""

    @property
    def pool(self) -> OldestFirst:
        """Its data connections."""

    def send(self, line: bytes) -> None:
        """Queue a line for it."""


class Ingress:
    """Users of the public port. ``link(timeout_s)`` waits for a peer, or raises NoDataConnection."""

    def __init__(self, link: Callable[[float], Link], exchanges: Crew, config: Config, counters: Counters) -> None:
        self._link = link
        self._exchanges = exchanges
        self._config = config
        self._counters = counters
        self._udp_limit = max(config.semaphore_limit // 2, 1)
        self._udp_running = 0

    def room(self) -> int:
        """Wait until there is room for a user, and say for how many."""
        self._exchanges.wait_available()
        return self._exchanges.free_count()

    def user(self, user: Stream) -> None:
        """Start the exchange of a TCP user."""
        self._counters.tcp_exchanges += 1
        self._exchanges.spawn(self._tcp, user)

    def datagram(self, datagram: bytes, reply: Callable[[bytes], None]) -> None:
        """Start the exchange of one datagram, or drop it: v1 cannot frame an empty one."""
        if not 0 < len(datagram) <= self._config.udp_data_buf_size:
            self._counters.datagrams_dropped_size += 1
        elif self._udp_running >= self._udp_limit or self._exchanges.full():
            self._counters.datagrams_dropped_busy += 1
        else:
            self._counters.udp_exchanges += 1
            self._udp_running += 1
            self._exchanges.spawn(self._udp, datagram, reply)

    def _tcp(self, user: Stream) -> None:
        with user:
            try:
                id, data = self._launch(Kind.TCP, self._config.limits.pool_wait_s)
            except TunnelError as exc:
                self._counters.exchanges_failed += 1
                log.warning("user %s refused: %s", user, exc)
                user.reset()
                return
            with data:
                _relay(id, user, data, self._config, self._counters)

    def _udp(self, datagram: bytes, reply: Callable[[bytes], None]) -> None:
        try:
            with deadline(self._config.udp_read_timeout_s, "datagram"):
                answer = self._ask(datagram)
            if not answer:
                raise TimeoutError("no answer")
            self._counters.bytes_down += len(answer)
            reply(answer)
        except (OSError, TunnelError) as exc:
            self._counters.datagrams_unanswered += 1
            log.debug("datagram of %s: %s", reply, reason(exc))
        finally:
            self._udp_running -= 1

    def _ask(self, datagram: bytes) -> bytes:
        _, data = self._launch(Kind.UDP, self._config.udp_read_timeout_s)
        with data:
            data.sendall(datagram)
            data.shutdown_write()
            self._counters.bytes_up += len(datagram)
            answer = _read_to_end(data, self._config.udp_data_buf_size)
        if len(answer) > self._config.udp_data_buf_size:
            self._counters.datagrams_dropped_size += 1
            raise ConnectionAbortedError("the answer is longer than UDP_DATA_BUF_SIZE")
        return answer

    def _launch(self, kind: Kind, timeout_s: float) -> tuple[bytes, Transport]:
        """Take a data connection from whichever peer has one first, and say what it is for."""
        end = time.monotonic() + timeout_s
        while True:
            link = self._link(end - time.monotonic())
            try:
                id, data = link.pool.take(max(end - time.monotonic(), 0))
            except TunnelError:
                if time.monotonic() < end:  # this peer is gone; perhaps the next comes in time
                    continue
                raise
            link.send(wire.format_launch(Launch(id, kind)))
            return id, data


class Egress:
    """Launches of one session, each brought to the target; beyond the limit they wait, and none is lost."""

    def __init__(self, pool: ById, exchanges: Crew, config: Config, counters: Counters) -> None:
        self._pool = pool
        self._exchanges = exchanges
        self._config = config
        self._counters = counters
        self._waiting = Pool(config.max_pool_capacity)  # launches that wait for a slot, each in its greenlet
        self._endpoints: list[Endpoint] = []

    def launch(self, launch: Launch) -> None:
        """Start the exchange of one launch. Never blocks."""
        if not self._waiting and not self._exchanges.full():
            self._exchanges.spawn(self._run, launch)
        elif not self._waiting.full():
            self._waiting.spawn(self._exchanges.spawn, self._run, launch)
        else:  # more launches than there are data connections: the peer does not keep the protocol
            self._counters.launches_lost += 1

    def _run(self, launch: Launch) -> None:
        try:
            data = self._pool.take(launch.id, self._config.limits.pool_wait_s)
        except NodePassError as exc:
            self._counters.launches_lost += 1
            log.warning("launch of %s lost: %s", launch.id.decode(), exc)
            return
        carry = self._tcp if launch.kind is Kind.TCP else self._udp
        try:
            with data:
                carry(launch.id, data)
        except (OSError, ConnectError) as exc:
            self._counters.exchanges_failed += 1
            log.warning("exchange %s: target %s: %s", launch.id.decode(), self._config.target, reason(exc))

    def _tcp(self, id: bytes, data: Transport) -> None:
        self._counters.tcp_exchanges += 1
        limits = self._config.limits
        try:
            target = connect(self._target(), limits.target_timeout_s, limits)
        except ConnectError:
            self._endpoints = []  # the name may have moved
            raise
        with target:
            _relay(id, data, target, self._config, self._counters)

    def _udp(self, id: bytes, data: Transport) -> None:
        self._counters.udp_exchanges += 1
        limit, timeout_s = (self._config.udp_data_buf_size, self._config.udp_read_timeout_s)
        with deadline(timeout_s, "datagram"):
            datagram = _read_datagram(data, limit)
        if not 0 < len(datagram) <= limit:
            self._counters.datagrams_dropped_size += 1
            return
        answer = b""
        with TargetSocket(self._target()[0]) as target:
            try:
                target.send(datagram)
                self._counters.bytes_up += len(datagram)
                with deadline(timeout_s, "answer"):
                    answer = target.recv()
            except OSError as exc:  # silent, or refused by ICMP: an end of stream without an answer says so
                self._counters.datagrams_unanswered += 1
                log.debug("exchange %s: target %s: %s", id.decode(), self._config.target, reason(exc))
        if len(answer) > limit:
            self._counters.datagrams_dropped_size += 1
            answer = b""
        if answer:
            self._counters.bytes_down += len(answer)
            data.sendall(answer)
        data.linger(self._config.limits.drain_linger_s)

    def _target(self) -> list[Endpoint]:
        if not self._endpoints:
            self._endpoints = resolve(self._config.target)
        return self._endpoints


def _relay(id: bytes, user_side: Transport, target_side: Transport, config: Config, counters: Counters) -> None:
    """Copy both ways, count, and pass a failure of one side on to the other as a reset."""
    started = time.monotonic()
    limits = config.limits
    outcome = relay.exchange(user_side, target_side, limits.half_closed_timeout_s, limits.idle_timeout_s)
    counters.bytes_up += outcome.a_to_b
    counters.bytes_down += outcome.b_to_a
    if outcome.error is not None:
        counters.exchanges_failed += 1
        user_side.reset()
        target_side.reset()
    if log.isEnabledFor(logging.DEBUG):
        log.debug(
            "exchange %s: %s -> %s: %s after %.3f s, %d bytes up, %d down",
            id.decode(),
            user_side,
            target_side,
            "ended" if outcome.error is None else reason(outcome.error),
            time.monotonic() - started,
            outcome.a_to_b,
            outcome.b_to_a,
        )


def _read_to_end(data: Transport, limit: int) -> bytes:
    """Read until the peer's end of stream, or one byte more than ``limit``."""
    read = b""
    while len(read) <= limit and (piece := data.recv(limit + 1 - len(read))):
        read += piece
    return read


def _read_datagram(data: Transport, limit: int) -> bytes:
    """Read a datagram that nothing frames: up to the end of stream, or to a short silence.

    Our server half-closes behind it, the original's does not (protocol v1).
    """
    read = b""
    while len(read) <= limit:
        silence_s = END_OF_DATAGRAM_S if len(read) >= ONE_SEGMENT else 0 if read else None
        piece = None
        with gevent.Timeout(silence_s, False):
            piece = data.recv(MAX_DATAGRAM)
        if not piece:
            break
        read += piece
    return read
