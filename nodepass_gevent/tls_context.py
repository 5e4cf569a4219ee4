"""Contexts for TLS: what a side presents, whom it accepts, and the files behind both, which may change meanwhile.

A context that has been used cannot change: new files mean new contexts, and connections that exist stay as they are.
"""

import datetime
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from OpenSSL import SSL, crypto

from . import opening
from .certificates import (
    Certificate,
    FromFiles,
    expired,
    exposure,
    load_authorities,
    load_certificate,
    make_certificate,
)
from .config import Config
from .errors import ConfigError, PolicyError
from .opening import SELF_SIGNED, VERIFIED
from .state import Presented
from .values import Pins, format_pin, is_literal
from .verification import MAX_CHAIN, NO_HOST, Judge, name_problem, names_no_host, pin_problem, use_problem

log = logging.getLogger(__name__)

ALPNS = (b"", opening.ALPN_CONTROL, opening.ALPN_DATA)  # v1 data connections have none
EXPIRY_WARNING_DAYS = 14
Standing = tuple[int, str]  # a level of the log, and how a certificate stands today
NOTHING_TOLD: Standing = (logging.NOTSET, "")
_WORDS = {"ee key too small": "its key is too short; RSA wants 2048 bits at least"}  # for what OpenSSL says


class ServerCertificate:
    """What a server presents, made in memory or from files, and the authorities of its clients' certificates.

    ``mode`` is the one that it offers: in mode 2 clients verify what is presented. One made in memory is that of
    ``before``, in whose place this comes: clients may have its pin.
    """

    def __init__(
        self,
        crt: str | None,
        key: str | None,
        ca: str | None = None,
        log: logging.Logger = log,
        mode: int = SELF_SIGNED,
        before: "ServerCertificate | None" = None,
    ) -> None:
        self._log = log
        self._key = key
        self._mode = mode
        self._files = FromFiles(_load_usable, crt, key, log=log) if crt and key else None
        self._made: Certificate | None = None if self._files else (before and before._made) or make_certificate()
        self._authorities = FromFiles(load_authorities, ca, log=log) if ca else None
        self._ca = ca
        self._told = NOTHING_TOLD
        self._announce(certificate=True, authorities=True)
        self._build()

    def reload(self) -> None:
        """Read the files again if they changed; keep what was there, and say so, if they are bad."""
        certificate = bool(self._files and self._files.reload())
        authorities = bool(self._authorities and self._authorities.reload())
        self._announce(certificate=certificate, authorities=authorities)
        if certificate or authorities:
            self._build()

    @property
    def certificate(self) -> Certificate:
        """The certificate in use."""
        certificate = self._files.value if self._files else self._made
        assert certificate
        return certificate

    def describe(self) -> Presented:
        """Say what is presented."""
        return _describe(self.certificate)

    def _announce(self, *, certificate: bool, authorities: bool) -> None:
        """Log what is new: the certificate, or that its end is near, the authorities, or all."""
        if certificate or _standing(self.certificate) != self._told:
            found = doubts(self.certificate, self._key, "server", self._mode)
            self._told = _announce_certificate(self._log, "certificate", self.certificate, found)
        if self._ca and self._authorities and authorities:
            _announce_authorities(self._log, "clients need a certificate of", self._ca, self._authorities.value)

    def _build(self) -> None:
        self.contexts = {alpn: self._context(alpn) for alpn in ALPNS}  # by kind of connection; of v1: b""

    def _context(self, alpn: bytes) -> SSL.Context:
        context = _context(SSL.TLS_SERVER_METHOD, alpn)
        if alpn:
            context.set_alpn_select_callback(
                lambda _connection, offered: alpn if alpn in offered else SSL.NO_OVERLAPPING_PROTOCOLS
            )
        _present(context, self.certificate)
        if self._authorities:
            _trust(context, self._authorities.value)
            context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, Judge("its certificate is", "ca"))
        return context


@dataclass(frozen=True)
class ClientContext:
    """With what one kind of connection is dialled."""

    context: SSL.Context
    alpn: bytes
    sni: bytes  # the name to ask for; empty: none
    judged: bool  # the server's certificate has to be accepted


