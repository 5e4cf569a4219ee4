"""How a tunnel is, and how all of them are: what is known, and the sentences. Looks at nothing: it is given all."""

from collections.abc import Mapping
from dataclasses import dataclass
from textwrap import shorten

from .log import Dropped
from .metrics import Histogram
from .state import Description, Ended
from .tls_context import EXPIRY_WARNING_DAYS

MINUTE_S = 60
DAY_S = 24 * 3600
HELD_UP_S = 0.5  # a process that was held up for that long says so
NAMED = 3  # tunnels in a sentence
MAX_WARNING = 200  # characters of one in a sentence
NOTHING_WRONG = "nothing wrong in the last minute"
WRONG = {  # counters of what goes wrong, and how they are told
    "exchanges_failed": ("exchange", "failed"),
    "launches_lost": ("launch", "lost"),
    "datagrams_unanswered": ("datagram", "without an answer"),
    "datagrams_refused": ("refusal", "of datagrams at the target"),
    "signals_malformed": ("signal", "malformed"),
    "accept_pauses": ("pause", "of a listener"),
}


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


def all_words(tunnels: tuple[Tunnel, ...], now: float) -> str:
    """Say how all tunnels are."""
    if len(tunnels) == 1:
        return tunnels[0].words
    missing = [tunnel for tunnel in tunnels if tunnel.condition != "serving"]
    exchanges = _count(sum(tunnel.exchanges for tunnel in tunnels), "exchange")
    ends = _first([f"{tunnel.name}: {said}" for tunnel in tunnels for said in _certificate(tunnel, now)])
    ends = f"; {ends}" if ends else ""
    if not missing:
        said_of = {tunnel.name: [*_full(tunnel), *_last_minute(tunnel, now)] for tunnel in tunnels}
        wrong = [f"{name}: {', '.join(said)}" for name, said in said_of.items() if said]
        how = _first(wrong) or NOTHING_WRONG
        return f"Serving: {len(tunnels)} tunnels, each with its peer, {exchanges}; {how}{ends}."
    share = f"Only {len(tunnels) - len(missing)}" if len(missing) < len(tunnels) else "None"
    why = _first([f"{tunnel.name}: {', '.join([_why(tunnel), *_refusal(tunnel, now)])}" for tunnel in missing])
    sums = {key: sum(tunnel.wrong[key] for tunnel in tunnels) for key in WRONG}
    return f"{share} of {len(tunnels)} tunnels serving, {exchanges}; {'; '.join([why, *_wrong_words(sums)])}{ends}."


def process_words(worst_lag_s: float, lost: int, dropped: Dropped) -> list[str]:
    """Say what was wrong with the process in the last minute; ``lost`` is the number of log lines."""
    said = [f"The process was held up for {worst_lag_s:.1f} s."] if worst_lag_s >= HELD_UP_S else []
    if lost:
        said.append(f"{_count(lost, 'log line')} lost in the last minute: {dropped.why}.")
    elif dropped.still:
        said.append(f"The last log lines were lost: {dropped.why}.")
    return said


def _first(said: list[str]) -> str:
    """Join the first few, and say how many more there are."""
    return "; ".join(said if len(said) <= NAMED else [*said[:NAMED], f"and {len(said) - NAMED} more"])


def tunnel_words(tunnel: Tunnel, now: float) -> str:
    """Say in a sentence how a tunnel is, and what went wrong in the last minute."""
    parts = [_condition_words(tunnel, now), *_full(tunnel), *_last_minute(tunnel, now)]
    if len(parts) == 1 and tunnel.condition != "failing":
        parts.append(NOTHING_WRONG)
    return "; ".join([*parts, *_certificate(tunnel, now)]) + "."


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


def _certificate(tunnel: Tunnel, now: float) -> list[str]:
    """Say that the certificate of this side ends soon, or has."""
    certificate = tunnel.description.certificate
    if not certificate or certificate.expires - now >= EXPIRY_WARNING_DAYS * DAY_S:
        return []
    days = int((certificate.expires - now) // DAY_S)
    ends = f"expires in {_count(days, 'day')}" if days >= 0 else "has expired"
    return [f"the certificate {ends}"]


def _last_minute(tunnel: Tunnel, now: float) -> list[str]:
    """Say what went wrong in the last minute, and is not the case now."""
    said = _wrong_words(tunnel.wrong)
    if said and tunnel.warning:
        said.append(f"last warning: {shorten(tunnel.warning, MAX_WARNING, placeholder=' …')}")
    ended = _ago(tunnel.ended, now) if tunnel.condition != "failing" else []
    return [*said, *ended, *_refusal(tunnel, now)]


def _refusal(tunnel: Tunnel, now: float) -> list[str]:
    """Where no client is, say whom the server has refused: that may be it."""
    return _ago(tunnel.description.refused, now) if tunnel.condition == "waiting" else []


def _ago(ended: Ended | None, now: float) -> list[str]:
    """Say what ended in the last minute."""
    return [f"{now - ended.at:.0f} s ago: {ended.why}"] if ended and now - ended.at < MINUTE_S else []


def _wrong_words(wrong: Mapping[str, int]) -> list[str]:
    said = [f"{_count(count, WRONG[key][0])} {WRONG[key][1]}" for key, count in wrong.items() if count]
    return [f"{', '.join(said)} in the last minute"] if said else []


def _count(number: int, noun: str) -> str:
    plural = f"{noun}{'es' if noun.endswith('ch') else 's'}"
    return f"{number or 'no'} {noun if number == 1 else plural}"
