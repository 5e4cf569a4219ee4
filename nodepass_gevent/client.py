"""The dialling side: call the server, adopt its TLS mode, keep data connections ready, and obey its launches."""

import secrets
from functools import partial

import gevent
from gevent.event import Event

from . import authentication, net, opening, tls, tunnel_key, wire
from . import log as logs
from .config import Config
from .crew import Crew
from .deadlines import deadline, shared_deadline
from .dialing import PlainDial
from .dialing_pool import DialingPool
from .egress import Egress
from .errors import Busy, CertificateRefused, KeyMismatch, NoPlace, PolicyError, ProtocolError, RefusedByPeer
from .hearing import Signals, Silence, refusal
from .keyring import KeyRing
from .metrics import Counters
from .net import Endpoint
from .opening import OFF, VERIFIED, Data, FirstLine, Hello, Welcome
from .session import Session
from .state import Description, Peer, wall_clock
from .tls_context import ClientPolicy
from .transport import Stream, Transport
from .tunnel_key import SessionKeys
from .wire import Bye, Fail

CHUNK = 1024  # bytes per read while the welcome is awaited
V1_LEAD_S = 0.03  # a server of ours launches no v1 data connection in the first 5 ms, or more when it is busy
CALLS = 8  # in a row, while server processes on one port have their clients: the system draws who takes a call
CAPABILITIES = frozenset((opening.NEED, opening.FAIL, opening.BYE, opening.UDP))