class ClientPolicy:
    """What a client demands of its server's certificate, and what it presents itself.

    ``host`` is the name that the certificate has to have in mode 2, unless ``sni`` is another one. ``least`` is the
    mode that this side demands: the server may ask for more.
    """

    def __init__(
        self,
        host: str,
        *,
        sni: str | None = None,
        ca: str | None = None,
        pin: Pins | None = None,
        crt: str | None = None,
        key: str | None = None,
        log: logging.Logger = log,
        least: int = VERIFIED,
    ) -> None:
        self._log = log
        self._verified_by = "tls=2" if least == VERIFIED else "tls=2, which the server asks for"
        self._host = host
        # A dot at the end stands in no certificate and in no SNI (RFC 6066), nor does the zone of an address.
        self._name = (sni or host).removesuffix(".").partition("%")[0]
        self._name_from = "sni" if sni else self._verified_by
        self._pin = pin
        self._ca = ca
        self._key = key
        self._certificate = FromFiles(_load_usable, crt, key, log=log) if crt and key else None
        self._authorities = FromFiles(load_authorities, ca, log=log) if ca else None
        self._contexts: dict[tuple[int, bytes], ClientContext] = {}
        self._told = NOTHING_TOLD
        self._announce(certificate=True, authorities=True)

    def reload(self) -> None:
        """Read the files again if they changed, and the system's authorities; what is bad stays as it was."""
        self._announce(
            certificate=bool(self._certificate and self._certificate.reload()),
            authorities=bool(self._authorities and self._authorities.reload()),
        )
        self._contexts = {}

    def context(self, mode: int, alpn: bytes = b"") -> ClientContext:
        """Give what to dial with: mode 1 takes any certificate that fits the pins, mode 2 verifies it as well."""
        made = self._contexts.get((mode, alpn))
        if made is None:
            made = self._contexts[mode, alpn] = self._make(mode, alpn)
        return made

    def describe(self) -> Presented | None:
        """Say what is presented to a server that asks."""
        return _describe(self._certificate.value) if self._certificate else None

    def _announce(self, *, certificate: bool, authorities: bool) -> None:
        """Log what is new: the certificate, or that its end is near, the authorities, or all."""
        if self._certificate and (certificate or _standing(self._certificate.value) != self._told):
            found = doubts(self._certificate.value, self._key, "client", SELF_SIGNED)
            self._told = _announce_certificate(self._log, "client certificate", self._certificate.value, found)
        if self._ca and self._authorities and authorities:
            _announce_authorities(self._log, "the server needs a certificate of", self._ca, self._authorities.value)

    def _make(self, mode: int, alpn: bytes) -> ClientContext:
        context = _context(SSL.TLS_CLIENT_METHOD, alpn)
        if alpn:
            context.set_alpn_protos([alpn])
        if self._certificate:
            _present(context, self._certificate.value)
        if mode == VERIFIED:
            self._trust_authorities(context)
        judged = mode == VERIFIED or bool(self._pin)
        if judged:
            context.set_verify(SSL.VERIFY_PEER, self._judge(mode))
        asked = self._name if mode == VERIFIED and not is_literal(self._name) else ""
        return ClientContext(context, alpn, asked.encode("idna"), judged)

    def _trust_authorities(self, context: SSL.Context) -> None:
        """Trust those of ``ca``, or else the system's: SSL_CERT_FILE's and SSL_CERT_DIR's, where these are set."""
        if self._authorities:
            _trust(context, self._authorities.value)
            return
        path = os.environ.get("SSL_CERT_FILE")
        if path and not os.access(path, os.R_OK):
            raise PolicyError(f"SSL_CERT_FILE: cannot read {path!r}")
        context.set_default_verify_paths()

    def _judge(self, mode: int) -> Judge:
        def examine(certificate: x509.Certificate) -> str:
            if mode == VERIFIED and (problem := name_problem(certificate, self._name)):
                return f"{self._name_from}: {problem}"
            if self._pin and (problem := pin_problem(certificate, self._pin)):
                return f"pin: {problem}"
            return ""

        chain_setting = ("ca" if self._ca else self._verified_by) if mode == VERIFIED else ""
        return Judge(f"certificate of {self._host}", chain_setting, examine)


def check_files(config: Config) -> None:
    """Make sure that the files of the settings can be used; raise ConfigError."""
    if config.crt and config.key:
        _load_usable(config.crt, config.key)
    if config.ca:
        load_authorities(config.ca)


