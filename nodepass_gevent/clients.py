"""The clients of a server: who is known, each with its session; users wait here for one."""

import logging
import math
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field

from gevent.event import Event

from . import wire
from .config import Limits
from .errors import NoDataConnection, PeerSilent, SessionEnded, SessionLost
from .launching import Abortable
from .pool import AcceptingPool
from .session import Session
from .state import Ended, Peer, wall_clock
from .transport import Stream
from .tunnel_key import SessionKeys


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
        self._came.set()  # first: without memory for that it is not here, where nobody would take it out
        self._by_session[session] = client

    def serve(self, client: Client, on_silence: Callable[[], None] = lambda: None) -> None:
        """Run a client's session to its end; ``on_silence`` is called when that is its silence."""
        client.stream.fail_when_unacknowledged(self._limits.tcp_user_timeout_s)
        client.stream.retransmit_soon()
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
