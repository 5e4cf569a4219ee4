"""The listening side: callers of the tunnel port and of the data port, the client's session, the public port.

In profile v1 a client cannot say who it is. A caller of the tunnel port is told the first line at once, and is
known as the client when a data connection from its address has completed, TLS included, on the data port.
Whoever else calls there is held to a deadline and then closed: closing it at once would make an old client
dial without pause.
"""

import errno
import logging
import random
import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial

import gevent
from gevent.event import Event
from gevent.pool import Group, Pool

from . import net, tls, wire
from .callers import Caller, Callers
from .config import Config
from .errors import NoDataConnection, PoolClosed, ProtocolError, SessionLost
from .forward import Ingress
from .metrics import Counters
from .net import ArrivalWatch, RawSocket, Stream, Transport, deadline, reason
from .pool import AcceptingPool
from .session import Session
from .udp import PublicSocket
from .wire import FirstLine

log = logging.getLogger(__name__)

DATA_PORTS = range(1024, 8192)  # where the original draws its data port
PORT_DRAWS = 100  # tries to find a free one
RIPEN_S = 0.005  # the original's client drops a launch that comes right behind its id (protocol v1)
ACK_POLL_S, ACK_POLL_MAX_S = 0.001, 0.05  # the kernel does not tell when an acknowledgement is in


@dataclass(frozen=True)
class Client:
    """A caller that is known, by the address it calls from."""

    key: str
    control: Stream
    session: Session
    pool: AcceptingPool

    def send(self, line: bytes) -> None:
        """Queue a line on the control channel."""
        self.session.send(line)


