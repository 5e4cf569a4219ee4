"""A NodePass v1 client for tests, written from the protocol page alone: threads, standard library, no product code.

    python tests/peers/v1_client.py TUNNEL_HOST:PORT TARGET_HOST:PORT [--min N] [--max N] [--patient] ...

It is as brittle as the original on purpose: one read for the id and one for a datagram, a launch whose id it does not
know yet is dropped, and after more than a third of the capacity of those the pool is flushed. --patient waits instead.
As with the original the pool grows with use and keeps its size: a leak test fixes it with --max equal to --min.
It says on stdout, one line each: CLIENT (control channel up), READY (pool filled), MISS, FLUSH, LOST.
"""

import argparse
import contextlib
import os
import signal
import socket
import ssl
import sys
import threading
import time
import urllib.parse

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import streams

DIAL_S = 5.0
ID_LENGTH = 8
ID_WAIT_S = 10.0
LONGEST_LINE = 65536  # the original has no limit


class Unusable(Exception):
    """The first line names no data port that can be dialled."""


class Pool:
    """Idle data connections by id, between `min` and `max` of them, refilled once a round."""

    def __init__(self, settings: argparse.Namespace, data_address: tuple[str, int], tls: str) -> None:
        self._settings = settings
        self._address = data_address
        self._context = client_context(tls)
        self._idle: dict[str, streams.Stream] = {}
        self._changed = threading.Condition()
        self._capacity = settings.min
        self._misses = 0
        self._closed = threading.Event()

    def fill(self) -> None:
        """Refill in rounds until closed, adapting the capacity to the use; say READY after the first full one."""
        ready = False
        while not self._closed.is_set():
            created = self._fill_once()
            if not ready and len(self._idle) >= self._settings.min:
                ready = True
                say(f"READY pool={len(self._idle)}")
            if created < self._capacity * 0.2:
                self._capacity = max(self._capacity - 1, self._settings.min)
            elif created > self._capacity * 0.8:
                self._capacity = min(self._capacity + 1, self._settings.max)
            self._closed.wait(self._settings.refill_interval)

    def _fill_once(self) -> int:
        created = 0
        while len(self._idle) < self._capacity and not self._closed.is_set():
            try:
                connection_id, stream = self._dial()
            except OSError as exc:
                say(f"DIAL failed: {exc}")  # the original would dial on without a pause
                break
            created += 1
            self._add(connection_id, stream)
        return created

    def _dial(self) -> tuple[str, streams.Stream]:
        """Open one data connection: TLS at once if any, then the id, with one read."""
        sock = socket.create_connection(self._address, timeout=DIAL_S)
        try:
            if self._context:
                name, record_size = self._address[0], self._settings.record_size
                stream = streams.secure(sock, self._context, name=name, record_size=record_size)
            else:
                stream = streams.clear(sock)
            raw = stream.read(ID_LENGTH, self._settings.id_timeout)
        except BaseException:
            sock.close()
            raise
        if len(raw) != ID_LENGTH:
            sock.close()
            raise ConnectionError(f"one read gave {raw!r}, not an id")
        return raw.decode("latin-1"), stream

    def _add(self, connection_id: str, stream: streams.Stream) -> None:
        with self._changed:
            if not self._closed.is_set():
                self._idle[connection_id] = stream
                self._changed.notify_all()
                return
        stream.close()

    def take(self, connection_id: str) -> streams.Stream | None:
        """Return the data connection of a launch, once; None when its id is not known."""
        with self._changed:
            if self._settings.patient:
                self._changed.wait_for(lambda: connection_id in self._idle or self._closed.is_set(), ID_WAIT_S)
            stream = self._idle.pop(connection_id, None)
            if stream is None:
                say(f"MISS {connection_id}")
                self._misses += 1
            flush = self._misses > self._capacity // 3
        if flush:
            self._flush()
        return stream

    def _flush(self) -> None:
        with self._changed:
            idle = list(self._idle.values())
            self._idle.clear()
            self._misses = 0
            self._capacity = self._settings.min
        say(f"FLUSH {len(idle)}")
        for stream in idle:
            stream.close()

    def close(self) -> None:
        with self._changed:
            self._closed.set()
            self._changed.notify_all()
            idle = list(self._idle.values())
            self._idle.clear()
        for stream in idle:
            stream.close()


