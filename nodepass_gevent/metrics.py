"""Counters of one tunnel: plain numbers, written in the data path, read by whoever shows them."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field, fields

BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # of times to a first byte
TRAFFIC = ("bytes_up", "bytes_down", "datagrams_up", "datagrams_down")

Traffic = tuple[int, int, int, int]  # what an exchange has carried so far, as TRAFFIC names it


class Histogram:
    """How many times were within each of BOUNDS_S, the last count being of those beyond them, and their sum."""

    __slots__ = ("counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.sum_s = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.sum_s += seconds


@dataclass(slots=True)
class Counters:
    """What has happened since the start. Bytes are user data; up is user to target."""

    tcp_exchanges: int = 0
    udp_exchanges: int = 0  # of one datagram and its answer
    udp_sessions: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    datagrams_up: int = 0
    datagrams_down: int = 0
    exchanges_failed: int = 0  # ended by a reset, a timeout or a missing data connection
    launches_lost: int = 0  # a launch whose data connection never came, or was gone
    launches_failed: int = 0  # the peer said so
    launches_repeated: int = 0  # the data connection proved dead before a byte; its user was given another one
    signals_malformed: int = 0
    signals_unknown: int = 0
    signals_stale: int = 0  # about a launch that is no more, or works
    datagrams_dropped_busy: int = 0  # over the limit of exchanges
    datagrams_dropped_size: int = 0  # outside of sessions: empty, or longer than UDP_DATA_BUF_SIZE
    datagrams_dropped_rate: int = 0  # over udp-rate-per-address
    datagrams_dropped_queue: int = 0  # a session's data connection was full, or ended
    datagrams_dropped_network: int = 0  # a session's, not taken by the network they were for
    datagrams_refused: int = 0  # the target's host said that nobody listens
    datagrams_kept_out: int = 0  # from an address that is not allowed, or over users-per-address
    datagrams_unanswered: int = 0
    users_kept_out: int = 0  # from an address that is not allowed, or over users-per-address
    callers_refused: int = 0
    callers_kept_out: int = 0  # from an address that is not allowed, or has a penalty
    data_connections_refused: int = 0
    certificates_refused: int = 0  # of clients
    tags_wrong: int = 0  # proofs of the tunnel key that do not fit
    accept_pauses: int = 0  # out of descriptors or memory
    first_bytes: Histogram = field(default_factory=Histogram)  # launch or accept of a TCP user to the first answer
    running: set[Callable[[], Traffic]] = field(default_factory=set)  # of exchanges that have not ended

    def ended(self, traffic: Callable[[], Traffic]) -> None:
        """Count what an exchange has carried, once: it runs no more."""
        self.running.discard(traffic)
        bytes_up, bytes_down, datagrams_up, datagrams_down = traffic()
        self.bytes_up += bytes_up
        self.bytes_down += bytes_down
        self.datagrams_up += datagrams_up
        self.datagrams_down += datagrams_down

    def total(self) -> dict[str, int]:
        """Give every number by its name, with the traffic of what still runs."""
        numbers = {name: getattr(self, name) for name in NUMBERS}
        sums = map(sum, zip(*(traffic() for traffic in self.running), strict=True))
        for name, value in zip(TRAFFIC, sums, strict=False):  # no sums where nothing runs
            numbers[name] += value
        return numbers

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.total().items() if value) or "nothing yet"


NUMBERS = tuple(each.name for each in fields(Counters) if each.type is int)
