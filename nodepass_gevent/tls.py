"""TLS connections: the handshakes of both sides, and TLSStream over pyOpenSSL.

OpenSSL works on memory here and never sees a descriptor: all I/O goes through the Stream beneath, which is
safe against descriptors that are closed and reused.
"""

import socket
from collections.abc import Callable
from contextlib import suppress

from OpenSSL import SSL

from .errors import CertificateRefused, PolicyError, ProtocolError, RefusedByPeer
from .opening import MAX_FIRST_LINE
from .tls_context import ClientContext, reasons
from .transport import Stream, Transport
from .verification import Verdict

RECORD = 16384  # bytes of plain text in the largest TLS record
BATCH = 4 * RECORD  # bytes encrypted before one write
HEADER = 5  # bytes of a record: type, version, length
OVERHEAD = 1024  # bytes; more than four records' headers and tags, or an alert
LITTLE = 1024  # bytes; about what a handshake alone makes of OpenSSL's buffers
MOST_BEHIND = 2 * BATCH  # bytes that wait for a peer which makes us answer (key updates) and does not read

_raw = memoryview(bytearray(BATCH + OVERHEAD))  # cipher text on its way to OpenSSL; nobody switches meanwhile
_REFUSALS = {  # of a certificate, as alerts of TLS name them
    "bad certificate": "it cannot read it, the handshake's signature is wrong, or it is not valid yet",
    "unsupported certificate": "it is not made for this use (extended key usage)",
    "certificate revoked": "it is revoked",
    "certificate expired": "it has expired, or is not yet valid",
    "certificate unknown": "it does not fit what is expected there",
    "unknown ca": "it is of no authority that is known there, or of another key than is pinned there",
    "access denied": "it is not allowed there",
}
_NO_CERTIFICATE = "peer did not return a certificate"


def accept(stream: Stream, context: SSL.Context, alpn: bytes = b"", before: bytes = b"") -> "TLSStream":
    """Make the server's handshake, with ``before``, in clear, ahead of its first flight; the caller sets the deadline.

    In profile v2 its end, which no client waits for, goes out with what is said next.
    Raises OSError, ProtocolError, and CertificateRefused, of which the caller is to ``tell`` the peer when it likes.
    """
    connection = SSL.Connection(context, None)
    connection.set_app_data(Verdict())
    connection.set_accept_state()
    transport = TLSStream(stream, connection)
    transport.finish_handshake(before, speaks=bool(alpn))
    _check_profile(connection, alpn)
    return transport


def dial(stream: Stream, how: ClientContext, opening: bytes = b"") -> "TLSStream":
    """Make the client's handshake, in which the server's certificate is judged.

    With ``opening``, a line in clear, that goes out in one segment with the ClientHello, and the line that the server
    has for every caller is read and dropped. The caller sets the deadline. Raises OSError, PolicyError, ProtocolError,
    and CertificateRefused, of which the caller is to ``tell`` the server.
    """
    verdict = Verdict()
    connection = SSL.Connection(how.context, None)
    connection.set_app_data(verdict)
    connection.set_connect_state()
    if how.sni:
        connection.set_tlsext_host_name(how.sni)
    transport = TLSStream(stream, connection)
    transport.advance(opening)
    if opening:
        stream.wait_for_arrival()
        stream.read_line(MAX_FIRST_LINE)
    transport.finish_handshake()
    if how.judged and not verdict.accepted:
        raise PolicyError("the server's certificate was not judged")  # OpenSSL always asks; never go on if it did not
    _check_profile(connection, how.alpn)
    return transport


def tell(stream: Stream, refused: CertificateRefused, timeout_s: float) -> None:
    """Tell the peer why, within ``timeout_s``, and leave nothing unread: a reset could take the alert away again."""
    with suppress(OSError):  # it has gone
        stream.say(refused.alert)
        stream.linger(timeout_s)


def _check_profile(connection: SSL.Connection, alpn: bytes) -> None:
    """Make sure of what v2 needs: OpenSSL completes a handshake without the protocol that was asked for."""
    if not alpn:
        return
    if connection.get_protocol_version() != SSL.TLS1_3_VERSION or connection.get_alpn_proto_negotiated() != alpn:
        raise ProtocolError(f"the TLS handshake is not one of profile v2 ({alpn.decode()}, TLS 1.3)")


