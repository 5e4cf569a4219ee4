"""Who has the tunnel key: its proofs on one connection inside TLS, for the side that proves and the side that verifies.

What a proof is stands in ``tunnel_key``, its lines in ``opening``. Callers set the deadlines; raised are OSError,
ProtocolError and KeyMismatch.
"""

from collections.abc import Callable

from . import opening, wire
from .errors import KeyMismatch, ProtocolError
from .opening import ClientProof, Welcome
from .tls import TLSStream
from .tunnel_key import EXPORTER_LABEL, SIZE, Handshake, Root, SessionKeys, same
from .wire import Bye


def prove(
    control: TLSStream, root: Root, first: bytes, hello: bytes, nonce: bytes, capabilities: frozenset[bytes]
) -> Handshake:
    """Send a client's proof; the server's answer is for ``check_answer``."""
    handshake = Handshake(root, first, hello, _exporter(control), nonce)
    control.sendall(opening.format_client_proof(ClientProof(nonce, handshake.client_tag, capabilities)))
    return handshake


def check_answer(handshake: Handshake, line: bytes) -> tuple[Welcome | Bye, SessionKeys | None]:
    """Read the server's answer, which proves that it has the key too, or is a bye."""
    answer = opening.parse_server_proof(line)
    if isinstance(answer, Bye):
        return answer, None
    session = answer.welcome.session
    if not same(answer.tag, handshake.server_tag(session)):
        raise KeyMismatch("the server's proof of the tunnel key is wrong: somebody else answers in its place")
    return answer.welcome, handshake.session_keys(session)


def verify(control: TLSStream, roots: tuple[Root, ...], first: bytes, hello: bytes) -> tuple[Handshake, ClientProof]:
    """Wait for a client's proof, and verify it with each of the keys."""
    proof = opening.parse_client_proof(_read_line(control))
    exporter = _exporter(control)
    handshakes = [Handshake(root, first, hello, exporter, proof.nonce) for root in roots]
    fitting = [handshake for handshake in handshakes if same(handshake.client_tag, proof.tag)]
    if not fitting:
        raise KeyMismatch("its proof of the tunnel key is wrong")
    return fitting[0], proof


def prove_data(data: TLSStream, keys: SessionKeys) -> bytes:
    """Prove that a data connection belongs to the session, verify that the server's end does, and give its id."""
    exporter = _exporter(data)
    tag = keys.client_tag(exporter)
    data.sendall(keys.session + tag)
    answer = data.recv_exactly(wire.ID_LENGTH + SIZE)
    id = wire.parse_id(answer[: wire.ID_LENGTH])
    if not same(answer[wire.ID_LENGTH :], keys.server_tag(id, exporter, tag)):
        raise KeyMismatch("the server's tag on a data connection is wrong: somebody else answers in its place")
    return id


def verify_data(data: TLSStream, keys: SessionKeys) -> Callable[[bytes], bytes]:
    """Wait for a data connection's tag and verify it; give what makes the answer's tag for an id."""
    exporter = _exporter(data)
    tag = keys.client_tag(exporter)
    if not same(data.recv_exactly(opening.SESSION_LENGTH + SIZE), keys.session + tag):
        raise KeyMismatch("its tag is wrong")
    return lambda id: keys.server_tag(id, exporter, tag)


def _exporter(connection: TLSStream) -> bytes:
    return connection.exporter(EXPORTER_LABEL, SIZE)


def _read_line(transport: TLSStream) -> bytes:
    """Wait for one line, behind which nothing may come before it is answered."""
    data = b""
    while b"\n" not in data:
        if len(data) >= opening.MAX_FIRST_LINE:
            raise ProtocolError(f"a line of more than {opening.MAX_FIRST_LINE} bytes")
        piece = transport.recv(opening.MAX_FIRST_LINE - len(data))
        if not piece:
            raise ConnectionAbortedError("it closed without a proof of the tunnel key")
        data += piece
    line, _, rest = data.partition(b"\n")
    if rest:
        raise ProtocolError("bytes behind the proof of the tunnel key")
    return line
