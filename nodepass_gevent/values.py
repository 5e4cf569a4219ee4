"""What operators write, and how it is read: addresses, networks, pins and durations; and foreign text in an error.

Knows no setting, no socket and no file. Parse stands beside format; a wrong text raises ConfigError with one line,
in which foreign text is escaped.
"""

import base64
import difflib
import ipaddress
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction

from .errors import ConfigError

SHOWN = 120  # characters of foreign text in one error line

_TUNNEL_KEY = re.compile(r"np1:[^@/?#,\s]+")


def printable(text: str, most: int = SHOWN) -> str:
    """Escape what would break or disguise a line, hide a tunnel key that went astray, and cut what is long."""
    line = escaped(_TUNNEL_KEY.sub("np1:***", text)[: most + 1])
    return line if len(line) <= most else line[: most - 3] + "..."


def escaped(text: str) -> str:
    """Escape what would break or disguise a line, and leave the rest as it is."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown(text: object) -> str:
    """Quote foreign text for an error; what stands before an ``@`` may be a tunnel key and is hidden."""
    _, at, rest = str(text).rpartition("@")
    return f"'{printable('***@' + rest if at else rest)}'"


def shown_path(path: object) -> str:
    """Quote the name of a file for an error; it may hold an ``@``, as systemd's credentials do, if it is no URL."""
    return shown(path) if "://" in str(path) else f"'{printable(str(path))}'"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest known word, or nothing."""
    close = closest(word, known)
    return f" (did you mean '{close}'?)" if close else ""


def closest(word: str, known: Iterable[str]) -> str:
    """Return the known word that is most like another one, or whose beginning or whole stands in the other; or "".

    Letters count in whatever case, and dashes in front not at all: they are alike in every option.
    """
    by_name = {each.lower().lstrip("-"): each for each in known}
    word = word[:SHOWN].lower().lstrip("-")
    close = difflib.get_close_matches(word, list(by_name), n=1)
    if not close:
        longer = [name for name in by_name if name.startswith(f"{word}-")]
        close = longer if len(longer) == 1 else [max(filter(word.startswith, by_name), key=len, default="")]
    return by_name.get(close[0], "")


# Addresses

_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?")
_MAX_NAME = 253  # RFC 1035, without the dot at the end
_LINK_LOCAL = ipaddress.IPv6Network("fe80::/10")
_SCOPE = re.compile(r"[A-Za-z0-9_.-]{1,15}")  # an interface name; Linux allows 15 characters


@dataclass(frozen=True)
class Address:
    """A host and a port; host "" means every interface to a listener."""

    host: str  # a name, an IPv4 address, or an IPv6 address without its brackets
    port: int

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Parse ``host:port``, ``:port`` or ``[ipv6]:port``; raise ConfigError."""
        if "://" in text:
            raise ConfigError(f"{shown(text)} is a URL; an address is host:port alone")
        host, colon, port = text.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        if ":" in host and "[" not in text:
            raise ConfigError(f"{shown(text)} has too many colons; an IPv6 address is written in brackets: [::1]:80")
        if not colon or "]" in port:
            hint = f" (did you mean :{text}?)" if re.fullmatch("[0-9]{1,5}", text) else ""
            raise ConfigError(f"{shown(text)} has no port{hint}; allowed: host:port, :port, [ipv6]:port")
        if not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
            raise ConfigError(f"{shown(text)}: the port is not a number from 0 to 65535")
        if bracketed:
            host = host[1:-1]
        problem = _ipv6_problem(host) if bracketed else _host_problem(host)
        if problem:
            raise ConfigError(f"{shown(text)}: {problem}")
        return cls(host, int(port))

    @property
    def is_loopback(self) -> bool:
        """Whether it is an address that only this machine can reach."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def is_unspecified(self) -> bool:
        """Whether it is written as every address: something to listen on, and nothing to call."""
        try:
            return unmapped(self.host).is_unspecified
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _ipv6_problem(host: str) -> str:
    address, percent, scope = host.partition("%")
    if percent and not _SCOPE.fullmatch(scope):
        return "what follows % is not an interface"
    if not _is_address(ipaddress.IPv6Address, address):
        return "what stands in brackets is not an IPv6 address"
    if not percent and ipaddress.IPv6Address(address) in _LINK_LOCAL:
        return f"a link-local address needs its interface, such as [{address}%eth0]"
    return ""


def _host_problem(host: str) -> str:
    if not host:
        return ""
    if not _NAME.fullmatch(host) or len(host.rstrip(".")) > _MAX_NAME:
        return "the host is neither a name (ASCII letters, digits, hyphens, dots) nor an address"
    if host.rstrip(".").rpartition(".")[2].isdigit() and not _is_address(ipaddress.IPv4Address, host):
        return "the host is not an IPv4 address"  # no name ends in a number
    return ""


def is_host(text: str) -> bool:
    """Say whether a text is a name, or an address without brackets."""
    return bool(text) and (_is_address(ipaddress.IPv6Address, text) or not _host_problem(text))


def is_literal(host: str) -> bool:
    """Whether a host is an address already, and no name."""
    return _is_address(ipaddress.ip_address, host)


def _is_address(read: Callable[[str], object], text: str) -> bool:
    try:
        read(text)
    except ValueError:
        return False
    return True


# Pins

_PIN_PREFIX = re.compile("sha-?256(://|//|:|/)", re.IGNORECASE)
_PIN_HEX, _PIN_BASE64 = re.compile("[0-9A-Fa-f]{64}"), re.compile("[A-Za-z0-9+/_-]{43}=?")


def format_pin(digest: bytes) -> str:
    """Format a public key's digest in the form that survives shells and URLs."""
    return f"sha256:{digest.hex()}"