class Client:
    """The role behind ``client://``. ``run`` is one session, to its end; exchanges outlive it."""

    def __init__(self, config: Config, before: "Client | None" = None) -> None:
        self.config = config
        self.counters: Counters = before.counters if before else Counters()
        self.exchanges = Crew(config.semaphore_limit)
        self.begun = Event()
        self._log = logs.of(config.name)
        self._keys = KeyRing(config)
        self._policy = ClientPolicy(
            config.tunnel.host,
            sni=config.sni,
            ca=config.ca,
            pin=config.pin,
            crt=config.crt,
            key=config.key,
            log=self._log,
            least=config.tls_demanded[0],
        )
        self._called = False  # and said so
        self._warned = False  # of what a v1 control channel leaves open
        self._source_missed = False  # and said so
        self._session: tuple[int, float, Stream, DialingPool] | None = None  # profile, since when, and its parts

    def __str__(self) -> str:
        return f"client of {self.config.tunnel}"

    def reload(self) -> None:
        """Read certificate and key files again if they changed; the next session is begun with the first key."""
        self._policy.reload()
        self._keys.reload()

    @property
    def peers(self) -> int:
        """Count the server while there is a session."""
        return int(self._session is not None)

    def describe(self) -> Description:
        """Say whether the session stands, and what is presented."""
        return Description(self._look(), self._policy.describe())

    def _look(self) -> tuple[Peer, ...]:
        if self._session is None:
            return ()
        profile, since, control, pool = self._session
        return (Peer(str(control), profile, since, len(pool), pool.capacity),)

    def dismiss(self) -> None:
        """Do nothing: nobody waits here."""

    def retire(self) -> None:
        """Leave nothing behind: exchanges need nothing of it."""

    def run(self) -> None:
        """Call the server and serve its launches; raises OSError or NodePassError when that ends."""
        self.reload()
        if not self._called:
            self._called = True
            self._log.info("calling %s, for %s", self.config.tunnel, self.config.target)
        for left in reversed(range(CALLS)):
            try:
                return self._run_session()
            except NoPlace:
                if not left:
                    raise

    def _run_session(self) -> None:
        config, limits = self.config, self.config.limits
        with net.connect(net.resolve(config.tunnel), limits.connect_timeout_s, limits) as control:
            with gevent.Timeout(min(limits.connect_timeout_s, limits.first_line_timeout_s), False):
                control.wait_for_arrival()
            if control.peek() is None:
                self._log.warning(
                    "%s took the call and is silent; a NodePass server speaks first:"
                    " is this its tunnel port, and not its public port?",
                    control,
                )
            line, first = self._first_line(control)
            self._check_key(first)
            least, setting = config.tls_demanded
            if first.tls < least:
                raise PolicyError(f"the server offers tls {first.tls}, and {setting} accepts no less than {least}")
            control.fail_when_unacknowledged(limits.tcp_user_timeout_s)
            control.retransmit_soon()
            if opening.offers_v2(first) and config.protocol != "1":
                self._run_v2(control, first, line)
            else:
                self._run_v1(control, first)

    def _first_line(self, control: Stream) -> tuple[bytes, FirstLine]:
        """Give the server's first line, as it came and read."""
        try:
            with deadline(self.config.limits.first_line_timeout_s, "first line"):
                line = control.read_line(opening.MAX_FIRST_LINE)
            return line, opening.parse_first_line(line)
        except ProtocolError as exc:
            raise ProtocolError(f"{exc}; is {self.config.tunnel} the tunnel port of a NodePass server?") from exc
        except ConnectionError as exc:
            why = "the server hung up before its first line; perhaps it stops, keeps this address out, or"
            raise ConnectionAbortedError(f"{why} {self.config.tunnel} is not its tunnel port: its log says") from exc

    def _check_key(self, first: FirstLine) -> None:
        """Make sure that both sides have a tunnel key or neither has: with one there is no way without it."""
        method, keyed = first.query.get("a"), self.config.keyed
        if method is not None and method != tunnel_key.METHOD:
            raise PolicyError(f"the server asks for a tunnel key by method {wire.printable(method)}, unknown here")
        if method and not keyed:
            raise PolicyError("the server asks for a tunnel key, and this client has none: set tunnel-key-file")
        if keyed and not method:
            raise PolicyError("the server has no tunnel key, and this client has one: set it there too")
        if keyed and (first.tls == OFF or not opening.offers_v2(first)):
            raise PolicyError("the server offers no TLS, or no profile v2, and a tunnel key needs both")

    # Profile v2

    def _run_v2(self, control: Stream, first: FirstLine, line: bytes) -> None:
        if control.peek() is not None:
            raise ProtocolError("the server sent bytes behind its first line")
        own_port = opening.data_port(first)
        name, keyed = self.config.tunnel_name or "", self.config.keyed
        can = CAPABILITIES | ({opening.FROM} if self.config.proxy_protocol else set())
        hello = opening.format_hello(Hello(name, frozenset() if keyed else can))
        control.sendall(hello)
        with deadline(self.config.limits.opening_timeout_s, "welcome"):
            transport = self._secure(control, first.tls, opening.ALPN_CONTROL)
            lines = wire.Lines(opening.MAX_FIRST_LINE)
            if keyed:
                welcome, keys, early = self._authenticate(transport, lines, line, hello[:-1], can)
            else:
                answer, *early = _read_lines(transport, lines)
                welcome, keys = opening.parse_welcome(answer), None
        if isinstance(welcome, Bye):
            if own_port and welcome.why == wire.BUSY:  # another process may take the next call
                raise NoPlace("the server process that took the call has a client: the next call may reach another one")
            raise refusal(welcome)
        pool = self._make_pool(control, own_port, first.tls, welcome, keys)
        can &= welcome.capabilities
        interval_s = welcome.ping_interval_s

        def fail(id: bytes, why: str) -> bool:
            return opening.FAIL in can and session.send(wire.format_fail(Fail(id, why.encode())))

        def answer_ping() -> object:
            return session.send(wire.PING)

        egress = Egress(pool, self.exchanges, self.config, self.counters, fail, told_users=opening.FROM in can)
        lines.limit = wire.MAX_LINE  # the welcome alone may be longer
        signals = Signals(egress, self.counters, self._log, lines, answer_ping, pool.dial_more, obeys_bye=True)
        session = Session(
            transport,
            pool,
            signals.receive,
            silence_s=lambda: self.config.limits.dead_intervals * interval_s,
            leave_s=lambda: self.config.leave_s if opening.BYE in can else None,
            begin=partial(signals.obey, early),
        )
        if opening.FROM not in can:
            self._miss_source()
        self._log.info("connected to %s, profile v2, tls %d, for %s", control, first.tls, self.config.target)
        self._serve(session, 2, control, pool, egress)

    def _make_pool(
        self, control: Stream, own_port: int | None, mode: int, welcome: Welcome, keys: SessionKeys | None
    ) -> DialingPool:
        """Make the pool of a session; it dials to where the control channel leads, or to the server's own port."""
        host, port, *scope = control.peer
        endpoint = Endpoint(control.socket.family, (host, own_port or port, *scope))
        line = opening.format_data(Data(welcome.session))
        plain = PlainDial(endpoint, self.config.limits, line) if mode == OFF else None
        dial = plain or partial(self._dial_v2, endpoint, mode, line, keys)
        most = max(min(self.config.max_pool_capacity, welcome.most_data_connections), 1)
        least, timeout_s = min(self.config.min_pool_capacity, most), self.config.limits.tcp_user_timeout_s
        return DialingPool(dial, least, most, log=self._log, user_timeout_s=timeout_s, at_once=plain)

    def _authenticate(
        self, transport: Transport, lines: wire.Lines, first: bytes, hello: bytes, can: frozenset[bytes]
    ) -> tuple[Welcome | Bye, SessionKeys | None, list[bytes]]:
        """Prove the tunnel key, and verify that the server has it; give the welcome and the lines behind it."""
        assert isinstance(transport, tls.TLSStream), "a tunnel key needs TLS"
        nonce = secrets.token_bytes(tunnel_key.CLIENT_NONCE_LENGTH)
        handshake = authentication.prove(transport, self._keys.roots[0], first, hello, nonce, can)
        try:
            answer, *early = _read_lines(transport, lines)
        except RefusedByPeer:  # of our certificate TLS 1.3 tells only now
            raise
        except ConnectionError as exc:
            why = "the server closed on the proof of the tunnel key: are it and tunnel-name the same on both sides?"
            raise KeyMismatch(why) from exc
        return *authentication.check_answer(handshake, answer), early

    def _dial_v2(
        self, endpoint: Endpoint, mode: int, line: bytes, keys: SessionKeys | None, /
    ) -> tuple[bytes, Transport]:
        """Make one data connection, over TLS, of the session that ``line`` names; it is ready when its id is here."""
        limits = self.config.limits
        stream = net.connect([endpoint], limits.connect_timeout_s, limits, speaks_first=True)
        try:
            with shared_deadline(limits.id_timeout_s, "data connection"):
                ready = self._secure(stream, mode, opening.ALPN_DATA, line)
                if keys:
                    assert isinstance(ready, tls.TLSStream), "a tunnel key needs TLS"
                    return authentication.prove_data(ready, keys), ready
                return _wait_for_id(ready), ready
        except BaseException:
            stream.reset()
            raise

    # Profile v1

    def _run_v1(self, control: Stream, first: FirstLine) -> None:
        if self.config.protocol == "2":
            raise PolicyError("the server does not speak profile v2, and protocol=2 accepts no other")
        if first.port is None:
            raise Busy("the server takes no client from here now; perhaps another one is connected")
        self._warn_of_plain_text(first.tls)
        host, _, *scope = control.peer
        endpoint = Endpoint(control.socket.family, (host, first.port, *scope))
        plain = PlainDial(endpoint, self.config.limits) if first.tls == OFF else None
        pool = DialingPool(
            plain or partial(self._dial_v1, endpoint, first.tls),
            self.config.min_pool_capacity,
            self.config.max_pool_capacity,
            lead_s=V1_LEAD_S,
            log=self._log,
            user_timeout_s=self.config.limits.tcp_user_timeout_s,
            at_once=plain,
        )
        silence = Silence(self.config.limits)
        egress = Egress(pool, self.exchanges, self.config, self.counters)
        signals = Signals(egress, self.counters, self._log, wire.Lines(), silence.note_ping)
        self._miss_source()
        self._log.info(
            "connected to %s, profile v1, data port %d, tls %d, for %s",
            control, first.port, first.tls, self.config.target,
        )  # fmt: skip
        session = Session(control, pool, signals.receive, silence_s=silence.limit_s)
        self._serve(session, 1, control, pool, egress)

    def _warn_of_plain_text(self, mode: int) -> None:
        """Say once what a policy does not cover in profile v1."""
        if not self._warned and (mode == VERIFIED or self.config.pin):
            self._warned = True
            self._log.warning(
                "profile v1: the server's certificate is checked on data connections, but the control channel is plain"
                " text, so that whoever is on the path can start or stop exchanges; protocol=2 accepts no such server"
            )

    def _dial_v1(self, endpoint: Endpoint, mode: int, /) -> tuple[bytes, Transport]:
        """Make one data connection over TLS; it is ready when its id is here."""
        limits = self.config.limits
        stream = net.connect([endpoint], limits.connect_timeout_s, limits)
        try:
            data = self._secure(stream, mode)
            with shared_deadline(limits.id_timeout_s, "id of a data connection"):
                return _wait_for_id(data), data
        except BaseException:
            stream.reset()
            raise

    # Both

    def _serve(self, session: Session, profile: int, control: Stream, pool: DialingPool, egress: Egress) -> None:
        """Run a session to its end."""
        self.begun.set()
        self._session = profile, wall_clock(), control, pool
        try:
            session.run()
        finally:
            self._session = None
            egress.leave()

    def _miss_source(self) -> None:
        """Say once that the target will not be told who its users are."""
        if self.config.proxy_protocol and not self._source_missed:
            self._source_missed = True
            self._log.warning("the server does not tell users' addresses: the target is told that they are not known")

    def _secure(self, stream: Stream, mode: int, alpn: bytes = b"", line: bytes = b"") -> Transport:
        if mode == OFF:
            return stream
        try:
            with shared_deadline(self.config.limits.tls_handshake_timeout_s, "TLS handshake"):
                return tls.dial(stream, self._policy.context(mode, alpn), line)
        except CertificateRefused as exc:
            tls.tell(stream, exc, self.config.limits.drain_linger_s)
            raise


def _wait_for_id(data: Transport) -> bytes:
    if not data.buffered:
        data.wait_for_arrival()  # no id is here so soon
    return wire.parse_id(data.recv_exactly(wire.ID_LENGTH))


def _read_lines(transport: Transport, lines: wire.Lines) -> list[bytes]:
    """Wait for at least one whole line; the caller sets the deadline."""
    while True:
        data = transport.recv(CHUNK)
        if not data:
            raise ConnectionAbortedError("the server closed before its welcome")
        if whole := lines.feed(data):
            return whole
