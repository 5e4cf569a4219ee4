"""The lines by which connections open, parse beside format: who calls, and what both sides speak.

Profile v1, server -> every caller of the tunnel port, at once; the caller answers nothing:

    //<data port>#<tls mode>    (``off`` for the port where no v1 client is served)

Profile v2 is offered in the query of that line, which a v1 client ignores, and taken up by a line of the caller's:

    //<data port>?v=2&n=<nonce>#<tls mode>          server -> every caller of the tunnel port
    //<name>?v=2[&c=<capabilities>]#hello           client -> server: this is a client of tunnel <name>
    //<session>?v=2#data                            client -> server: this is a data connection of <session>
    //<session>?c=<capabilities>&i=<s>&p=<n>#welcome   server -> client: session, ping interval, most data connections

Where several processes share the tunnel port the first line has ``d=<port>`` too: there this one's data connections go.
With a tunnel key the first line has ``a=psk1`` too, the hello has no capabilities, and for the welcome come, in TLS:

    //auth?n=<nonce>&m=<tag>&c=<capabilities>#c     client -> server: its proof of the key
    //auth?s=<session>&m=<tag>&c=<capabilities>&i=<s>&p=<n>#s   server -> client: its proof, and the welcome

A server that takes no client now says bye in place of either welcome. Grammar, bye, and what is raised are those of
``wire``.
"""

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import quote, unquote_to_bytes

from . import tunnel_key
from .errors import ProtocolError
from .wire import MAX_LINE, NUMBER, Bye, Line, parse_line, printable

MAX_FIRST_LINE = 1024  # bytes; room for the offers of later profiles
TLS_MODES = OFF, SELF_SIGNED, VERIFIED = 0, 1, 2  # as they stand in the first line
VERSION = b"2"
NONCE_LENGTH = 16  # bytes in a first line that offers v2
SESSION_LENGTH = 8  # bytes, written as hexadecimal digits in lines
ALPN_CONTROL, ALPN_DATA = b"nodepass-ctl/2", b"nodepass-data/2"
NEED, FAIL, BYE, FROM, UDP = (b"need", b"fail", b"bye", b"from", b"udp")  # capabilities: signals, and UDP sessions

_PORT = re.compile(rb"[1-9][0-9]{0,4}")
_SESSION = re.compile(rb"[0-9a-f]{16}")
_DATA = re.compile(rb"//([0-9a-f]{16})\?v=2#data\n")
DATA_LENGTH = 28  # bytes of such a line


@dataclass(frozen=True)
class FirstLine:
    """The server's handshake. ``port`` is None where no v1 client is served (``off``)."""

    port: int | None
    tls: int
    query: Mapping[str, bytes] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Hello:
    """A caller of the tunnel port is a client of the tunnel ``name``."""

    name: str = ""
    capabilities: frozenset[bytes] = frozenset()


class Data(NamedTuple):
    """A caller of the tunnel port is a data connection of ``session``."""

    session: bytes


@dataclass(frozen=True)
class Welcome:
    """The server's answer to a hello."""

    session: bytes
    capabilities: frozenset[bytes]
    ping_interval_s: int
    most_data_connections: int


@dataclass(frozen=True)
class ClientProof:
    """A client's proof that it has the tunnel key."""

    nonce: bytes
    tag: bytes
    capabilities: frozenset[bytes] = frozenset()


@dataclass(frozen=True)
class ServerProof:
    """The server's answer to a proof that is right: its own, and the welcome."""

    tag: bytes
    welcome: Welcome


def parse_first_line(line: bytes) -> FirstLine:
    """Read the server's handshake; its query is kept, whatever it offers."""
    parts = parse_line(line)
    if parts.fragment not in [b"%d" % mode for mode in TLS_MODES]:
        raise ProtocolError(f"unknown TLS mode, known are 0, 1 and 2: {printable(line)}")
    port = None if parts.host == b"off" else _parse_port(parts.host)
    return FirstLine(port, int(parts.fragment), parts.query)