class Server:
    """The role behind ``server://``. ``run`` serves until it fails or is killed; exchanges outlive it."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.counters = Counters()
        self.exchanges = Pool(config.semaphore_limit)
        self._certificate = tls.ServerCertificate(config.crt, config.key) if config.tls else None
        self._first_line = FirstLine(config.data_port, config.tls)
        self._ingress = Ingress(self._client, self.exchanges, config, self.counters)
        self._callers = Callers(config.limits.callers)
        self._held = Callers(config.limits.callers)
        self._clients: dict[bytes, Client] = {}  # by session id
        self._client_came = Event()
        self._joining = 0  # data connections between accept and pool
        self._greenlets = Group()  # one for each caller and each joining data connection

    def __str__(self) -> str:
        return f"server {self.config.tunnel}"

    def reload(self) -> None:
        """Read certificate files again if they changed."""
        if self._certificate:
            self._certificate.reload()

    def run(self) -> None:
        """Listen and serve; raises OSError or ConnectError when an address cannot be had."""
        with ExitStack() as stack:
            parts = self._open(stack)
            stack.callback(self._greenlets.kill)
            running = Group()
            stack.callback(running.kill)
            first = gevent.wait([running.spawn(part) for part in parts], count=1)[0]
            raise RuntimeError(f"an accept loop ended: {first.exception!r}")

    def _open(self, stack: ExitStack) -> list[Callable[[], None]]:
        """Open all listeners, to be closed by ``stack``; give the loops that serve them."""
        config, limits = self.config, self.config.limits

        def listen(address) -> tuple[RawSocket, int]:
            listener = stack.enter_context(closing(net.listen(address, limits)))
            return listener, listener.getsockname()[1]

        tunnel, tunnel_port = listen(config.tunnel)
        data, data_port = self._listen_data(listen)
        self._first_line = FirstLine(data_port, config.tls)
        loops: list[Callable[[], None]] = [
            partial(net.serve, tunnel, partial(self._greenlets.spawn, self._greet), self._paused),
            partial(net.serve, data, partial(self._greenlets.spawn, self._join), self._paused),
            self._reload_for_ever,
        ]
        target = config.target
        if config.network != "udp":
            public, public_port = listen(target)
            target = replace(target, port=public_port)
            loops.append(partial(net.serve, public, self._ingress.user, self._paused, self._ingress.room))
        if config.network != "tcp":
            datagrams = stack.enter_context(closing(PublicSocket(target)))
            target = replace(target, port=datagrams.port)
            loops.append(partial(datagrams.serve, self._ingress.datagram))
        tunnel_address = replace(config.tunnel, port=tunnel_port)
        network = "tcp and udp" if config.network == "both" else config.network
        log.info(
            "listening: tunnel %s, data port %d, public %s (%s), tls %d",
            tunnel_address, data_port, target, network, config.tls,
        )  # fmt: skip
        return loops

    def _listen_data(self, listen: Callable) -> tuple[RawSocket, int]:
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

    def _reload_for_ever(self) -> None:
        while True:
            gevent.sleep(self.config.reload_interval_s)
            self.reload()

    def _paused(self, exc: OSError) -> None:
        self.counters.accept_pauses += 1
        (log.debug if self.counters.accept_pauses % 60 != 1 else log.warning)("accepting pauses: %s", reason(exc))

    # The tunnel port

    def _greet(self, stream: Stream) -> None:
        """Tell a caller the first line, find out what it is, and serve it when it is the client."""
        key = net.peer_key(stream.peer[0])
        # Where the client is, a second one cannot be told from the first by its data connections: serve no v1 there.
        second = self._client_at(key) is not None
        first = FirstLine(None, self.config.tls) if second else self._first_line
        caller = Caller(key, stream)
        try:
            with stream:
                stream.sendall(wire.format_first_line(first))
                verdict = self._wait_for_verdict(caller, self._held if second else self._callers)
                if isinstance(verdict, Client):
                    self._serve(verdict)
                elif second:
                    self._refuse(f"second client {stream}: one is connected from its address")
                else:
                    self._refuse(f"caller {stream}: {verdict}")
        except OSError as exc:
            self._refuse(f"caller {key}: {reason(exc)}")

    def _refuse(self, who_and_why: str) -> None:
        self.counters.callers_refused += 1
        log.warning("refused %s", who_and_why)

    def _wait_for_verdict(self, caller: Caller, table: Callers) -> Client | str:
        """Give the Client that this caller proved to be, or why it must go."""
        stream, timeout_s = caller.connection, self.config.limits.caller_timeout_s

        def arrived() -> None:
            caller.decide(_why_it_spoke(stream))

        self._note(caller, table)
        watch = ArrivalWatch(stream, arrived)
        try:
            caller.verdict.wait(timeout_s)
            caller.decide(f"silent for {timeout_s:g} s")
            return caller.verdict.get()
        finally:
            watch.close()
            table.remove(caller)

    def _note(self, caller: Caller, table: Callers) -> None:
        evicted = table.add(caller)
        if evicted:
            evicted.decide("too many callers, and most of them from its address")

    def _serve(self, client: Client) -> None:
        client.control.fail_when_unacknowledged(self.config.limits.user_timeout_s)
        log.info("client %s connected", client.control)
        try:
            client.session.run()
        except SessionLost as exc:
            log.warning("client %s: %s", client.control, exc)
        finally:
            self._clients = {id: other for id, other in self._clients.items() if other is not client}

    # The data port

    def _join(self, stream: Stream) -> None:
        """Bring a data connection into the pool of its client; hold and then close everybody else's."""
        key = net.peer_key(stream.peer[0])
        self._joining += 1
        try:
            with ExitStack() as owned:
                owned.enter_context(stream)
                client, data = self._complete(stream, key)
                if client is None:
                    self._hold(stream, key)
                    return
                id = self._send_id(data, client.pool)
                self._ripen(stream)
                client.pool.add(id, data)
                owned.pop_all()  # it is the pool's now
        except (OSError, PoolClosed) as exc:
            self.counters.data_connections_refused += 1
            log.debug("data connection from %s: %s", key, reason(exc))
        finally:
            self._joining -= 1

    def _complete(self, stream: Stream, key: str) -> tuple[Client | None, Transport]:
        """Make the TLS handshake with whoever may be a client, and say whose connection this is."""
        expected = self._client_at(key) or self._callers.youngest(key)
        if not expected or self._joining > self.config.max_pool_capacity:
            return None, stream
        data: Transport = stream
        if self._certificate:
            with deadline(self.config.limits.tls_handshake_timeout_s, "TLS handshake"):
                data = tls.accept(stream, self._certificate.context)
        client = self._client_at(key) or self._recognise(key)
        return (client if client and client.pool.room > 0 else None), data

    def _recognise(self, key: str) -> Client | None:
        """A data connection from ``key`` is complete: its youngest silent caller is a client."""
        caller = self._callers.youngest(key)
        if caller is None:
            return None
        if self._clients:
            current = next(iter(self._clients.values()))
            caller.decide(f"a second client, while {current.control} is connected")
            return None
        pool = AcceptingPool(self.config.max_pool_capacity)
        session = Session(caller.connection, pool, _refuse_speech, ping_interval_s=self.config.report_interval_s)
        client = Client(key, caller.connection, session, pool)
        if not caller.decide(client):
            return None
        self._clients[secrets.token_bytes(8)] = client
        self._client_came.set()
        return client

    def _hold(self, stream: Stream, key: str) -> None:
        self.counters.data_connections_refused += 1
        held = Caller(key, stream)
        self._note(held, self._held)
        held.verdict.wait(self.config.limits.tls_handshake_timeout_s)
        self._held.remove(held)
        log.debug("data connection from %s refused: no client is expected there, or its pool is full", key)

    def _send_id(self, data: Transport, pool: AcceptingPool) -> bytes:
        id = secrets.token_hex(wire.ID_LENGTH // 2).encode()
        while id in pool:
            id = secrets.token_hex(wire.ID_LENGTH // 2).encode()
        data.sendall(id)  # in one write: the original's client reads it with one read
        return id

    def _ripen(self, stream: Stream) -> None:
        """Wait until the id is acknowledged, and a moment more."""
        poll_s = ACK_POLL_S
        with deadline(self.config.limits.id_timeout_s, "acknowledgement of the id"):
            while stream.unacknowledged():
                if stream.peek() is False:  # a reset connection never acknowledges
                    raise ConnectionAbortedError("it closed before its id was acknowledged")
                gevent.sleep(poll_s)
                poll_s = min(poll_s * 2, ACK_POLL_MAX_S)
        gevent.sleep(RIPEN_S)

    # The client

    def _client_at(self, key: str) -> Client | None:
        for client in self._clients.values():
            if client.key == key and not client.pool.closed and client.control.peek() is not False:
                return client
        return None

    def _client(self, timeout_s: float) -> Client:
        """Wait for a client whose session lives."""
        end = time.monotonic() + timeout_s
        while True:
            for client in self._clients.values():
                if not client.pool.closed:
                    return client
            self._client_came.clear()
            if not self._client_came.wait(max(end - time.monotonic(), 0)):
                raise NoDataConnection("no client is connected")


def _why_it_spoke(stream: Stream) -> str:
    opening = memoryview(bytearray(wire.MAX_LINE))
    try:
        size = stream.pull(opening)
    except OSError as exc:
        return reason(exc)
    return f"it speaks {wire.recognise(bytes(opening[:size]))}" if size else "it closed"


def _refuse_speech(_data: bytes) -> None:
    raise ProtocolError("it sent bytes, and a v1 client sends none")
