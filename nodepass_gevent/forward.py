"""The way of a user: Ingress, from the public port to a launch; Egress, from a launch to the target.

What is TCP's stands here, what is UDP's in ``datagrams``. Neither knows which side of the tunnel it runs on. Each
exchange is one greenlet of ``exchanges``, the pool that is the limit of them all; it outlives the session that
launched it.
"""

import logging
import time
from collections.abc import Callable
from typing import Protocol

from gevent.pool import Pool

from . import relay, wire
from .config import Config
from .crew import Crew
from .datagrams import DatagramEgress, DatagramIngress
from .errors import ConnectError, NodePassError, NotCarried, TunnelError
from .metrics import Counters
from .net import Endpoint, connect, resolve
from .transport import Stream, Transport, reason
from .wire import Kind, Launch

log = logging.getLogger(__name__)


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

    @property
    def capabilities(self) -> frozenset[bytes]:
        """What it is agreed that both sides can."""

    def send(self, line: bytes) -> None:
        """Queue a line for it."""


class Ingress:
    """Users of the public port. ``link(timeout_s)`` waits for a peer, or raises NoDataConnection."""

    def __init__(self, link: Callable[[float], Link], exchanges: Crew, config: Config, counters: Counters) -> None:
        self._link = link
        self._exchanges = exchanges
        self._config = config
        self._counters = counters
        self.udp = DatagramIngress(self._launch, self._framed, exchanges, config, counters)

    def room(self) -> int:
        """Wait until there is room for a user, and say for how many."""
        self._exchanges.wait_available()
        return self._exchanges.free_count()

    def user(self, user: Stream, ended: Callable[[], object] | None = None) -> None:
        """Start the exchange of a TCP user; ``ended()`` is called behind it."""
        self._counters.tcp_exchanges += 1
        if ended is None:
            self._exchanges.spawn(self._tcp, user)
        else:
            self._exchanges.spawn(self._tcp_then, user, ended)

    def _tcp_then(self, user: Stream, ended: Callable[[], object]) -> None:
        try:
            self._tcp(user)
        finally:
            ended()

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

    def _framed(self) -> bool:
        """Whether the peer of now carries UDP sessions; while there is none, hope so."""
        try:
            return wire.UDP in self._link(0).capabilities
        except TunnelError:
            return True

    def _launch(self, kind: Kind, timeout_s: float) -> tuple[bytes, Transport]:
        """Take a data connection from whichever peer has one first, and say what it is for."""
        end = time.monotonic() + timeout_s
        while True:
            link = self._link(end - time.monotonic())
            if kind is Kind.UDP_SESSION and wire.UDP not in link.capabilities:
                raise NotCarried("the peer has no UDP sessions")
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
        udp = DatagramEgress(self._target, self._forget_target, exchanges, config, counters)
        self._carry = {Kind.TCP: self._tcp, Kind.UDP: udp.exchange, Kind.UDP_SESSION: udp.session}

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
        try:
            with data:
                self._carry[launch.kind](launch.id, data)
        except (OSError, ConnectError) as exc:
            self._counters.exchanges_failed += 1
            log.warning("exchange %s: target %s: %s", launch.id.decode(), self._config.target, reason(exc))

    def _tcp(self, id: bytes, data: Transport) -> None:
        self._counters.tcp_exchanges += 1
        limits = self._config.limits
        try:
            target = connect(self._target(), limits.target_timeout_s, limits)
        except ConnectError:
            self._forget_target()
            raise
        with target:
            _relay(id, data, target, self._config, self._counters)

    def _target(self) -> list[Endpoint]:
        if not self._endpoints:
            self._endpoints = resolve(self._config.target)
        return self._endpoints

    def _forget_target(self) -> None:
        """Resolve anew the next time: the name may have moved."""
        self._endpoints = []


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