def doubts(certificate: Certificate, key: str | None, end: str, mode: int) -> list[str]:
    """Say what is wrong with files that can be used, but for their time: who refuses them, and who may read the key.

    ``end`` is the one of a TLS connection that presents them: server, in ``mode``, or client.
    """
    found = _refusals(certificate.chain[0], end, mode)
    if key and (problem := exposure(key)):
        found.append(f"key: {key!r} {problem}")
    return found


def _refusals(certificate: x509.Certificate, end: str, mode: int) -> list[str]:
    crt, problem = "crt: the certificate", use_problem(certificate, end)
    if end == "client":
        return [f"{crt} {problem}: a server with ca refuses it"] if problem else []
    if mode != VERIFIED:
        return []  # clients take any
    problems = [NO_HOST] if names_no_host(certificate) else []
    problems += [problem] if problem else []
    return [f"{crt} {each}: with tls=2 clients refuse it" for each in problems]


def _load_usable(crt: str, key: str) -> Certificate:
    certificate = load_certificate(crt, key)
    try:
        _present(_context(SSL.TLS_METHOD, b""), certificate)
    except (SSL.Error, TypeError) as exc:  # TypeError: a kind of key that signs nothing
        why = reasons(exc) if isinstance(exc, SSL.Error) else "its key is of another kind"
        raise ConfigError(f"crt: {crt!r} cannot be used for TLS: {_WORDS.get(why, why)}") from exc
    return certificate


def _describe(certificate: Certificate) -> Presented:
    return Presented(certificate.fingerprint, format_pin(certificate.key_digest), certificate.expires.timestamp())


def _standing(certificate: Certificate) -> Standing:
    """Say whether a certificate is valid and what day counts, as a warning near its end or out of its time."""
    now = datetime.datetime.now(datetime.timezone.utc)
    if certificate.begins > now:
        return logging.WARNING, f"not valid before {certificate.begins.date()}"
    if certificate.expires <= now:
        return logging.WARNING, f"expired on {certificate.expires.date()}"
    soon = now + datetime.timedelta(days=EXPIRY_WARNING_DAYS)
    return logging.WARNING if certificate.expires < soon else logging.INFO, f"valid until {certificate.expires.date()}"


def _announce_certificate(log: logging.Logger, which: str, certificate: Certificate, found: Sequence[str]) -> Standing:
    """Log what a certificate is, and what is wrong; give how it stands."""
    level, words = standing = _standing(certificate)
    log.log(level, "%s %s, pin %s, %s", which, certificate.fingerprint, format_pin(certificate.key_digest), words)
    for doubt in found:
        log.warning("%s", doubt)
    return standing


def _announce_authorities(log: logging.Logger, demand: str, path: str, authorities: Sequence[x509.Certificate]) -> None:
    log.info("%s an authority in %r; certificates there: %d", demand, path, len(authorities))
    if ends := expired(authorities):
        log.warning("ca: %d of %d in %r expired, the last on %s", len(ends), len(authorities), path, max(ends).date())


def _context(method: int, alpn: bytes) -> SSL.Context:
    context = SSL.Context(method)
    context.set_min_proto_version(SSL.TLS1_3_VERSION if alpn else SSL.TLS1_2_VERSION)
    # No tickets and no cache: a session that is resumed would be one whose certificate nobody looks at.
    context.set_options(SSL.OP_NO_TICKET | SSL.OP_NO_RENEGOTIATION | SSL.OP_NO_COMPRESSION)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_mode(SSL.MODE_RELEASE_BUFFERS)  # 32 instead of 47 KiB for an idle connection
    context.set_verify_depth(MAX_CHAIN)
    return context


def _present(context: SSL.Context, certificate: Certificate) -> None:
    context.use_certificate(certificate.chain[0])
    for issuer in certificate.chain[1:]:
        context.add_extra_chain_cert(issuer)
    context.use_privatekey(certificate.key)


def _trust(context: SSL.Context, authorities: Sequence[x509.Certificate]) -> None:
    """Accept chains that lead to one of these, be it a root or not."""
    store: Any = context.get_cert_store()
    store.set_flags(crypto.X509StoreFlags.PARTIAL_CHAIN)
    for authority in authorities:
        store.add_cert(crypto.X509.from_cryptography(authority))


def reasons(exc: SSL.Error) -> str:
    """Give what OpenSSL says, without its codes."""
    entries = exc.args[0] if exc.args and isinstance(exc.args[0], list) else []
    return ", ".join(entry[-1] for entry in entries)
