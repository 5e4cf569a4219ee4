"""A client with the tunnel key, on plain sockets: it does what a test says, right or wrong."""

import contextlib
import re
from functools import cache

from support import as_stream, bounded
from tunnel import HERE, dial

from nodepass_gevent import opening, tls
from nodepass_gevent.opening import ClientProof
from nodepass_gevent.tls_context import SELF_SIGNED, ClientPolicy
from nodepass_gevent.tunnel_key import Handshake, derive, format_key, parse_key

ALPN_CONTROL, ALPN_DATA = b"nodepass-ctl/2", b"nodepass-data/2"  # as the wire has them, whatever the product says
EXPORTER_LABEL = b"EXPORTER-Channel-Binding"

KEY, OTHER_KEY = parse_key(format_key(b"k" * 32)), parse_key(format_key(b"o" * 32))
HELLO = b"//?v=2#hello"
NONCE = b"n" * 16
FIRST = re.compile(rb"//off\?v=2&n=[A-Za-z0-9_-]{22}&a=psk1#[12]")


@cache
def context(alpn):
    return ClientPolicy(HERE).context(SELF_SIGNED, alpn)


class KeyedClient:
    """A caller of the tunnel port, up to the end of the TLS handshake; the proof is the test's."""

    def __init__(self, port, key=KEY, hello=HELLO, name="", source=HERE):
        self.port, self.root, self.hello, self.source = port, derive(key, name), hello, source
        self.opened = []
        stream = as_stream(dial(port, source))
        self.opened.append(stream)
        self.first = stream.read_line(1024)
        assert FIRST.fullmatch(self.first)
        stream.sendall(hello + b"\n")
        with bounded():
            self.control = tls.dial(stream, context(ALPN_CONTROL))
        self.lines = b""

    def handshake(self, root=None, **other):
        """Compute the proofs of this connection, or those of another one."""
        exporter = self.control.exporter(EXPORTER_LABEL, 32)
        seen = {"first": self.first, "hello": self.hello, "exporter": exporter, "nonce": NONCE} | other
        return Handshake(root or self.root, **seen)

    def proof(self, nonce=NONCE, tag=None, capabilities=b"need"):
        tag = self.handshake(nonce=nonce).client_tag if tag is None else tag
        return opening.format_client_proof(ClientProof(nonce, tag, frozenset(filter(None, [capabilities]))))

    def line(self):
        """Wait for the next line of the control channel; ConnectionError when there is none any more."""
        with bounded():
            while b"\n" not in self.lines:
                piece = self.control.recv(1000)
                if not piece:
                    raise ConnectionAbortedError("end of stream")
                self.lines += piece
        line, _, self.lines = self.lines.partition(b"\n")
        return line

    def signal(self):
        """Wait for a line that is not a ping."""
        while not (line := self.line()):
            pass
        return line

    def authenticate(self):
        """Prove the key; verify the server's answer."""
        self.control.sendall(self.proof())
        answer = opening.parse_server_proof(self.line())
        self.session = answer.welcome.session
        handshake = self.handshake()
        assert answer.tag == handshake.server_tag(self.session)
        self.keys = handshake.session_keys(self.session)
        return self

    def open(self, session=None, source=None):
        """Dial a data connection, up to the end of the TLS handshake."""
        stream = as_stream(dial(self.port, source or self.source))
        self.opened.append(stream)
        line = b"//%b?v=2#data\n" % (session or self.session).hex().encode()
        with bounded():
            return tls.dial(stream, context(ALPN_DATA), line)

    def tag(self, data, keys=None):
        """Give what proves a data connection: the session's id and the tag."""
        keys = keys or self.keys
        return keys.session + keys.client_tag(data.exporter(EXPORTER_LABEL, 32))

    def join(self, **options):
        """Bring a data connection into the server's pool; give its id and the connection."""
        data = self.open(**options)
        data.sendall(self.tag(data))
        return self.verified(data)

    def verified(self, data):
        with bounded():
            answer = data.recv_exactly(40)
        exporter = data.exporter(EXPORTER_LABEL, 32)
        assert answer[8:] == self.keys.server_tag(answer[:8], exporter, self.keys.client_tag(exporter))
        return answer[:8], data

    def serves(self, user, *, of=None):
        """Carry a question and an answer between a user and the data connection launched for it."""
        launched = {}
        for id, data in of or [self.join()]:
            launched[id] = data
        user.sendall(b"question")
        while not (match := re.fullmatch(rb"//([0-9a-f]{8})#1", self.signal())):
            pass
        data = launched[match[1]]
        with bounded():
            assert data.recv_exactly(8) == b"question"
            data.sendall(b"answer")
        data.close()
        return user.recv(6) == b"answer"

    def close(self):
        for stream in self.opened:
            stream.close()


def fate(transport):
    """Wait for a connection's end; say how it ended and after which bytes, as one outside sees it."""
    seen = b""
    with bounded(), contextlib.ExitStack() as stack:
        stack.callback(transport.close)
        try:
            while piece := transport.recv(1000):
                seen += piece
        except ConnectionResetError:
            return "reset", seen
        except ConnectionError as exc:
            return str(exc), seen
        return "end", seen
