"""Datagrams on their way from users of the public port to a launch.

With a peer that has the capability ``udp`` a user's address has a session: one data connection for all its datagrams,
both ways, framed. With any other peer each datagram is an exchange of its own, with one answer, and nothing frames it.
"""

import time
from collections.abc import Callable, MutableMapping
from functools import partial
from itertools import islice
from typing import Any, Protocol

import gevent

from . import access, unframed
from . import log as logs
from .access import AccessLog
from .config import Config
from .crew import Crew
from .deadlines import shared_deadline
from .errors import NotCarried, TunnelError, reason
from .launching import Launched, Launcher
from .metrics import Counters, Traffic
from .transport import Transport
from .udp import PublicSocket, Reply
from .udp_relay import UDPRelay, longest_silence_s
from .wire import Kind

EVICTABLE_S = 1.0  # of silence: a session gives its place to a newcomer when all places are taken
EVICTION_TRIES = 8  # sessions that are looked at for a newcomer
REFUSED_S = 1.0  # what a user sends is dropped for that long after its peer has said that its launch failed


class Entrance(Protocol):
    """Counts users by address."""

    def enter(self, host: str) -> bool:
        """Count one in, who must leave; False when there are too many from there."""

    def leave(self, host: str) -> None:
        """Count one out."""


