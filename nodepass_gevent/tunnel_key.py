"""The tunnel key ``psk1``: what operators write, what is derived from it, and the proofs. No socket or file here.

    key     32 random bytes as ``np1:<base64url>``, or a passphrase of at least 16 characters (Unicode NFC, UTF-8)
    SALT    "nodepass-py/psk/v2" || tunnel name
    root    HKDF-Extract(SALT, bytes); of a passphrase bytes = scrypt(passphrase, SALT, N=2^15, r=8, p=1, 32)
    lp(...) each part behind its 2-byte big-endian length;   MAC(k, label, ...) = HMAC-SHA256(k, lp(label, ...))
    K_cs    HKDF-Expand(root, "nodepass-py v2 ctl-client", 32);   K_ss: the same with "ctl-server"

The control channel: TH = SHA-256(lp("nodepass-py v2 transcript", FIRST, HELLO, E)), FIRST and HELLO being the two
lines in clear without their newlines, and E the exporter value of the TLS connection that follows (RFC 9266). In it

    client -> server   CN, TC = MAC(K_cs, "np2 ctl client", TH, CN)
    server -> client   SID, TS = MAC(K_ss, "np2 ctl server", TH, CN, TC, SID)
    SK      HKDF-Expand(HKDF-Extract(MAC(root, "np2 session salt", TH, CN), root), "nodepass-py v2 session", 32)
    KdC     HKDF-Expand(SK, "nodepass-py v2 data client", 32);   KdS: the same with "data server"

A data connection, E being the exporter value of its own TLS connection:

    client -> server   SID || DC, DC = MAC(KdC, "np2 data client", SID, E)
    server -> client   id || DS, DS = MAC(KdS, "np2 data server", SID, id, E, DC)

HKDF is RFC 5869 with SHA-256. Whatever holds key material shows ``***`` instead of it.
"""

import base64
import hashlib
import hmac
import re
import unicodedata
from dataclasses import dataclass

from .errors import ConfigError

METHOD = b"psk1"  # as the first line names it
SIZE = 32  # bytes of a key, of a tag, and of an exporter value
CLIENT_NONCE_LENGTH = 16  # bytes
MIN_PASSPHRASE = 16  # characters
MAX_PASSPHRASE = 1024  # characters; more is a file of something else
EXPORTER_LABEL = b"EXPORTER-Channel-Binding"  # RFC 9266

_PREFIX = "np1:"
_SALT = b"nodepass-py/psk/v2"
_SCRYPT = {"n": 1 << 15, "r": 8, "p": 1, "dklen": SIZE, "maxmem": 1 << 26}  # uses 32 MiB, and about 0.1 s
_RAW = re.compile(r"[A-Za-z0-9_-]{43}")


class Secret:
    """Never shows what it holds: not in logs, tracebacks or a printed Config."""

    def __repr__(self) -> str:
        return "***"


@dataclass(frozen=True, repr=False)
class TunnelKey(Secret):
    """A key as the operator gave it."""

    data: bytes
    is_passphrase: bool


def parse_key(text: str) -> TunnelKey:
    """Read what an operator wrote; raise ConfigError, whose text holds nothing of it."""
    text = unicodedata.normalize("NFC", text.strip())
    if text == repr(Secret()):
        raise ConfigError("*** only stands for a key, as --show-config prints it; the key itself is needed")
    if text.startswith(_PREFIX):
        return TunnelKey(_decode(text.removeprefix(_PREFIX)), False)
    if not text.isprintable():
        raise ConfigError("the passphrase holds control characters, or is not UTF-8 text")
    if not MIN_PASSPHRASE <= len(text) <= MAX_PASSPHRASE:
        raise ConfigError(
            f"a passphrase has {MIN_PASSPHRASE} to {MAX_PASSPHRASE} characters; better: a key made by 'nodepass genkey'"
        )
    return TunnelKey(text.encode(), True)


def _decode(text: str) -> bytes:
    """Read 32 bytes in base64url without padding; 43 characters have two bits too many, and those must be zero."""
    data = base64.urlsafe_b64decode(text + "=") if _RAW.fullmatch(text) else b""
    if not data or format_key(data) != _PREFIX + text:
        raise ConfigError("np1: is not followed by a key as 'nodepass genkey' makes it; is it whole?")
    return data


def format_key(data: bytes) -> str:
    """Write 32 random bytes as a key."""
    return _PREFIX + base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@dataclass(frozen=True, repr=False)
class Root(Secret):
    """What a tunnel's key comes to."""

    root: bytes
    client_key: bytes
    server_key: bytes


def derive(key: TunnelKey, tunnel_name: str = "") -> Root:
    """Derive a tunnel's keys; of a passphrase that takes about 0.1 s, in which other threads run."""
    salt = _SALT + tunnel_name.encode()
    data = hashlib.scrypt(key.data, salt=salt, **_SCRYPT) if key.is_passphrase else key.data
    root = _extract(salt, data)
    return Root(root, _expand(root, b"nodepass-py v2 ctl-client"), _expand(root, b"nodepass-py v2 ctl-server"))


@dataclass(frozen=True, repr=False)
class SessionKeys(Secret):
    """What the data connections of one session are proven with; ``exporter`` is each connection's own value."""

    session: bytes
    client_key: bytes
    server_key: bytes

    def client_tag(self, exporter: bytes) -> bytes:
        return _mac(self.client_key, b"np2 data client", self.session, exporter)

    def server_tag(self, id: bytes, exporter: bytes, client_tag: bytes) -> bytes:
        return _mac(self.server_key, b"np2 data server", self.session, id, exporter, client_tag)


class Handshake(Secret):
    """The proofs on one control channel, the same at both ends of it.

    ``first`` and ``hello`` are the lines in clear as they went over the wire, without newlines.
    """

    def __init__(self, root: Root, first: bytes, hello: bytes, exporter: bytes, nonce: bytes) -> None:
        self._root = root
        self._seen = (hashlib.sha256(_lp(b"nodepass-py v2 transcript", first, hello, exporter)).digest(), nonce)
        self.client_tag = _mac(root.client_key, b"np2 ctl client", *self._seen)

    def server_tag(self, session: bytes) -> bytes:
        return _mac(self._root.server_key, b"np2 ctl server", *self._seen, self.client_tag, session)

    def session_keys(self, session: bytes) -> SessionKeys:
        salt = _mac(self._root.root, b"np2 session salt", *self._seen)
        key = _expand(_extract(salt, self._root.root), b"nodepass-py v2 session")
        return SessionKeys(
            session, _expand(key, b"nodepass-py v2 data client"), _expand(key, b"nodepass-py v2 data server")
        )


def same(tag: bytes, other: bytes) -> bool:
    """Compare two tags in a time that tells nothing of them."""
    return hmac.compare_digest(tag, other)


def _lp(*parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(2, "big") + part for part in parts)


def _mac(key: bytes, *parts: bytes) -> bytes:
    return hmac.digest(key, _lp(*parts), "sha256")


def _extract(salt: bytes, data: bytes) -> bytes:
    return hmac.digest(salt, data, "sha256")


def _expand(key: bytes, info: bytes) -> bytes:
    return hmac.digest(key, info + b"\x01", "sha256")  # SIZE bytes are one block
