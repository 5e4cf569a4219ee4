"""The listening side: the tunnel port, the data port for v1 clients, the public port, and the certificate.

What becomes of a caller is decided in ``reception``, what becomes of a user in ``forward``.
"""

import errno
import logging
import random
import socket
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial

import gevent
from gevent.event import Event
from gevent.pool import Group

from . import net
from .admission import Admission
from .clients import Clients
from .config import Address, Config
from .crew import Crew
from .forward import Ingress
from .keyring import KeyRing
from .metrics import Counters
from .penalties import Penalties
from .reception import Reception
from .tls_context import ServerCertificate
from .transport import RawSocket, Stream, reason
from .udp import PublicSocket

log = logging.getLogger(__name__)

DATA_PORTS = range(1024, 8192)  # where the original draws its data port
PORT_DRAWS = 100  # tries to find a free one
PAUSES_PER_WARNING = 60  # at most one a second: a warning a minute

Bound = tuple[Address, int]  # an address as it is configured, and the type of socket


class Server:
    """The role behind ``server://``. ``run`` serves until it fails or is killed; exchanges outlive it."""

    def __init__(self, config: Config, before: "Server | None" = None) -> None:
        self.config = config
        self.counters: Counters = before.counters if before else Counters()
        self._sockets: dict[Bound, RawSocket] = {}  # that are open, by what they are bound to
        self._inherited = before.duplicate_sockets() if before else {}  # of the one in whose place this one comes
        self.exchanges = Crew(config.semaphore_limit)
        self.begun = Event()
        self._certificate = ServerCertificate(config.crt, config.key, config.ca) if config.tls else None
        self._clients = Clients(config.limits)
        self._keys = KeyRing(config)
        self._admission = Admission(config, self.counters)
        self.penalties = Penalties(config.limits, self._clients.at)
        self._reception = Reception(config, self._certificate, self._keys, self._clients, self.penalties, self.counters)
        entrance = self._admission if config.limits.users_per_address else None
        self._ingress = Ingress(self._clients.wait, self.exchanges, config, self.counters, entrance)
        self._callers = Group()  # a greenlet for each caller, until it is a data connection in its pool
        self._joiners = Crew()  # for data connections, where joining takes a handshake

    def __str__(self) -> str:
        return f"server {self.config.tunnel}"

    @property
    def peers(self) -> int:
        """How many clients are connected."""
        return len(self._clients)

    def reload(self) -> None:
        """Read certificate and key files again if they changed."""
        if self._certificate:
            self._certificate.reload()
        self._keys.reload()

    def duplicate_sockets(self) -> dict[Bound, RawSocket]:
        """Give duplicates of the open sockets: who calls meanwhile waits for the one that gets them."""
        return {bound: net.duplicate(sock) for bound, sock in self._sockets.items()}

    def retire(self) -> None:
        """End the UDP sessions: the public socket is another one's now, and the next datagram opens a session there."""
        self._ingress.udp.end("the tunnel is given new settings")

    def run(self) -> None:
        """Listen and serve; raises OSError or ConnectError when an address cannot be had."""
        with ExitStack() as stack:
            parts = self._open(stack)
            self._clients.open()
            stack.callback(self._reception.close)
            stack.callback(self._callers.kill)
            self._joiners = Crew()
            stack.callback(self._joiners.kill)
            stack.callback(self._clients.close)
            running = Group()
            stack.callback(running.kill)
            first = gevent.wait([running.spawn(part) for part in parts], count=1)[0]
            raise RuntimeError(f"an accept loop ended: {first.exception!r}")

    def _open(self, stack: ExitStack) -> list[Callable[[], None]]:
        """Open all listeners, to be closed by ``stack``; give the parts that serve them."""
        config = self.config

        def keep(address: Address, kind: int, make: Callable[[], RawSocket]) -> RawSocket:
            sock = self._inherited.pop((address, kind), None) or make()
            self._sockets[address, kind] = sock
            stack.callback(self._sockets.pop, (address, kind), None)  # two may name port 0
            return sock

        def listen(address: Address) -> RawSocket:
            sock = keep(address, socket.SOCK_STREAM, lambda: net.listen(address, config.limits))
            return stack.enter_context(closing(sock))

        def serve(listener: RawSocket, handle: Callable[[Stream], object]) -> Callable[[], None]:
            return partial(net.serve, listener, handle, self._paused, _after_those_before, config.limits)

        tunnel = listen(config.tunnel)
        ports = [f"tunnel {_bound(config.tunnel, tunnel)}"]
        start = self._admission.guard_callers(self._called, self.penalties.keeps_out)
        parts: list[Callable[[], None]] = [serve(tunnel, start)]
        if config.protocol != "2" and not config.keyed:
            data = self._listen_data(listen)
            self._reception.data_port = data.getsockname()[1]
            ports.append(f"data port {self._reception.data_port}")
            parts.append(serve(data, self._admission.guard_callers(self._called_for_data)))
        target = config.target
        if config.network != "udp":
            public = listen(target)
            target = _bound(target, public)
            start = self._admission.guard_users(self._ingress.user)
            parts.append(partial(net.serve, public, start, self._paused, self._ingress.room, config.limits))
        if config.network != "tcp":
            sock = keep(target, socket.SOCK_DGRAM, lambda: net.bind(target, socket.SOCK_DGRAM))
            datagrams = PublicSocket(target, self._admission.admits_datagram, sock)  # closed after its last session
            target = replace(target, port=datagrams.port)
            parts.append(partial(self._ingress.udp.serve, datagrams))
        ports.append(f"public {target} ({config.network.replace('both', 'tcp and udp')})")
        while self._inherited:
            self._inherited.popitem()[1].close()
        key = ", with a tunnel key" if config.keyed else ""
        log.info("listening: %s, tls %d%s", ", ".join(ports), config.tls, key)
        self.begun.set()
        return parts

    def _called(self, stream: Stream) -> None:
        """Serve a caller of the tunnel port; of a data connection the opening is here by now, as a rule."""
        data = self._reception.take_data(stream)
        if data is None:
            self._callers.spawn(self._reception.greet, stream)
        elif self._reception.is_stranger(stream):
            self._callers.spawn(self._reception.join_stranger, stream, data)
        elif self.config.tls:
            self._joiners.spawn(self._reception.join_session, stream, data)
        else:
            self._reception.join_session(stream, data)

    def _called_for_data(self, stream: Stream) -> None:
        """Serve a caller of the v1 data port."""
        if not self._reception.join_at_once(stream):
            self._callers.spawn(self._reception.join, stream)

    def _listen_data(self, listen: Callable[[Address], RawSocket]) -> RawSocket:
        """Take the data port that is set, or draw until one is free."""
        if self.config.data_port:
            return listen(replace(self.config.tunnel, port=self.config.data_port))
        for port in random.sample(DATA_PORTS, PORT_DRAWS):
            try:
                return listen(replace(self.config.tunnel, port=port))
            except OSError as exc:
                if exc.errno != errno.EADDRINUSE:
                    raise
        raise OSError(errno.EADDRINUSE, f"no free data port in {DATA_PORTS.start}-{DATA_PORTS.stop - 1}")

    def _paused(self, exc: OSError) -> None:
        warn = self.counters.accept_pauses % PAUSES_PER_WARNING == 0
        self.counters.accept_pauses += 1
        log.log(logging.WARNING if warn else logging.DEBUG, "accepting pauses: %s", reason(exc))


def _after_those_before() -> int:
    """Let callers that are accepted have their turn, and then take a batch more: a handshake takes longer than that.

    The event loop looks for arrivals every few milliseconds, whether those before have had their turn or not.
    """
    gevent.sleep(0)
    return net.ACCEPT_BATCH


def _bound(address: Address, listener: RawSocket) -> Address:
    """Give the address with the port that the system chose for port 0."""
    return replace(address, port=listener.getsockname()[1])
