"""What one tunnel is told to do: addresses, durations, limits, and the frozen Config that holds them.

Knows no socket, no file and no command line; a value's source is only a name to put into an error.
A wrong value raises ConfigError with one line of text, in which foreign text is escaped.
"""

import difflib
import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from fractions import Fraction
from typing import Any

from .errors import ConfigError

SHOWN = 120  # characters of foreign text in one error line


def printable(text: str) -> str:
    """Escape what would break or disguise a line, and cut what is long."""
    escaped = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: SHOWN + 1])
    return escaped if len(escaped) <= SHOWN else escaped[: SHOWN - 3] + "..."


def shown(text: object) -> str:
    """Quote foreign text for an error; what stands before an ``@`` may be a tunnel key and is hidden."""
    _, at, rest = str(text).rpartition("@")
    return f"'{printable('***@' + rest if at else rest)}'"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest known word, or nothing."""
    close = difflib.get_close_matches(word[:SHOWN].lower(), list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


# Addresses

_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?")
_MAX_NAME = 253  # RFC 1035, without the dot at the end
_SCOPE = re.compile(r"[A-Za-z0-9_.-]{1,15}")  # an interface name; Linux allows 15 characters


@dataclass(frozen=True)
class Address:
    """A host and a port; host "" means every interface to a listener."""

    host: str  # a name, an IPv4 address, or an IPv6 address without its brackets
    port: int

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Parse ``host:port``, ``:port`` or ``[ipv6]:port``; raise ConfigError."""
        host, colon, port = text.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        if ":" in host and "[" not in text:
            raise ConfigError(f"{shown(text)} has too many colons; an IPv6 address is written in brackets: [::1]:80")
        if not colon or "]" in port:
            raise ConfigError(f"{shown(text)} has no port; allowed: host:port, :port, [ipv6]:port")
        if not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
            raise ConfigError(f"{shown(text)}: the port is not a number from 0 to 65535")
        if bracketed:
            host = host[1:-1]
        problem = _ipv6_problem(host) if bracketed else _host_problem(host)
        if problem:
            raise ConfigError(f"{shown(text)}: {problem}")
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _ipv6_problem(host: str) -> str:
    address, percent, scope = host.partition("%")
    if percent and not _SCOPE.fullmatch(scope):
        return "what follows % is not an interface"
    return "" if _is_address(ipaddress.IPv6Address, address) else "what stands in brackets is not an IPv6 address"


def _host_problem(host: str) -> str:
    if not host:
        return ""
    if not _NAME.fullmatch(host) or len(host.rstrip(".")) > _MAX_NAME:
        return "the host is neither a name (ASCII letters, digits, hyphens, dots) nor an address"
    if host.rstrip(".").rpartition(".")[2].isdigit() and not _is_address(ipaddress.IPv4Address, host):
        return "the host is not an IPv4 address"  # no name ends in a number
    return ""


def _is_address(family: type[ipaddress.IPv4Address] | type[ipaddress.IPv6Address], text: str) -> bool:
    try:
        family(text)
    except ValueError:
        return False
    return True


# Durations, as Go's time.ParseDuration and Duration.String write them

_UNIT_NS = {
    "ns": 1,
    "us": 10**3,
    "\u00b5s": 10**3,  # micro sign
    "\u03bcs": 10**3,  # Greek mu
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
}
_UNITS = "|".join(_UNIT_NS)
_DURATION = re.compile(rf"(?:(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:{_UNITS}))+")
_PART = re.compile(rf"([0-9]*)(?:\.([0-9]*))?({_UNITS})")  # of what matched the whole
_MAX_DURATION = 100  # characters
_INT64 = 2**63  # Go counts nanoseconds in 64 bits


def parse_duration(text: str) -> float:
    """Parse a Go duration such as ``5s``, ``1h30m``, ``1.5h`` or ``0`` into seconds; raise ConfigError."""
    negative = text.startswith("-")
    unsigned = text[1:] if text.startswith(("+", "-")) else text
    if unsigned == "0":
        return 0.0
    if len(unsigned) > _MAX_DURATION or not _DURATION.fullmatch(unsigned):
        raise ConfigError(f"{shown(text)} is not a duration such as 5s, 1h30m or 100ms")
    total_ns = sum(
        int(whole or 0) * _UNIT_NS[unit] + _fraction_ns(fraction, _UNIT_NS[unit])
        for whole, fraction, unit in _PART.findall(unsigned)
    )
    if total_ns >= _INT64 + negative:
        raise ConfigError(f"{shown(text)} is a longer duration than 2562047h")
    return (-total_ns if negative else total_ns) / 10**9


