"""The way of a launch to the target; it does not know on which side of the tunnel it runs.

What is TCP's stands here, what is UDP's in ``datagrams_egress``. Each exchange is one greenlet of ``exchanges``, the
pool that is the limit of them all; it outlives the session that launched it.
"""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Protocol

import gevent

from . import access, proxy_protocol
from . import log as logs
from .access import AccessLog
from .alarm import soon
from .carrying import conclude, observe_answer, run, tell_full
from .config import Config
from .crew import Crew
from .datagrams_egress import DatagramEgress
from .errors import GONE, ConnectError, NoDataConnection, NodePassError, ProtocolError, reason
from .metrics import Counters
from .net import connect
from .relay import Exchange
from .target import TargetAddresses
from .transport import Stream, Transport
from .wire import Kind, Launch

CHUNK = 4096  # bytes per read of what nobody wants
LOOK_S = 0.01  # between two looks whether a peer has reset a connection on which nothing more comes
FIRST = 4096  # bytes that go along with a handshake: there is room for more in the send buffer of a new connection


class ById(Protocol):
    """The pool that Egress takes from."""

    def take(self, id: bytes, timeout_s: float) -> Transport:
        """Give the data connection of that id, or raise a NodePassError."""

    def keep(self, id: bytes) -> None:
        """Let the data connection of that id wait until it is taken, or dropped."""

    def drop(self, id: bytes) -> None:
        """Reset the data connection of that id, here or to come: its launch comes to nothing."""

    def outlives(self, id: bytes) -> bool:
        """Whether what was kept under that id has outlived the session."""


