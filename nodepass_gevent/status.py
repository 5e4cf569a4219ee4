"""How the tunnels are: a snapshot of now, the last minutes second by second, and a sentence in plain words.

Reads what the roles have counted; knows neither HTTP nor any format but the document of /status.json.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from textwrap import shorten
from typing import Any, NamedTuple

from . import __version__
from .config import LOG_LEVELS
from .log import Event
from .metrics import BOUNDS_S, Counters, Histogram
from .service import Service
from .state import Description, Ended, wall_clock
from .tls_context import EXPIRY_WARNING_DAYS

HISTORY_S = 300  # seconds that are kept, a row each: about 50 KiB
MINUTE_S = 60
RATE_S = 10  # a single second says little of what comes in bursts
HELD_UP_S = 0.5  # a process that was held up for that long says so
NAMED = 3  # tunnels in a sentence
WARNINGS = LOG_LEVELS[LOG_LEVELS.index("warn") :]
MAX_WARNING = 200  # characters of one in a sentence
WRONG = {  # counters of what goes wrong, and how they are told
    "exchanges_failed": ("exchange", "failed"),
    "launches_lost": ("launch", "lost"),
    "datagrams_unanswered": ("datagram", "without an answer"),
    "datagrams_refused": ("refusal", "of datagrams at the target"),
    "signals_malformed": ("signal", "malformed"),
    "accept_pauses": ("pause", "of a listener"),
}
DIRECTIONS = ("bytes_up", "bytes_down")
DAY_S = 24 * 3600


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
class Tunnel:
    """One tunnel, now."""

    name: str
    role: str
    tunnel: str
    outside: str  # the server's public port, the client's target
    tls: int
    keyed: bool
    condition: str  # serving, waiting, connecting, failing or stopping
    words: str
    description: Description
    exchanges: int
    limit: int
    full: bool  # further users wait
    numbers: dict[str, int]
    first_bytes: Histogram
    failures: int
    ended: Ended | None
    next_try_at: float | None
    wrong: dict[str, int]  # in the last minute, by counter
    warning: str  # the last one in the log, of the last minute
    rates: Mapping[str, int]  # bytes per second, by direction, in the last RATE_S


@dataclass(frozen=True)
class Snapshot:
    """The process, now."""

    now: float
    started: float
    words: str
    lag_s: float
    worst_lag_s: float  # of the last minute
    lines_dropped: int
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
        lines_dropped: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._services = services
        self._recent = recent
        self._lines_dropped = lines_dropped
        self._clock = clock
        self._started = wall_clock()
        self._tracks: dict[str, _Track] = {}
        self._rows: deque[Row] = deque(maxlen=HISTORY_S)
        self._lags: deque[float] = deque([0.0], maxlen=MINUTE_S)
        self._sampled_at = clock()
        self.refused: Ended | None = None  # what was read last, and why; the configuration before it goes on

    def sample(self, lag_s: float) -> None:
        """Note what has happened since the last time; ``lag_s`` is by how much the event loop was late."""
        self._catch_up()
        now = self._clock()
        elapsed_s = max(now - self._sampled_at, 0.001)
        self._lags.append(lag_s)
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
        words = _all_words(tunnels, now)
        if worst_lag_s >= HELD_UP_S:
            words += f" The process was held up for {worst_lag_s:.1f} s."
        if self.refused:
            words += f" The configuration was refused, and the one before it goes on: {self.refused.why}."
        lost = self._lines_dropped()
        return Snapshot(now, self._started, words, self._lags[-1], worst_lag_s, lost, tunnels, self.refused)

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
        return replace(tunnel, words=_words(tunnel, now))

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


def _all_words(tunnels: tuple[Tunnel, ...], now: float) -> str:
    """Say how all tunnels are."""
    if len(tunnels) == 1:
        return tunnels[0].words
    missing = [tunnel for tunnel in tunnels if tunnel.condition != "serving"]
    exchanges = _count(sum(tunnel.exchanges for tunnel in tunnels), "exchange")
    if not missing:
        said_of = {tunnel.name: [*_full(tunnel), *_last_minute(tunnel, now)] for tunnel in tunnels}
        wrong = [f"{name}: {', '.join(said)}" for name, said in said_of.items() if said]
        return f"Serving: {len(tunnels)} tunnels, each with its peer, {exchanges}; {_first(wrong) or _NOTHING_WRONG}."
    share = f"Only {len(tunnels) - len(missing)}" if len(missing) < len(tunnels) else "None"
    why = _first([f"{tunnel.name}: {_why(tunnel)}" for tunnel in missing])
    sums = {key: sum(tunnel.wrong[key] for tunnel in tunnels) for key in WRONG}
    return f"{share} of {len(tunnels)} tunnels serving, {exchanges}; {'; '.join([why, *_wrong_words(sums)])}."


def _first(said: list[str]) -> str:
    """Join the first few, and say how many more there are."""
    return "; ".join(said if len(said) <= NAMED else [*said[:NAMED], f"and {len(said) - NAMED} more"])


_NOTHING_WRONG = "nothing wrong in the last minute"


def _words(tunnel: Tunnel, now: float) -> str:
    """Say in a sentence how a tunnel is, and what went wrong in the last minute."""
    parts = [_condition_words(tunnel, now), *_full(tunnel), *_last_minute(tunnel, now)]
    if len(parts) == 1 and tunnel.condition != "failing":
        parts.append(_NOTHING_WRONG)
    certificate = tunnel.description.certificate
    if certificate and certificate.expires - now < EXPIRY_WARNING_DAYS * DAY_S:
        days = int((certificate.expires - now) // DAY_S)
        ends = f"expires in {_count(days, 'day')}" if days >= 0 else "has expired"
        parts.append(f"the certificate {ends}")
    return "; ".join(parts) + "."


def _why(tunnel: Tunnel) -> str:
    """Say why a tunnel does not serve."""
    if tunnel.condition == "failing":
        what = "listening" if tunnel.role == "server" else "connected"
        return f"not {what}: {tunnel.ended.why if tunnel.ended else 'it ended'}"
    reasons = {"stopping": "stopping", "waiting": "no client is connected"}
    return reasons.get(tunnel.condition, f"connecting to {tunnel.tunnel}")


def _condition_words(tunnel: Tunnel, now: float) -> str:
    exchanges = _count(tunnel.exchanges, "exchange")
    if tunnel.condition == "serving":
        peers = tunnel.description.peers
        who = _count(len(peers), "client") if tunnel.role == "server" else f"server {peers[0].address}"
        return f"Serving: {who} connected, {exchanges}"
    if tunnel.condition == "stopping":
        return f"Stopping: {exchanges} left"
    if tunnel.condition == "waiting":
        return f"Waiting: {_why(tunnel)}, {exchanges}"
    why = _why(tunnel)
    pause_s = max((tunnel.next_try_at or now) - now, 0)
    again = f"; trying again in {pause_s:.0f} s" if tunnel.condition == "failing" else ""
    return f"{why[0].upper()}{why[1:]}{again}, {exchanges}"


def _full(tunnel: Tunnel) -> list[str]:
    """Say that users have to wait, where they have."""
    return ["all places are taken (semaphore-limit), further users wait"] if tunnel.full else []


def _last_minute(tunnel: Tunnel, now: float) -> list[str]:
    """Say what went wrong in the last minute, and is not the case now."""
    said = _wrong_words(tunnel.wrong)
    if said and tunnel.warning:
        said.append(f"last warning: {shorten(tunnel.warning, MAX_WARNING, placeholder=' …')}")
    if tunnel.ended and tunnel.condition != "failing" and now - tunnel.ended.at < MINUTE_S:
        said.append(f"{now - tunnel.ended.at:.0f} s ago: {tunnel.ended.why}")
    return said


def _wrong_words(wrong: Mapping[str, int]) -> list[str]:
    said = [f"{_count(count, WRONG[key][0])} {WRONG[key][1]}" for key, count in wrong.items() if count]
    return [f"{', '.join(said)} in the last minute"] if said else []


def _count(number: int, noun: str) -> str:
    plural = f"{noun}{'es' if noun.endswith('ch') else 's'}"
    return f"{number or 'no'} {noun if number == 1 else plural}"