def _translate(exc: SSL.Error) -> ConnectionError:
    """Give OpenSSL's errors the face that every transport shows: a broken connection."""
    said = reasons(exc)
    _, _, alert = said.partition(" alert ")
    if alert == "certificate required":
        return RefusedByPeer("the peer demands a certificate of this side: set crt and key")
    if alert in _REFUSALS:
        return RefusedByPeer(f"the peer refuses the certificate of this side: {_REFUSALS[alert]}")
    if alert == "internal error":  # what OpenSSL sends for a name or key that a client does not expect
        said += "; a client ends so where a pin or a name is not that of the certificate"
    return ConnectionAbortedError("TLS: " + (said or "connection broken"))


class TLSStream(Transport):
    """A TLS connection over a Stream. A FIN without close_notify is a cut, not an end."""

    __slots__ = (
        "_connection", "_ended", "_finished", "_header", "_lacking", "_records", "buffered", "stream", "unsent",
    )  # fmt: skip

    def __init__(self, stream: Stream, connection: SSL.Connection) -> None:
        self.stream = stream
        self._connection = connection
        self.unsent = b""  # cipher text
        self._ended = False  # close_notify has come
        self._finished = False  # ours is written
        self.buffered = False
        self._records = 0  # that OpenSSL holds, whole and unread; at most: some are not of data
        self._lacking = 0  # bytes of the record that has begun
        self._header = b""  # of the next one, as far as it has come

    def finish_handshake(self, before: bytes = b"", *, speaks: bool = False) -> None:
        """Answer the peer until the handshake is done; ``before``, in clear, goes out with the first answer.

        Whoever ``speaks`` next has the last answer go out with that.
        """
        done = False
        while not done:
            count = self.stream.recv_into(_raw[:RECORD])
            if not count:
                raise ConnectionAbortedError("the peer closed during the TLS handshake")
            self._feed(count)
            done, before = self.advance(before, speaks=speaks), b""
        try:  # bytes may have come right behind it, and as a rule have not
            self._connection.recv(1, socket.MSG_PEEK)
        except SSL.WantReadError:
            self._records = 0
        except SSL.ZeroReturnError:  # told to who reads
            pass
        except SSL.Error as exc:  # OpenSSL says only once what is wrong
            raise _translate(exc) from exc
        self.buffered = self._records > 0

    def advance(self, before: bytes = b"", *, speaks: bool = False) -> bool:
        """Go on in the handshake with what has come, and send ``before`` and what follows; True when it is done.

        Of whoever ``speaks`` next the last answer is left for then.
        """
        done = True
        try:
            self._connection.do_handshake()
        except SSL.WantReadError:
            done = False
        except SSL.Error as exc:
            alert = before + self._output(BATCH)  # tells the peer why
            problem = self._connection.get_app_data().problem
            if not problem and reasons(exc) == _NO_CERTIFICATE:
                problem = "it has no certificate, and ca demands one"
            if problem:
                raise CertificateRefused(problem, alert) from exc
            self.stream.sendall(alert)
            raise _translate(exc) from exc
        if not (done and speaks) and (answer := before + self._output(BATCH)):
            self.stream.sendall(answer)
        return done

    def _output(self, usual: int) -> bytes:
        """Give all that OpenSSL says; that may be more than is ``usual``: a long chain, many tickets, key updates."""
        said = b""
        try:
            while len(piece := self._connection.bio_read(usual)) == usual:
                said += piece
            said += piece
        except SSL.WantReadError:
            pass
        return said

    def exporter(self, label: bytes, size: int) -> bytes:
        """Give what only the two ends of this very connection can compute (RFC 9266); ProtocolError before TLS 1.3."""
        if self._connection.get_protocol_version() != SSL.TLS1_3_VERSION:
            raise ProtocolError("an exporter value of less than TLS 1.3 binds nothing")
        try:
            return self._connection.export_keying_material(label, size, b"")
        except SSL.Error as exc:
            raise _translate(exc) from exc

    def fileno(self) -> int:
        return self.stream.fileno()

    def fail_when_unacknowledged(self, seconds: float) -> None:
        self.stream.fail_when_unacknowledged(seconds)

    def watch(self, callback: Callable[..., None], *args: object) -> None:
        self.stream.watch(callback, *args)

    def unwatch(self) -> None:
        self.stream.unwatch()

    def wait_for_arrival(self) -> None:
        self.stream.wait_for_arrival()

    def __str__(self) -> str:
        return str(self.stream)

    def pull(self, buffer: memoryview) -> int:
        if self.buffered:
            filled = self._decrypt(buffer)
        else:
            count = self.stream.pull(_raw)
            if not count:
                raise ConnectionAbortedError("the TLS stream was cut off")
            filled = begin = 0
            at_once = [self._lacking]  # of a record that OpenSSL has the beginning of
            ends = self._ends_of_records(count)
            at_once += ends[-2:]
            for end in ends:  # one by one: OpenSSL's buffers grow, and never shrink again
                self._records += 1
                if end - begin <= LITTLE and end not in at_once:
                    continue  # as tickets, of which OpenSSL tells nothing: before the last it takes them all together
                self._connection.bio_write(_raw[begin:end])
                filled += self._decrypt(buffer[filled:])
                begin = end
            if begin < count:
                self._connection.bio_write(_raw[begin:count])
        if filled or self._ended:
            return filled
        raise BlockingIOError  # a part of a record; more may wait in the socket, but first others have their turn

    def _feed(self, count: int) -> None:
        """Give OpenSSL the cipher text that has come, whatever it is."""
        self._connection.bio_write(_raw[:count])
        self._records += len(self._ends_of_records(count))

    def _ends_of_records(self, count: int) -> list[int]:
        """Find where records end in the cipher text that has come (RFC 8446, 5.1)."""
        if not self._lacking and not self._header and count == HEADER + (_raw[3] << 8 | _raw[4]):
            return [count]  # just one, as of most requests and answers
        before, end, ends = len(self._header), self._lacking, []
        text = self._header + bytes(_raw[:count]) if before else _raw
        last = before + count - HEADER  # where a header may begin that is whole
        if end:
            ends.append(end - before)
        while end <= last:
            end += HEADER + (text[end + 3] << 8 | text[end + 4])
            ends.append(end - before)
        if end - before > count:  # not yet
            ends.pop()
        self._lacking = max(end - before - count, 0)
        self._header = bytes(text[end : before + count])
        return ends

    def _decrypt(self, buffer: memoryview) -> int:
        """Empty OpenSSL into ``buffer``, record by record; to ask for more than it has would cost an exception."""
        filled = 0
        try:
            while self._records and filled < len(buffer) and not self._ended:
                asked = min(len(buffer) - filled, RECORD)
                read = self._connection.recv_into(buffer[filled:], asked)
                filled += read
                if read < asked or not self._connection.pending():
                    self._records -= 1
        except SSL.WantReadError:
            self._records = 0
            self._answer()
        except SSL.ZeroReturnError:
            self._ended = True
        except SSL.Error as exc:
            raise _translate(exc) from exc
        self.buffered = self._records > 0 or self._ended
        return filled

    def _answer(self) -> None:
        """Send what OpenSSL has answered by itself, to key updates; what the kernel does not take stays bounded."""
        answer = self._output(BATCH + OVERHEAD)  # little more than was asked, and that came in one read
        if not answer or self._finished:  # behind our end nothing may be said
            return
        self.unsent += answer
        self.flush()
        if len(self.unsent) > MOST_BEHIND:
            raise ConnectionAbortedError("TLS: the peer asks for key updates and reads none of the answers")

    def push(self, data: memoryview | bytes) -> int:
        taken = self.push_more(data)
        self.flush()
        return taken

    def push_more(self, data: memoryview | bytes) -> int:
        return 0 if self.unsent and not self.flush() else self._encrypt(data)

    def _encrypt(self, data: memoryview | bytes) -> int:
        """Add a batch to what is to be sent; give its length in plain text."""
        taken, most = 0, min(len(data), BATCH)
        records = [self.unsent] if self.unsent else []
        try:
            while taken < most:
                taken += self._connection.send(data[taken : taken + RECORD])
                records.append(self._output(RECORD + OVERHEAD))
        except SSL.Error as exc:
            raise _translate(exc) from exc
        self.unsent = b"".join(records)
        return taken

    def flush(self) -> bool:
        while self.unsent:
            sent = self.stream.push_more(self.unsent) if self._finished else self.stream.push(self.unsent)
            if not sent:
                return False
            self.unsent = self.unsent[sent:]
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
        self.unsent += self._output(OVERHEAD)  # our close_notify
        self.flush()

    def peek(self) -> bool | None:
        try:
            if not self.buffered:
                count = self.stream.pull(_raw[:RECORD])
                if not count:
                    return False
                self._feed(count)
            self.buffered = self._records > 0
            return bool(self._connection.recv(1, socket.MSG_PEEK)) if self._records else None
        except SSL.WantReadError:
            self._records, self.buffered = 0, False
        except BlockingIOError:
            return None
        except (OSError, SSL.Error):
            return False
        try:
            self._answer()
        except OSError:
            return False
        return None

    def at_end(self) -> bool:
        return self._ended

    def is_dead(self) -> bool:
        return self.stream.is_dead()

    def round_trip_s(self) -> float:
        return self.stream.round_trip_s()

    def close(self) -> None:
        self.stream.close()

    def reset(self) -> None:
        self.stream.reset()
