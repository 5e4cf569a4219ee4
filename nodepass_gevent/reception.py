"""Who calls, and what becomes of it: the state machine of callers on the tunnel port and on the v1 data port.

Each caller of the tunnel port is told the first line at once. By a line of its own it is a v2 client or one of its data
connections. When it stays silent it is known as a v1 client once a data connection from its address has completed,
TLS included, on the data port. Until a caller is known it holds nothing and displaces nobody. What becomes of a data
connection, and of whoever else calls the data port, is decided in ``joining``.
"""

import logging
import math
import os
import secrets
from contextlib import ExitStack

import gevent

from . import authentication, net, opening, tls, wire
from . import log as logs
from .callers import Caller, Callers
from .clients import Client, Clients
from .config import Config
from .deadlines import deadline
from .errors import CertificateRefused, KeyMismatch, ProtocolError, reason
from .hearing import Answers
from .joining import Joining
from .keyring import KeyRing
from .metrics import Counters
from .opening import Data, FirstLine, Hello, ServerProof, Welcome
from .penalties import Penalties
from .pool import AcceptingPool
from .session import Session
from .state import Ended
from .tls_context import ServerCertificate
from .transport import Stream, Transport
from .tunnel_key import Handshake
from .wire import Bye, Need

CAPABILITIES = frozenset((opening.NEED, opening.FAIL, opening.BYE, opening.FROM, opening.UDP))


