"""Certificates and their keys: read from PEM files, or made. What TLS does with them stands in ``tls``."""

import datetime
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from .errors import ConfigError

SELF_SIGNED_DAYS = 365
MAX_FILE = 1 << 20  # bytes of a certificate or key file


@dataclass(frozen=True)
class Certificate:
    """A certificate with its chain, and the private key that fits it."""

    chain: tuple[x509.Certificate, ...]
    key: Any

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate in DER, as ``openssl x509 -fingerprint -sha256`` prints it."""
        return self.chain[0].fingerprint(hashes.SHA256()).hex(":").upper()

    @property
    def expires(self) -> datetime.datetime:
        return self.chain[0].not_valid_after_utc


def load_certificate(crt: str, key: str) -> Certificate:
    """Read PEM files: the certificate, then its chain; and its key, without a passphrase.

    Raises ConfigError when a file cannot be read or parsed, or when the two do not fit.
    """
    try:
        chain = tuple(x509.load_pem_x509_certificates(_read("crt", crt)))
    except ValueError as exc:
        raise ConfigError(f"crt: {crt!r} is not a certificate in PEM form") from exc
    try:
        private = serialization.load_pem_private_key(_read("key", key), password=None)
    except TypeError as exc:
        raise ConfigError(f"key: {key!r} is protected by a passphrase; a key without one is needed") from exc
    except ValueError as exc:
        raise ConfigError(f"key: {key!r} is not a private key in PEM form") from exc
    if private.public_key() != chain[0].public_key():
        raise ConfigError(f"key: {key!r} does not fit the certificate {crt!r}")
    return Certificate(chain, private)


def _read(setting: str, path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(MAX_FILE)
    except OSError as exc:
        raise ConfigError(f"{setting}: cannot read {path!r}: {(exc.strerror or str(exc)).lower()}") from exc


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
