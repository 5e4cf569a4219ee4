"""The launch of a user: a data connection from whichever peer has one first, and the word to it what that is for."""

import time
from collections.abc import Callable, MutableMapping
from typing import Protocol

import gevent
from gevent.event import Event

from . import opening, wire
from .errors import NotCarried, TunnelError
from .transport import Transport
from .wire import Kind, Launch


class OldestFirst(Protocol):
    """The pool of a peer's data connections."""

    def take_ready(self) -> tuple[bytes, Transport] | None:
        """Give a data connection and its id, if one is ready."""

    def take(self, timeout_s: float) -> tuple[bytes, Transport]:
        """Do so, or wait for one; TunnelError."""


class Abortable(Protocol):
    """A launched exchange that its peer may declare failed."""

    def abort(self, error: Exception) -> bool:
        """End it with ``error``; False when the peer has answered already, and then it goes on."""

    def lose(self, error: Exception) -> None:
        """End it with ``error``: the peer has lost its data connection."""

    def forsake(self, since: float, error: Exception) -> None:
        """End it where its user loses nothing by that, unless the peer has been heard ``since`` then (monotonic)."""


class Link(Protocol):
    """The way to a peer: a control channel to launch on, and its pool."""

    @property
    def pool(self) -> OldestFirst:
        """Its data connections."""

    @property
    def capabilities(self) -> frozenset[bytes]:
        """What it and this side can beyond v1."""

    @property
    def launched(self) -> MutableMapping[bytes, Abortable]:
        """The exchanges that run on its data connections, by id."""

    def send(self, line: bytes) -> bool:
        """Queue a line for it; False when it takes none any more."""


Launched = tuple[bytes, Transport, Link]  # a data connection with its id, and whose it is


class Launcher:
    """Launches for users. ``link(timeout_s)`` waits for a peer, or raises NoDataConnection."""

    def __init__(self, link: Callable[[float], Link]) -> None:
        self._link = link
        self._waiting = 0  # for a peer or a data connection
        self._settled = Event()  # set when nobody waits any more

    def settle(self, timeout_s: float) -> None:
        """Wait until nobody who has come waits for a launch, for ``timeout_s`` at most."""
        if timeout_s > 0:
            gevent.sleep(0)  # who has come this moment begins
            self._settled.clear()
            if self._waiting:
                self._settled.wait(timeout_s)

    def carries_sessions(self) -> bool:
        """Whether the peer of now carries UDP sessions; while there is none, hope so."""
        try:
            return opening.UDP in self._link(0).capabilities
        except TunnelError:
            return True

    def launch_at_once(self, kind: Kind, user: tuple) -> Launched | None:
        """Do as ``launch`` where a data connection is ready; None where its user has to wait for one.

        Does not switch. Not for UDP sessions, which not every peer carries.
        """
        try:
            link = self._link(0)
        except TunnelError:
            return None
        ready = link.pool.take_ready()
        return (*ready, link) if ready and _say(link, *ready, kind, user) else None

    def launch(self, kind: Kind, timeout_s: float, user: tuple) -> Launched:
        """Launch for ``user``, a sockaddr; TunnelError when nothing is ready in time, or its peer does not carry it."""
        self._waiting += 1
        try:
            return self._launch_in_time(kind, timeout_s, user)
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._settled.set()

    def _launch_in_time(self, kind: Kind, timeout_s: float, user: tuple) -> Launched:
        end = time.monotonic() + timeout_s
        while True:
            link = self._link(end - time.monotonic())
            if kind is Kind.UDP_SESSION and opening.UDP not in link.capabilities:
                raise NotCarried("the peer has no UDP sessions")
            try:
                id, data = link.pool.take(max(end - time.monotonic(), 0))
            except TunnelError:
                if time.monotonic() < end:  # this peer is gone; perhaps the next comes in time
                    continue
                raise
            if _say(link, id, data, kind, user):
                return id, data, link


def _say(link: Link, id: bytes, data: Transport, kind: Kind, user: tuple) -> bool:
    """Say what a data connection is for, and for whom; False, and it is reset, when its peer has gone in between."""
    said = False
    try:
        said = link.send(wire.format_launch(Launch(id, kind, user if opening.FROM in link.capabilities else None)))
    finally:
        if not said:
            data.reset()
    return said
