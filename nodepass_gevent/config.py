"""What a tunnel is told to do, and the process that runs it: Config and Process, their settings, ranges and defaults.

Knows no socket, no file and no command line; a value's source is only a name to put into an error.
A wrong value raises ConfigError with one line of text, in which foreign text is escaped.
"""

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from .errors import ConfigError
from .tunnel_key import TunnelKey
from .values import Address, Networks, Pins, did_you_mean, format_duration, is_host, shown, shown_path

_TUNNEL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
LOG_LEVELS = ("debug", "info", "warn", "error", "fatal")  # the most detailed first
LOG_FORMATS = ("text", "json")
FILES_READ = ("crt", "key", "ca", "tunnel_key_file", "status_token_file")
FILES = (*FILES_READ, "log_to")  # fields that name a file


def _within(low: float, high: float, default: float | None) -> Any:
    return field(default=default, metadata={"range": (low, high)})


def _one_of(*choices: Any, default: Any = MISSING) -> Any:
    return field(default=default, metadata={"choices": choices})


def _deadline(default_s: float) -> Any:
    return _within(0.001, 24 * 3600, default_s)


def _whole_seconds(default_s: int) -> Any:
    return field(default=default_s, metadata={"range": (1, 32767), "whole": True})  # what Linux takes


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Deadlines and sizes; each is a setting. Those that can be off are off at 0."""

    connect_timeout_s: float = _deadline(5.0)  # a second SYN goes out after 1 s, a third after 3 s
    target_timeout_s: float = _deadline(5.0)
    first_line_timeout_s: float = _deadline(30.0)  # the original's server can take 20 s to come back
    opening_timeout_s: float = _deadline(5.0)  # a caller that has begun to say what it is
    caller_timeout_s: float = _deadline(10.0)  # a caller on the tunnel port that says nothing
    tls_handshake_timeout_s: float = _deadline(5.0)  # the original's deadline
    authentication_timeout_s: float = _deadline(5.0)  # all before it has caller_timeout_s since accept
    takeover_timeout_s: float = _deadline(2.0)  # a client answers a ping: less than the other waits for its welcome
    id_timeout_s: float = _deadline(10.0)  # the client waits for the 8-byte id of a data connection
    pool_wait_s: float = _deadline(10.0)  # a user waits for a data connection
    half_closed_timeout_s: float = _deadline(60.0)  # one direction ended and the other is silent
    idle_timeout_s: float = _within(0, 8760 * 3600, 0)  # off: TCP itself knows no such limit, and SSH users rely on it
    udp_session_timeout_s: float = _deadline(60.0)  # nothing moves either way; NATs forget UDP after 30 to 180 s
    drain_linger_s: float = _deadline(2.0)  # after our FIN, the wait for the peer's
    dead_intervals: int = _within(1, 1000, 3)  # of silence; a single lost ping proves little
    dead_timeout_s: float = _deadline(15.0)  # towards a v1 server, whose interval is not known from the start
    users_per_address: int = _within(0, 1 << 20, 0)  # off: all users may come through one proxy or NAT
    udp_rate_per_address: int = _within(0, 1 << 20, 0)  # off: an upload over QUIC is thousands a second
    callers: int = _within(1, 1 << 16, 64)  # connections on the tunnel port that are not known yet
    penalty_after: int = _within(0, 1000, 3)  # wrong proofs from one address; keys are mistyped
    penalty_first_s: float = _deadline(5.0)  # doubles with each further one
    penalty_longest_s: float = _deadline(600.0)  # who has the right key by then has not waited for ever
    accept_pause_s: float = _deadline(0.05)  # of a listener without descriptors or memory; doubles
    accept_pause_longest_s: float = _deadline(1.0)  # as long as users wait without noticing much
    descriptor_reserve: int = _within(0, 1 << 16, 16)  # for name look-ups (10 at most), files that are read again
    keepalive_idle_s: int = _whole_seconds(20)  # below the 30 s after which the shortest NATs forget
    keepalive_interval_s: int = _whole_seconds(8)
    keepalive_count: int = _within(1, 127, 3)  # with idle and interval: a dead peer is known after 44 s
    tcp_user_timeout_s: float = _deadline(20.0)  # unacknowledged bytes; TCP alone would wait 15 min


def setting_name(field_name: str) -> str:
    """Return what operators call a field of Config: ``udp_read_timeout_s`` is ``udp-read-timeout``."""
    return field_name.removesuffix("_s").replace("_", "-")


def setting_text(field_name: str, value: Any) -> str:
    """Format a field of Config as operators write it."""
    return format_duration(value) if field_name.endswith("_s") else str(value)


class Checked:
    """What Config and Process share: settings with rules, each with a source."""

    sources: Mapping[str, str]

    def value(self, field_name: str) -> Any:
        """Give the value of a field."""
        return getattr(self, field_name)

    def source(self, setting: str) -> str:
        """Name where a setting, by its dashed name, came from."""
        return self.sources.get(setting, "default")

    def fault(self, field_name: str, why: str) -> ConfigError:
        """Make the error for a field: its name, its value, what is wrong, its source."""
        name, value = (setting_name(field_name), setting_text(field_name, self.value(field_name)))
        quoted = shown_path(value) if field_name in FILES else shown(value)
        return ConfigError(f"{name}: {quoted} {why} [from {self.source(name)}]")

    def _check_field(self, name: str, rule: Mapping[str, Any]) -> None:
        value = self.value(name)
        if "choices" in rule and value not in rule["choices"]:
            hint = did_you_mean(value, map(str, rule["choices"])) if isinstance(value, str) else ""
            raise self.fault(name, f"is not one of {', '.join(map(str, rule['choices']))}{hint}")
        if "range" in rule and value is not None and not rule["range"][0] <= value <= rule["range"][1]:
            low, high = (setting_text(name, bound) for bound in rule["range"])
            raise self.fault(name, f"is not within {low} to {high}")
        if "whole" in rule and value % 1:
            raise self.fault(name, "is not a whole number of seconds")


@dataclass(frozen=True, kw_only=True)
class Process(Checked):
    """The settings of the whole process, whatever tunnels it runs."""

    log_to: str = "stdout"  # stdout, stderr or a file
    log_format: str = _one_of(*LOG_FORMATS, default="text")
    log_rate: int = _within(0, 1 << 20, 1)  # ten lines in ten seconds show what is wrong, and a flood is no full disk
    status: Address | None = None  # where it is asked how it is; None: nowhere
    status_token_file: str | None = None  # whose content who asks must know
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for each in fields(self):
            self._check_field(each.name, each.metadata)
        if self.status and not self.status.is_loopback and self.status_token_file is None:
            raise self.fault("status", "can be asked by others; give a status-token-file, or a loopback address")


def is_live(field_name: str) -> bool:
    """Whether a field of Config may change while its tunnel runs: levels of its log, times, and counts beside times.

    Not those of keepalive, which accepted connections have from their listener.
    """
    timed = field_name.endswith("_s") and not field_name.startswith("keepalive_")
    return timed or field_name in ("log", "access_log", "dead_intervals", "penalty_after")


DEMANDS = (  # of a client, and the least TLS mode in which each is met
    ("ca", 2),
    ("sni", 2),
    ("pin", 1),
    ("crt", 1),
    ("tunnel_key", 1),
    ("tunnel_key_file", 1),
)
ORDERED = (  # the first is at most the second
    ("min_pool_capacity", "max_pool_capacity"),
    ("penalty_first_s", "penalty_longest_s"),
    ("accept_pause_s", "accept_pause_longest_s"),
)


@dataclass(frozen=True, kw_only=True)
class Config(Checked):
    """One tunnel's settings, checked. ``sources`` names where each setting came from, by setting name.

    Frozen but for ``adopt``.
    """

    role: str = _one_of("server", "client")
    tunnel: Address
    target: Address  # the server's public port, the client's target
    name: str = ""  # of the tunnel in its config file, where there are several
    log: str = _one_of(*LOG_LEVELS, default="info")
    access_log: str = _one_of("off", "debug", "info", default="debug")
    tls: int = _one_of(0, 1, 2, default=0)  # a client's is the least mode it accepts
    crt: str | None = None  # a file
    key: str | None = None  # a file
    ca: str | None = None  # a file
    sni: str | None = None
    pin: Pins | None = None
    tunnel_key: TunnelKey | None = None
    tunnel_key_file: str | None = None
    tunnel_name: str | None = None  # goes into the key, and so is the same at both ends
    allow_users: Networks | None = None  # None: everybody
    deny_users: Networks | None = None  # None: nobody; wins over allow
    allow_clients: Networks | None = None
    deny_clients: Networks | None = None
    data_port: int | None = _within(1, 65535, None)  # None: any free one
    reuse_port: int = _one_of(0, 1, default=0)  # several processes on the tunnel port and the public port
    network: str = _one_of("tcp", "udp", "both", default="both")
    protocol: str = _one_of("auto", "1", "2", default="auto")
    proxy_protocol: int = _one_of(0, 1, 2, default=0)  # of the header for the target; 0: none
    semaphore_limit: int = _within(1, 1 << 20, 1024)
    min_pool_capacity: int = _within(1, 1 << 16, 16)
    max_pool_capacity: int = _within(1, 1 << 16, 1024)
    udp_data_buf_size: int = _within(1, 65507, 8192)  # the most an IPv4 datagram holds
    udp_read_timeout_s: float = _within(0.001, 24 * 3600, 5.0)
    report_interval_s: float = _within(0.01, 3600, 5.0)  # below 10 ms keep-alives would be the traffic
    reload_interval_s: float = _within(0.01, 8760 * 3600, 3600.0)
    service_cooldown_s: float = _within(0.001, 24 * 3600, 5.0)
    shutdown_timeout_s: float = _within(0, 24 * 3600, 5.0)  # 0: nobody is waited for
    limits: Limits = field(default_factory=Limits)  # of its own, as ``adopt`` changes them
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for each in (*fields(self), *fields(self.limits)):
            self._check_field(each.name, each.metadata)
        for least, most in ORDERED:
            self._check_order(least, most)
        self._check_pair()
        self._check_tunnel_key()
        if self.role == "client":
            self._check_client()
        else:
            self._check_server()

    def changes(self, other: "Config") -> list[str]:
        """Name the fields in which ``other`` differs."""
        return [name for name in _FIELDS if self.value(name) != other.value(name)]

    def adopt(self, other: "Config") -> bool:
        """Take over what differs in ``other`` when all of it may change in a running tunnel; else False, and nothing.

        The one way in which a Config changes: all parts of the tunnel hold it, or its limits, and read them when due.
        """
        changed = self.changes(other)
        if not all(map(is_live, changed)):
            return False
        for name in changed:
            object.__setattr__(self if name in _OWN else self.limits, name, other.value(name))
        object.__setattr__(self, "sources", other.sources)
        return True

    @property
    def leave_s(self) -> float:
        """How long an orderly end of a session may take."""
        return min(self.limits.drain_linger_s, self.shutdown_timeout_s)

    @property
    def url(self) -> str:
        """The tunnel without its settings."""
        return f"{self.role}://{self.tunnel}/{self.target}"

    @property
    def keyed(self) -> bool:
        """Whether nobody is served, and no server taken, without the tunnel key."""
        return self.tunnel_key is not None or self.tunnel_key_file is not None

    @property
    def serves_v1(self) -> bool:
        """Whether a server takes clients of profile v1, which cannot prove a tunnel key."""
        return self.protocol != "2" and not self.keyed

    def value(self, field_name: str) -> Any:
        """Give the value of a field, its own or one of its limits."""
        return getattr(self if hasattr(self, field_name) else self.limits, field_name)

    @property
    def tls_demanded(self) -> tuple[int, str]:
        """The least TLS mode that a client accepts, and the setting that demands it."""
        demands = [
            (self.tls, f"tls={self.tls}"),
            *((mode, setting_name(name)) for name, mode in DEMANDS if getattr(self, name)),
        ]
        return max(demands, key=lambda demand: demand[0])

    def _lack_of_tls(self, field_name: str, least: int) -> ConfigError:
        modes = " or ".join(f"tls={mode}" for mode in range(least, 3))
        return self.fault(field_name, f"needs {modes}, and tls is {self.tls} (from {self.source('tls')})")

    def _check_order(self, least: str, most: str) -> None:
        if self.value(least) > self.value(most):
            name, text = setting_name(most), setting_text(most, self.value(most))
            raise self.fault(least, f"is above {name}, {text} (from {self.source(name)})")

    def _check_pair(self) -> None:
        if self.crt and not self.key:
            raise self.fault("crt", "has no key that belongs to it; give both crt and key, or neither")
        if self.key and not self.crt:
            raise self.fault("key", "has no crt that belongs to it; give both crt and key, or neither")

    def _check_tunnel_key(self) -> None:
        if self.tunnel_name is not None and not _TUNNEL_NAME.fullmatch(self.tunnel_name):
            raise self.fault("tunnel_name", "is not 1 to 64 ASCII letters, digits, '_', '.' or '-'")
        if not self.keyed:
            return
        if self.tunnel_key is not None and self.tunnel_key_file is not None:
            other = self.source("tunnel-key")
            raise self.fault("tunnel_key_file", f"is not the only one: there is a tunnel-key, from {other}")
        if self.role == "server" and self.tls == 0:
            raise self._lack_of_tls("tunnel_key" if self.tunnel_key is not None else "tunnel_key_file", 1)
        if self.protocol == "1":
            raise self.fault("protocol", "knows no tunnel key; with one allowed: auto, 2")

    def _check_client(self) -> None:
        for name, mode in DEMANDS if "tls" in self.sources else ():
            if self.tls == 0 and getattr(self, name) is not None:
                raise self._lack_of_tls(name, mode)
        for name in ("data_port", "allow_users", "deny_users", "allow_clients", "deny_clients"):
            if getattr(self, name) is not None:
                raise self.fault(name, "belongs to the server; a client has none")
        if self.reuse_port:
            raise self.fault("reuse_port", "belongs to the server, whose ports processes can share")
        if self.sni is not None and not is_host(self.sni):
            raise self.fault("sni", "is neither a name (ASCII letters, digits, hyphens, dots) nor an address")
        if self.tunnel.is_unspecified:
            raise self.fault("url", f"calls {self.tunnel.host}, which is no address to call: name the server")
        for address in (self.tunnel, self.target):
            if address.port == 0:
                raise self.fault("url", f"dials {shown(address)}; a client needs ports from 1 to 65535")

    def _check_server(self) -> None:
        if self.proxy_protocol:
            raise self.fault("proxy_protocol", "belongs to the client, which connects to the target")
        for name in ("sni", "pin"):
            if getattr(self, name) is not None:
                raise self.fault(name, "belongs to the client; a server has none")
        if self.tls == 0 and self.ca:
            raise self.fault("ca", "demands certificates of clients, and needs tls; allowed then: 1, 2")
        if self.tls == 2 and not self.crt:
            hint = " (in a shell, put the URL in quotes)" if self.source("tls") == "URL query" else ""
            raise self.fault("tls", f"needs crt and key{hint}; without them allowed: 0, 1")
        if self.data_port is not None and not self.serves_v1 and not self.reuse_port:
            why = "with a tunnel key" if self.keyed else "with protocol=2"
            raise self.fault("data_port", f"is for clients of profile v1, and {why} none is served")
        if self.data_port is not None and self.data_port == self.tunnel.port:
            raise self.fault("data_port", "is the tunnel port already; give another one, or none")
        if self.reuse_port and not (self.tunnel.port and self.target.port):
            raise self.fault("reuse_port", "shares ports that are named, and the URL leaves one to the system by 0")
        if self.tunnel.port and self.tunnel == self.target and self.network != "udp":
            raise self.fault("url", "names one address twice; the tunnel port and the public port must differ")


_OWN = [each.name for each in fields(Config) if each.name not in ("limits", "sources")]
_FIELDS = [*_OWN, *(each.name for each in fields(Limits))]
