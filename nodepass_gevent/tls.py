"""TLS: the server's certificate and its reload, contexts per mode and profile, TLSStream over pyOpenSSL.

OpenSSL works on memory here and never sees a descriptor: all I/O goes through the Stream beneath, which is
safe against descriptors that are closed and reused. This module alone calls ``OpenSSL.SSL``.
"""

import datetime
import logging
import os
import socket
from collections.abc import Callable

from cryptography import x509
from OpenSSL import SSL
from service_identity import CertificateError, VerificationError
from service_identity.cryptography import verify_certificate_hostname, verify_certificate_ip_address

from . import opening
from .certificates import Certificate, load_certificate, make_certificate
from .errors import ConfigError, PolicyError, ProtocolError
from .net import is_literal
from .transport import Stream, Transport

log = logging.getLogger(__name__)

OFF, SELF_SIGNED, VERIFIED = 0, 1, 2  # the modes, as they stand in the first line
ALPNS = (b"", opening.ALPN_CONTROL, opening.ALPN_DATA)  # v1 data connections have none
RECORD = 16384  # bytes of plain text in the largest TLS record
BATCH = 4 * RECORD  # bytes encrypted before one write
OVERHEAD = 1024  # bytes; more than four records' headers and tags, or an alert
EXPIRY_WARNING_DAYS = 14

_raw = memoryview(bytearray(BATCH + OVERHEAD))  # cipher text on its way to OpenSSL; nobody switches meanwhile
_VERIFY_ERRORS = {
    code: name.removeprefix("ERR_").replace("_", " ").lower()
    for name, code in vars(SSL.X509VerificationCodes).items()
    if name.isupper()
}


class ServerCertificate:
    """What a server presents: made in memory, or two files that may change while it runs."""

    def __init__(self, crt: str | None, key: str | None) -> None:
        self._files = (crt, key) if crt and key else None
        self._seen = self._stamp()
        self._use(load_certificate(*self._files) if self._files else make_certificate())

    def reload(self) -> None:
        """Read the files again if they changed; keep the old certificate, and say so, if they are bad."""
        stamp = self._stamp()
        if not self._files or stamp == self._seen:
            return
        self._seen = stamp
        try:
            self._use(load_certificate(*self._files))
        except ConfigError as exc:
            log.error("certificate not reloaded, the old one stays in use: %s", exc)

    def _use(self, certificate: Certificate) -> None:
        self.certificate = certificate
        # A context that has been used cannot change: always new ones, a profile's connections each with their own.
        self.contexts = {alpn: _server_context(certificate, alpn) for alpn in ALPNS}
        soon = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=EXPIRY_WARNING_DAYS)
        level = logging.WARNING if certificate.expires < soon else logging.INFO
        log.log(level, "certificate %s, valid until %s", certificate.fingerprint, certificate.expires.date())

    @property
    def context(self) -> SSL.Context:
        """What to accept with where no profile is asked for."""
        return self.contexts[b""]

    def _stamp(self) -> tuple:
        def one(path: str) -> tuple:
            try:
                status = os.stat(path)
            except OSError:
                return ()
            return status.st_ino, status.st_mtime_ns, status.st_size

        return tuple(map(one, self._files or ()))


def _server_context(certificate: Certificate, alpn: bytes) -> SSL.Context:
    context = _context(SSL.TLS_SERVER_METHOD, alpn)
    if alpn:
        context.set_alpn_select_callback(
            lambda _connection, offered: alpn if alpn in offered else SSL.NO_OVERLAPPING_PROTOCOLS
        )
    context.use_certificate(certificate.chain[0])
    for issuer in certificate.chain[1:]:
        context.add_extra_chain_cert(issuer)
    context.use_privatekey(certificate.key)
    return context


def client_context(mode: int, alpn: bytes = b"") -> SSL.Context:
    """Make what a client dials with: mode 1 takes any certificate, mode 2 the system's authorities'.

    The authorities are those of SSL_CERT_FILE and SSL_CERT_DIR, where these are set.
    """
    context = _context(SSL.TLS_CLIENT_METHOD, alpn)
    if alpn:
        context.set_alpn_protos([alpn])
    if mode == VERIFIED:
        path = os.environ.get("SSL_CERT_FILE")
        if path and not os.access(path, os.R_OK):
            raise PolicyError(f"SSL_CERT_FILE: cannot read {path!r}")
        context.set_default_verify_paths()
        context.set_verify(SSL.VERIFY_PEER, _note_verification)
    return context


