"""The clients of a server: who is known, each with its session, and what it says on it; users wait here for one."""

import logging
import math
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field

from gevent.event import Event

from . import wire
from .config import Limits
from .errors import LaunchFailed, NoDataConnection, PeerLeft, PeerSilent, SessionEnded, SessionLost
from .launching import Abortable
from .metrics import Counters
from .pool import AcceptingPool
from .session import Session
from .state import Ended, Peer, wall_clock
from .transport import Stream
from .tunnel_key import SessionKeys
from .wire import Bye, Fail, Ping

LATELY_S = 1.0  # a UDP session that has had an answer within that works, whatever becomes of the control channel


@dataclass(frozen=True)
class Client:
    """A caller that is known, by the address it calls from, and its session."""

    profile: int
    origin: str  # as net.origin_of gives it
    stream: Stream
    session: Session
    pool: AcceptingPool
    session_keys: SessionKeys | None = None  # by which its data connections are proven, where there is a tunnel key
    capabilities: frozenset[bytes] = frozenset()  # that both sides have
    heard: Event = field(default_factory=Event)  # set by whatever comes on its control channel
    launched: MutableMapping[bytes, Abortable] = field(default_factory=dict)  # exchanges by their connection's id
    since: float = field(default_factory=wall_clock)

    @property
    def alive(self) -> bool:
        return not self.pool.closed and self.stream.peek() is not False

    def send(self, line: bytes) -> bool:
        """Queue a line on the control channel; False when it is ending."""
        return self.session.send(line)

    def describe(self) -> Peer:
        """Say what there is to see of it."""
        return Peer(str(self.stream), self.profile, self.since, len(self.pool), self.pool.capacity)

    def answers(self, timeout_s: float) -> bool:
        """Ping it, and say whether it answers in time."""
        self.heard.clear()
        self.send(wire.PING)
        return self.heard.wait(timeout_s)


class Signals:
    """What a v2 client says once it is welcome: answers to pings, launches that failed, bye."""

    def __init__(self, launched: MutableMapping[bytes, Abortable], counters: Counters, log: logging.Logger) -> None:
        self._log = log
        self.heard = Event()  # set by whatever comes
        self._lines = wire.Lines()
        self._known: set[bytes] = set()  # what ran when it was last heard
        self._launched = launched
        self._counters = counters

    def receive(self, data: bytes) -> None:
        """Take what came on the control channel; ProtocolError for what is no line, PeerLeft at a bye."""
        self.heard.set()
        self._known = set(self._launched)
        for line in self._lines.feed(data):
            match wire.parse_signal(line):
                case Ping():
                    pass
                case Fail() as fail:
                    self._fail(fail)
                case Bye():
                    raise PeerLeft("it said bye")
                case _:
                    self._counters.signals_unknown += 1

    def forsake(self) -> None:
        """End what was launched since the client was last heard, and has not been answered: nobody may be there.

        A frozen client's kernel goes on acknowledging, so that nothing else would ever end its users. UDP sessions that
        have heard nothing lately end too: with a user who speaks on they would never be idle.
        """
        silent = LaunchFailed("silent")
        for id in self._launched.keys() - self._known:
            self._launched[id].abort(silent)
        for running in self._launched.values():
            running.forsake(time.monotonic() - LATELY_S, silent)

    def _fail(self, fail: Fail) -> None:
        """End the exchange of a launch that failed; not one that has been answered, whatever its peer says now."""
        running = self._launched.get(fail.id)
        if running is None or not running.abort(LaunchFailed(wire.printable(fail.why, wire.MAX_LINE)[1:-1])):
            self._counters.signals_stale += 1
            self._log.debug("launch %s failed, says its client: it has ended, or works", fail.id.decode())


class Clients:
    """All clients, from their admission to the end of their sessions."""

    def __init__(self, limits: Limits, log: logging.Logger) -> None:
        self._limits = limits
        self._log = log
        self._by_session: dict[bytes, Client] = {}
        self._came = Event()
        self._closed = False
        self.heirs: Clients | None = None  # of the server that comes in the place of this one
        self.left: Ended | None = None  # the last one

    def __len__(self) -> int:
        return len(self._by_session)

    def wait(self, timeout_s: float | None) -> Client:
        """Wait for a client whose session lives, None: for ever; NoDataConnection.

        Goes on with the heirs, once this server stops. Does not switch when there is no time to wait.
        """
        end = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while not self._closed:
            for client in self._by_session.values():
                if not client.pool.closed:
                    return client
            left_s = end - time.monotonic()
            self._came.clear()
            if left_s <= 0 or not self._came.wait(None if timeout_s is None else left_s):
                raise NoDataConnection("no client is connected")
        if self.heirs is not None:
            return self.heirs.wait(None if timeout_s is None else end - time.monotonic())
        raise NoDataConnection("the server is stopping")

    def open(self) -> None:
        """Let users wait for a client."""
        self._closed = False

    def close(self) -> None:
        """Let nobody wait for a client any more."""
        self._closed = True
        self._came.set()

    def get(self, session: bytes) -> Client | None:
        """Give the client of a session."""
        return self._by_session.get(session)

    def describe(self) -> tuple[Peer, ...]:
        """Say who is connected."""
        return tuple(client.describe() for client in self._by_session.values() if client.alive)

    def current(self) -> Client | None:
        """Give the client that lives, if there is one."""
        return next((client for client in self._by_session.values() if client.alive), None)

    def at(self, origin: str) -> Client | None:
        """Give the client that lives at an address, if there is one."""
        for client in self._by_session.values():
            if client.origin == origin and client.alive:
                return client
        return None

    def admit(self, client: Client, session: bytes) -> None:
        """Register a client by the id of its session."""
        self._by_session[session] = client
        self._came.set()

    def serve(self, client: Client, on_silence: Callable[[], None] = lambda: None) -> None:
        """Run a client's session to its end; ``on_silence`` is called when that is its silence."""
        client.stream.fail_when_unacknowledged(self._limits.tcp_user_timeout_s)
        self._log.info("client %s connected, profile v%d", client.stream, client.profile)
        try:
            client.session.run()
        except SessionEnded as exc:
            self.left = Ended(f"client {client.stream} left: {exc}")
            self._log.info("%s", self.left.why)
        except SessionLost as exc:
            self.left = Ended(f"client {client.stream}: {exc}")
            self._log.warning("%s", self.left.why)
            if isinstance(exc, PeerSilent):
                on_silence()
        finally:
            self._by_session = {id: other for id, other in self._by_session.items() if other is not client}
