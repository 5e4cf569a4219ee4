"""The public port: open all the time, or, where several processes share it, while a client is there to serve its users.

What becomes of a user is decided in ``ingress``. Here is only when users may come, and that none is lost at the end.
"""

import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

import gevent

from . import accepting, net
from . import log as logs
from .admission import Admission
from .clients import Clients
from .config import Config
from .errors import NoDataConnection
from .handover import PUBLIC, Sockets, bound, named
from .ingress import Ingress
from .transport import RawSocket
from .udp import PublicSocket
from .values import Address

DIVERTED_S = 0.2  # who is in the middle of a TCP handshake is through by then, unless a round trip takes longer
RETURN_S = 2.0  # a client that was told bye, for new settings, is back by then


class PublicPort:
    """Where users come: TCP, UDP or both. Who opens it closes it."""

    def __init__(
        self,
        config: Config,
        sockets: Sockets,
        clients: Clients,
        ingress: Ingress,
        admission: Admission,
        on_pause: Callable[[Exception], None],
    ) -> None:
        self._config = config
        self._log = logs.of(config.name)
        self._sockets = sockets
        self._clients = clients
        self._ingress = ingress
        self._start = admission.guard_users(ingress.user)
        self._admits_datagram = admission.admits_datagram
        self._on_pause = on_pause
        self._listener: RawSocket | None = None
        self._datagrams: RawSocket | None = None
        self._receivers: list[gevent.Greenlet] = []  # of users

    @property
    def is_open(self) -> bool:
        """Whether users may come."""
        return bool(self._receivers)

    def prepare(self) -> Address:
        """Open, or make sure that it can be done later; give the address. Raises OSError or ConnectError."""
        target, shared = self._config.target, self._config.reuse_port
        if not shared or self._sockets.inherits(PUBLIC, target):
            return self._open()
        for kind, other in ((socket.SOCK_STREAM, "udp"), (socket.SOCK_DGRAM, "tcp")):
            if self._config.network != other:
                with named(PUBLIC, kind):
                    net.bind(target, kind, shared=True).close()
        return target

    def run(self) -> BaseException | None:
        """Serve users until killed, or until receiving them fails; give the reason, an OSError where it is outside."""
        try:
            while not (failed := [each for each in self._receivers if each.ready()]):
                if self._config.reuse_port:
                    self._take_turn()
                else:
                    gevent.wait(self._receivers, count=1)
        except OSError as exc:
            return exc
        return failed[0].exception

    def _take_turn(self) -> None:
        """Serve users while there is a client; where the port is open already, one may be a moment away."""
        patience_s = RETURN_S if self._receivers else None
        with suppress(NoDataConnection):
            while not any(each.ready() for each in self._receivers):
                client = self._clients.wait(patience_s)
                if not self._receivers:
                    self._log.info("public %s: open", self._open())
                gevent.wait([client.pool.ended, *self._receivers], count=1)
                patience_s = 0
            return
        self.close(self._config.limits.drain_linger_s)
        self._log.info("public %s: closed, no client is here; others on this port take its users", self._config.target)

    def _open(self) -> Address:
        config, target = self._config, self._config.target
        shared = bool(config.reuse_port)
        if config.network != "udp":
            self._listener = listener = self._sockets.open(
                PUBLIC, target, socket.SOCK_STREAM, lambda: net.listen(config.target, config.limits, shared=shared)
            )
            target = bound(target, listener)
        if config.network != "tcp":
            self._datagrams = self._sockets.open(
                PUBLIC, target, socket.SOCK_DGRAM, lambda: net.bind(target, socket.SOCK_DGRAM, shared=shared)
            )
            datagrams = PublicSocket(self._datagrams, self._admits_datagram)  # closed after its last session
            target = replace(target, port=datagrams.port)
            self._receivers.append(gevent.spawn(self._ingress.udp.serve, datagrams))
        if self._listener:
            limits, ingress = config.limits, self._ingress
            serve = partial(accepting.serve, room=ingress.room, rest=ingress.wait_for_room, limits=limits)
            self._receivers.append(gevent.spawn(serve, self._listener, self._start, self._on_pause))
        return target

    def close(self, within_s: float) -> None:
        """Let nobody come any more. TCP users that have called by now are taken, for ``within_s`` at most.

        UDP sessions keep their socket to their end; not so where other processes share the port, for then
        newcomers that they could serve would come here.
        """
        gevent.killall(self._receivers)
        self._receivers.clear()
        shared, ours = self._config.reuse_port, not self._sockets.handed_over
        if self._datagrams:
            self._sockets.forget(self._datagrams)
            self._datagrams = None
            if shared and ours:
                self._ingress.udp.end("this process takes no users any more")
        if self._listener:
            if ours and within_s:
                diverted_s = DIVERTED_S if shared and not accepting.migrates() else 0
                with gevent.Timeout(within_s, False):
                    accepting.serve_last(self._listener, self._start, self._ingress.wait_for_room, diverted_s)
            self._sockets.forget(self._listener)
            self._listener.close()
            self._listener = None
