"""Authorities for tests, which issue what trustme does not: certificates that are wrong in one way each."""

import datetime
import ipaddress
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from nodepass_gevent.certificates import digest_key
from nodepass_gevent.config import Pins

SERVER, CLIENT = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH
ANY = ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE
DAYS = (-1, 30)  # validity, from today


@dataclass(frozen=True)
class Issued:
    """A certificate, its issuers but the root, and its key."""

    chain: tuple[x509.Certificate, ...]
    key: Any

    @property
    def pin(self):
        return Pins((digest_key(self.chain[0]),))

    def write(self, folder, name="own"):
        """Write both files; give their paths as settings."""
        folder.mkdir(parents=True, exist_ok=True)
        crt, key = folder / f"{name}.pem", folder / f"{name}.key"
        crt.write_bytes(pem(*self.chain))
        key.touch(0o600)
        key.write_bytes(self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return {"crt": str(crt), "key": str(key)}

    @property
    def alone(self):
        """The same without its issuers."""
        return Issued(self.chain[:1], self.key)

    def issue(self, *names, days=DAYS, usage=(SERVER, CLIENT), common_name="test", path_length=None, authority=False):
        """Issue a certificate, whether this one is an authority's or not."""
        key = ec.generate_private_key(ec.SECP256R1())
        made = _sign(self.chain[0].subject, self.key, key, names, days, usage, common_name, path_length, authority)
        root = self.chain[0].issuer == self.chain[0].subject
        return Issued((made, *(() if root else self.chain)), key)

    def child(self, common_name="child", **how):
        """Issue the certificate of an authority."""
        return self.issue(common_name=common_name, usage=(), authority=True, **how)


def make_authority(common_name="authority", days=DAYS, path_length=None):
    """Make a root."""
    key = ec.generate_private_key(ec.SECP256R1())
    return Issued((_sign(_name(common_name), key, key, (), days, (), common_name, path_length, True),), key)


def pem(*certificates):
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def write_authorities(path, *authorities):
    """Write the file that ``ca`` names; give its path."""
    path.write_bytes(pem(*(authority.chain[0] for authority in authorities)))
    return str(path)


def _name(text):
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _sign(issuer, signing_key, key, names, days, usage, common_name, path_length, authority):
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(common_name))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=days[0]))
        .not_valid_after(now + datetime.timedelta(days=days[1]))
        .add_extension(x509.BasicConstraints(authority, path_length), critical=True)
    )
    if usage:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usage), critical=False)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(list(map(_general_name, names))), critical=False)
    return builder.sign(signing_key, hashes.SHA256())


def _general_name(text):
    if "://" in text:
        return x509.UniformResourceIdentifier(text)
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)