def offers_v2(first: FirstLine) -> bool:
    """Whether the server offers v2; ProtocolError when its offer is not whole."""
    if VERSION not in first.query.get("v", b"").split(b","):
        return False
    nonce = first.query.get("n", b"")
    if len(_unbase64(nonce)) != NONCE_LENGTH:
        raise ProtocolError(f"an offer of v2 without a nonce of {NONCE_LENGTH} bytes: {printable(nonce)}")
    return True


def data_port(first: FirstLine) -> int | None:
    """Give the port to which v2 data connections go instead of the tunnel port, if there is one; ProtocolError."""
    text = first.query.get("d")
    return None if text is None else _parse_port(text)


def format_first_line(first: FirstLine, nonce: bytes = b"", keyed: bool = False, data_port: int | None = None) -> bytes:
    """Write the handshake, with an offer of v2 when there is a nonce for it; ``keyed``: to who has the tunnel key."""
    port = b"off" if first.port is None else b"%d" % first.port
    offer = b"?v=%b&n=%b" % (VERSION, _base64(nonce)) if nonce else b""
    method = b"&a=" + tunnel_key.METHOD if keyed else b""
    elsewhere = b"&d=%d" % data_port if offer and data_port else b""
    return b"//%b%b%b%b#%d\n" % (port, offer, method, elsewhere, first.tls)


def parse_data(start: bytes) -> Data | None:
    """Read a data connection's opening, newline and all, where ``start`` is exactly that; None where it is not."""
    match = _DATA.fullmatch(start)
    return Data(bytes.fromhex(match[1].decode())) if match else None


def parse_opening(line: bytes) -> Hello | Data:
    """Read the line by which a v2 caller of the tunnel port says what it is."""
    parts = parse_line(line)
    if parts.query.get("v") != VERSION:
        raise ProtocolError(f"not an opening of version 2: {printable(line)}")
    if parts.fragment == b"data":
        if len(line) >= MAX_LINE:
            raise ProtocolError(f"a line of more than {MAX_LINE} bytes")
        return Data(_parse_session(parts.host))
    if parts.fragment == b"hello":
        return Hello(unquote_to_bytes(parts.host).decode("utf-8", "replace"), _capabilities(parts))
    raise ProtocolError(f"neither hello nor data: {printable(line)}")


def format_hello(hello: Hello) -> bytes:
    """Write a client's opening."""
    name = quote(hello.name, safe="").encode()
    return b"//%b?v=%b%b#hello\n" % (name, VERSION, _format_capabilities(hello.capabilities))


def format_data(data: Data) -> bytes:
    """Write a data connection's opening."""
    return b"//%b?v=%b#data\n" % (data.session.hex().encode(), VERSION)


def parse_welcome(line: bytes) -> Welcome | Bye:
    """Read the server's answer to a hello."""
    parts = parse_line(line)
    if parts.fragment == b"bye":
        return Bye(parts.query.get("why", b""))
    if parts.fragment != b"welcome":
        raise ProtocolError(f"not a welcome: {printable(line)}")
    return _terms(_parse_session(parts.host), parts)


def _terms(session: bytes, parts: Line) -> Welcome:
    interval, most = parts.query.get("i", b""), parts.query.get("p", b"")
    if not NUMBER.fullmatch(interval) or not NUMBER.fullmatch(most):
        raise ProtocolError("a welcome without ping interval or most data connections")
    return Welcome(session, _capabilities(parts), max(int(interval), 1), int(most))


def format_welcome(welcome: Welcome) -> bytes:
    """Write the answer to a hello that is accepted."""
    return b"//%b?%b#welcome\n" % (welcome.session.hex().encode(), _format_terms(welcome))


def _format_terms(welcome: Welcome) -> bytes:
    capabilities = b",".join(sorted(welcome.capabilities))
    return b"c=%b&i=%d&p=%d" % (capabilities, welcome.ping_interval_s, welcome.most_data_connections)


def parse_client_proof(line: bytes) -> ClientProof:
    """Read a client's proof of the tunnel key."""
    parts = _proof(parse_line(line), b"c")
    nonce = _binary(parts, "n", tunnel_key.CLIENT_NONCE_LENGTH)
    return ClientProof(nonce, _binary(parts, "m", tunnel_key.SIZE), _capabilities(parts))


