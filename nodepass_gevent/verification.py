"""What is demanded of a peer's certificate, and the words for what is wrong with it.

It is judged within the handshake, by OpenSSL and then here, so that one that is not accepted ends it: the peer gets an
alert, and the reason, which names the setting that was violated, is kept on the connection.
"""

from collections.abc import Callable
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import ExtendedKeyUsageOID
from OpenSSL import SSL, crypto
from service_identity import CertificateError, VerificationError
from service_identity.cryptography import verify_certificate_hostname, verify_certificate_ip_address

from .certificates import digest_key
from .values import Pins, format_pin, is_literal, printable

MAX_CHAIN = 8  # certificates between a peer's and its authority's; real ones have one or two
NAMES_SHOWN = 3  # of a certificate that is for another name
NO_HOST = "names no host (no subjectAltName)"  # said of a certificate

_UNREADABLE = (  # what is raised for certificates that OpenSSL takes, and that are malformed inside
    ValueError, UnsupportedAlgorithm, crypto.Error,
    x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType,
)  # fmt: skip
_USES = {"server": ExtendedKeyUsageOID.SERVER_AUTH, "client": ExtendedKeyUsageOID.CLIENT_AUTH}
_CODES = SSL.X509VerificationCodes
_UNKNOWN_ISSUER = "no authority known here has issued it, or a certificate between is missing"
_WORDS = {  # for what OpenSSL finds; {} is the certificate in the chain
    _CODES.ERR_DEPTH_ZERO_SELF_SIGNED_CERT: "it is self-signed, and not known here",
    _CODES.ERR_SELF_SIGNED_CERT_IN_CHAIN: "the authority that has issued it is not known here",
    _CODES.ERR_UNABLE_TO_GET_ISSUER_CERT: _UNKNOWN_ISSUER,
    _CODES.ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY: _UNKNOWN_ISSUER,
    _CODES.ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE: _UNKNOWN_ISSUER,
    _CODES.ERR_CERT_SIGNATURE_FAILURE: "the signature of {} is wrong",
    _CODES.ERR_CERT_HAS_EXPIRED: "{} has expired on {end}",
    _CODES.ERR_CERT_NOT_YET_VALID: "{} is not yet valid: it begins on {begin}",
    _CODES.ERR_INVALID_PURPOSE: "{} is not made for this use (extended key usage)",
    _CODES.ERR_INVALID_CA: "{} is not an authority's",
    _CODES.ERR_PATH_LENGTH_EXCEEDED: "its chain is longer than an authority in it allows",
    _CODES.ERR_CERT_CHAIN_TOO_LONG: f"its chain has more than {MAX_CHAIN} certificates between",
    _CODES.ERR_PERMITTED_VIOLATION: "its authority may not issue for this name",
    _CODES.ERR_EXCLUDED_VIOLATION: "its authority may not issue for this name",
    66: "its key is too short",  # these three have no name in pyOpenSSL
    67: "the key of an authority in its chain is too short",
    68: "an authority in its chain has signed with a hash that is broken",
}
_HINTS = {_CODES.ERR_DEPTH_ZERO_SELF_SIGNED_CERT: "; a copy of it as ca makes it known"}  # where there is no ca


@dataclass
class Verdict:
    """What the handshake found out about a peer's certificate; kept on its connection."""

    problem: str = ""  # why it is refused
    accepted: bool = False


class Judge:
    """OpenSSL's callback: decides on the chain, where it counts, and then on the peer's own certificate."""

    def __init__(
        self, what: str, chain_setting: str, examine: Callable[[x509.Certificate], str] = lambda certificate: ""
    ) -> None:
        self._what = what  # is refused
        self._chain_setting = chain_setting  # demands a chain that is right; empty: none does
        self._examine = examine  # the peer's own certificate -> the setting that it violates, and how; or nothing

    def __call__(self, connection: SSL.Connection, certificate: crypto.X509, code: int, depth: int, ok: int) -> bool:
        verdict: Verdict = connection.get_app_data()
        problem = ""
        try:
            if self._chain_setting and not ok:
                problem = f"{self._chain_setting}: {_in_words(code, certificate, depth)}"
                problem += "" if self._chain_setting == "ca" else _HINTS.get(code, "")
            elif depth == 0:
                problem = self._examine(certificate.to_cryptography())
        except _UNREADABLE:
            problem = f"{self._chain_setting or 'pin'}: it cannot be read"
        if problem:
            verdict.problem = f"{self._what} refused by {problem}"
            if depth == 0:
                verdict.problem += f" (fingerprint {certificate.digest('sha256').decode()})"
            return False
        verdict.accepted |= depth == 0
        return True


def _in_words(code: int, certificate: crypto.X509, depth: int) -> str:
    begin, end = (
        f"{date[:4]}-{date[4:6]}-{date[6:8]}"
        for date in ((get() or b"").decode() for get in (certificate.get_notBefore, certificate.get_notAfter))
    )
    which = "it" if depth == 0 else "the certificate of an authority in its chain"
    words = _WORDS.get(code, "OpenSSL's verification error {code}")
    return words.format(which, begin=begin, end=end, code=code)


def name_problem(certificate: x509.Certificate, name: str) -> str:
    """Say why a certificate is not for a name or address, or nothing; a common name is none."""
    verify = verify_certificate_ip_address if is_literal(name) else verify_certificate_hostname
    try:
        verify(certificate, name)
    except (CertificateError, VerificationError, ValueError):
        hosts = _hosts(certificate)
        if not hosts:
            return f"it {NO_HOST}"
        shown = ", ".join(map(printable, hosts[:NAMES_SHOWN]))
        more = f" and {len(hosts) - NAMES_SHOWN} more" if len(hosts) > NAMES_SHOWN else ""
        return f"it is for {shown}{more}, and not for {name}"
    return ""


def names_no_host(certificate: x509.Certificate) -> bool:
    """Whether no client that asks for a name or an address can accept a certificate."""
    try:
        return not _hosts(certificate)
    except _UNREADABLE:
        return False


def _hosts(certificate: x509.Certificate) -> list[str]:
    """Give the names and addresses that a certificate is for; raises what _UNREADABLE has."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]


def use_problem(certificate: x509.Certificate, end: str) -> str:
    """Say that a certificate is not made for that end of TLS, or nothing; "any use" counts as none, as with OpenSSL."""
    try:
        uses = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (x509.ExtensionNotFound, *_UNREADABLE):
        return ""
    if _USES[end] in uses:
        return ""
    for other, use in _USES.items():
        if use in uses:
            return f"is made for {other}s only (extended key usage)"
    return f"is not made for {end}s (extended key usage)"


def pin_problem(certificate: x509.Certificate, pin: Pins) -> str:
    """Say why no pin fits a certificate's key, or nothing."""
    if (digest := digest_key(certificate)) in pin.digests:
        return ""
    hint = ""
    if certificate.fingerprint(SHA256()) in pin.digests:
        hint = "; what is expected is the fingerprint of the certificate, and not of its key"
    return f"its key is {format_pin(digest)}, expected {str(pin).replace(',', ' or ')}{hint}"