class Egress:
    """Launches of one session, each brought to the target; beyond the limit they wait, and none is lost.

    ``fail(id, why)`` tells the peer that a launch does not become an exchange; False where there is no way to.
    ``told_users``: the peer has agreed to tell who they are.
    """

    def __init__(
        self,
        pool: ById,
        exchanges: Crew,
        config: Config,
        counters: Counters,
        fail: Callable[[bytes, str], bool] = lambda id, why: False,
        *,
        told_users: bool = False,
    ) -> None:
        self._pool = pool
        self._fail = fail
        self._told_users = told_users
        self._exchanges = exchanges
        self._config = config
        self._counters = counters
        self._log = logs.of(config.name)
        self._access = AccessLog(config, access.TARGET)
        self._full = logs.Seldom(self._log)
        self._waiting: dict[bytes, gevent.Greenlet] = {}  # launches that wait for room among the exchanges, by id
        self._target = TargetAddresses(config.target)
        udp = DatagramEgress(self._target, self._refuse, self._user, exchanges, config, counters)
        self._carry_udp = {Kind.UDP: udp.exchange, Kind.UDP_SESSION: udp.session}

    def launch(self, launch: Launch) -> None:
        """Start the exchange of one launch. Never blocks."""
        try:
            if not self._waiting and not self._exchanges.full():
                self._exchanges.spawn(self._run, launch)
                return
            tell_full(self._full, self._config)
            if len(self._waiting) < self._config.max_pool_capacity and launch.id not in self._waiting:
                self._waiting[launch.id] = gevent.spawn(self._wait_for_room, launch)
                self._pool.keep(launch.id)
                return
        except MemoryError:
            pass
        # No memory; or the peer breaks the protocol, with more launches than data connections.
        self._counters.launches_lost += 1
        self._fail(launch.id, "busy")
        if launch.id not in self._waiting:
            self._pool.drop(launch.id)

    def leave(self) -> None:
        """Go on without the session, with all that it has launched, but for what its end took the data connection."""
        for id, waiting in list(self._waiting.items()):
            if not self._pool.outlives(id):
                waiting.kill(gevent.GreenletExit("the session has ended"), block=False)

    def _wait_for_room(self, launch: Launch) -> None:
        came = time.monotonic()
        try:
            self._exchanges.enter()
        except gevent.GreenletExit as exc:  # with its session, or with all exchanges
            self._pool.drop(launch.id)
            self._lose(launch, came, exc)
            raise
        finally:
            del self._waiting[launch.id]
        self._run(launch)

    def _run(self, launch: Launch) -> None:
        started, in_crowd = time.monotonic(), soon.busy
        try:
            data = self._pool.take(launch.id, self._config.limits.pool_wait_s)
        except NodePassError as exc:
            self._lose(launch, started, exc)
            if isinstance(exc, NoDataConnection):
                self._fail(launch.id, GONE)
            return
        try:
            with data:
                if self._config.network != "both":
                    self._check_network(launch, data)
                if launch.kind is Kind.TCP:
                    self._tcp(launch, data, in_crowd=in_crowd)
                else:
                    self._carry_udp[launch.kind](launch, data)
        except (OSError, ConnectError) as exc:
            self._counters.exchanges_failed += 1
            target = self._config.target
            why = reason(exc).removeprefix(f"connect {target}: ")
            self._log.warning("exchange %s: target %s: %s", launch.id.decode(), target, why)
            end = access.NO_TARGET if isinstance(exc, ConnectError) else access.FAILED, why
            self._access.nothing(_protocol(launch), launch.id, self._user(launch), started, end)

    def _lose(self, launch: Launch, started: float, exc: BaseException) -> None:
        """Note a launch that never had its data connection."""
        self._counters.launches_lost += 1
        repeated = isinstance(exc, ProtocolError)  # a few bytes each, as often as a peer likes: no line for that
        level = logging.DEBUG if repeated else logging.WARNING
        self._log.log(level, "launch of %s lost: %s", launch.id.decode(), exc)
        if not repeated:
            end = access.NO_DATA_CONNECTION, str(exc)
            self._access.nothing(_protocol(launch), launch.id, self._user(launch), started, end)

    def _tcp(self, launch: Launch, data: Transport, *, in_crowd: bool) -> None:
        self._counters.tcp_exchanges += 1
        limits, came = self._config.limits, time.monotonic()
        introduces = bool(self._config.proxy_protocol)
        try:
            endpoints = self._target.get()
            # Alone, a handshake is done before the request, and the target gets ready meanwhile. In a crowd both go
            # together: the target is woken once for them, which costs the machine less.
            says = data.recv_ready(FIRST) if in_crowd and not introduces and type(data) is Stream else b""
            target = connect(endpoints, limits.target_timeout_s, limits, says, speaks_first=introduces)
            self._target.prefer(target.peer)
        except ConnectError as exc:
            self._target.forget()
            self._refuse(launch, data, exc.why)
            raise
        except OSError:  # no descriptor, no memory
            self._refuse(launch, data, "busy")
            raise
        except gevent.GreenletExit:
            self._access.nothing("tcp", launch.id, self._user(launch), came, (access.CUT, ""))
            raise
        with target:
            if introduces:
                target.sendall(proxy_protocol.header(self._config.proxy_protocol, self._user(launch), target.peer))
            started = time.monotonic()
            on_answer = partial(observe_answer, self._counters, came)
            running = Exchange(data, target, limits.half_closed_timeout_s, on_answer, len(says))
            tell = partial(self._access.tcp, launch.id, self._user(launch), (data, target), started, running.traffic)
            error = run(running, limits.idle_timeout_s, self._counters, tell)
            tell(error)
            if error:
                if isinstance(error, TimeoutError) and data.is_dead():
                    self._fail(launch.id, GONE)  # on a path that is dead the server would wait for minutes
                conclude(data, target, error, running.complete, self._counters)

    def _check_network(self, launch: Launch, data: Transport) -> None:
        """Refuse what this side is not to carry, whatever the server takes from its users: ConnectError."""
        if self._config.network != _protocol(launch):
            self._refuse(launch, data, "refused")
            raise ConnectError(f"network={self._config.network} keeps {_protocol(launch)} out")

    def _user(self, launch: Launch) -> tuple | None:
        """Give the user's address, where the peer has agreed to tell it."""
        return launch.user if self._told_users else None

    def _refuse(self, launch: Launch, data: Transport, why: str) -> None:
        """Tell the peer that no exchange will be, and leave it a moment: the reset behind could overtake that word."""
        if self._fail(launch.id, why):
            try:
                with suppress(OSError), gevent.Timeout(self._config.limits.drain_linger_s, False):
                    while data.recv_next(CHUNK):
                        pass
                    while launch.kind is Kind.TCP and not data.is_dead():  # who has said all waits for an answer still
                        gevent.sleep(LOOK_S)
            except gevent.GreenletExit:
                end = access.NO_TARGET, why
                self._access.nothing(_protocol(launch), launch.id, self._user(launch), time.monotonic(), end)
                raise


def _protocol(launch: Launch) -> str:
    return "tcp" if launch.kind is Kind.TCP else "udp"
