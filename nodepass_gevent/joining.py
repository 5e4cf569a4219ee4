"""Data connections on their way into the pool of their client, from accept to the id that makes them ready.

A v2 connection names its session. A v1 connection belongs to the client at its address; everybody else who calls the v1
data port is held to a deadline and then closed: closing it at once would make an old client dial without pause.
"""

import os
from collections.abc import Callable
from contextlib import ExitStack, suppress

import gevent

from . import authentication, net, opening, tls, wire
from . import log as logs
from .callers import Callers, most_candidates
from .clients import Client, Clients
from .config import Config
from .deadlines import deadline, shared_deadline
from .errors import CertificateRefused, KeyMismatch, PoolClosed, ProtocolError, reason
from .metrics import Counters
from .opening import Data
from .pool import AcceptingPool
from .ripening import Ripening
from .tls_context import ServerCertificate
from .transport import Stream, Transport


class _Count:
    """How many are in it."""

    def __init__(self) -> None:
        self.now = 0

    def __enter__(self) -> None:
        self.now += 1

    def __exit__(self, *_: object) -> None:
        self.now -= 1


class Joining:
    """What is between accept and pool; never more than a client's pool has room for."""

    def __init__(
        self,
        config: Config,
        certificate: ServerCertificate | None,
        clients: Clients,
        held: Callers,
        counters: Counters,
        on_wrong_tag: Callable[[str], None],
    ) -> None:
        self._log = logs.of(config.name)
        self._refusals = logs.Seldom(self._log)  # an original without a certificate calls again and again
        self._limits = config.limits
        self._certificate = certificate
        self._clients = clients
        self._held = held
        self._candidates = Callers(most_candidates(config.max_pool_capacity))
        self._counters = counters
        self._on_wrong_tag = on_wrong_tag
        self._running = _Count()  # data connections that join; those that are held take nobody's place
        self._ripening = Ripening(config.limits, self._refused)

    def close(self) -> None:
        """Reset what waits here without a greenlet."""
        self._ripening.close()

    def _has_room(self, client: Client) -> bool:
        """Whether one more may join a client's pool: what is ready counts, and what is on its way."""
        return client.pool.room > self._running.now + len(self._ripening)

    def secure(self, stream: Stream, alpn: bytes = b"", before: bytes = b"") -> Transport:
        """Make the TLS handshake where the mode has one, with ``before``, in clear, ahead of it."""
        if not self._certificate:
            return stream
        try:
            with shared_deadline(self._limits.tls_handshake_timeout_s, "TLS handshake"):
                return tls.accept(stream, self._certificate.contexts[alpn], alpn, before)
        except CertificateRefused as exc:
            self._counters.certificates_refused += 1
            if alpn:  # a v1 client would call again at once: it is told later
                tls.tell(stream, exc, self._limits.drain_linger_s)
            raise

    def join_session(self, stream: Stream, origin: str, data: Data, first: bytes = b"") -> bool:
        """Bring a v2 data connection into the pool of the session it names; False when it does not belong there.

        What is left to send of the first line goes out with what follows. Without TLS there is no wait in here.
        With a tunnel key its tag decides, without one its address. An id that is no live session's is refused before
        TLS: it travels in clear and is no secret, and strangers shall cost little.
        """
        client = self._clients.get(data.session)
        if client and not client.session_keys and client.origin != origin:
            client = None
        if client is None or client.pool.closed or not self._has_room(client):
            self._counters.data_connections_refused += 1
            self._log.debug("data connection from %s refused: no such session here, or its pool is full", origin)
            stream.say(first)
            return False
        try:
            if self._certificate:
                with self._running:
                    if not stream.seen(1):  # the ClientHello comes later, and perhaps after the first line
                        stream.sendall(first)
                        first = b""
                    transport = self.secure(stream, opening.ALPN_DATA, first)
                    id = _send_id(transport, client.pool, behind=self._verify(transport, client))
            else:
                transport = stream
                id = _send_id(stream, client.pool, first)
            client.pool.add(id, transport)
        except (OSError, ProtocolError, PoolClosed, CertificateRefused, KeyMismatch) as exc:
            if isinstance(exc, KeyMismatch):
                self._on_wrong_tag(origin)
            self._counters.data_connections_refused += 1
            self._log.debug("data connection from %s: %s", origin, reason(exc))
            stream.reset()
            return False
        return True

    def _verify(self, transport: Transport, client: Client) -> Callable[[bytes], bytes]:
        """Verify the tag of a data connection, where there is a tunnel key; give what goes out behind an id."""
        if not client.session_keys:
            return _nothing
        assert isinstance(transport, tls.TLSStream), "a tunnel key needs TLS"
        with deadline(self._limits.authentication_timeout_s, "authentication"):
            return authentication.verify_data(transport, client.session_keys)

    def join_v1_at_once(self, stream: Stream, client: Client) -> bool:
        """Bring a v1 data connection without TLS towards the pool of its client; False when ``join_v1`` must.

        There is no wait in here.
        """
        if self._certificate or not self._has_room(client):
            return False
        try:
            self._ripen(stream, stream, client)
        except OSError as exc:
            stream.reset()
            self._refused(stream, reason(exc))
        return True

    def join_v1(
        self, stream: Stream, client: Client | None, whose: Callable[[str], Client | None], *, candidate: bool
    ) -> None:
        """Bring a v1 data connection towards the pool of its client; hold and then close everybody else's.

        ``client`` is known at its address, or a ``candidate`` calls from there; ``whose`` says, when it is complete.
        Until then a candidate's may be anybody's, and takes no place from a client's.
        """
        origin = net.origin_of(stream.peer[0])
        try:
            with ExitStack() as owned:
                owned.enter_context(stream)
                why, alert = "no client is expected there, or its pool is full", b""
                try:
                    if candidate or (client and self._has_room(client)):
                        with self._running if client else self._candidates.noted(origin, stream):
                            data = self.secure(stream)
                            client = whose(origin)
                        if client and self._has_room(client):
                            self._ripen(stream, data, client)
                            owned.pop_all()  # it is not ours any more
                            return
                except CertificateRefused as exc:
                    why, alert = str(exc), exc.alert
                    self._refusals.warning("refused data connection from %s: %s", origin, why)
                self._hold(stream, origin, why)
                if alert:
                    stream.push(alert)
        except OSError as exc:
            self._refused(stream, reason(exc))

    def _ripen(self, stream: Stream, data: Transport, client: Client) -> None:
        id = _send_id(data, client.pool)
        self._ripening.add(id, stream, data, client.pool)

    def _refused(self, stream: Stream, why: str) -> None:
        self._counters.data_connections_refused += 1
        self._log.debug("data connection from %s: %s", net.origin_of(stream.peer[0]), why)

    def _hold(self, stream: Stream, origin: str, why: str) -> None:
        self._counters.data_connections_refused += 1
        with suppress(ConnectionAbortedError), self._held.noted(origin, stream):
            gevent.sleep(self._limits.tls_handshake_timeout_s)
        self._log.debug("data connection from %s refused: %s", origin, why)


def _nothing(_id: bytes) -> bytes:
    return b""


def _send_id(
    data: Transport, pool: AcceptingPool, before: bytes = b"", behind: Callable[[bytes], bytes] = _nothing
) -> bytes:
    while (id := os.urandom(wire.ID_LENGTH // 2).hex().encode()) in pool:
        pass
    send = data.say if type(data) is Stream else data.sendall  # in clear nobody may wait: it is accepted just now
    send(before + id + behind(id))  # in one write: the original's client reads it with one read
    return id
