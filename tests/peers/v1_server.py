"""A NodePass v1 server for tests, written from the protocol page alone: threads, standard library, no product code.

    python tests/peers/v1_server.py TUNNEL_HOST:PORT PUBLIC_HOST:PORT [--tls 0|1|2] [--crt FILE --key FILE] ...

It serves one client at a time, hands out a data connection the moment its id is written (as the original does, which
is a race), finds out that a client is gone only by writing to it, and then closes everything, pauses and starts over.
Exchanges in flight go on. It says on stdout, one line each: READY, CLIENT, REFUSED (a data connection), LOST.
"""

import argparse
import collections
import contextlib
import os
import random
import secrets
import signal
import socket
import ssl
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import streams

DATA_PORTS = range(1024, 8192)
TICK_S = 0.1  # how often a blocked accept or recvfrom looks whether its session is over
CONTROL_WRITE_S = 5.0


class SessionOver(Exception):
    """The control channel of this session has failed."""


class Pool:
    """Data connections of one session, oldest first; each is handed out once."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._ready: collections.deque[tuple[str, streams.Stream]] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False

    def add(self, connection_id: str, stream: streams.Stream) -> None:
        with self._changed:
            if not self._closed and len(self._ready) < self._most:
                self._ready.append((connection_id, stream))
                self._changed.notify()
                return
        stream.close()

    def take(self) -> tuple[str, streams.Stream]:
        """Wait for the oldest one that is still alive; raise SessionOver."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ready or self._closed)
                if self._closed:
                    raise SessionOver
                connection_id, stream = self._ready.popleft()
            if stream.silent():
                return connection_id, stream
            stream.close()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            ready = list(self._ready)
            self._ready.clear()
        for _, stream in ready:
            stream.close()


class Session:
    """One control channel and its pool."""

    def __init__(self, control: socket.socket, settings: argparse.Namespace) -> None:
        control.settimeout(CONTROL_WRITE_S)
        self._control = control
        self._writing = threading.Lock()
        self.settings = settings
        self.pool = Pool(settings.max)
        self.over = threading.Event()

    def write(self, line: bytes) -> None:
        try:
            with self._writing:
                self._control.sendall(line)
        except OSError as exc:
            self.over.set()
            raise SessionOver(str(exc)) from exc

    def launch(self, fragment: str) -> streams.Stream:
        """Pair a user with a data connection; raise SessionOver."""
        connection_id, stream = self.pool.take()
        try:
            self.write(f"//{connection_id}#{fragment}\n".encode())
        except SessionOver:
            stream.close()
            raise
        return stream

    def keep_alive(self) -> None:
        """Write an empty line at once and every interval; raise SessionOver when one cannot be written."""
        while True:
            self.write(b"\n")
            self.over.wait(self.settings.report_interval)
            if self.over.is_set():
                raise SessionOver("a launch could not be written")


def admit(session: Session, sock: socket.socket) -> None:
    """Make a data connection of a caller of the data port: TLS at once if any, its id in one send, into the pool."""
    settings = session.settings
    try:
        if settings.context:
            stream = streams.secure(sock, settings.context, record_size=settings.record_size)
        else:
            stream = streams.clear(sock)
        connection_id = secrets.token_hex(4)
        stream.send(connection_id.encode())
    except OSError as exc:
        say(f"REFUSED {exc}")
        sock.close()
        return
    session.pool.add(connection_id, stream)


def relay_user(session: Session, sock: socket.socket) -> None:
    """Serve one TCP user."""
    try:
        stream = session.launch("1")
    except SessionOver:
        sock.close()
        return
    streams.exchange(streams.clear(sock), stream)


def relay_datagram(settings, public: socket.socket, datagram: bytes, user: tuple, stream: streams.Stream) -> None:
    """Write one datagram unframed and send what one read gives back to the user.

    The original keeps the connection open after the request, for ever; this one until the reply or the timeout.
    """
    with contextlib.suppress(OSError), contextlib.closing(stream):
        stream.send(datagram)
        stream.drain(settings.udp_timeout)
        if settings.udp_half_close:
            stream.end()
        reply = stream.read(settings.udp_buffer, settings.udp_timeout)
        if reply:
            public.sendto(reply, user)


def accept_all(listener: socket.socket, session: Session, handle) -> None:
    """Give every caller a thread of its own until the session is over."""
    while not session.over.is_set():
        try:
            sock, _ = listener.accept()
        except TimeoutError:
            continue
        except OSError:
            time.sleep(TICK_S)
            continue
        threading.Thread(target=handle, args=(session, sock), daemon=True).start()


