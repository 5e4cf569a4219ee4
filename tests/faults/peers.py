"""Peers spoken by hand, on plain sockets: a client of profile v2 and a server of either profile."""

import contextlib
import secrets
import socket
import ssl
import threading

OFFER = b"//off?v=2&n=AAAAAAAAAAAAAAAAAAAAAA#0\n"
SESSION = b"0123456789abcdef"
WELCOME = b"//%b?c=need&i=60&p=64#welcome\n" % SESSION  # it sends no pings, and is borne for three minutes
WAIT_S = 10.0


def dial(port, source="127.0.0.1", timeout=WAIT_S):
    """Connect from an address of choice."""
    return socket.create_connection(("127.0.0.1", port), timeout, source_address=(source, 0))


def read_line(sock):
    """Read to the newline and not a byte behind it; what came when the stream ends before."""
    line = b""
    while not line.endswith(b"\n") and (byte := sock.recv(1)):
        line += byte
    return line


def read_exactly(sock, size):
    read = b""
    while len(read) < size and (piece := sock.recv(size - len(read))):
        read += piece
    return read


def how_it_ends(sock):
    """Read on to the end: give what came, and whether it was an ``end`` or a ``reset``."""
    read = b""
    try:
        while piece := sock.recv(65536):
            read += piece
    except ConnectionError:
        return read, "reset"
    return read, "end"


def secured(sock, alpn):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols([alpn])
    return context.wrap_socket(sock)


class RawClient:
    """A client of profile v2: calls, says hello, is welcomed, joins and answers launches with an echo."""

    def __init__(self, port, tls=0, source="127.0.0.1", hello=b"//?v=2&c=need#hello\n"):
        self._port, self._tls, self._source = port, tls, source
        self.idle = {}
        self.control = dial(port, source)
        self.first_line = read_line(self.control)
        self.control.sendall(hello)
        if tls:
            self.control = secured(self.control, "nodepass-ctl/2")
        self.welcome = read_line(self.control)

    @property
    def session(self):
        return self.welcome[2:18]

    def join(self):
        """Bring one data connection into the pool; give its id."""
        data = dial(self._port, self._source)
        data.sendall(b"//%b?v=2#data\n" % self.session)
        read_line(data)
        if self._tls:
            data = secured(data, "nodepass-data/2")
        id = read_exactly(data, 8)
        self.idle[id] = data
        return id

    def launched(self):
        """Wait for a launch; give its data connection."""
        while True:
            line = read_line(self.control)
            assert line, "the control channel was closed"
            if line == b"\n":
                self.control.sendall(b"\n")
            elif line[-3:-1] in (b"#1", b"#2", b"#3"):
                return self.idle.pop(line[2:10])

    def close(self):
        for sock in (self.control, *self.idle.values()):
            sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class FakeServer:
    """A server without TLS: says ``first`` to everybody, and then what ``on_hello`` and ``on_data`` do."""

    def __init__(self, first=OFFER, port=0):
        self.first = first
        self.calls = 0
        self.controls = []
        self.idle = {}  # data connections by id
        self.on_hello = lambda conn: conn.sendall(WELCOME)
        self.on_data = self.give_id
        self._open = set()
        self._stopped = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", port), backlog=1024)
        self._listener.settimeout(0.05)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept_all, daemon=True).start()

    def give_id(self, conn, id=None):
        id = id or secrets.token_hex(4).encode()
        self.idle[id] = conn
        conn.sendall(id)

    def send(self, *lines):
        """Say lines on the youngest control channel, in one write."""
        self.controls[-1].sendall(b"".join(lines))

    def launch(self):
        """Launch one of the idle connections; give it."""
        id, data = self.idle.popitem()
        self.send(b"//%b#1\n" % id)
        return data

    def _accept_all(self):
        while not self._stopped.is_set():
            with contextlib.suppress(OSError):
                conn, _ = self._listener.accept()
                conn.settimeout(WAIT_S)
                self._open.add(conn)
                threading.Thread(target=self._serve, args=(conn,), daemon=True).start()

    def _serve(self, conn):
        with contextlib.suppress(OSError):
            self.calls += 1
            first = self.first() if callable(self.first) else self.first
            conn.sendall(first)
            line = read_line(conn)
            if line.endswith(b"#hello\n"):
                self.controls.append(conn)
                self.on_hello(conn)
            elif line.endswith(b"#data\n"):
                self.on_data(conn)

    def close(self):
        self._stopped.set()
        self._listener.close()
        for conn in list(self._open):
            conn.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