def _fraction_ns(digits: str, unit_ns: int) -> int:
    """Round as Go does: digits past 63 bits are dropped, then one product of floats is cut off."""
    number, scale = 0, 1.0
    for digit in digits:
        longer = number * 10 + int(digit)
        if number > (_INT64 - 1) // 10 or longer > _INT64:
            break
        number, scale = longer, scale * 10
    return int(number * (unit_ns / scale))


def format_duration(seconds: float) -> str:
    """Format seconds as Go prints a duration: ``1h30m0s``, ``1.5s``, ``100ms``; rounded to nanoseconds."""
    total_ns = round(Fraction(seconds) * 10**9)
    sign, total_ns = "-" if total_ns < 0 else "", abs(total_ns)
    if total_ns == 0:
        return "0s"
    for unit, unit_ns in (("ns", 1), ("\u00b5s", 10**3), ("ms", 10**6)):
        if total_ns < unit_ns * 1000:
            return f"{sign}{_decimal(total_ns, unit_ns)}{unit}"
    minutes, rest_ns = divmod(total_ns, _UNIT_NS["m"])
    text = _decimal(rest_ns, _UNIT_NS["s"]) + "s"
    if minutes:
        text = f"{minutes % 60}m{text}"
    if minutes >= 60:
        text = f"{minutes // 60}h{text}"
    return sign + text


def _decimal(number: int, unit: int) -> str:
    whole, rest = divmod(number, unit)
    return f"{whole}.{rest:0{len(str(unit)) - 1}d}".rstrip("0").rstrip(".") if rest else str(whole)


# Limits and settings

LOG_LEVELS = ("debug", "info", "warn", "error", "fatal")  # the most detailed first


@dataclass(frozen=True)
class Limits:
    """Deadlines and sizes that no setting changes yet."""

    connect_timeout_s: float = 5.0  # a dial; a second SYN goes out after 1 s, a third after 3 s
    first_line_timeout_s: float = 30.0  # the original's server can take 20 s to come back
    opening_timeout_s: float = 5.0  # a caller that has begun to say what it is
    caller_timeout_s: float = 10.0  # a caller on the tunnel port that says nothing
    tls_handshake_timeout_s: float = 5.0  # the original's deadline
    id_timeout_s: float = 10.0  # the client waits for the 8-byte id of a data connection
    pool_wait_s: float = 10.0  # a user waits for a data connection
    half_closed_timeout_s: float = 60.0  # one direction ended and the other is silent
    control_dead_s: float = 15.0  # least silence of a v1 server that counts as dead (the rule: 3 observed intervals)
    drain_linger_s: float = 2.0  # after our FIN, the wait for the peer's
    callers: int = 64  # connections on the tunnel port that are not known yet
    keepalive_idle_s: int = 20  # below the 30 s after which the shortest NATs forget
    keepalive_interval_s: int = 8
    keepalive_count: int = 3  # with idle and interval: a dead peer is known after 44 s
    user_timeout_s: float = 20.0  # unacknowledged bytes; TCP alone would wait 15 min


def _within(low: float, high: float, default: float | None) -> Any:
    return field(default=default, metadata={"range": (low, high)})


def _one_of(*choices: Any, default: Any = MISSING) -> Any:
    return field(default=default, metadata={"choices": choices})


def setting_name(field_name: str) -> str:
    """Return what operators call a field of Config: ``udp_read_timeout_s`` is ``udp-read-timeout``."""
    return field_name.removesuffix("_s").replace("_", "-")


def setting_text(field_name: str, value: Any) -> str:
    """Format a field of Config as operators write it."""
    return format_duration(value) if field_name.endswith("_s") else str(value)


