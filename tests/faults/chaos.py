"""A relay between client and server that spoils what passes: holds, cuts, slices, delays and flips, or opens TLS."""

import contextlib
import select
import socket
import ssl
import struct
import threading
import time

from integration.harness import certificates

from .peers import read_line, secured

TO_SERVER, TO_CLIENT = "to server", "to client"
ALPN = {"hello": "nodepass-ctl/2", "data": "nodepass-data/2"}


class Link:
    """One connection through the relay; ``control`` is the one on which a hello was said."""

    def __init__(self, near, far):
        self.near, self.far = near, far
        self.opening = b""  # what the client said first
        self.passed = 0  # bytes, both ways

    @property
    def control(self):
        return b"#hello\n" in self.opening

    @property
    def data(self):
        return b"#data\n" in self.opening

    def cut(self, reset=True):
        """End both connections, by reset or as a clean end."""
        for sock in (self.near, self.far):
            with contextlib.suppress(OSError):
                if reset:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    sock.shutdown(socket.SHUT_RD)  # wakes the thread that reads: while it does nothing is closed
                else:
                    sock.shutdown(socket.SHUT_RDWR)
            sock.close()


class Relay:
    """Listens on ``port`` and passes on to ``to_port``; ``rule(link, direction, data)`` gives the pieces to pass on.

    The server sees all come from ``source``.
    """

    def __init__(self, to_port, source="127.0.0.1"):
        self.links = []
        self.rule = lambda _link, _direction, data: [data]
        self.passes_ends = True
        self.source = source
        self._to_port = to_port
        self._flowing = threading.Event()
        self._flowing.set()
        self._held = set()
        self._stopped = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._listener.settimeout(0.1)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept_all, daemon=True).start()

    def hold(self, links=None):
        """Pass nothing on any more, and close nothing: a cable that is cut. Of all links, or of some."""
        if links is None:
            self._flowing.clear()
        else:
            self._held |= set(links)

    def release(self):
        self._held = set()
        self._flowing.set()

    def cut(self, wanted=lambda link: True, reset=True):
        """Cut the links that are wanted; give how many they were."""
        chosen = [link for link in self.links if wanted(link)]
        for link in chosen:
            link.cut(reset)
        return len(chosen)

    def _accept_all(self):
        while not self._stopped.is_set():
            try:
                near, _ = self._listener.accept()
            except OSError:
                continue
            near.settimeout(None)
            threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near):
        try:
            far = socket.create_connection(("127.0.0.1", self._to_port), 5, (self.source, 0))
        except OSError:
            near.close()
            return
        far.settimeout(None)
        self._pass(near, far)

    def _pass(self, near, far):
        for sock in (near, far):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = Link(near, far)
        self.links.append(link)
        back = threading.Thread(target=self._pump, args=(link, far, near, TO_CLIENT), daemon=True)
        back.start()
        self._pump(link, near, far, TO_SERVER)
        back.join()
        link.cut(reset=False)
        self.links.remove(link)

    def _pump(self, link, source, sink, direction):
        try:
            while data := source.recv(65536):
                if direction is TO_SERVER and len(link.opening) < 200:
                    link.opening += data[:200]
                self._wait(link)
                for piece in self.rule(link, direction, data):
                    sink.sendall(piece)
                    link.passed += len(piece)
            self._wait(link)
            if self.passes_ends:
                sink.shutdown(socket.SHUT_WR)
        except OSError:
            self._wait(link)  # what is held tells nobody of an end
            link.cut()

    def _wait(self, link):
        while not self._stopped.is_set() and (not self._flowing.is_set() or link in self._held):
            time.sleep(0.02)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stopped.set()
        self._flowing.set()
        self._listener.close()
        self.cut()


class ManInTheMiddle(Relay):
    """A relay that ends TLS on both legs of connections of the ``kinds`` (hello, data), and keeps what it reads."""

    def __init__(self, to_port, source="127.0.0.1"):
        super().__init__(to_port, source)
        self.kinds = ()
        self.read = {"hello": b"", "data": b""}  # inside TLS, of both directions

    def _pass(self, near, far):
        if not self.kinds:
            super()._pass(near, far)
            return
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.enter_context(near)
            stack.enter_context(far)
            near.sendall(read_line(far))
            line = read_line(near)
            far.sendall(line)
            kind = line.rpartition(b"#")[2].strip().decode()
            if kind in self.kinds:
                far = stack.enter_context(secured(far, ALPN[kind]))
                near = stack.enter_context(self._accepted(near, ALPN[kind]))
            link = Link(near, far)
            link.opening = line
            self.links.append(link)
            self._copy(kind, link)
            link.cut()
            self.links.remove(link)

    def _accepted(self, near, alpn):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificates().crt, certificates().key)
        context.set_alpn_protocols([alpn])
        return context.wrap_socket(near, server_side=True)

    def _copy(self, kind, link):
        """Copy both ways until either ends; in one thread, which TLS needs."""
        ways = {link.near: link.far, link.far: link.near}
        with contextlib.suppress(OSError, ValueError):  # of sockets that were cut
            while True:
                for source in select.select(list(ways), [], [], 0.1)[0]:
                    source.settimeout(0)
                    with contextlib.suppress(ssl.SSLWantReadError):  # a session ticket
                        data = source.recv(65536)
                        if not data:
                            return
                        if isinstance(source, ssl.SSLSocket):
                            self.read[kind] += data
                        ways[source].settimeout(5)
                        ways[source].sendall(data)


def sliced(size=1):
    """Pass on in pieces of ``size`` bytes."""
    return lambda _link, _direction, data: [data[at : at + size] for at in range(0, len(data), size)]


def delayed(seconds):
    """Pass on later."""

    def rule(_link, _direction, data):
        time.sleep(seconds)
        return [data]

    return rule


def flipped(at, wanted=lambda link: link.data):
    """Flip one bit of the wanted links once ``at`` bytes have passed."""

    def rule(link, direction, data):
        if wanted(link) and direction is TO_CLIENT and link.passed >= at and len(data) > 40:
            spoiled = bytearray(data)
            spoiled[len(data) // 2] ^= 1
            return [bytes(spoiled)]
        return [data]

    return rule
