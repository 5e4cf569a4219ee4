"""Who calls, and what becomes of it: the state machine of callers on the tunnel port and on the v1 data port.

Each caller of the tunnel port is told the first line at once. By a line of its own it is a v2 client or one of its data
connections. When it stays silent it is known as a v1 client once a data connection from its address has completed,
TLS included, on the data port. Until a caller is known it holds nothing and displaces nobody. Whoever else calls the
data port is held to a deadline and then closed: closing it at once would make an old client dial without pause.
"""

import logging
import math
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import gevent
from gevent.event import Event

from . import net, tls, wire
from .callers import Caller, Callers
from .config import Config
from .errors import NoDataConnection, PoolClosed, ProtocolError, SessionLost
from .metrics import Counters
from .pool import AcceptingPool
from .session import Session
from .transport import ArrivalWatch, Stream, Transport, deadline, reason
from .wire import Bye, Data, FirstLine, Hello, Need, Ping, Welcome

log = logging.getLogger(__name__)

RIPEN_S = 0.005  # the original's client drops a launch that comes right behind its id (protocol v1)
ACK_POLL_S, ACK_POLL_MAX_S = 0.001, 0.05  # the kernel does not tell when an acknowledgement is in
DEAD_AFTER = 3  # ping intervals of silence
CAPABILITIES = frozenset((wire.NEED,))
SPEAKS = "it speaks"  # the verdict on a caller that is not silent


@dataclass(frozen=True)
class Client:
    """A caller that is known, by the address it calls from, and its session."""

    profile: int
    key: str
    stream: Stream
    session: Session
    pool: AcceptingPool

    @property
    def alive(self) -> bool:
        return not self.pool.closed and self.stream.peek() is not False

    def send(self, line: bytes) -> None:
        """Queue a line on the control channel."""
        self.session.send(line)


