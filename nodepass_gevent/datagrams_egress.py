"""Datagrams on their way from a launch to the target: sessions, framed, and exchanges of one datagram, unframed."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import gevent

from . import access, proxy_protocol, unframed
from . import log as logs
from .access import AccessLog
from .config import Config
from .crew import Crew
from .deadlines import shared_deadline
from .errors import GONE, ConnectError, reason
from .metrics import Counters, Traffic
from .net import Endpoint
from .target import TargetAddresses
from .transport import Transport
from .udp import TargetSocket
from .udp_relay import UDPRelay, longest_silence_s
from .wire import Launch


class _Carried:
    """What became of a datagram: what the target, and the peer behind it, was sent, and how that ended."""

    def __init__(self) -> None:
        self.up = self.down = b""
        self.end: access.End = access.CUT, ""


class DatagramEgress:
    """Launches of datagrams and sessions, brought to one of the target's addresses.

    ``refuse(launch, data, why)`` tells the peer that nothing comes of a launch; ``user(launch)`` is whom it is for.
    """

    def __init__(
        self,
        target: TargetAddresses,
        refuse: Callable[[Launch, Transport, str], None],
        user: Callable[[Launch], tuple | None],
        exchanges: Crew,
        config: Config,
        counters: Counters,
    ) -> None:
        self._target = target
        self._refuse = refuse
        self._user = user
        self._exchanges = exchanges
        self._config = config
        self._counters = counters
        self._access = AccessLog(config, access.TARGET)
        self._refusals = logs.Seldom(logs.of(config.name))

    def session(self, launch: Launch, data: Transport) -> None:
        """Carry a session over ``data``, framed, to and from a socket of its own, until a side ends or it is idle."""
        self._counters.udp_sessions += 1
        started = time.monotonic()
        with self._open_target(launch, data) as target:
            target.expect_many()
            target.on_refusal = partial(self._refused, target.endpoint)  # not target: a cycle
            session = UDPRelay(proxy_protocol.introduced(target.push, self._header(launch, target)))
            traffic = partial(_traffic_of_target, session)
            self._counters.running.add(traffic)
            try:
                session.run(data, partial(longest_silence_s, self._config, self._exchanges), target)
                if session.timed_out:
                    self._refuse(launch, data, GONE)
            finally:
                session.count_failures(self._counters)
                self._counters.ended(traffic)
                self._access.session(launch.id, self._user(launch), session, started)
                if not session.framed:  # not one answer
                    self._target.forget()

    def _refused(self, target: Endpoint) -> None:
        self._counters.datagrams_refused += 1
        self._nobody_listens(target)

    def _nobody_listens(self, target: Endpoint) -> None:
        self._refusals.warning("target %s: nobody listens there (UDP)", target)

    def _open_target(self, launch: Launch, data: Transport) -> TargetSocket:
        try:
            return _reach(self._target.get())
        except ConnectError as exc:
            self._refuse(launch, data, exc.why)
            raise
        except OSError:  # no way there, or no descriptor
            self._target.forget()
            self._refuse(launch, data, "unreachable")
            raise

    def _header(self, launch: Launch, target: TargetSocket) -> bytes:
        """Give what stands before the first datagram: version 1 of the PROXY protocol has no such thing."""
        if self._config.proxy_protocol != proxy_protocol.V2:
            return b""
        return proxy_protocol.datagram_header(self._user(launch), target.endpoint.sockaddr)

    def exchange(self, launch: Launch, data: Transport) -> None:
        """Carry one datagram and one answer over ``data``, unframed."""
        started = time.monotonic()
        self._counters.udp_exchanges += 1
        limit, timeout_s = (self._config.udp_data_buf_size, self._config.udp_read_timeout_s)
        try:
            datagram, ended = unframed.read_datagram(data, limit, timeout_s)
        except gevent.GreenletExit:
            self._access.nothing("udp", launch.id, self._user(launch), started, (access.CUT, ""))
            raise
        if not 0 < len(datagram) <= limit:
            self._counters.datagrams_dropped_size += 1
            end = access.FAILED, "the datagram is empty, or longer than udp-data-buf-size"
            self._access.nothing("udp", launch.id, self._user(launch), started, end)
            return
        carried = _Carried()
        with self._open_target(launch, data) as target:
            try:
                answer = self._ask(launch, target, datagram, carried)
                if answer:
                    self._answer(data, answer, carried)
            finally:
                self._access.datagram(launch.id, self._user(launch), carried.up, carried.down, started, carried.end)
        if not ended and carried.end[0] != access.FAILED:
            with suppress(OSError):  # to close before the peer has ended could take the answer away from it
                data.linger(self._config.limits.drain_linger_s)

    def _ask(self, launch: Launch, target: TargetSocket, datagram: bytes, carried: _Carried) -> bytes:
        """Give the target's answer; an empty one when it is silent, refuses by ICMP, or says too much."""
        try:
            target.send(self._header(launch, target) + datagram)
            carried.up = datagram
            self._counters.datagrams_up += 1
            self._counters.bytes_up += len(datagram)
            with shared_deadline(self._config.udp_read_timeout_s, "answer"):
                answer = target.recv()
        except OSError as exc:
            if isinstance(exc, ConnectionRefusedError):
                self._nobody_listens(target.endpoint)
            self._counters.datagrams_unanswered += 1
            self._target.forget()
            carried.end = access.UNANSWERED, reason(exc)
            return b""
        if len(answer) > self._config.udp_data_buf_size:
            self._counters.datagrams_dropped_size += 1
            carried.end = access.UNANSWERED, "the answer is longer than udp-data-buf-size"
            return b""
        carried.end = access.ENDED, ""
        return answer

    def _answer(self, data: Transport, answer: bytes, carried: _Carried) -> None:
        try:
            with shared_deadline(self._config.udp_read_timeout_s, "answer to the tunnel"):
                data.send_last(answer)
        except OSError as exc:
            self._counters.exchanges_failed += 1
            carried.end = access.FAILED, reason(exc)
            data.reset()  # a part of it is no answer
        else:
            carried.down = answer
            self._counters.datagrams_down += 1
            self._counters.bytes_down += len(answer)


def _reach(endpoints: Sequence[Endpoint]) -> TargetSocket:
    """Take the first that there is a way to, IPv4 before IPv6, as the original does: UDP does not say who listens."""
    *others, last = sorted(endpoints, key=lambda endpoint: endpoint.family)
    for endpoint in others:
        with suppress(OSError):
            return TargetSocket(endpoint)
    return TargetSocket(last)


def _traffic_of_target(session: UDPRelay) -> Traffic:
    return session.delivered_bytes, session.framed_bytes, session.delivered, session.framed