def relay_user(pool: Pool, connection_id: str, settings: argparse.Namespace) -> None:
    """Launch 1: join a TCP user's data connection with a new connection to the target."""
    stream = pool.take(connection_id)
    if stream is None:
        return
    try:
        target = socket.create_connection(settings.target, timeout=DIAL_S)
    except OSError as exc:
        say(f"TARGET failed: {exc}")
        stream.close()
        return
    streams.exchange(streams.clear(target), stream)


def relay_datagram(pool: Pool, connection_id: str, settings: argparse.Namespace) -> None:
    """Launch 2: one read is the datagram; send it from a fresh socket, write one reply back unframed, close."""
    stream = pool.take(connection_id)
    if stream is None:
        return
    family = socket.AF_INET6 if ":" in settings.target[0] else socket.AF_INET
    with contextlib.suppress(OSError), contextlib.closing(stream), socket.socket(family, socket.SOCK_DGRAM) as target:
        datagram = stream.read(settings.udp_buffer, settings.udp_timeout)
        if not datagram:
            return
        target.settimeout(settings.udp_timeout)
        target.connect(settings.target)
        target.send(datagram)
        stream.send(target.recv(settings.udp_buffer))
        stream.drain(settings.udp_timeout)


LAUNCHES = {"1": relay_user, "2": relay_datagram}  # by fragment; others are ignored


def parse_line(line: bytes) -> tuple[str, str]:
    """Return host and fragment, all that the original looks at."""
    url = urllib.parse.urlsplit(line.decode("latin-1").rstrip("\n"))
    return url.netloc, url.fragment


def open_pool(first_line: bytes, settings: argparse.Namespace) -> Pool:
    """Read the handshake; raise Unusable."""
    try:
        host, tls = parse_line(first_line)
        port = int(host)
    except ValueError as exc:
        raise Unusable(f"{first_line!r}: {exc}") from exc
    if not first_line.endswith(b"\n") or not 0 < port < 65536:
        raise Unusable(repr(first_line))
    return Pool(settings, (settings.tunnel[0], port), tls)


def follow(lines, pool: Pool, settings: argparse.Namespace) -> None:
    """Serve launches until the control channel ends."""
    while line := lines.readline(LONGEST_LINE):
        try:
            connection_id, fragment = parse_line(line)
        except ValueError:
            continue
        if fragment in LAUNCHES:
            arguments = (pool, connection_id, settings)
            threading.Thread(target=LAUNCHES[fragment], args=arguments, daemon=True).start()


def session(settings: argparse.Namespace) -> None:
    """Serve one control channel to its end."""
    with socket.create_connection(settings.tunnel, timeout=DIAL_S) as control, control.makefile("rb") as lines:
        control.settimeout(None)  # the original waits for ever
        first_line = lines.readline(LONGEST_LINE)
        pool = open_pool(first_line, settings)
        say(f"CLIENT of {settings.tunnel[0]}:{settings.tunnel[1]}, told {first_line!r}")
        filler = threading.Thread(target=pool.fill, daemon=True)
        filler.start()
        try:
            follow(lines, pool, settings)
        finally:
            pool.close()
            filler.join()


def run(settings: argparse.Namespace) -> None:
    """Serve, pause, start over; for ever."""
    while True:
        try:
            session(settings)
            say("LOST end of stream")
        except (OSError, Unusable) as exc:
            say(f"LOST {exc}")
        time.sleep(settings.cooldown)


def client_context(tls: str) -> ssl.SSLContext | None:
    """Return the context of a mode as the server announced it; the original takes an unknown one for 0."""
    if tls == "1":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif tls == "2":
        context = ssl.create_default_context()  # the system's authorities; SSL_CERT_FILE is honoured
    else:
        return None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def say(text: str) -> None:
    print(text, flush=True)


def address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tunnel", type=address)
    parser.add_argument("target", type=address)
    parser.add_argument("--min", type=int, default=16, help="MIN_POOL_CAPACITY")
    parser.add_argument("--max", type=int, default=1024, help="MAX_POOL_CAPACITY")
    parser.add_argument("--refill-interval", type=float, default=1.0, metavar="S")
    parser.add_argument("--patient", action="store_true", help="wait for an id that is not known yet")
    parser.add_argument("--cooldown", type=float, default=5.0, metavar="S")
    parser.add_argument("--id-timeout", type=float, default=30.0, metavar="S", help="the original has none")
    parser.add_argument("--udp-timeout", type=float, default=5.0, metavar="S")
    parser.add_argument("--udp-buffer", type=int, default=8192, metavar="BYTES")
    parser.add_argument("--record-size", type=int, default=0, metavar="BYTES", help="cut TLS writes; Go starts at 1200")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    run(parse(sys.argv[1:]))
