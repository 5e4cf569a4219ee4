"""Users: what they do to a port, and how long it took.

One process, closed loops: who waits for an answer asks nothing new meanwhile, so what a stall holds up is not seen.
"""

import contextlib
import errno
import re
import select
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from processes import HOST
from target import ANSWER, CLOSE, LAST_ANSWER

PIECE = 1 << 18  # bytes
ANSWER_S = 5.0  # a user who waits for longer counts as an error
READ, WRITE = select.EPOLLIN, select.EPOLLOUT
WRK = shutil.which("wrk")
_buffer = memoryview(bytearray(PIECE))


@dataclass
class Result:
    """What came of a load: how many answers in how many seconds, their waits in ms, and failures."""

    count: float = 0.0
    seconds: float = 0.0
    waits_ms: dict[int, float] = field(default_factory=dict)  # by percentile
    errors: int = 0

    @property
    def rate(self) -> float:
        return self.count / self.seconds if self.seconds else 0.0


def percentiles(waits_s: list[float]) -> dict[int, float]:
    ordered = sorted(waits_s)
    return {p: ordered[len(ordered) * p // 100] * 1000 for p in (50, 99) if ordered}


def request(fresh: bool) -> bytes:
    return b"GET / HTTP/1.1\r\nHost: bench\r\n%s\r\n" % (CLOSE if fresh else b"")


def answers(port: int, timeout_s: float = 1.0) -> bool:
    """Ask once through a fresh connection."""
    try:
        with socket.create_connection((HOST, port), timeout_s) as user:
            user.sendall(request(True))
            return user.recv(1) == ANSWER[:1]
    except OSError:
        return False


def requests(port: int, users: int, seconds: float, fresh: bool = False) -> Result:
    """Ask as often as answers come, on connections that stay, or on a fresh one each time."""
    return _wrk(port, users, seconds, fresh) if WRK else ask(port, users, seconds, fresh)


def _wrk(port: int, users: int, seconds: float, fresh: bool) -> Result:
    argv = [WRK, "-t1", f"-c{users}", f"-d{max(1, round(seconds))}s", "--latency", "--timeout", f"{ANSWER_S:.0f}s"]
    argv += ["-H", "Connection: close"] if fresh else []
    argv += [f"http://{HOST}:{port}/"]
    said = subprocess.run(argv, capture_output=True, text=True, timeout=seconds + 30).stdout
    units_ms = {"us": 0.001, "ms": 1, "s": 1000, "m": 60000}
    waits = {int(p): float(v) * units_ms[u] for p, v, u in re.findall(r"(50|99)%\s+([\d.]+)(us|ms|s|m)\b", said)}
    count = int(re.search(r"(\d+) requests in", said)[1])
    rate = float(re.search(r"Requests/sec:\s+([\d.]+)", said)[1])
    errors = re.search(r"connect (\d+), read (\d+), write (\d+), timeout (\d+)", said)
    return Result(count, count / rate if rate else seconds, waits, sum(map(int, errors.groups())) if errors else 0)


def ask(port: int, users: int, seconds: float, fresh: bool = False, count: int | None = None) -> Result:
    """Do as wrk does, also for a ``count`` of requests; ``seconds`` bounds it in any case."""
    question, length = request(fresh), len(LAST_ANSWER if fresh else ANSWER)
    waits, errors, asked = [], 0, 0
    start = time.perf_counter()
    end = start + seconds
    with _Crowd(port) as crowd:

        def next_one() -> None:
            nonlocal asked
            if count is None or asked < count:
                asked += 1
                crowd.connect()

        for _ in range(users):
            next_one()
        now = start
        while crowd.users and now < end:
            for user, event in crowd.wait(0.1):
                now = time.perf_counter()
                try:
                    if event & WRITE:
                        user.sock.send(question)
                        crowd.expect(user, READ)
                        continue
                    piece = len(user.sock.recv(4096))
                except OSError:
                    piece = 0
                user.received += piece
                if piece and user.received < length:
                    continue
                if not piece:
                    errors += 1
                else:
                    waits.append(now - user.since)
                if fresh or not piece:
                    crowd.drop(user)
                    next_one()
                elif count is None or asked < count:
                    asked += 1
                    user.received, user.since = 0, now
                    user.sock.send(question)
                else:
                    crowd.drop(user)
            now = time.perf_counter()
    return Result(len(waits), now - start, percentiles(waits), errors)


@dataclass
class _User:
    sock: socket.socket
    since: float
    received: int = 0


class _Crowd:
    """Users by descriptor, and a poll that tells which of them can go on."""

    def __init__(self, port: int) -> None:
        self.users: dict[int, _User] = {}
        self._port = port
        self._poll = select.epoll()

    def connect(self) -> None:
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        code = sock.connect_ex((HOST, self._port))
        if code not in (0, errno.EINPROGRESS):
            sock.close()
            raise OSError(code, f"connect to port {self._port}")
        self.users[sock.fileno()] = _User(sock, time.perf_counter())
        self._poll.register(sock.fileno(), WRITE)

    def expect(self, user: _User, event: int) -> None:
        self._poll.modify(user.sock.fileno(), event)

    def wait(self, timeout_s: float) -> Iterator[tuple[_User, int]]:
        for fd, event in self._poll.poll(timeout_s):
            yield self.users[fd], event

    def late(self) -> list[_User]:
        """Give those who wait for too long."""
        since = time.perf_counter() - ANSWER_S
        return [user for user in self.users.values() if user.since < since]

    def drop(self, user: _User) -> None:
        self._poll.unregister(user.sock.fileno())
        del self.users[user.sock.fileno()]
        user.sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        for user in list(self.users.values()):
            self.drop(user)
        self._poll.close()


def first_bytes(port: int, count: int, seconds: float) -> Result:
    """Come ``count`` times, one after the other; the waits are those from connect() to the first byte."""
    waits, errors, start = [], 0, time.perf_counter()
    while len(waits) + errors < count and time.perf_counter() - start < seconds:
        began = time.perf_counter()
        if answers(port, ANSWER_S):
            waits.append(time.perf_counter() - began)
        else:
            errors += 1
    return Result(len(waits), time.perf_counter() - start, percentiles(waits), errors)


def newcomers(port: int, per_s: float, seconds: float, before_s: float) -> Result:
    """Come ``per_s`` times a second, whoever still waits; who comes within ``before_s`` of the start is not counted.

    The waits are those from connect() to the first byte.
    """
    waits, errors, came, begin = [], 0, 0, time.perf_counter()
    with _Crowd(port) as crowd:
        while (now := time.perf_counter() - begin) < seconds or crowd.users:
            while came < min(now, seconds) * per_s:
                crowd.connect()
                came += 1
            for user, event in crowd.wait(0.5 / per_s):
                try:
                    if event & WRITE:
                        user.sock.send(request(True))
                        crowd.expect(user, READ)
                        continue
                    answered = bool(user.sock.recv(1))
                except OSError:
                    answered = False
                if user.since - begin >= before_s:
                    waits += [time.perf_counter() - user.since] * answered
                    errors += not answered
                crowd.drop(user)
            for user in crowd.late():
                errors += user.since - begin >= before_s
                crowd.drop(user)
    return Result(len(waits), seconds - before_s, percentiles(waits), errors)


def upload(port: int, streams: int, seconds: float) -> Result:
    """Send for so long on each stream; ``count`` is what the target says it got, in bytes."""
    with _streams(port, streams, b"S") as (socks, poll):
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            for fd, _ in poll(WRITE):
                with contextlib.suppress(BlockingIOError):
                    socks[fd].send(_buffer)
        arrived = 0
        for sock in socks.values():
            sock.shutdown(socket.SHUT_WR)
        for sock in socks.values():
            sock.settimeout(10)
            arrived += int.from_bytes(sock.recv(8, socket.MSG_WAITALL), "big")
        return Result(arrived, time.perf_counter() - start)


def download(port: int, streams: int, seconds: float) -> Result:
    with _streams(port, streams, b"F") as (socks, poll):
        arrived, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            for fd, _ in poll(READ):
                arrived += socks[fd].recv_into(_buffer)
        return Result(arrived, time.perf_counter() - start)


@contextlib.contextmanager
def _streams(port: int, count: int, kind: bytes) -> Iterator[tuple[dict[int, socket.socket], Callable]]:
    """Give connections by descriptor and a function that waits for an event on any of them."""
    with contextlib.ExitStack() as stack:
        poll = stack.enter_context(select.epoll())
        socks = {}
        for _ in range(count):
            sock = stack.enter_context(socket.create_connection((HOST, port), ANSWER_S))
            sock.sendall(kind)
            sock.setblocking(False)
            socks[sock.fileno()] = sock
            poll.register(sock.fileno(), 0)
        waiting = 0

        def wait(event: int) -> list[tuple[int, int]]:
            nonlocal waiting
            if waiting != event:
                waiting = event
                for fd in socks:
                    poll.modify(fd, event)
            return poll.poll(0.1)

        yield socks, wait


@contextlib.contextmanager
def idle_users(port: int, count: int, seconds: float = 60.0) -> Iterator[int]:
    """Open ``count`` connections, a byte echoed on each; gives how many were served, and holds them."""
    served = started = 0
    end = time.perf_counter() + seconds
    with _Crowd(port) as crowd:
        while served < count and time.perf_counter() < end:
            while started < count and started - served < 200:  # not a test of anybody's backlog
                crowd.connect()
                started += 1
            for user, event in crowd.wait(0.1):
                try:
                    if event & WRITE:
                        user.sock.send(b"E")
                        crowd.expect(user, READ)
                    elif user.sock.recv(1):
                        served += 1
                        crowd.expect(user, 0)
                    else:
                        raise ConnectionResetError
                except OSError:
                    crowd.drop(user)
                    started -= 1
        yield served


def datagrams(port: int, sockets: int, size: int, seconds: float) -> Result:
    """Send datagrams there and back on each socket; one without an answer for 2 s counts as an error."""
    waits, errors, number = [], 0, 0
    sent: dict[int, tuple[float, bytes]] = {}
    with contextlib.ExitStack() as stack:
        poll, socks = stack.enter_context(select.epoll()), {}
        for _ in range(sockets):
            sock = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
            sock.setblocking(False)
            sock.connect((HOST, port))
            socks[sock.fileno()] = sock
            poll.register(sock.fileno(), READ)

        def send(fd: int) -> None:
            nonlocal number
            number += 1
            data = (struct.pack(">I", number) * (size // 4 + 1))[-size:]
            sent[fd] = time.perf_counter(), data
            socks[fd].send(data)

        start = time.perf_counter()
        end = start + seconds
        for fd in socks:
            send(fd)
        while (now := time.perf_counter()) < end:
            for fd, _ in poll.poll(0.1):
                with contextlib.suppress(OSError):
                    if socks[fd].recv(65536) == sent[fd][1]:
                        waits.append(time.perf_counter() - sent[fd][0])
                        send(fd)
            for fd in [fd for fd, (since, _) in sent.items() if now - since > 2.0]:
                errors += 1
                send(fd)
    return Result(len(waits), now - start, percentiles(waits), errors)


def chunks(port: int, size: int, seconds: float) -> Result:
    """Send a chunk to the echo, wait until all of it is back, and again."""
    count, data = 0, b"E" * size
    with socket.create_connection((HOST, port), ANSWER_S) as user:
        user.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        user.setblocking(False)
        start = time.perf_counter()
        with select.epoll() as poll:
            poll.register(user.fileno(), READ | WRITE)
            while time.perf_counter() - start < seconds:
                to_send, to_come = memoryview(data), size
                poll.modify(user.fileno(), READ | WRITE)
                while to_come:
                    ready = poll.poll(ANSWER_S)
                    if not ready:
                        raise TimeoutError(f"{to_come} of {size} bytes did not come back")
                    if to_send and ready[0][1] & WRITE:
                        with contextlib.suppress(BlockingIOError):
                            to_send = to_send[user.send(to_send) :]
                        if not to_send:
                            poll.modify(user.fileno(), READ)
                    if ready[0][1] & READ:
                        received = user.recv_into(_buffer)
                        if not received:
                            raise ConnectionResetError("the echo ended")
                        to_come -= received
                count += 1
        return Result(count, time.perf_counter() - start)