class DatagramIngress:
    """Users of the public UDP port."""

    def __init__(
        self,
        launcher: Launcher,
        exchanges: Crew,
        config: Config,
        counters: Counters,
        entrance: Entrance | None = None,
    ) -> None:
        self._launcher = launcher
        self._exchanges = exchanges
        self._config = config
        self._counters = counters
        self._entrance = entrance  # None: all may come
        self._log = logs.of(config.name)
        self._access = AccessLog(config, access.PUBLIC)
        self._full = logs.Seldom(self._log)
        self._limit = max(config.semaphore_limit // 2, 1)
        self._asking = 0  # exchanges of one datagram
        self._sessions: dict[Reply, UDPRelay] = {}  # by user
        self._leaving: gevent.Greenlet | None = None  # receives for the last sessions, and then closes the socket

    def serve(self, public: PublicSocket) -> None:
        """Receive until killed; then the sessions and exchanges that are left keep the socket until they have ended."""
        receiver = gevent.spawn(_receive, public, self.datagram)
        try:
            receiver.get()
        finally:
            if (self._sessions or self._asking) and not receiver.ready():
                self._leaving = receiver
            else:
                receiver.kill()

    def end(self, why: str) -> None:
        """End all sessions, and let the public socket go at once."""
        for reply, session in list(self._sessions.items()):
            session.end(why)
            if not session.running:  # it waits for a client, and its user need not
                self._close_session(reply, session)
        if self._leaving is not None:
            self._leaving.kill()
            self._leaving = None

    def datagram(self, datagram: bytes, reply: Reply) -> None:
        """Take a datagram of a user. Never blocks. MemoryError: it is dropped."""
        session = self._sessions.get(reply)
        if session is not None:
            session.send(datagram)
        elif self._leaving is not None:
            self._counters.datagrams_dropped_busy += 1
        elif self._launcher.carries_sessions():
            self._open_session(datagram, reply)
        else:
            self._open_exchange(datagram, reply)

    def _ended(self) -> None:
        """The last to end lets the public socket go, where it is left for it."""
        if self._leaving is not None and not self._sessions and not self._asking:
            self._leaving.kill(block=False)
            self._leaving = None

    def _enter(self, reply: Reply) -> bool:
        if self._entrance is None or self._entrance.enter(reply.sender[0]):
            return True
        self._counters.datagrams_kept_out += 1
        return False

    def _leave(self, reply: Reply) -> None:
        if self._entrance is not None:
            self._entrance.leave(reply.sender[0])

    def _drop_busy(self) -> None:
        self._counters.datagrams_dropped_busy += 1
        self._full.warning(
            "no place is left for datagrams of further users: of %d (semaphore-limit) UDP has half",
            self._config.semaphore_limit,
        )

    # Sessions

    def _open_session(self, datagram: bytes, reply: Reply) -> None:
        if not self._enter(reply):  # first: who is one too many takes nobody's place
            return
        if len(self._sessions) + self._asking >= self._limit:
            self._evict()
        if len(self._sessions) + self._asking >= self._limit or self._exchanges.full():
            self._leave(reply)
            self._drop_busy()
            return
        try:
            session = self._sessions[reply] = UDPRelay(reply.__call__)  # as a method: looked up once
            session.send(datagram)
            self._exchanges.spawn(self._run_session, session, reply)
        except MemoryError:
            self._sessions.pop(reply, None)
            self._leave(reply)
            self._counters.datagrams_dropped_busy += 1
            raise

    def _evict(self) -> None:
        """End one session that has been idle; those that are looked at and stay are last in the row after that."""
        for reply in list(islice(self._sessions, EVICTION_TRIES)):
            session = self._sessions.pop(reply)
            if session.running and session.idle_s() >= EVICTABLE_S:
                session.end("idle, and another user came")
                self._leave(reply)
                return
            self._sessions[reply] = session

    def _run_session(self, session: UDPRelay, reply: Reply) -> None:
        started, id = time.monotonic(), b""
        launched: MutableMapping[bytes, Any] = {}
        traffic = partial(_traffic_of_user, session)
        carried = True
        try:
            id, data, link = self._launcher.launch(Kind.UDP_SESSION, self._config.limits.pool_wait_s, reply.sender)
            self._counters.udp_sessions += 1
            self._counters.running.add(traffic)
            launched = link.launched
            launched[id] = session
            with data:
                session.run(data, partial(longest_silence_s, self._config, self._exchanges))
            if session.refused:
                self._counters.launches_failed += 1
                self._log.warning("user %s dropped for %g s: %s", reply, REFUSED_S, session.how)
                gevent.sleep(REFUSED_S)
        except NotCarried:  # by the peer for which its first datagrams have waited
            carried = False
            self._close_session(reply, session)
            for datagram in session.take_waiting():
                self._open_exchange(datagram, reply)
        except TunnelError as exc:
            session.end(reason(exc))
            self._counters.datagrams_unanswered += len(session.take_waiting())
        finally:
            launched.pop(id, None)
            self._close_session(reply, session)
            self._ended()
            session.count_failures(self._counters)
            self._counters.ended(traffic)
            if carried:
                self._access.session(id, reply.sender, session, started)

    def _close_session(self, reply: Reply, session: UDPRelay) -> None:
        """Take a session out of the table, if it is there still."""
        if self._sessions.get(reply) is session:
            del self._sessions[reply]
            self._leave(reply)

    # Exchanges of one datagram

    def _open_exchange(self, datagram: bytes, reply: Reply) -> None:
        """Start the exchange of one datagram, or drop it: v1 cannot frame an empty one."""
        if not 0 < len(datagram) <= self._config.udp_data_buf_size:
            self._counters.datagrams_dropped_size += 1
        elif len(self._sessions) + self._asking >= self._limit or self._exchanges.full():
            self._drop_busy()
        elif self._enter(reply):
            self._counters.udp_exchanges += 1
            self._asking += 1
            launched = None
            try:
                launched = self._launcher.launch_at_once(Kind.UDP, reply.sender)  # before: it wakes its client
                self._exchanges.spawn(self._run_exchange, datagram, reply, launched)
            except MemoryError:
                if launched:
                    _, data, _ = launched
                    data.reset()
                self._asking -= 1
                self._leave(reply)
                self._counters.datagrams_dropped_busy += 1
                raise

    def _run_exchange(self, datagram: bytes, reply: Reply, launched: Launched | None) -> None:
        timeout_s = self._config.udp_read_timeout_s
        started, id, asked, answer = time.monotonic(), b"", b"", b""
        end = access.CUT, ""
        try:
            with shared_deadline(timeout_s, "datagram"):
                id, data, _ = launched or self._launcher.launch(Kind.UDP, timeout_s, reply.sender)
                with data:
                    data.send_last(datagram)
                    asked = datagram
                    self._counters.datagrams_up += 1
                    self._counters.bytes_up += len(datagram)
                    answer = self._answer(reply, data)
            end = access.ENDED, ""
        except (OSError, TunnelError) as exc:
            self._counters.datagrams_unanswered += 1
            end = access.UNANSWERED if id else access.NO_DATA_CONNECTION, reason(exc)
        finally:
            self._access.datagram(id, reply.sender, asked, answer, started, end)
            self._asking -= 1
            self._leave(reply)
            self._ended()

    def _answer(self, reply: Reply, data: Transport) -> bytes:
        """Wait for the answer, and give it to the user."""
        answer = unframed.read_to_end(data, self._config.udp_data_buf_size)
        if len(answer) > self._config.udp_data_buf_size:
            self._counters.datagrams_dropped_size += 1
            raise ConnectionAbortedError("the answer is longer than UDP_DATA_BUF_SIZE")
        if not answer:
            raise TimeoutError("no answer")
        reply(answer)
        self._counters.datagrams_down += 1
        self._counters.bytes_down += len(answer)
        return answer


def _receive(public: PublicSocket, handle: Callable[[bytes, Reply], None]) -> None:
    try:
        public.serve(handle)
    finally:
        public.close()


def _traffic_of_user(session: UDPRelay) -> Traffic:
    return session.framed_bytes, session.delivered_bytes, session.framed, session.delivered
