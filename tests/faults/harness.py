"""What the tests of faults share: a tunnel of two processes, the standing figures every case is held to, and needs.

The standing figures: all users are served with their own bytes, descriptors and greenlets are back where they were,
memory has not grown, and the logs hold no error, no traceback and no line that is longer than a line should be.
"""

import contextlib
import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from integration.harness import QUICK, Process, certificates, free_port, wait_until
from integration.load import FIXED_POOL
from integration.targets import EchoTCP, EchoUDP
from integration.users import comes_back, payload, talk

LAUNCHER = Path(__file__).with_name("launcher.py")
CLONE_NEWNET = 0x40000000

# Deadlines that tests wait out; several times what an honest peer needs on a busy machine.
LIMITS = {
    "first_line_timeout_s": 3.0,
    "caller_timeout_s": 2.0,
    "opening_timeout_s": 2.0,
    "tls_handshake_timeout_s": 2.0,
    "id_timeout_s": 3.0,
    "pool_wait_s": 3.0,
    "half_closed_timeout_s": 2.0,
    "connect_timeout_s": 2.0,
    "target_timeout_s": 2.0,
    "dead_timeout_s": 3.0,
    "drain_linger_s": 1.0,
    "udp_session_timeout_s": 1.0,
}
SLACK = 3  # on deadlines set short
SETTLED_S = 10.0  # the last of what a test opened has timed out by then
GROWN_KIB = 6 * 1024  # what a process may keep of a fault: caches and a fragmented heap, but nothing per repetition
LONGEST_LOG_LINE = 512
FORBIDDEN = re.compile(
    r"  (ERROR|FATAL)  |Traceback|Exception ignored|ConcurrentObjectUseError|ResourceWarning|Unexpected EOF"
)
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}  [A-Z]+  |greenlets \d+$|killed$")


def unavailable(why: str) -> None:
    """Skip on a user's machine, fail in CI: there every row that can run must."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(why)


def need_root() -> None:
    if os.geteuid() != 0:
        unavailable("needs root: network namespaces, other processes' limits and system calls")


def need(*programs: str) -> None:
    """Make sure that programs are installed."""
    for program in programs:
        if not shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"):
            unavailable(f"{program} is not installed")


def run(*argv: str) -> str:
    """Run a tool to its end, and give what it printed; a failure is one of the test."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"
    return done.stdout


class Target:
    """A TCP and a UDP echo at one port."""

    def __init__(self) -> None:
        port = free_port("both")
        self.tcp, self.udp = EchoTCP(port=port), EchoUDP(port=port)
        self.port, self.address = port, f"127.0.0.1:{port}"

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.tcp.stop()
        self.udp.stop()


@dataclass
class Tunnel:
    """A server and a client process, and where users come. ``dialled`` is where the client calls, if not the server."""

    target: str
    tls: int = 0
    query: str = ""
    env: dict = field(default_factory=dict)
    limits: dict = field(default_factory=dict)
    dialled: int | None = None
    prefix: tuple = ()  # of both commands
    server_prefix: tuple = ()
    server_env: dict = field(default_factory=dict)
    forbidden: re.Pattern = FORBIDDEN
    connect: object = socket.create_connection  # how users come
    tunnel_port: int = field(default_factory=free_port)
    public_port: int = field(default_factory=lambda: free_port("both"))
    server: Process | None = None
    client: Process | None = None
    at_rest: list = field(default_factory=list)  # the figures to come back to

    @property
    def public(self):
        return "127.0.0.1", self.public_port

    @property
    def processes(self):
        return [process for process in (self.server, self.client) if process and process.returncode is None]

    def _start(self, name, url, query, env, prefix):
        limits = {
            f"NODEPASS_{name.removesuffix('_s').upper()}": f"{value}s" for name, value in (LIMITS | self.limits).items()
        }
        query = "&".join(filter(None, (query, self.query)))
        command = [*prefix, sys.executable, "-W", "always::ResourceWarning", str(LAUNCHER), f"{url}?{query}"]
        return Process(command, env=QUICK | FIXED_POOL | limits | self.env | env, name=name)

    def start_server(self):
        files = certificates()
        query = f"tls={self.tls}" + (f"&crt={files.crt}&key={files.key}" if self.tls == 2 else "")
        url = f"server://127.0.0.1:{self.tunnel_port}/127.0.0.1:{self.public_port}"
        self.server = self._start("server", url, query, self.server_env, (*self.prefix, *self.server_prefix))

    def start_client(self):
        host = "localhost" if self.tls == 2 else "127.0.0.1"
        env = {"SSL_CERT_FILE": certificates().ca} if self.tls == 2 else {}
        url = f"client://{host}:{self.dialled or self.tunnel_port}/{self.target}"
        self.client = self._start("client", url, "", env, self.prefix)

    def start(self, within_s=30.0):
        self.start_server()
        self.start_client()
        self.recovers(within_s)

    def is_up(self):
        for process in (self.server, self.client):
            assert process.returncode is None, f"{process.name} ended with {process.returncode}\n{process.tail()}"
        return comes_back(self.public) if self.connect is socket.create_connection else self._comes_back()

    def _comes_back(self):
        with contextlib.suppress(OSError), self.connect(self.public, timeout=2.0) as user:
            user.sendall(b"word")
            return user.recv(4) == b"word"
        return False

    def recovers(self, within_s):
        """Wait until a user is served; give how long that took."""
        began = time.monotonic()
        try:
            wait_until(self.is_up, within_s, "a user is served")
        except AssertionError as exc:
            raise AssertionError(f"{exc}\n{self.logs()}") from None
        return time.monotonic() - began

    def served(self, count, size=20_000, at_once=10):
        """Send ``count`` users, and give how many got just their own bytes back."""

        def visit(number):
            word = payload(size, seed=number)
            try:
                return talk(self.public, word, timeout=20.0) == word
            except OSError:
                return False

        with ThreadPoolExecutor(at_once) as users:
            return sum(users.map(visit, range(count)))

    def logs(self):
        return "\n".join(process.tail() for process in (self.server, self.client) if process)

    def stop(self):
        for process in filter(None, (self.client, self.server)):
            process.kill()

    def __enter__(self):
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_):
        self.stop()