def _context(method: int, alpn: bytes) -> SSL.Context:
    context = SSL.Context(method)
    context.set_min_proto_version(SSL.TLS1_3_VERSION if alpn else SSL.TLS1_2_VERSION)
    context.set_options(SSL.OP_NO_TICKET | SSL.OP_NO_RENEGOTIATION | SSL.OP_NO_COMPRESSION)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_mode(SSL.MODE_RELEASE_BUFFERS)  # 32 instead of 47 KiB for an idle connection
    return context


def _note_verification(connection: SSL.Connection, _certificate, code: int, _depth: int, ok: int) -> bool:
    if not ok:
        connection.set_app_data(_VERIFY_ERRORS.get(code, f"verification error {code}"))
    return bool(ok)


def accept(stream: Stream, context: SSL.Context, alpn: bytes = b"") -> "TLSStream":
    """Make the server's handshake; the caller sets its deadline. Raises OSError, ProtocolError."""
    connection = SSL.Connection(context, None)
    connection.set_accept_state()
    transport = _handshake(TLSStream(stream, connection))
    _check_profile(connection, alpn)
    return transport


def dial(
    stream: Stream, context: SSL.Context, mode: int, host: str, alpn: bytes = b"", line: bytes = b""
) -> "TLSStream":
    """Make the client's handshake; in mode 2 the certificate must be for ``host``.

    With ``line``, an opening in clear, that goes out in one segment with the ClientHello, and the line that the server
    has for every caller is read and dropped. The caller sets the deadline. Raises OSError, PolicyError, ProtocolError.
    """
    host = host.removesuffix(".")  # of a fully qualified name; stands in no certificate and in no SNI (RFC 6066)
    connection = SSL.Connection(context, None)
    connection.set_connect_state()
    if mode == VERIFIED and not is_literal(host):
        connection.set_tlsext_host_name(host.encode("idna"))
    transport = TLSStream(stream, connection)
    if line:
        transport.start(line)
        stream.read_line(opening.MAX_FIRST_LINE)
    try:
        _handshake(transport)
    except OSError as exc:
        if problem := connection.get_app_data():
            raise PolicyError(f"certificate of {host} refused: {problem}") from exc
        raise
    if mode == VERIFIED:
        certificate = connection.get_peer_certificate(as_cryptography=True)
        assert certificate, "OpenSSL has verified it"
        _verify_name(certificate, host)
    _check_profile(connection, alpn)
    return transport


def _check_profile(connection: SSL.Connection, alpn: bytes) -> None:
    """Make sure of what v2 needs: OpenSSL completes a handshake without the protocol that was asked for."""
    if not alpn:
        return
    if connection.get_protocol_version() != SSL.TLS1_3_VERSION or connection.get_alpn_proto_negotiated() != alpn:
        raise ProtocolError(f"the TLS handshake is not one of profile v2 ({alpn.decode()}, TLS 1.3)")


def _verify_name(certificate: x509.Certificate, host: str) -> None:
    verify = verify_certificate_ip_address if is_literal(host) else verify_certificate_hostname
    try:
        verify(certificate, host)
    except CertificateError as exc:
        raise PolicyError(f"certificate of {host} refused: it names no host (no subjectAltName)") from exc
    except (VerificationError, ValueError) as exc:
        raise PolicyError(f"certificate of {host} refused: it is for another name") from exc


def _handshake(transport: "TLSStream") -> "TLSStream":
    while not transport.step():
        pass
    return transport


def _translate(exc: SSL.Error) -> ConnectionError:
    """Give OpenSSL's errors the face that every transport shows: a broken connection."""
    reasons = exc.args[0] if exc.args and isinstance(exc.args[0], list) else []
    return ConnectionAbortedError("TLS: " + (", ".join(entry[-1] for entry in reasons) or "connection broken"))