class Reception:
    """Turns callers into clients, and their data connections into the clients' pools."""

    def __init__(self, config: Config, certificate: tls.ServerCertificate | None, counters: Counters) -> None:
        self.data_port: int | None = config.data_port  # where v1 data connections are taken; None: nowhere
        self._config = config
        self._limits = config.limits
        self._certificate = certificate
        self._counters = counters
        self._callers = Callers(config.limits.callers)
        self._held = Callers(config.limits.callers)
        self._clients: dict[bytes, Client] = {}  # by session id
        self._client_came = Event()
        self._closed = False
        self._joining = 0  # data connections between accept and pool

    def client(self, timeout_s: float) -> Client:
        """Wait for a client whose session lives; NoDataConnection."""
        end = time.monotonic() + timeout_s
        while not self._closed:
            for client in self._clients.values():
                if not client.pool.closed:
                    return client
            self._client_came.clear()
            if not self._client_came.wait(max(end - time.monotonic(), 0)):
                raise NoDataConnection("no client is connected")
        raise NoDataConnection("the server is stopping")

    def open(self) -> None:
        """Let users wait for a client."""
        self._closed = False

    def close(self) -> None:
        """Let nobody wait for a client any more."""
        self._closed = True
        self._client_came.set()

    # The tunnel port

    def greet(self, stream: Stream) -> None:
        """Tell a caller the first line, find out what it is, and serve it to its end."""
        key = net.peer_key(stream.peer[0])
        neighbour = self._client_at(key)
        # Where a v1 client is, a second one cannot be told from it by its data connections: serve no v1 there.
        port = None if neighbour and neighbour.profile == 1 else self.data_port
        nonce = b"" if self._config.protocol == "1" else os.urandom(wire.NONCE_LENGTH)
        first = wire.format_first_line(FirstLine(port, self._config.tls), nonce)
        try:
            with ExitStack() as owned, ExitStack() as unknown:
                owned.enter_context(stream)
                line = stream.take_line(wire.MAX_FIRST_LINE)  # of a data connection it is here by now, as a rule
                if line is None:
                    stream.sendall(first)
                    first = b""
                    verdict = self._listen_to(stream, key, neighbour, port, unknown)
                    if isinstance(verdict, Client):
                        unknown.close()
                        self._serve(verdict)
                        return
                    if verdict is not SPEAKS:
                        self._refuse(f"caller {stream}: {verdict}")
                        return
                    line = self._read_opening(stream)
                try:
                    opening = self._parse_opening(line)
                except ProtocolError:
                    stream.sendall(first)
                    raise
                if isinstance(opening, Data):
                    unknown.close()
                    self._join_session(stream, key, opening, first, owned)
                else:
                    stream.sendall(first)
                    self._serve_hello(stream, key, opening, unknown)
        except (OSError, ProtocolError) as exc:
            self._refuse(f"caller {stream}: {reason(exc)}")

    def _refuse(self, who_and_why: str) -> None:
        self._counters.callers_refused += 1
        log.warning("refused %s", who_and_why)

    def _listen_to(
        self, stream: Stream, key: str, neighbour: Client | None, port: int | None, unknown: ExitStack
    ) -> Client | str:
        """Wait for what a caller says: SPEAKS, the v1 client that a silent one proved to be, or why it must go."""
        if neighbour and neighbour.profile == 2 and self._joining < self._config.max_pool_capacity:
            with self._counted(), deadline(self._limits.opening_timeout_s, "opening of a caller from the client"):
                stream.wait_for_arrival()  # an honest client dials hundreds at once: they count in its own budget
            return SPEAKS
        caller = Caller(key, stream, gevent.getcurrent())
        unknown.enter_context(self._noted(caller, self._held if port is None else self._callers))
        verdict = self._wait_for_verdict(caller)
        if port is None and verdict is not SPEAKS and neighbour:
            return f"a second client, while {neighbour.stream} is connected"
        return verdict

    def _wait_for_verdict(self, caller: Caller) -> Client | str:
        """Give the Client that a caller proved to be, SPEAKS when it says something, or why it must go."""
        stream, timeout_s = caller.connection, self._limits.caller_timeout_s

        def arrived() -> None:
            caller.decide("it closed" if stream.peek() is False else SPEAKS)

        watch = ArrivalWatch(stream, arrived)
        try:
            caller.verdict.wait(timeout_s)
            caller.decide(f"silent for {timeout_s:g} s")
            return caller.verdict.get()
        finally:
            watch.close()

    @contextmanager
    def _noted(self, caller: Caller, table: Callers) -> Iterator[None]:
        """Keep a caller in a table while it is unknown; one that must go for it is interrupted."""
        evicted = table.add(caller)
        if evicted:
            why = ConnectionAbortedError("too many callers, and most of them from its address")
            gevent.kill(evicted.greenlet, why)
        try:
            yield
        finally:
            table.remove(caller)

    def _read_opening(self, stream: Stream) -> bytes:
        """Read the line in which a caller says what it is, and not a byte more."""
        if self._config.protocol == "1" or not stream.begins_with(b"//"):
            return stream.recv(wire.MAX_LINE)  # no line, but enough of it to name it
        with deadline(self._limits.opening_timeout_s, "opening line"):
            return stream.read_line(wire.MAX_FIRST_LINE)

    def _parse_opening(self, line: bytes) -> Hello | Data:
        if self._config.protocol == "1" or not line.startswith(b"//"):
            raise ProtocolError(f"it speaks {wire.recognise(line)}")
        return wire.parse_opening(line)

    def _serve(self, client: Client) -> None:
        """Run a client's session to its end."""
        client.stream.fail_when_unacknowledged(self._limits.user_timeout_s)
        log.info("client %s connected, profile v%d", client.stream, client.profile)
        try:
            client.session.run()
        except SessionLost as exc:
            log.warning("client %s: %s", client.stream, exc)
        finally:
            self._clients = {id: other for id, other in self._clients.items() if other is not client}

    def _admit(self, client: Client) -> bytes:
        """Register a session, and give its id."""
        id = secrets.token_bytes(wire.SESSION_LENGTH)
        self._clients[id] = client
        self._client_came.set()
        return id

    def _client_at(self, key: str) -> Client | None:
        for client in self._clients.values():
            if client.key == key and client.alive:
                return client
        return None

    # Profile v2: hello and data on the tunnel port

    def _serve_hello(self, stream: Stream, key: str, hello: Hello, unknown: ExitStack) -> None:
        unknown.close()
        unknown.enter_context(self._noted(Caller(key, stream, gevent.getcurrent()), self._callers))
        control = self._secure(stream, wire.ALPN_CONTROL)
        unknown.close()
        current = next((client for client in self._clients.values() if client.alive), None)
        if current:
            control.sendall(wire.format_bye(Bye(b"busy")))
            control.linger(self._limits.drain_linger_s)
            self._refuse(f"second client {stream}, while {current.stream} is connected")
            return
        agreed = hello.capabilities & CAPABILITIES
        interval_s = math.ceil(self._config.report_interval_s)
        pool = AcceptingPool(
            self._config.max_pool_capacity,
            (lambda: session.send(wire.format_need(Need(1)))) if wire.NEED in agreed else (lambda: None),
        )
        session = Session(
            control,
            pool,
            self._count_signals(),
            ping_interval_s=self._config.report_interval_s,
            silence_s=lambda: DEAD_AFTER * interval_s,
        )
        client = Client(2, key, stream, session, pool)
        id = self._admit(client)
        session.send(wire.format_welcome(Welcome(id, agreed, interval_s, self._config.max_pool_capacity)))
        self._serve(client)

    def _count_signals(self):
        """Make the receiver of a v2 client's lines: answers to pings, and what is not known yet."""
        lines = wire.Lines()

        def receive(data: bytes) -> None:
            for line in lines.feed(data):
                if not isinstance(wire.parse_signal(line), Ping):
                    self._counters.signals_unknown += 1

        return receive

    def _join_session(self, stream: Stream, key: str, data: Data, first: bytes, owned: ExitStack) -> None:
        """Bring a v2 data connection into the pool of the session it names; ``first`` is still to be sent."""
        client = self._clients.get(data.session)
        if client is None or client.key != key or client.pool.closed or self._full(client):
            self._counters.data_connections_refused += 1
            log.debug("data connection from %s refused: no such session here, or its pool is full", key)
            stream.sendall(first)
            return
        try:
            with self._counted():
                if self._certificate and first:
                    stream.sendall(first)
                    first = b""
                transport = self._secure(stream, wire.ALPN_DATA)
                id = self._send_id(transport, client.pool, first)
            client.pool.add(id, transport)
            owned.pop_all()  # it is the pool's now
        except (OSError, ProtocolError, PoolClosed) as exc:
            self._counters.data_connections_refused += 1
            log.debug("data connection from %s: %s", key, reason(exc))
            stream.reset()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count a data connection while it joins, and only then: those that are held take nobody's place."""
        self._joining += 1
        try:
            yield
        finally:
            self._joining -= 1

    def _full(self, client: Client) -> bool:
        return client.pool.room <= self._joining

    def _secure(self, stream: Stream, alpn: bytes = b"") -> Transport:
        if not self._certificate:
            return stream
        with deadline(self._limits.tls_handshake_timeout_s, "TLS handshake"):
            return tls.accept(stream, self._certificate.contexts[alpn], alpn)

    # Profile v1: the data port

    def join(self, stream: Stream) -> None:
        """Bring a v1 data connection into the pool of its client; hold and then close everybody else's."""
        key = net.peer_key(stream.peer[0])
        try:
            with ExitStack() as owned:
                owned.enter_context(stream)
                with self._counted():
                    client, data = self._complete(stream, key)
                    if client:
                        id = self._send_id(data, client.pool)
                        self._ripen(stream)
                        client.pool.add(id, data)
                        owned.pop_all()  # it is the pool's now
                        return
                self._hold(stream, key)
        except (OSError, PoolClosed) as exc:
            self._counters.data_connections_refused += 1
            log.debug("data connection from %s: %s", key, reason(exc))

    def _complete(self, stream: Stream, key: str) -> tuple[Client | None, Transport]:
        """Make the TLS handshake with whoever may be a v1 client, and say whose connection this is."""
        expected = self._v1_client_at(key) or self._callers.youngest(key)
        if not expected or self._joining > self._config.max_pool_capacity:
            return None, stream
        data = self._secure(stream)
        client = self._v1_client_at(key) or self._recognise(key)
        return (client if client and client.pool.room > 0 else None), data

    def _v1_client_at(self, key: str) -> Client | None:
        client = self._client_at(key)
        return client if client and client.profile == 1 else None

    def _recognise(self, key: str) -> Client | None:
        """A data connection from ``key`` is complete: its youngest silent caller is a client."""
        caller = self._callers.youngest(key)
        if caller is None:
            return None
        current = next((client for client in self._clients.values() if client.alive), None)
        if current:
            caller.decide(f"a second client, while {current.stream} is connected")
            return None
        pool = AcceptingPool(self._config.max_pool_capacity)
        session = Session(caller.connection, pool, _refuse_speech, ping_interval_s=self._config.report_interval_s)
        client = Client(1, key, caller.connection, session, pool)
        if not caller.decide(client):
            return None
        self._admit(client)
        return client

    def _hold(self, stream: Stream, key: str) -> None:
        self._counters.data_connections_refused += 1
        with suppress(ConnectionAbortedError), self._noted(Caller(key, stream, gevent.getcurrent()), self._held):
            gevent.sleep(self._limits.tls_handshake_timeout_s)
        log.debug("data connection from %s refused: no client is expected there, or its pool is full", key)

    def _send_id(self, data: Transport, pool: AcceptingPool, before: bytes = b"") -> bytes:
        id = secrets.token_hex(wire.ID_LENGTH // 2).encode()
        while id in pool:
            id = secrets.token_hex(wire.ID_LENGTH // 2).encode()
        data.sendall(before + id)  # in one write: the original's client reads it with one read
        return id

    def _ripen(self, stream: Stream) -> None:
        """Wait until the id is acknowledged, and a moment more."""
        poll_s = ACK_POLL_S
        with deadline(self._limits.id_timeout_s, "acknowledgement of the id"):
            while stream.unacknowledged():
                if stream.peek() is False:  # a reset connection never acknowledges
                    raise ConnectionAbortedError("it closed before its id was acknowledged")
                gevent.sleep(poll_s)
                poll_s = min(poll_s * 2, ACK_POLL_MAX_S)
        gevent.sleep(RIPEN_S)


def _refuse_speech(_data: bytes) -> None:
    raise ProtocolError("it sent bytes, and a v1 client sends none")
