"""Certificates and their keys: read from PEM files, and again when these change, or made. Knows no TLS."""

import datetime
import hashlib
import logging
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from .errors import ConfigError, reason
from .files import may_pass, open_at_once, stamps

Value = TypeVar("Value")

SELF_SIGNED_DAYS = 365
MAX_FILE = 1 << 20  # bytes of a certificate or key file
_CERTIFICATE, _PRIVATE_KEY = b"-----END CERTIFICATE-----", b" PRIVATE KEY-----"
_SWAPPED = ": are crt and key swapped?"


class FromFiles(Generic[Value]):
    """What was read from files, and is read again when they change."""

    def __init__(self, read: Callable[..., Value], *paths: str, log: logging.Logger) -> None:
        self._read, self._paths, self._log = read, paths, log
        self._seen = stamps(*paths)
        self.value = read(*paths)

    def reload(self) -> bool:
        """Read the files again if they changed, or could not be read; keep what was there, and say so, if bad."""
        seen = stamps(*self._paths)
        if seen == self._seen:
            return False
        try:
            self.value = self._read(*self._paths)
        except ConfigError as exc:
            self._seen = () if may_pass(exc) else seen
            self._log.error("not reloaded, the old one stays in use: %s", exc)
            return False
        self._seen = seen
        return True


@dataclass(frozen=True)
class Certificate:
    """A certificate with its chain, and the private key that fits it."""

    chain: tuple[x509.Certificate, ...]
    key: Any

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate in DER, as ``openssl x509 -fingerprint -sha256`` prints it."""
        return self.chain[0].fingerprint(hashes.SHA256()).hex(":").upper()

    @cached_property
    def key_digest(self) -> bytes:
        """SHA-256 of the public key, which is what a pin names."""
        return digest_key(self.chain[0])

    @property
    def begins(self) -> datetime.datetime:
        return self.chain[0].not_valid_before_utc

    @property
    def expires(self) -> datetime.datetime:
        return self.chain[0].not_valid_after_utc


def digest_key(certificate: x509.Certificate) -> bytes:
    """Give SHA-256 of the public key as a SubjectPublicKeyInfo in DER; ValueError, UnsupportedAlgorithm."""
    key = certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(key).digest()


def load_certificate(crt: str, key: str) -> Certificate:
    """Read PEM files: the certificate, then its chain; and its key, without a passphrase.

    Raises ConfigError when a file cannot be read or parsed, or when the two do not fit.
    """
    chain = _load_certificates("crt", crt)
    data = _read("key", key)
    try:
        private = serialization.load_pem_private_key(data, password=None)
    except TypeError as exc:
        raise ConfigError(f"key: {key!r} is protected by a passphrase; a key without one is needed") from exc
    except (ValueError, UnsupportedAlgorithm) as exc:
        swapped = _CERTIFICATE in data and _PRIVATE_KEY not in data
        why = f"holds a certificate, and no private key{_SWAPPED}" if swapped else "is not a private key in PEM form"
        raise ConfigError(f"key: {key!r} {why}") from exc
    try:
        fits = private.public_key() == chain[0].public_key()
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise ConfigError(f"crt: the key in {crt!r} is of an unknown kind") from exc
    if not fits:
        raise ConfigError(f"key: {key!r} does not fit the certificate {crt!r}")
    return Certificate(chain, private)


def exposure(key: str) -> str:
    """Say that anybody can read the file of a private key, or nothing; that a group can is often meant (ssl-cert)."""
    try:
        mode = stat.S_IMODE(os.stat(key).st_mode)
    except (OSError, ValueError):
        return ""
    return f"has mode {mode:04o}: others may read it; chmod 600 keeps them out" if mode & stat.S_IROTH else ""


def load_authorities(path: str) -> tuple[x509.Certificate, ...]:
    """Read the certificates of authorities, at least one, from a PEM file; raise ConfigError."""
    return _load_certificates("ca", path)


def expired(authorities: Sequence[x509.Certificate]) -> list[datetime.datetime]:
    """Give when those came to their end that are not valid any more."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return [authority.not_valid_after_utc for authority in authorities if authority.not_valid_after_utc < now]


def _load_certificates(setting: str, path: str) -> tuple[x509.Certificate, ...]:
    data = _read(setting, path)
    try:
        return tuple(x509.load_pem_x509_certificates(data))
    except ValueError as exc:
        why = "is not a certificate in PEM form"
        if _PRIVATE_KEY in data and _CERTIFICATE not in data:
            why = f"holds a private key, and no certificate{_SWAPPED if setting == 'crt' else ''}"
        raise ConfigError(f"{setting}: {path!r} {why}") from exc


def _read(setting: str, path: str) -> bytes:
    try:
        with open(path, "rb", opener=open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError(f"{setting}: {path!r} is not a regular file")
            data = file.read(MAX_FILE + 1)
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the path
        raise ConfigError(f"{setting}: cannot read {path!r}: {reason(exc)}") from exc
    if len(data) > MAX_FILE:
        raise ConfigError(f"{setting}: {path!r} is larger than {MAX_FILE} bytes")
    return data


def make_certificate() -> Certificate:
    """Make a self-signed P-256 certificate, as the original does."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "nodepass-gevent")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # a peer's clock may be behind
        .not_valid_after(now + datetime.timedelta(days=SELF_SIGNED_DAYS))
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Certificate((certificate,), key)
