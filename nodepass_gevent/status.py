"""How the tunnels are: a snapshot of now, the last minutes second by second, and a sentence in plain words.

Reads what the roles have counted; knows neither HTTP nor any format but the document of /status.json.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from . import __version__
from .config import LOG_LEVELS
from .log import Dropped, Event
from .metrics import BOUNDS_S, Counters
from .service import Service
from .state import Ended, wall_clock
from .status_words import MINUTE_S, NOTHING_WRONG, WRONG, Tunnel, all_words, process_words, tunnel_words

HISTORY_S = 300  # seconds that are kept, a row each: about 50 KiB
RATE_S = 10  # a single second says little of what comes in bursts
WARNINGS = LOG_LEVELS[LOG_LEVELS.index("warn") :]
DIRECTIONS = ("bytes_up", "bytes_down")


class Row(NamedTuple):
    """One second of all tunnels. Rates are per second; times to a first byte are of the TCP users of that second."""

    time: float
    bytes_up: float
    bytes_down: float
    exchanges: int
    begun: int
    errors: int
    first_byte_mean_s: float | None
    first_byte_p95_s: float | None
    pool_ready: int


@dataclass(frozen=True)
class Snapshot:
    """The process, now."""

    now: float
    started: float
    words: str
    lag_s: float
    worst_lag_s: float  # of the last minute
    lines_dropped: int
    lost_in_last_minute: int  # of those
    tunnels: tuple[Tunnel, ...]
    refused: Ended | None = None  # the configuration, when it was last read: the one before goes on

    @property
    def missing(self) -> list[Tunnel]:
        """The tunnels that do not serve."""
        return [tunnel for tunnel in self.tunnels if tunnel.condition != "serving"]


@dataclass
class _Track:
    """What was counted of one tunnel when it was last looked at."""

    counters: Counters
    numbers: dict[str, int]
    first_bytes: list[int]
    first_bytes_s: float
    wrong: deque[list[int]]  # what had gone wrong by then, each second of the last minute, as WRONG has it
    moved: deque[tuple[float, ...]] = field(default_factory=lambda: deque(maxlen=RATE_S))  # seconds; bytes by direction

    @property
    def rates(self) -> dict[str, int]:
        """Bytes per second, by direction."""
        if not self.moved:
            return dict.fromkeys(DIRECTIONS, 0)
        elapsed_s, *sums = map(sum, zip(*self.moved, strict=True))
        return {key: round(bytes / elapsed_s) for key, bytes in zip(DIRECTIONS, sums, strict=True)}


class Status:
    """What can be told of ``services``. ``sample`` is to be called once a second."""

    def __init__(
        self,
        services: Iterable[Service],
        recent: Callable[[], Iterable[Event]],
        dropped: Callable[[], Dropped],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._services = services
        self._recent = recent
        self._dropped = dropped
        self._clock = clock
        self._started = wall_clock()
        self._tracks: dict[str, _Track] = {}
        self._rows: deque[Row] = deque(maxlen=HISTORY_S)
        self._lags: deque[float] = deque([0.0], maxlen=MINUTE_S)
        self._lost: deque[int] = deque([0], maxlen=MINUTE_S)  # log lines, by then, each second of the last minute
        self._sampled_at = clock()
        self.refused: Ended | None = None  # what was read last, and why; the configuration before it goes on

    def sample(self, lag_s: float) -> None:
        """Note what has happened since the last time; ``lag_s`` is by how much the event loop was late."""
        self._catch_up()
        now = self._clock()
        elapsed_s = max(now - self._sampled_at, 0.001)
        self._lags.append(lag_s)
        self._lost.append(self._dropped().lost)
        tracks: dict[str, _Track] = {}
        sums = dict.fromkeys((*DIRECTIONS, "tcp_exchanges", "udp_exchanges", "udp_sessions"), 0)
        firsts, firsts_s, errors, exchanges, ready = [0] * (len(BOUNDS_S) + 1), 0.0, 0, 0, 0
        for service in self._services:
            role, track = service.role, self._track(service)
            counters, numbers = role.counters, role.counters.total()
            counts, sum_s = list(counters.first_bytes.counts), counters.first_bytes.sum_s
            track.moved.append((elapsed_s, *(max(numbers[key] - track.numbers[key], 0) for key in DIRECTIONS)))
            for key in sums:
                sums[key] += numbers[key] - track.numbers[key]
            firsts = [total + new - old for total, new, old in zip(firsts, counts, track.first_bytes, strict=True)]
            firsts_s += sum_s - track.first_bytes_s
            errors += sum(numbers[key] - track.numbers[key] for key in WRONG)
            exchanges += service.exchanges
            ready += sum(peer.ready for peer in role.describe().peers)
            track.numbers, track.first_bytes, track.first_bytes_s = numbers, counts, sum_s
            track.wrong.append([numbers[key] for key in WRONG])
            tracks[_name(service)] = track
        self._tracks, self._sampled_at = tracks, now
        begun = sums["tcp_exchanges"] + sums["udp_exchanges"] + sums["udp_sessions"]
        up, down = (round(max(sums[key], 0) / elapsed_s) for key in DIRECTIONS)
        mean_s = round(firsts_s / sum(firsts), 6) if sum(firsts) else None
        row = Row(round(wall_clock(), 3), up, down, exchanges, begun, errors, mean_s, quantile(firsts, 0.95), ready)
        self._rows.append(row)

    def snapshot(self) -> Snapshot:
        """Give what there is now."""
        self._catch_up()
        now = wall_clock()
        tunnels = tuple(self._look(service, now) for service in self._services)
        worst_lag_s = max(self._lags)
        words, dropped = all_words(tunnels, now), self._dropped()
        lost = dropped.lost - self._lost[0]
        if said := process_words(worst_lag_s, lost, dropped):
            words = " ".join([words.replace(f"; {NOTHING_WRONG}", ""), *said])
        if self.refused:
            words += f" The configuration was refused, and the one before it goes on: {self.refused.why}."
        return Snapshot(
            now, self._started, words, self._lags[-1], worst_lag_s, dropped.lost, lost, tunnels, self.refused
        )

    def document(self, since: float = 0.0) -> dict[str, Any]:
        """Give what /status.json says; the rows of the history are those behind ``since``."""
        snapshot = self.snapshot()
        return {
            "version": __version__,
            "pid": os.getpid(),
            "now": round(snapshot.now, 3),
            "started": round(snapshot.started, 3),
            "words": snapshot.words,
            "ready": not snapshot.missing,
            "loop_lag_s": round(snapshot.lag_s, 4),
            "worst_loop_lag_s": round(snapshot.worst_lag_s, 4),
            "log_lines_dropped": snapshot.lines_dropped,
            "log_lines_lost_in_last_minute": snapshot.lost_in_last_minute,
            "configuration_refused": asdict(snapshot.refused) if snapshot.refused else None,
            "tunnels": [_tunnel_document(tunnel) for tunnel in snapshot.tunnels],
            "history": {"fields": Row._fields, "rows": [row for row in self._rows if row.time > since]},
            "events": [event._asdict() for event in self._recent()],
        }

    def _catch_up(self) -> None:
        """Begin anew where nobody has looked for a minute, as while ``status`` was off: what was counted is past."""
        now = self._clock()
        if now - self._sampled_at > MINUTE_S:
            self._tracks = {_name(each): _begin(each.role.counters, each.role.counters) for each in self._services}
            self._lags = deque([0.0], maxlen=MINUTE_S)
            self._lost = deque([self._dropped().lost], maxlen=MINUTE_S)
            self._sampled_at = now

    def _track(self, service: Service) -> _Track:
        """Give what was counted of a tunnel: nothing, where it or its counters came after the last sample."""
        track, counters = self._tracks.get(_name(service)), service.role.counters
        return track if track and track.counters is counters else _begin(counters, Counters())

    def _look(self, service: Service, now: float) -> Tunnel:
        role, config = service.role, service.role.config
        description, numbers, track = role.describe(), role.counters.total(), self._track(service)
        if role.exchanges.draining:
            condition = "stopping"
        elif description.peers:
            condition = "serving"
        elif service.next_try_at is not None:
            condition = "failing"
        else:
            condition = "waiting" if config.role == "server" else "connecting"
        ended = max((end for end in (service.ended, description.left) if end), key=lambda end: end.at, default=None)
        tunnel = Tunnel(
            name=_name(service),
            role=config.role,
            tunnel=str(config.tunnel),
            outside=str(config.target),
            tls=config.tls,
            keyed=config.keyed,
            condition=condition,
            words="",
            description=description,
            exchanges=service.exchanges,
            limit=config.semaphore_limit,
            full=role.exchanges.full() and condition != "stopping",
            numbers=numbers,
            first_bytes=role.counters.first_bytes,
            failures=service.failures,
            ended=ended,
            next_try_at=service.next_try_at,
            wrong={key: numbers[key] - before for key, before in zip(WRONG, track.wrong[0], strict=True)},
            warning=self._last_warning(config.name, now),
            rates=track.rates,
        )
        return replace(tunnel, words=tunnel_words(tunnel, now))

    def _last_warning(self, name: str, now: float) -> str:
        warnings = [event for event in self._recent() if event.tunnel == name and event.level in WARNINGS]
        return warnings[-1].message if warnings and now - warnings[-1].time < MINUTE_S else ""


def quantile(counts: list[int], share: float) -> float | None:
    """Estimate a quantile from the counts of a Histogram, as Prometheus does; None when there are none."""
    rank = share * sum(counts)
    low, seen = 0.0, 0
    for count, high in zip(counts, (*BOUNDS_S, BOUNDS_S[-1]), strict=True):
        if count and seen + count >= rank:
            return round(low + (high - low) * (rank - seen) / count, 6)
        low, seen = high, seen + count
    return None


def _begin(counters: Counters, seen: Counters) -> _Track:
    """Begin a track; what ``seen`` has counted is not of now."""
    numbers, first_bytes = seen.total(), seen.first_bytes
    wrong = deque([[numbers[key] for key in WRONG]], maxlen=MINUTE_S)
    return _Track(counters, numbers, list(first_bytes.counts), first_bytes.sum_s, wrong)


def _name(service: Service) -> str:
    """Name a tunnel; the only one of a process may have no name but its role."""
    return service.role.config.name or service.role.config.role


def _tunnel_document(tunnel: Tunnel) -> dict[str, Any]:
    description = tunnel.description
    server = tunnel.role == "server"
    return {
        "name": tunnel.name,
        "role": tunnel.role,
        "tunnel": tunnel.tunnel,
        "public": tunnel.outside if server else None,
        "target": None if server else tunnel.outside,
        "tls": tunnel.tls,
        "tunnel_key": tunnel.keyed,
        "condition": tunnel.condition,
        "words": tunnel.words,
        "peers": [asdict(peer) for peer in description.peers],
        "pool_ready": sum(peer.ready for peer in description.peers),
        "pool_capacity": sum(peer.capacity for peer in description.peers),
        "exchanges": tunnel.exchanges,
        "exchanges_limit": tunnel.limit,
        "certificate": asdict(description.certificate) if description.certificate else None,
        "failures": tunnel.failures,
        "ended": asdict(tunnel.ended) if tunnel.ended else None,
        "next_try_at": tunnel.next_try_at,
        "wrong_in_last_minute": tunnel.wrong,
        "counters": tunnel.numbers,
        "per_second": tunnel.rates,
        "first_byte_s": {
            "count": sum(tunnel.first_bytes.counts),
            "sum": round(tunnel.first_bytes.sum_s, 6),
            "p50": quantile(tunnel.first_bytes.counts, 0.5),
            "p95": quantile(tunnel.first_bytes.counts, 0.95),
        },
    }
