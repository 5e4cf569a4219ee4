"""The dialling side: call the server, adopt its TLS mode, keep data connections ready, and obey its launches."""

import logging
import time
from contextlib import ExitStack
from functools import partial

from gevent.pool import Pool

from . import net, tls, wire
from .config import Config, Limits
from .errors import PolicyError, ProtocolError
from .forward import Egress
from .metrics import Counters
from .net import Endpoint, Stream, Transport, deadline
from .pool import DialingPool
from .session import Session
from .wire import FirstLine, Launch, Ping

log = logging.getLogger(__name__)

DEAD_AFTER = 3  # keep-alive intervals of silence


class Client:
    """The role behind ``client://``. ``run`` is one session, to its end; exchanges outlive it."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.counters = Counters()
        self.exchanges = Pool(config.semaphore_limit)

    def __str__(self) -> str:
        return f"client of {self.config.tunnel}"

    def reload(self) -> None:
        """Nothing of a client stands in files that change."""

    def run(self) -> None:
        """Call the server and serve its launches; raises OSError or NodePassError when that ends."""
        config, limits = self.config, self.config.limits
        with net.connect(net.resolve(config.tunnel), limits.connect_timeout_s, limits) as control:
            with deadline(limits.first_line_timeout_s, "first line (a server of NodePass 1.4 or later sends none)"):
                first = wire.parse_first_line(control.read_line(wire.MAX_FIRST_LINE))
            self._check(first)
            control.fail_when_unacknowledged(limits.user_timeout_s)
            host, _, *scope = control.peer
            endpoint = Endpoint(control.socket.family, (host, first.port, *scope))
            dial = partial(self._dial, endpoint, first.tls, tls.client_context(first.tls) if first.tls else None)
            pool = DialingPool(dial, config.min_pool_capacity, config.max_pool_capacity)
            signals = _Signals(Egress(pool, self.exchanges, config, self.counters), self.counters, limits)
            log.info("connected to %s, data port %d, tls %d, for %s", control, first.port, first.tls, config.target)
            Session(control, pool, signals.receive, silence_s=signals.silence_s).run()

    def _check(self, first: FirstLine) -> None:
        if first.tls < self.config.tls:
            raise PolicyError(
                f"the server offers tls {first.tls}, and this client accepts no less than {self.config.tls}"
            )
        if first.port is None:
            raise PolicyError("the server takes no client from here now; perhaps another one is connected")

    def _dial(self, endpoint: Endpoint, mode: int, context, /) -> tuple[bytes, Transport]:
        """Make one data connection; it is ready when its id is here."""
        limits = self.config.limits
        stream = net.connect([endpoint], limits.connect_timeout_s, limits)
        with ExitStack() as owned:
            owned.enter_context(stream)
            data = self._secure(stream, mode, context)
            with deadline(limits.id_timeout_s, "id of a data connection"):
                id = wire.parse_id(data.recv_exactly(wire.ID_LENGTH))
            owned.pop_all()  # it is the pool's now
        return id, data

    def _secure(self, stream: Stream, mode: int, context) -> Transport:
        if mode == tls.OFF:
            return stream
        with deadline(self.config.limits.tls_handshake_timeout_s, "TLS handshake"):
            return tls.dial(stream, context, mode, self.config.tunnel.host)


class _Signals:
    """What the server says after its first line."""

    def __init__(self, egress: Egress, counters: Counters, limits: Limits) -> None:
        self._egress = egress
        self._counters = counters
        self._limits = limits
        self._lines = wire.Lines()
        self._last_ping = 0.0
        self._interval_s = 0.0  # the longest between two keep-alives; 0 while unknown

    def receive(self, data: bytes) -> None:
        """Obey launches; count and pass over what is malformed or unknown."""
        for line in self._lines.feed(data):
            try:
                signal = wire.parse_signal(line)
            except ProtocolError as exc:
                self._counters.signals_malformed += 1
                log.debug("signal passed over: %s", exc)
                continue
            match signal:
                case Launch():
                    self._egress.launch(signal)
                case Ping():
                    self._note_ping(time.monotonic())
                case _:
                    self._counters.signals_unknown += 1

    def silence_s(self) -> float | None:
        """How long the server may be silent: its own interval tells, for an old one may have set it long."""
        if not self._interval_s:
            return None
        return max(DEAD_AFTER * self._interval_s, self._limits.control_dead_s)

    def _note_ping(self, now: float) -> None:
        if self._last_ping:
            self._interval_s = max(self._interval_s, now - self._last_ping)
        self._last_ping = now