@dataclass(frozen=True, kw_only=True)
class Config:
    """One tunnel's settings, checked. ``sources`` names where each setting came from, by setting name."""

    role: str = _one_of("server", "client")
    tunnel: Address
    target: Address  # the server's public port, the client's target
    name: str = ""  # of the tunnel, where there are several
    log: str = _one_of(*LOG_LEVELS, default="info")
    tls: int = _one_of(0, 1, 2, default=0)  # a client's is the least mode it accepts
    crt: str | None = None  # a file
    key: str | None = None  # a file
    data_port: int | None = _within(1, 65535, None)  # None: any free one
    network: str = _one_of("tcp", "udp", "both", default="both")
    protocol: str = _one_of("auto", "1", "2", default="auto")
    semaphore_limit: int = _within(1, 1 << 20, 1024)
    min_pool_capacity: int = _within(1, 1 << 16, 16)
    max_pool_capacity: int = _within(1, 1 << 16, 1024)
    udp_data_buf_size: int = _within(1, 65507, 8192)  # the most an IPv4 datagram holds
    udp_read_timeout_s: float = _within(0.001, 24 * 3600, 5.0)
    report_interval_s: float = _within(0.01, 3600, 5.0)  # below 10 ms keep-alives would be the traffic
    reload_interval_s: float = _within(0.01, 8760 * 3600, 3600.0)
    service_cooldown_s: float = _within(0.001, 24 * 3600, 5.0)
    shutdown_timeout_s: float = _within(0, 24 * 3600, 5.0)  # 0: nobody is waited for
    limits: Limits = Limits()
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for each in fields(self):
            self._check_field(each.name, each.metadata)
        if self.min_pool_capacity > self.max_pool_capacity:
            most = f"{self.max_pool_capacity} (from {self.source('max-pool-capacity')})"
            raise self.fault("min_pool_capacity", f"is above max-pool-capacity, {most}")
        self._check_certificate()
        if self.role == "client":
            self._check_client()
        else:
            self._check_server()

    @property
    def url(self) -> str:
        """The tunnel without its settings."""
        return f"{self.role}://{self.tunnel}/{self.target}"

    def source(self, setting: str) -> str:
        """Name where a setting, by its dashed name, came from."""
        return self.sources.get(setting, "default")

    def fault(self, field_name: str, why: str) -> ConfigError:
        """Make the error for a field: its name, its value, what is wrong, its source."""
        name, value = (setting_name(field_name), setting_text(field_name, getattr(self, field_name)))
        return ConfigError(f"{name}: {shown(value)} {why} [from {self.source(name)}]")

    def _check_field(self, name: str, rule: Mapping[str, Any]) -> None:
        value = getattr(self, name)
        if "choices" in rule and value not in rule["choices"]:
            hint = did_you_mean(value, rule["choices"]) if isinstance(value, str) else ""
            raise self.fault(name, f"is not one of {', '.join(map(str, rule['choices']))}{hint}")
        if "range" in rule and value is not None and not rule["range"][0] <= value <= rule["range"][1]:
            low, high = (setting_text(name, bound) for bound in rule["range"])
            raise self.fault(name, f"is not within {low} to {high}")

    def _check_certificate(self) -> None:
        if self.role == "client" and (self.crt or self.key):
            raise self.fault("crt" if self.crt else "key", "belongs to the server; a client has none")
        if self.crt and not self.key:
            raise self.fault("crt", "has no key that belongs to it; give both crt and key, or neither")
        if self.key and not self.crt:
            raise self.fault("key", "has no crt that belongs to it; give both crt and key, or neither")

    def _check_client(self) -> None:
        if self.data_port is not None:
            raise self.fault("data_port", "belongs to the server; a client has none")
        for address in (self.tunnel, self.target):
            if address.port == 0:
                raise self.fault("url", f"dials {shown(address)}; a client needs ports from 1 to 65535")

    def _check_server(self) -> None:
        if self.tls == 2 and not self.crt:
            raise self.fault("tls", "needs crt and key; without them allowed: 0, 1")
        if self.data_port is not None and self.data_port == self.tunnel.port:
            raise self.fault("data_port", "is the tunnel port already; give another one, or none")
        if self.tunnel.port and self.tunnel == self.target and self.network != "udp":
            raise self.fault("url", "names one address twice; the tunnel port and the public port must differ")