def greenlets(process):
    """Ask a process how many greenlets live in it."""
    seen = len(process.lines)
    os.kill(process.pid, signal.SIGUSR1)
    return int(process.wait_for_line(r"greenlets (\d+)", 10, seen)[1])


def descriptors(process):
    """Count what a process has open, but for the pipes that the relay keeps ready."""
    count = 0
    for link in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            count += not os.readlink(link).startswith("pipe:")
    return count


def steady_descriptors(process):
    """Count them once they have not changed for a while."""
    seen = [descriptors(process)]

    def steady():
        seen.append(descriptors(process))
        return len(seen) > 40 and len(set(seen[-40:])) == 1  # 10 ms each

    wait_until(steady, 20, f"descriptors of {process.name} stay the same")
    return seen[-1]


@dataclass(frozen=True)
class Figures:
    """What a process uses when it is at rest."""

    pid: int
    fds: int
    greenlets: int
    kib: int

    @classmethod
    def of(cls, process):
        return cls(process.pid, steady_descriptors(process), greenlets(process), process.rss_kib())


def complaints(process, forbidden=FORBIDDEN):
    """Give the lines of a process's log that no fault of a peer may cause."""
    return [
        line
        for line in list(process.lines)
        if forbidden.search(line) or len(line.encode()) > LONGEST_LOG_LINE or not LOG_LINE.match(line)
    ]


@contextlib.contextmanager
def standing(tunnel, *, users=10, grown_kib=GROWN_KIB, settled_s=SETTLED_S):
    """Hold a tunnel to the standing figures: before and after the block it is the same."""
    if not tunnel.at_rest:
        tunnel.at_rest = [Figures.of(process) for process in (tunnel.server, tunnel.client)]
    before = [
        replace(each, kib=Process.rss_kib(each)) for each in tunnel.at_rest
    ]  # descriptors never leave their start
    yield tunnel
    served = tunnel.served(users) if tunnel.connect is socket.create_connection else users * tunnel._comes_back()
    assert served == users, f"{served} of {users} users served\n{tunnel.logs()}"
    for process, figures in zip((tunnel.server, tunnel.client), before, strict=True):
        assert process.returncode is None, process.tail(10)
        try:
            wait_until(lambda p=process, f=figures: descriptors(p) == f.fds, settled_s, "the descriptors are back")
            wait_until(lambda p=process, f=figures: greenlets(p) <= f.greenlets, settled_s, "the greenlets are back")
        except AssertionError as exc:
            links = sorted(os.readlink(link) for link in Path(f"/proc/{process.pid}/fd").iterdir() if link.is_symlink())
            raise AssertionError(f"{exc}: {figures}, now {Figures.of(process)} {links}\n{process.tail(10)}") from None
        grown = process.rss_kib() - figures.kib
        if process.pid == figures.pid:
            assert grown < grown_kib, f"{process.name}: {grown} KiB more\n{process.tail(10)}"
        assert not complaints(process, tunnel.forbidden), complaints(process, tunnel.forbidden)