class Reception:
    """Turns callers into clients, and their data connections into the clients' pools."""

    def __init__(
        self,
        config: Config,
        certificate: ServerCertificate | None,
        keys: KeyRing,
        clients: Clients,
        penalties: Penalties,
        counters: Counters,
    ) -> None:
        self._data_port: int | None = None  # where v1 data connections are taken; None: nowhere
        # Where v2 ones are, when another process may have the tunnel port's next call; None: there.
        self._own_port: int | None = None
        self._config = config
        self._log = logs.of(config.name)
        self._limits = config.limits
        self._counters = counters
        self._callers = Callers(config.limits.callers)
        self._held = Callers(config.limits.callers)
        self._keys = keys
        self._clients = clients
        self._penalties = penalties
        self.refused: Ended | None = None  # the last one
        self._awaited = 0  # callers from the address of the client that have not said their line yet
        self._joining = Joining(config, certificate, clients, self._held, counters, self._on_wrong_tag)
        self._spent_lines: dict[int | None, bytes] = {}  # by data port, for whom no nonce matters any more

    def close(self) -> None:
        """Let go what has no greenlet of its own."""
        self._joining.close()

    def open_data_port(self, port: int) -> None:
        """Name the data port to callers: to those that it is for."""
        self._data_port = port if self._config.serves_v1 else None
        self._own_port = port if self._config.reuse_port else None

    def expects_v1(self) -> bool:
        """Whether who calls a data port for both profiles is to be served as v1."""
        current = self._clients.current()
        return self._config.serves_v1 and (current is None or current.profile == 1)

    # The tunnel port

    def take_data(self, stream: Stream) -> Data | None:
        """Take the opening of a v2 data connection, if that is what has arrived; of anything else nothing."""
        if self._config.protocol == "1":
            return None
        try:
            data = opening.parse_data(stream.seen(opening.DATA_LENGTH))
            if data:
                stream.recv(opening.DATA_LENGTH)
            return data
        except OSError:  # whoever greets it meets it again
            return None

    def join_session(self, stream: Stream, data: Data) -> None:
        """Bring a v2 data connection, which has not been greeted, into its pool. Waits only where there is TLS."""
        joined = False
        try:
            origin = net.origin_of(stream.peer[0])
            joined = self._joining.join_session(stream, origin, data, self._spent_line())
        except OSError:  # it has gone
            pass
        finally:
            if not joined:
                stream.close()

    def is_stranger(self, stream: Stream) -> bool:
        """Whether a data connection comes from where no client is: with a tunnel key it may still prove itself."""
        return self._config.keyed and self._clients.at(net.origin_of(stream.peer[0])) is None

    def join_stranger(self, stream: Stream, data: Data) -> None:
        """Do as ``join_session``, in the bounded table: until its tag is verified it may be anybody's."""
        with self._callers.noted(net.origin_of(stream.peer[0]), stream):
            self.join_session(stream, data)

    def greet(self, stream: Stream) -> None:
        """Tell a caller the first line, find out what it is, and serve it to its end."""
        origin = net.origin_of(stream.peer[0])
        neighbour = self._clients.at(origin)
        # Where a v1 client is, a second one cannot be told from it by its data connections: serve no v1 there.
        port = None if neighbour and neighbour.profile == 1 else self._data_port
        line = b""
        try:
            with ExitStack() as owned, self._hurry() as hurry, ExitStack() as unknown:
                owned.enter_context(stream)
                first = self._first_line(port)
                stream.sendall(first)
                verdict = self._listen_to(stream, origin, neighbour, port, unknown)
                if isinstance(verdict, Client):
                    unknown.close()
                    self._clients.serve(verdict)
                    return
                if verdict:
                    self._refuse(f"caller {stream}: {verdict}{self._lacking}")
                    return
                line = self._read_opening(stream)
                said = self._parse_opening(line)
                if isinstance(said, Hello):
                    self._serve_hello(stream, origin, said, unknown, hurry, (first[:-1], line))
                    return
                unknown.close()
                if self.is_stranger(stream):
                    unknown.enter_context(self._callers.noted(origin, stream))
                if self._joining.join_session(stream, origin, said):
                    owned.pop_all()  # it is the pool's now
        except (OSError, ProtocolError, CertificateRefused, KeyMismatch) as exc:
            if isinstance(exc, KeyMismatch):
                self._on_wrong_tag(origin)
            silent = isinstance(exc, ConnectionError) and not line
            self._refuse(f"caller {stream}: {reason(exc)}{self._lacking if silent else ''}")

    def _hurry(self) -> gevent.Timeout:
        """Bound the time in which a caller must prove the tunnel key, where there is one."""
        if not self._config.keyed:
            return gevent.Timeout(None)
        seconds = self._limits.caller_timeout_s
        why = TimeoutError(f"no proof of the tunnel key within {seconds:g} s; perhaps it has none")
        return gevent.Timeout(seconds, why)

    @property
    def _lacking(self) -> str:
        return "; perhaps it has no tunnel key, and this server asks for one" if self._config.keyed else ""

    def _on_wrong_tag(self, origin: str) -> None:
        """Count a wrong proof of the tunnel key, on a control channel or for a live session, and who gave it."""
        self._counters.tags_wrong += 1
        self._penalties.report(origin)

    def _first_line(self, port: int | None) -> bytes:
        nonce = b"" if self._config.protocol == "1" else os.urandom(opening.NONCE_LENGTH)
        return opening.format_first_line(FirstLine(port, self._config.tls), nonce, self._config.keyed, self._own_port)

    def _spent_line(self) -> bytes:
        """Give the first line for who has said already that it is a data connection: its nonce opens nothing."""
        line = self._spent_lines.get(self._data_port)
        if line is None:
            line = self._spent_lines[self._data_port] = self._first_line(self._data_port)
        return line

    def _refuse(self, who_and_why: str, level: int = logging.WARNING) -> None:
        self._counters.callers_refused += 1
        self.refused = Ended(f"refused {who_and_why}")
        self._log.log(level, "refused %s", who_and_why)

    def _listen_to(
        self, stream: Stream, origin: str, neighbour: Client | None, port: int | None, unknown: ExitStack
    ) -> Client | str:
        """Wait until a caller speaks, and give ""; else the v1 client that it proved to be, or why it must go."""
        if neighbour and neighbour.profile == 2 and neighbour.pool.room > self._awaited:
            self._awaited += 1  # an honest client dials hundreds at once: they count in a budget of their own
            unknown.callback(self._heard)
            seconds = self._limits.opening_timeout_s
            hint = f"; perhaps a second client, of v1, while {neighbour.stream} is connected"
            why = f"silent for {seconds:g} s{hint if self._config.serves_v1 else self._lacking}"
            with gevent.Timeout(seconds, TimeoutError(why)):
                if not stream.seen(1):
                    stream.wait_for_arrival()
            return ""
        caller = unknown.enter_context((self._held if port is None else self._callers).noted(origin, stream))
        verdict = self._wait_for_verdict(caller)
        if port is None and verdict and neighbour:
            return f"a second client, while {neighbour.stream} is connected"
        return verdict

    def _heard(self) -> None:
        """One that was awaited has said its line, or is gone."""
        self._awaited -= 1

    def _wait_for_verdict(self, caller: Caller) -> Client | str:
        """Give the Client that a caller proved to be, "" when it says something, or why it must go."""
        stream, timeout_s = caller.connection, self._limits.caller_timeout_s

        def arrived() -> None:
            caller.decide("it closed" if stream.peek() is False else "")

        stream.watch(arrived)
        try:
            caller.verdict.wait(timeout_s)
            caller.decide(f"silent for {timeout_s:g} s")
            return caller.verdict.get()
        finally:
            stream.unwatch()

    def _read_opening(self, stream: Stream) -> bytes:
        """Read the line in which a caller says what it is, and not a byte more."""
        if self._config.protocol == "1" or not b"//".startswith(stream.seen(2)):
            return stream.recv(wire.MAX_LINE)  # no line, but enough of it to name it
        with deadline(self._limits.opening_timeout_s, "opening line"):
            return stream.read_line(opening.MAX_FIRST_LINE)

    def _parse_opening(self, line: bytes) -> Hello | Data:
        if self._config.protocol == "1" or not line.startswith(b"//"):
            raise ProtocolError(opening.recognise(line))
        return opening.parse_opening(line)

    # Profile v2: hello and data on the tunnel port

    def _serve_hello(
        self,
        stream: Stream,
        origin: str,
        hello: Hello,
        unknown: ExitStack,
        hurry: gevent.Timeout,
        clear: tuple[bytes, bytes],
    ) -> None:
        """Find out whether a client may stay, and serve it; ``clear`` are the two lines that went ahead of TLS."""
        if self._config.keyed and hello.capabilities:
            raise ProtocolError("it has no tunnel key, and this server asks for one")
        unknown.close()
        unknown.enter_context(self._callers.noted(origin, stream))
        control = self._joining.secure(stream, opening.ALPN_CONTROL)
        handshake, capabilities = self._authenticate(control, clear, hello)
        if handshake:
            self._penalties.forgive(origin)
        current = self._who_stays()
        hurry.close()
        if current:
            self._send_away(control, stream, current)
            return
        unknown.close()
        self._serve_v2(control, stream, origin, capabilities & CAPABILITIES, handshake)

    def _serve_v2(
        self, control: Transport, stream: Stream, origin: str, agreed: frozenset[bytes], handshake: Handshake | None
    ) -> None:
        """Make a client of a caller that may stay, welcome it, and serve it to its end."""
        interval_s = math.ceil(self._config.report_interval_s)

        def on_shortage(users: int) -> object:
            return opening.NEED in agreed and session.send(wire.format_need(Need(users)))

        pool = AcceptingPool(self._config.max_pool_capacity, on_shortage, self._log, self._limits.tcp_user_timeout_s)
        launched: dict = {}
        answers = Answers(launched, self._counters, self._log)
        session = Session(
            control,
            pool,
            answers.receive,
            ping_interval_s=self._config.report_interval_s,
            silence_s=lambda: self._limits.dead_intervals * interval_s,
            leave_s=lambda: self._config.leave_s if opening.BYE in agreed else None,
        )
        id = secrets.token_bytes(opening.SESSION_LENGTH)
        session_keys = handshake.session_keys(id) if handshake else None
        client = Client(2, origin, stream, session, pool, session_keys, agreed, answers.heard, launched)
        self._clients.admit(client, id)
        welcome = Welcome(id, agreed, interval_s, self._config.max_pool_capacity)
        if handshake:
            session.send(opening.format_server_proof(ServerProof(handshake.server_tag(id), welcome)))
        else:
            session.send(opening.format_welcome(welcome))
        self._clients.serve(client, answers.forsake)

    def _authenticate(
        self, control: Transport, clear: tuple[bytes, bytes], hello: Hello
    ) -> tuple[Handshake | None, frozenset[bytes]]:
        """Verify that a client has the tunnel key, where there is one; give its capabilities too."""
        if not self._config.keyed:
            return None, hello.capabilities
        assert isinstance(control, tls.TLSStream), "a tunnel key needs TLS"
        with deadline(self._limits.authentication_timeout_s, "authentication"):
            handshake, proof = authentication.verify(control, self._keys.roots, *clear)
        return handshake, proof.capabilities

    def _who_stays(self) -> Client | None:
        """Give the client that is connected, if any; to a newcomer with the key one gives way that answers no ping."""
        while current := self._clients.current():
            if not self._config.keyed or current.answers(self._limits.takeover_timeout_s):
                return current
            self._log.warning("client %s answers no ping: another one takes its place", current.stream)
            current.pool.forsake("another client has taken its place")
        return None

    def _send_away(self, control: Transport, stream: Stream, current: Client) -> None:
        """Tell a second client that there is one already; it is closed then."""
        try:
            control.sendall(wire.format_bye(Bye(wire.BUSY)))
            control.linger(self._limits.drain_linger_s)
        except ConnectionAbortedError:  # it has to make room
            raise
        except OSError:  # it hangs up
            pass
        level = logging.DEBUG if self._own_port else logging.WARNING  # where it calls again, for another process
        self._refuse(f"second client {stream}, while {current.stream} is connected", level)

    # Profile v1: the data port

    def join_at_once(self, stream: Stream) -> bool:
        """Take a data connection of a v1 client where nothing makes it wait; False when ``join`` must."""
        client = self._v1_client_at(net.origin_of(stream.peer[0]))
        return client is not None and self._joining.join_v1_at_once(stream, client)

    def join(self, stream: Stream) -> None:
        """Take a data connection of a v1 client, or of a silent caller that this proves to be one."""
        origin = net.origin_of(stream.peer[0])
        client = self._v1_client_at(origin)
        candidate = client is None and self._callers.youngest(origin) is not None
        self._joining.join_v1(stream, client, self._whose, candidate=candidate)

    def _whose(self, origin: str) -> Client | None:
        """Give the v1 client at an address; a candidate becomes one, for its data connection is complete."""
        return self._v1_client_at(origin) or self._recognise(origin)

    def _v1_client_at(self, origin: str) -> Client | None:
        client = self._clients.at(origin)
        return client if client and client.profile == 1 else None

    def _recognise(self, origin: str) -> Client | None:
        """Make a client of the youngest silent caller at ``origin``, whose data connection is complete."""
        caller = self._callers.youngest(origin)
        if caller is None:
            return None
        current = self._clients.current()
        if current:
            caller.decide(f"a second client, while {current.stream} is connected")
            return None
        pool = AcceptingPool(
            self._config.max_pool_capacity, log=self._log, user_timeout_s=self._limits.tcp_user_timeout_s
        )
        session = Session(caller.connection, pool, _refuse_speech, ping_interval_s=self._config.report_interval_s)
        client = Client(1, origin, caller.connection, session, pool)
        id = secrets.token_bytes(opening.SESSION_LENGTH)  # first: a caller for which there is none is not served
        if not caller.decide(client):
            return None
        try:
            self._clients.admit(client, id)
        except MemoryError:
            pool.close()  # which ends its session: it would last, and no user would come to it
            raise
        return client


def _refuse_speech(_data: bytes) -> None:
    raise ProtocolError("it sent bytes, and a v1 client sends none")
