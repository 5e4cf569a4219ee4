"""The metrics of /metrics: names, units and labels, made of a snapshot. ``docs/status.rst`` tells each of them."""

import platform
from collections.abc import Callable, Iterator

import gevent
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from . import __version__
from .metrics import BOUNDS_S
from .status import Snapshot
from .status_words import Tunnel

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Of each counter of a tunnel: name without _total, help, label, and the value of the label by the counter's name.
COUNTERS: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    (
        "nodepass_connections",
        "Users, by what carries them.",
        "kind",
        {"tcp_exchanges": "tcp", "udp_sessions": "udp_session", "udp_exchanges": "udp_exchange"},
    ),
    (
        "nodepass_transferred_bytes",
        "Bytes of user data; up is from the user to the target.",
        "direction",
        {"bytes_up": "up", "bytes_down": "down"},
    ),
    (
        "nodepass_datagrams",
        "Datagrams of users and targets that were carried.",
        "direction",
        {"datagrams_up": "up", "datagrams_down": "down"},
    ),
    (
        "nodepass_datagrams_dropped",
        "Datagrams that were not carried.",
        "reason",
        {
            "datagrams_dropped_busy": "busy",
            "datagrams_dropped_size": "size",
            "datagrams_dropped_rate": "rate",
            "datagrams_dropped_queue": "queue",
            "datagrams_dropped_network": "network",
            "datagrams_kept_out": "kept_out",
        },
    ),
    (
        "nodepass_errors",
        "What went wrong.",
        "kind",
        {
            "exchanges_failed": "exchange",
            "launches_lost": "launch_lost",
            "datagrams_unanswered": "datagram_unanswered",
            "signals_malformed": "signal_malformed",
            "signals_unknown": "signal_unknown",
            "accept_pauses": "accept_pause",
        },
    ),
    (
        "nodepass_refusals",
        "Who or what was refused.",
        "kind",
        {
            "users_kept_out": "user_kept_out",
            "callers_refused": "caller",
            "callers_kept_out": "caller_kept_out",
            "data_connections_refused": "data_connection",
            "certificates_refused": "certificate",
            "tags_wrong": "tunnel_key",
            "datagrams_refused": "datagram_by_target",
        },
    ),
    (
        "nodepass_launches",
        "Launches that took another way than the usual one.",
        "outcome",
        {"launches_failed": "failed", "launches_repeated": "repeated", "signals_stale": "stale"},
    ),
)

Gauge = Callable[[Tunnel], float | None]
GAUGES: tuple[tuple[str, str, Gauge], ...] = (
    (
        "nodepass_up",
        "Whether it works: a server listens, a client calls or is connected.",
        lambda it: it.next_try_at is None,
    ),
    ("nodepass_peer_connected", "Whether its peer is connected.", lambda it: it.condition == "serving"),
    ("nodepass_exchanges", "TCP users, UDP sessions and datagrams that are being carried.", lambda it: it.exchanges),
    ("nodepass_exchanges_limit", "How many there may be at once.", lambda it: it.limit),
    (
        "nodepass_pool_connections",
        "Data connections that are ready.",
        lambda it: sum(p.ready for p in it.description.peers),
    ),
    (
        "nodepass_pool_connections_limit",
        "How many a client keeps ready now, a server takes at most.",
        lambda it: sum(peer.capacity for peer in it.description.peers),
    ),
    (
        "nodepass_certificate_expiry_timestamp_seconds",
        "When the certificate that this side presents expires.",
        lambda it: it.description.certificate.expires if it.description.certificate else None,
    ),
)


class _Collector(Collector):
    """One snapshot as metrics; ``breathe`` is called between them."""

    def __init__(self, snapshot: Snapshot, breathe: Callable[[], object]) -> None:
        self._snapshot = snapshot
        self._breathe = breathe

    def collect(self) -> Iterator[Metric]:
        for metric in self._metrics():
            yield metric
            self._breathe()

    def _metrics(self) -> Iterator[Metric]:
        snapshot = self._snapshot
        versions = {"version": __version__, "python": platform.python_version(), "gevent": gevent.__version__}
        build = GaugeMetricFamily(
            "nodepass_build_info", "Always 1; the labels tell the versions.", labels=list(versions)
        )
        build.add_metric(list(versions.values()), 1)
        yield build
        yield GaugeMetricFamily("nodepass_loop_lag_seconds", "By how much the event loop was late.", snapshot.lag_s)
        dropped = "Log lines that were lost: their reader was too slow, or writing failed."
        yield CounterMetricFamily("nodepass_log_lines_dropped", dropped, snapshot.lines_dropped)
        taken = "Whether the configuration was taken up when it was last read; 0: the one before it goes on."
        yield GaugeMetricFamily("nodepass_config_last_reload_successful", taken, not snapshot.refused)
        for name, text, value in GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=["tunnel"])
            for tunnel in snapshot.tunnels:
                if (number := value(tunnel)) is not None:
                    gauge.add_metric([tunnel.name], number)
            yield gauge
        failures = CounterMetricFamily("nodepass_failures", "Sessions and listeners that failed.", labels=["tunnel"])
        for tunnel in snapshot.tunnels:
            failures.add_metric([tunnel.name], tunnel.failures)
        yield failures
        for name, text, label, values in COUNTERS:
            counter = CounterMetricFamily(name, text, labels=["tunnel", label])
            for tunnel in snapshot.tunnels:
                for key, kind in values.items():
                    counter.add_metric([tunnel.name, kind], tunnel.numbers[key])
            yield counter
        yield self._first_bytes()

    def _first_bytes(self) -> HistogramMetricFamily:
        text = "From a TCP user's arrival, on a client from its launch, to the first byte of the answer."
        times = HistogramMetricFamily("nodepass_time_to_first_byte_seconds", text, labels=["tunnel"])
        for tunnel in self._snapshot.tunnels:
            buckets, seen = [], 0
            for count, bound in zip(tunnel.first_bytes.counts, (*map(str, BOUNDS_S), "+Inf"), strict=True):
                seen += count
                buckets.append((bound, seen))
            times.add_metric([tunnel.name], buckets, tunnel.first_bytes.sum_s)
        return times


def expose(snapshot: Snapshot, breathe: Callable[[], object] = lambda: None) -> bytes:
    """Format a snapshot for Prometheus, with what the kernel says of the process."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(snapshot, breathe))
    ProcessCollector(registry=registry)
    return generate_latest(registry)