def receive_all(public: socket.socket, session: Session) -> None:
    """Launch an exchange for every datagram; like the original, wait for its data connection before the next."""
    while not session.over.is_set():
        try:
            datagram, user = public.recvfrom(session.settings.udp_buffer)
            stream = session.launch("2")
        except OSError:
            continue
        except SessionOver:
            return
        arguments = (session.settings, public, datagram, user, stream)
        threading.Thread(target=relay_datagram, args=arguments, daemon=True).start()


def serve_client(control: socket.socket, data: socket.socket, tcp: socket.socket, udp: socket.socket, settings) -> None:
    """Serve one client until its control channel fails."""
    session = Session(control, settings)
    loops = [
        threading.Thread(target=accept_all, args=(data, session, admit), daemon=True),
        threading.Thread(target=accept_all, args=(tcp, session, relay_user), daemon=True),
        threading.Thread(target=receive_all, args=(udp, session), daemon=True),
    ]
    try:
        session.write(f"//{data.getsockname()[1]}{settings.offer}#{settings.tls}\n".encode())
        for loop in loops:
            loop.start()
        session.keep_alive()
    except SessionOver as exc:
        say(f"LOST {exc}")
    finally:
        session.over.set()
        session.pool.close()
        for loop in loops:
            if loop.ident:
                loop.join()


def run(settings: argparse.Namespace) -> None:
    """Open the ports, serve one client, close everything, pause, start over; for ever."""
    while True:
        try:
            serve_once(settings)
        except OSError as exc:
            say(f"LOST {exc}")
        time.sleep(settings.cooldown)


def serve_once(settings: argparse.Namespace) -> None:
    with contextlib.ExitStack() as stack:
        tunnel = stack.enter_context(listen(settings.tunnel))
        data = stack.enter_context(listen_at_random(settings))
        tcp = stack.enter_context(listen(settings.public))
        udp = stack.enter_context(bind_datagrams(settings.public))
        say(f"READY data={data.getsockname()[1]} tls={settings.tls}")
        control, peer = accept(tunnel)
        say(f"CLIENT {peer[0]}:{peer[1]}")
        with control:
            serve_client(control, data, tcp, udp, settings)


def accept(listener: socket.socket) -> tuple[socket.socket, tuple]:
    while True:
        with contextlib.suppress(TimeoutError):
            return listener.accept()


def listen(address: tuple[str, int]) -> socket.socket:
    listener = socket.create_server(address, family=family_of(address), backlog=1024)
    listener.settimeout(TICK_S)
    return listener


def listen_at_random(settings: argparse.Namespace) -> socket.socket:
    """Listen on the data port: random at start, kept afterwards, another one when taken."""
    while True:
        port = settings.data_port or random.choice(DATA_PORTS)
        with contextlib.suppress(OSError):
            listener = listen((settings.tunnel[0], port))
            settings.data_port = port
            return listener
        settings.data_port = 0


def bind_datagrams(address: tuple[str, int]) -> socket.socket:
    sock = socket.socket(family_of(address), socket.SOCK_DGRAM)
    sock.bind(address)
    sock.settimeout(TICK_S)
    return sock


def family_of(address: tuple[str, int]) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address[0] else socket.AF_INET


def server_context(settings: argparse.Namespace) -> ssl.SSLContext | None:
    """Return the context of modes 1 and 2, None for mode 0. The two differ only in what the client checks."""
    if settings.tls == 0:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.num_tickets = 1  # as Go
    context.load_cert_chain(settings.crt, settings.key)
    return context


def say(text: str) -> None:
    print(text, flush=True)


def address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tunnel", type=address)
    parser.add_argument("public", type=address)
    parser.add_argument("--tls", type=int, choices=(0, 1, 2), default=0)
    parser.add_argument("--crt", help="certificate chain, PEM; needed with --tls 1 and 2")
    parser.add_argument("--key", help="its private key, PEM")
    parser.add_argument("--data-port", type=int, default=0, help="default: random in 1024-8191")
    parser.add_argument("--report-interval", type=float, default=5.0, metavar="S")
    parser.add_argument("--cooldown", type=float, default=5.0, metavar="S")
    parser.add_argument("--max", type=int, default=1024, help="MAX_POOL_CAPACITY")
    parser.add_argument("--udp-timeout", type=float, default=5.0, metavar="S")
    parser.add_argument("--udp-buffer", type=int, default=8192, metavar="BYTES")
    parser.add_argument("--udp-half-close", action="store_true", help="end the stream after the datagram")
    parser.add_argument("--record-size", type=int, default=0, metavar="BYTES", help="cut TLS writes; Go starts at 1200")
    parser.add_argument("--offer", default="", help="query of the first line, with its '?'; a v1 client ignores it")
    settings = parser.parse_args(arguments)
    if settings.tls and not (settings.crt and settings.key):
        parser.error("--tls 1 and 2 need --crt and --key")
    settings.context = server_context(settings)
    return settings


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    run(parse(sys.argv[1:]))
