"""A relay between client and server that spoils what passes: holds, cuts, slices, delays and flips."""

import contextlib
import socket
import struct
import threading
import time

TO_SERVER, TO_CLIENT = "to server", "to client"


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
                else:
                    sock.shutdown(socket.SHUT_RDWR)
            sock.close()


class Relay:
    """Listens on ``port`` and passes on to ``to_port``; ``rule(link, direction, data)`` gives the pieces to pass on."""

    def __init__(self, to_port):
        self.links = []
        self.rule = lambda _link, _direction, data: [data]
        self.passes_ends = True
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
            far = socket.create_connection(("127.0.0.1", self._to_port), timeout=5)
        except OSError:
            near.close()
            return
        far.settimeout(None)
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
        except ConnectionResetError:
            link.cut()
        except OSError:
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