class Namespace:
    """A network of its own, with a loopback that can be cut: processes are started and sockets made in it."""

    def __init__(self):
        need_root()
        need("unshare", "nsenter", "ip", "ss")
        self._holder = Process(["unshare", "-n", "sleep", "600"], name="namespace")
        self._path = f"/proc/{self._holder.pid}/ns/net"

        def apart():
            if self._holder.returncode is not None:
                unavailable(f"no network namespaces here: {self._holder.tail()}")
            with contextlib.suppress(OSError):
                return os.readlink(self._path) != os.readlink("/proc/self/ns/net")

        wait_until(apart, 10, "a network namespace")
        self.prefix = ("nsenter", f"--net={self._path}")
        self.run("ip", "link", "set", "lo", "up")

    def run(self, *argv):
        """Run a tool inside."""
        return run(*self.prefix, *argv)

    @contextlib.contextmanager
    def entered(self):
        """Sockets made in the block belong to this network; nothing in it may wait."""
        libc = ctypes.CDLL(None, use_errno=True)

        def enter(path):
            with open(path) as network:
                if libc.setns(network.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")

        with open("/proc/thread-self/ns/net") as ours:
            enter(self._path)
            try:
                yield
            finally:
                if libc.setns(ours.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")

    def connect(self, address, timeout=10.0):
        """Be a user inside."""
        with self.entered():
            user = socket.socket()
        user.settimeout(timeout)
        try:
            user.connect(address)
        except OSError:
            user.close()
            raise
        return user

    def target(self):
        with self.entered():
            return Target()

    def sockets(self, *filters):
        """Give the lines of ``ss`` for established TCP sockets."""
        return self.run("ss", "-Htn", "state", "established", *filters).splitlines()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._holder.kill()


@contextlib.contextmanager
def injected(process, syscalls, fault):
    """Let system calls of a running process fail, as ``strace -e inject`` has it."""
    need_root()
    need("strace")
    command = ["strace", "-f", "-qq", "-p", str(process.pid), "-o", "/dev/null", "-e", f"trace={syscalls}"]
    with Process([*command, "-e", f"inject={syscalls}:{fault}"], name="strace") as tracer:

        def attached():
            assert tracer.returncode is None, tracer.tail()
            status = Path(f"/proc/{process.pid}/status").read_text()
            return "TracerPid:\t0\n" not in status

        try:
            wait_until(attached, 10, "strace is attached")
        except AssertionError:
            unavailable(f"strace cannot trace here: {tracer.tail()}")
        yield
        tracer.stop(signal.SIGINT)
    wait_until(lambda: "TracerPid:\t0\n" in Path(f"/proc/{process.pid}/status").read_text(), 10, "strace has let go")


class Users:
    """Users who have come and stay, each with an exchange open; ``alive`` counts those that still work."""

    def __init__(self, tunnel, count):
        self.socks = []
        try:
            for _ in range(count):
                self.socks.append(tunnel.connect(tunnel.public, timeout=10.0))
            for number, user in enumerate(self.socks):
                self._ask(user, b"hello %6d" % number)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _ask(user, word):
        user.sendall(word)
        answer = b""
        while len(answer) < len(word):
            piece = user.recv(len(word) - len(answer))
            if not piece:
                raise ConnectionAbortedError("an end in the middle")
            answer += piece
        assert answer == word, (answer, word)

    def alive(self):
        count = 0
        for number, user in enumerate(self.socks):
            with contextlib.suppress(OSError):
                self._ask(user, b"still %6d" % number)
                count += 1
        return count

    def close(self):
        for user in self.socks:
            user.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Probing:
    """A user after the other while the block runs; afterwards ``tried`` and ``served`` say how it went."""

    def __init__(self, tunnel, pause_s=0.01):
        self.tried = self.served = 0
        self.slowest_s = 0.0
        self._tunnel, self._pause_s = tunnel, pause_s
        self._stopped = threading.Event()
        self._row = threading.Thread(target=self._come, daemon=True)

    def _come(self):
        while not self._stopped.wait(self._pause_s):
            began = time.monotonic()
            self.tried += 1
            self.served += self._tunnel.served(1, size=100, at_once=1)
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)

    def __enter__(self):
        self._row.start()
        return self

    def __exit__(self, *_):
        self._stopped.set()
        self._row.join()