class TLSStream(Transport):
    """A TLS connection over a Stream. A FIN without close_notify is a cut, not an end."""

    __slots__ = ("_backlog", "_connection", "_ended", "_finished", "buffered", "stream")

    def __init__(self, stream: Stream, connection: SSL.Connection) -> None:
        self.stream = stream
        self._connection = connection
        self._backlog = b""  # cipher text that the kernel did not take yet
        self._ended = False  # close_notify has come
        self._finished = False  # ours is written
        self.buffered = True  # bytes may have come right behind the handshake

    def start(self, line: bytes) -> None:
        """Send ``line`` and the ClientHello, in one segment."""
        try:
            self._connection.do_handshake()
        except SSL.WantReadError:
            self.stream.sendall(line + self._output(OVERHEAD + RECORD))

    def step(self) -> bool:
        """Go one round trip on in the handshake; True when it is done."""
        done = True
        try:
            self._connection.do_handshake()
        except SSL.WantReadError:
            done = False
        except SSL.Error as exc:
            self._send_output()  # the alert that tells the peer why
            raise _translate(exc) from exc
        self._send_output()
        if not done:
            count = self.stream.recv_into(_raw)
            if not count:
                raise ConnectionAbortedError("the peer closed during the TLS handshake")
            self._connection.bio_write(_raw[:count])
        return done

    def _send_output(self) -> None:
        self.stream.sendall(self._output(OVERHEAD + RECORD))

    def _output(self, size: int) -> bytes:
        try:
            return self._connection.bio_read(size)
        except SSL.WantReadError:
            return b""

    def fileno(self) -> int:
        return self.stream.fileno()

    def watch(self, callback: Callable[..., None], *args: object) -> None:
        self.stream.watch(callback, *args)

    def unwatch(self) -> None:
        self.stream.unwatch()

    def wait_for_arrival(self) -> None:
        self.stream.wait_for_arrival()

    def __str__(self) -> str:
        return str(self.stream)

    def pull(self, buffer: memoryview) -> int:
        if not self.buffered:
            count = self.stream.pull(_raw)
            if not count:
                raise ConnectionAbortedError("the TLS stream was cut off")
            self._connection.bio_write(_raw[:count])
        filled = self._decrypt(buffer)
        if filled or self._ended:
            return filled
        raise BlockingIOError  # a part of a record; more may wait in the socket, but first others have their turn

    def _decrypt(self, buffer: memoryview) -> int:
        """Empty OpenSSL into ``buffer``, several records at once."""
        filled = 0
        self.buffered = True
        try:
            while filled < len(buffer) and not self._ended:
                filled += self._connection.recv_into(buffer[filled:], RECORD)
        except SSL.WantReadError:
            self.buffered = False
            if not filled:
                self._backlog += self._output(OVERHEAD)  # an answer to a key update goes out with the next write
        except SSL.ZeroReturnError:
            self._ended = True
        except SSL.Error as exc:
            raise _translate(exc) from exc
        return filled

    def push(self, data: memoryview | bytes) -> int:
        if not self.flush():
            return 0
        data = memoryview(data)[:BATCH]
        taken = 0
        try:
            while taken < len(data):
                taken += self._connection.send(data[taken : taken + RECORD])
        except SSL.Error as exc:
            raise _translate(exc) from exc
        self._backlog = self._output(taken + OVERHEAD) if taken else b""
        self.flush()
        return taken

    def flush(self) -> bool:
        while self._backlog:
            sent = self.stream.push(self._backlog)
            if not sent:
                return False
            self._backlog = self._backlog[sent:]
        if self._finished:
            self.stream.finish()
        return True

    def finish(self) -> None:
        if self._finished:
            return
        self._finished = True
        try:
            self._connection.shutdown()
        except SSL.Error as exc:
            raise _translate(exc) from exc
        self._backlog += self._output(OVERHEAD)
        self.flush()

    def peek(self) -> bool | None:
        try:
            if not self.buffered:
                count = self.stream.pull(_raw)
                if not count:
                    return False
                self._connection.bio_write(_raw[:count])
            self.buffered = True
            return bool(self._connection.recv(1, socket.MSG_PEEK))
        except (BlockingIOError, SSL.WantReadError):
            self.buffered = False
            return None
        except (OSError, SSL.Error):
            return False

    def close(self) -> None:
        self.stream.close()

    def reset(self) -> None:
        self.stream.reset()
