"""A man in the middle: ends TLS on both legs with a certificate of its own, passes all bytes on, and keeps them."""

import re
from functools import partial

import gevent
from gevent.pool import Group
from secure import presented
from support import as_stream
from test_client import listener, port_of
from tunnel import HERE, dial

from nodepass_gevent import opening, tls
from nodepass_gevent.tls_context import SELF_SIGNED, ClientPolicy

ALPN = {b"hello": opening.ALPN_CONTROL, b"data": opening.ALPN_DATA}


class Mitm:
    """Stands before a tunnel port. ``kinds``: which connections it opens (hello, data); others pass through unread.

    ``first`` and ``line`` may change the lines in clear, server to client and client to server.
    """

    def __init__(self, stack, server_port, kinds=(b"hello", b"data"), first=bytes, line=bytes):
        self.server_port, self.kinds, self.first, self.line = server_port, kinds, first, line
        self.read = {b"hello": b"", b"data": b""}  # what it read inside TLS, of both directions
        self.opened = {b"hello": 0, b"data": 0}  # connections on which it ended both legs
        self.passed = []  # of each connection that passed through, what the client sent
        self._certificate = presented()
        self.listener = stack.enter_context(listener())
        self.listener.settimeout(None)
        self.port = port_of(self.listener)
        self._running = Group()
        stack.callback(self._running.kill)
        self._running.spawn(self._accept)

    def _accept(self):
        while True:
            sock, peer = self.listener.accept()
            self._running.spawn(self._carry, as_stream(sock, peer))

    def _carry(self, client):
        try:
            with client, as_stream(dial(self.server_port)) as server:
                client.sendall(self.first(server.read_line(1024)) + b"\n")
                line = client.read_line(1024)
                kind = re.search(rb"#(\w+)$", line)[1]
                server.sendall(self.line(line) + b"\n")
                if kind in self.kinds:
                    self._open(kind, client, server)
                else:
                    self.passed.append([line + b"\n"])
                    self._pump(client, server, self.passed[-1].append, lambda data: None)
        except OSError:
            pass

    def _open(self, kind, client, server):
        near = tls.accept(client, self._certificate.contexts[ALPN[kind]], ALPN[kind])
        far = tls.dial(server, ClientPolicy(HERE).context(SELF_SIGNED, ALPN[kind]))
        self.opened[kind] += 1
        note = partial(self._note, kind)
        self._pump(near, far, note, note)

    def _note(self, kind, data):
        self.read[kind] += data

    def _pump(self, near, far, *notes):
        """Copy both ways until either ends; an end of one is passed on as a reset of both."""

        def copy(source, sink, note):
            try:
                while data := source.recv(65536):
                    note(data)
                    sink.sendall(data)
            except OSError:
                pass

        ways = [self._running.spawn(copy, *way) for way in ((near, far, notes[0]), (far, near, notes[1]))]
        gevent.wait(ways, count=1)
        gevent.killall(ways)
        raise ConnectionResetError