@dataclass(frozen=True)
class Pins:
    """SHA-256 digests of public keys (SubjectPublicKeyInfo), of which a server has to have one."""

    digests: tuple[bytes, ...]

    @classmethod
    def parse(cls, text: str) -> "Pins":
        """Parse pins as curl (``sha256//<base64>``) and openssl (hex) have them; raise ConfigError."""
        return cls(tuple(cls._parse_one(each.strip()) for each in re.split("[,;]", text)))

    @staticmethod
    def _parse_one(text: str) -> bytes:
        prefix = _PIN_PREFIX.match(text)
        digest = text[prefix.end() if prefix else 0 :].replace(":", "")
        if _PIN_HEX.fullmatch(digest):
            return bytes.fromhex(digest)
        if _PIN_BASE64.fullmatch(digest):
            return base64.urlsafe_b64decode(digest[:43].replace("+", "-").replace("/", "_") + "=")
        raise ConfigError(f"{shown(text)} is not a pin: sha256: and 64 hexadecimal digits, or sha256// and base64")

    def __str__(self) -> str:
        return ",".join(map(format_pin, self.digests))


# Networks

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_Host = ipaddress.IPv4Address | ipaddress.IPv6Address


def unmapped(host: str) -> _Host:
    """Give a numeric host as an address, without its zone; mapped IPv4 is IPv4."""
    address = ipaddress.ip_address(host.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


@dataclass(frozen=True)
class Networks:
    """A list of networks; a single address is a network of one."""

    networks: tuple[_Network, ...]

    @classmethod
    def parse(cls, text: str) -> "Networks":
        """Parse addresses and networks, comma-separated: ``192.0.2.0/24,2001:db8::1``; raise ConfigError."""
        return cls(tuple(_parse_network(part.strip(" ")) for part in text.split(",")))

    def __contains__(self, address: _Host) -> bool:
        return any(address in network for network in self.networks)

    def __str__(self) -> str:
        return ",".join(map(_format_network, self.networks))


def _parse_network(text: str) -> _Network:
    try:
        network = ipaddress.ip_network(text.replace("%", " "), strict=False)  # a zone is no part of a network
    except ValueError:
        raise ConfigError(
            f"{shown(text)} is neither an address nor a network such as 192.0.2.0/24 or 2001:db8::/32"
        ) from None
    if "/" in text and ipaddress.ip_address(text.partition("/")[0]) != network.network_address:
        raise ConfigError(f"{shown(text)} has bits behind its prefix; the network is written {network}")
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    if mapped and network.prefixlen >= 96:  # as a listener for both families sees IPv4
        return ipaddress.ip_network((mapped, network.prefixlen - 96))
    return network


def _format_network(network: _Network) -> str:
    alone = network.prefixlen == network.max_prefixlen
    return str(network.network_address) if alone else str(network)


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


def parse_seconds(text: str) -> float:
    """Parse a duration; an integer when these are whole seconds, for who takes no others."""
    seconds = parse_duration(text)
    return int(seconds) if seconds.is_integer() else seconds


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