def format_client_proof(proof: ClientProof) -> bytes:
    """Write a client's proof of the tunnel key."""
    capabilities = _format_capabilities(proof.capabilities)
    return b"//auth?n=%b&m=%b%b#c\n" % (_base64(proof.nonce), _base64(proof.tag), capabilities)


def parse_server_proof(line: bytes) -> ServerProof | Bye:
    """Read the server's answer to a proof of the tunnel key."""
    parts = parse_line(line)
    if parts.fragment == b"bye":
        return Bye(parts.query.get("why", b""))
    tag = _binary(_proof(parts, b"s"), "m", tunnel_key.SIZE)
    return ServerProof(tag, _terms(_binary(parts, "s", SESSION_LENGTH), parts))


def format_server_proof(proof: ServerProof) -> bytes:
    """Write the answer to a proof of the tunnel key that is right."""
    session = _base64(proof.welcome.session)
    return b"//auth?s=%b&m=%b&%b#s\n" % (session, _base64(proof.tag), _format_terms(proof.welcome))


def _proof(parts: Line, side: bytes) -> Line:
    if (parts.host, parts.fragment) != (b"auth", side):
        raise ProtocolError("not a proof of the tunnel key")  # not shown: a passphrase can be guessed by a tag
    return parts


def _binary(parts: Line, key: str, size: int) -> bytes:
    data = _unbase64(parts.query.get(key, b""))
    if len(data) != size:
        raise ProtocolError(f"a proof of the tunnel key in which {key} has not {size} bytes")
    return data


_METHODS = (b"GET ", b"HEAD ", b"POST ", b"PUT ", b"OPTIONS ", b"CONNECT ", b"PRI * HTTP/")
_OPENINGS = (
    (_METHODS, "HTTP: most often a browser or a scanner, perhaps a client of NodePass 1.13 or later"),
    (b"\x16\x03", "TLS"),
    (b"SSH-", "SSH"),
    (b"//", "a later profile of this protocol"),
)
_BASE64_LINE = re.compile(  # of 7 bytes or more, where such a client sends 8 as a rule
    rb"(?:[A-Za-z0-9+/]{4}){2,}(?:[A-Za-z0-9+/]{4}|[A-Za-z0-9+/]{3}=|[A-Za-z0-9+/]{2}==)\n?"
)


def recognise(opening: bytes) -> str:
    """Say what a caller speaks that speaks first, which no v1 client does, by its first bytes."""
    for start, name in _OPENINGS:
        if opening.startswith(start):
            return f"it speaks {name}"
    if _BASE64_LINE.fullmatch(opening):
        return "it sent one line of no known protocol; perhaps it is a client of NodePass 1.4 to 1.12"
    return "it speaks no known protocol"


def _capabilities(parts: Line) -> frozenset[bytes]:
    return frozenset(filter(None, parts.query.get("c", b"").split(b",")))


def _format_capabilities(capabilities: frozenset[bytes]) -> bytes:
    return b"&c=" + b",".join(sorted(capabilities)) if capabilities else b""


def _parse_port(text: bytes) -> int:
    if not _PORT.fullmatch(text) or int(text) > 65535:
        raise ProtocolError(f"not a port of 1 to 65535: {printable(text)}")
    return int(text)


def _parse_session(text: bytes) -> bytes:
    if not _SESSION.fullmatch(text):
        raise ProtocolError(f"not a session of 16 lower-case hexadecimal digits: {printable(text)}")
    return bytes.fromhex(text.decode())


def _base64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def _unbase64(text: bytes) -> bytes:
    """Decode base64url without padding; only the canonical form is one."""
    try:
        data = base64.urlsafe_b64decode(text + b"=" * (-len(text) % 4))
    except ValueError as exc:
        raise ProtocolError(f"not base64url: {printable(text)}") from exc
    if _base64(data) != text:
        raise ProtocolError(f"not canonical base64url: {printable(text)}")
    return data
