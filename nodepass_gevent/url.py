"""The URL that says what a tunnel is: ``server://[<tunnel_key>@]<tunnel_addr>/<target_addr>?key=value&...``.

Split by rules of our own: urlsplit drops tabs and newlines and keeps quiet about much else.
Knows no setting: what the query's keys mean is not decided here.
"""

import re
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes

from .errors import ConfigError
from .values import Address, did_you_mean, printable, shown

ROLES = ("server", "client")
FORMS = "server://<tunnel_addr>/<target_addr> or client://<tunnel_addr>/<target_addr>"
MAX_URL = 8192  # characters; a long one with every setting has about 500
_KEY_FORM = (
    "a tunnel key stands before the tunnel address; in it write / as %2F, ? as %3F, # as %23, @ as %40, % as %25"
)
_BAD_PERCENT = re.compile("%(?![0-9A-Fa-f]{2})")
_FOREIGN_SCHEME = re.compile("[A-Za-z]{2,10}://")


@dataclass(frozen=True)
class TunnelURL:
    """The parts of a tunnel's URL; query values are decoded, keys are as written."""

    role: str
    tunnel: Address
    target: Address
    query: tuple[tuple[str, str], ...]
    key: str | None = field(default=None, repr=False)  # what stands before an @


def parse_url(text: str) -> TunnelURL:
    """Parse a tunnel's URL; raise ConfigError, whose text holds neither userinfo nor the whole URL."""
    if len(text) > MAX_URL:
        raise ConfigError(f"longer than {MAX_URL} characters")
    for position, char in enumerate(text, start=1):
        if char == " " or not char.isprintable():
            raise ConfigError(f"character {position} is '{printable(char)}'; blanks and control characters are refused")
    scheme, separator, rest = text.partition("://")
    if not separator:
        raise ConfigError(f"{shown(text)} has no ://; allowed: {FORMS}")
    role = scheme.lower()
    if role not in ROLES:
        raise ConfigError(f"unknown scheme {shown(scheme)}{did_you_mean(role, ROLES)}; allowed: {FORMS}")
    if "#" in rest:
        raise ConfigError("a fragment (#...) is not allowed; write # as %23")
    addresses, _, query = rest.partition("?")
    key, at, addresses = _split_key(addresses)
    try:
        tunnel, target = _addresses(addresses)
    except ConfigError:
        if not at and "@" in query:  # what was taken for an address may be a piece of a key
            raise ConfigError(_KEY_FORM) from None
        raise
    return TunnelURL(role, tunnel, target, _query(query), _decoded("tunnel-key", key) if at else None)


def _split_key(text: str) -> tuple[str, str, str]:
    """Split off what stands before an ``@``; no address holds one."""
    key, at, addresses = text.rpartition("@")
    if "/" in key or "@" in key:
        raise ConfigError(_KEY_FORM)
    if at and not key:
        raise ConfigError("the tunnel key before @ is empty")
    return key, at, addresses


def _addresses(text: str) -> tuple[Address, Address]:
    scheme = _FOREIGN_SCHEME.search(text)
    if scheme:
        raise ConfigError(f"an address is host:port alone, without {scheme[0]}")
    if "&" in text:
        raise ConfigError("settings begin with ?, not with &")
    tunnel, _, target = text.partition("/")
    if not target:
        raise ConfigError(f"the target address is missing; allowed: {FORMS}")
    if "/" in target:
        raise ConfigError(f"the target address {shown(target)} must not be followed by a path")
    return _address("tunnel", tunnel), _address("target", target)


def _address(which: str, text: str) -> Address:
    try:
        return Address.parse(text.replace("%25", "%"))  # before the zone of an address, as RFC 6874 has it
    except ConfigError as exc:
        raise ConfigError(f"the {which} address {exc}") from exc


def _query(text: str) -> tuple[tuple[str, str], ...]:
    pairs = (item.partition("=") for item in text.split("&") if item)
    return tuple((key, _decoded(key, value)) for key, _, value in pairs)


def _decoded(key: str, value: str) -> str:
    """Decode %XX; a plus sign stays one, for file names have them."""
    if _BAD_PERCENT.search(value):
        raise ConfigError(f"the value of {shown(key)} has a % without two hexadecimal digits; write % as %25")
    try:
        return unquote_to_bytes(value).decode()
    except UnicodeDecodeError as exc:
        raise ConfigError(f"the value of {shown(key)} is not UTF-8 text") from exc
