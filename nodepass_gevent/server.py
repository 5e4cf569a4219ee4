"""The listening side: the tunnel port, the data port for v1 clients, the public port, and the certificate.

Where several processes share the tunnel port and the public port, each has its own data port, for both profiles. What
becomes of a caller is decided in ``reception``, when users may come in ``public_port``, what becomes of them in
``ingress``.
"""

import errno
import random
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial

import gevent
from gevent.event import Event
from gevent.pool import Group

from . import accepting, net
from . import log as logs
from .admission import Admission
from .clients import Clients
from .config import Config
from .crew import Crew
from .errors import reason
from .handover import Sockets, bound
from .ingress import Ingress
from .keyring import KeyRing
from .metrics import Counters
from .penalties import Penalties
from .public_port import PublicPort
from .reception import Reception
from .state import Description
from .tls_context import ServerCertificate
from .transport import RawSocket, Stream
from .values import Address

DATA_PORTS = range(1024, 8192)  # where the original draws its data port
PORT_DRAWS = 100  # tries to find a free one
LAST_LAUNCHES_S = 1.0  # at the end, for users who have come: a data connection that they wait for takes round trips


class Server:
    """The role behind ``server://``. ``run`` serves until it fails or is killed; exchanges outlive it."""

    def __init__(self, config: Config, before: "Server | None" = None) -> None:
        self.config = config
        self.counters: Counters = before.counters if before else Counters()
        self.exchanges = Crew(config.semaphore_limit)
        self.begun = Event()
        self._log = logs.of(config.name)
        self._pauses = logs.Seldom(self._log)
        made = before._certificate if before else None
        self._certificate: ServerCertificate | None = (
            ServerCertificate(config.crt, config.key, config.ca, self._log, config.tls, made) if config.tls else None
        )
        self._keys = KeyRing(config)
        # A socket that was bound to be shared cannot be one that is not, nor the other way round.
        fits = before is not None and before.config.reuse_port == config.reuse_port
        inherited = before._sockets.duplicate() if before and fits else {}  # the last that may fail
        self._sockets: Sockets = Sockets(inherited)
        self._clients = Clients(config.limits, self._log)
        self._admission = Admission(config, self.counters)
        self.penalties = Penalties(config.limits, self._clients.at, self._log)
        if before:
            self._admission.follow(before._admission)
            self.penalties.follow(before.penalties)
            if fits:  # this one has its public port, and so its users
                before._clients.heirs = self._clients
        self._reception = Reception(config, self._certificate, self._keys, self._clients, self.penalties, self.counters)
        entrance = self._admission if config.limits.users_per_address else None
        self._ingress = Ingress(self._clients.wait, self.exchanges, config, self.counters, entrance)
        self._public = PublicPort(config, self._sockets, self._clients, self._ingress, self._admission, self._paused)
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

    def describe(self) -> Description:
        """Say who is connected, and what is presented."""
        presented = self._certificate.describe() if self._certificate else None
        return Description(self._clients.describe(), presented, self._clients.left, self._reception.refused)

    def dismiss(self) -> None:
        """Let nobody wait for a client here, also where this one never came to listen."""
        self._clients.close()

    def retire(self) -> None:
        """End the UDP sessions: the public socket is another one's now, and the next datagram opens a session there."""
        self._sockets.close_inherited()  # it may have had no time to open them
        self._ingress.udp.end("the tunnel is given new settings")

    def run(self) -> None:
        """Listen and serve; raises OSError or ConnectError when an address cannot be had."""
        self._ingress.udp.end("the server begins anew")  # sessions of the last try may still keep the public socket
        with ExitStack() as stack:
            stack.callback(self._sockets.close_inherited)  # also where another address cannot be had
            self._clients.open()
            parts = self._open(stack)
            stack.callback(self._reception.close)
            stack.callback(self._callers.kill)
            self._joiners = Crew()
            stack.callback(self._joiners.kill)
            stack.callback(self._clients.close)
            running = Group()
            stack.callback(running.kill)
            public = gevent.spawn(self._public.run)
            stack.callback(self._take_leave, public)
            first = gevent.wait([public, *(running.spawn(part) for part in parts)], count=1)[0]
            why = first.value if first.successful() else first.exception
            if isinstance(why, OSError):
                raise why
            raise RuntimeError("an accept loop ended") from why

    def _take_leave(self, public: gevent.Greenlet) -> None:
        """Take no users any more, and see those off that have come while their client is still here."""
        public.kill()
        within_s = min(LAST_LAUNCHES_S, self.config.leave_s) if self._clients.current() else 0
        end = time.monotonic() + within_s
        self._public.close(within_s)
        self._ingress.settle(end - time.monotonic())

    def _open(self, stack: ExitStack) -> list[Callable[[], None]]:
        """Open all listeners, to be closed by ``stack``; give the parts that serve callers."""
        config = self.config

        def listen(purpose: str, address: Address, *, shared: bool = False) -> RawSocket:
            sock = self._sockets.open(
                purpose, address, socket.SOCK_STREAM, lambda: net.listen(address, config.limits, shared=shared)
            )
            stack.callback(self._sockets.forget, sock)
            return stack.enter_context(closing(sock))

        def serve(listener: RawSocket, handle: Callable[[Stream], object]) -> Callable[[], None]:
            return partial(accepting.serve, listener, handle, self._paused, rest=_let_them_begin, limits=config.limits)

        tunnel = listen("tunnel", config.tunnel, shared=bool(config.reuse_port))
        ports = [f"tunnel {bound(config.tunnel, tunnel)}"]
        start = self._admission.guard_callers(self._called, self.penalties.keeps_out)
        parts = [serve(tunnel, start)]
        if config.serves_v1 or config.reuse_port:
            data = self._listen_data(partial(listen, "data"))
            port = data.getsockname()[1]
            self._reception.open_data_port(port)
            ports.append(f"data port {port}")
            join = self._admission.guard_callers(self._called_for_data)
            parts.append(serve(data, partial(self._called_on_own_port, start, join) if config.reuse_port else join))
        stack.callback(self._public.close, 0)
        public, carries = self._public.prepare(), config.network.replace("both", "tcp and udp")
        until = "" if self._public.is_open else ", closed until a client is connected"
        ports.append(f"public {public} ({carries}{until})")
        self._sockets.close_inherited()
        key = ", with a tunnel key" if config.keyed else ""
        self._log.info("listening: %s, tls %d%s", ", ".join(ports), config.tls, key)
        self.begun.set()
        return parts

    def _called_on_own_port(
        self, start: Callable[[Stream], object], join: Callable[[Stream], object], stream: Stream
    ) -> None:
        """Serve a caller of this process's own data port: the profile is that of the client that is here."""
        (join if self._reception.expects_v1() else start)(stream)

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

    def _paused(self, exc: Exception) -> None:
        self.counters.accept_pauses += 1
        self._pauses.warning("accepting pauses: %s", reason(exc))


def _let_them_begin() -> None:
    """Let callers that are accepted have their turn before more are: a handshake takes longer than to accept.

    The event loop looks for arrivals every few milliseconds, whether those before have had their turn or not.
    """
    gevent.sleep(0)
