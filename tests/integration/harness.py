"""Processes and users of the integration tests: start, wait for a condition, end by pid.

Plain sockets, threads and subprocesses, so it works in a patched and in an unpatched pytest process.
"""

import atexit
import collections
import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import trustme

from .targets import EchoTCP, EchoUDP
from .users import Probe, ends_cleanly

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / "tests" / "peers"
FIRST_PORT = int(os.environ.get("TEST_PORTS_FROM", "10000"))  # two runs at once take different ones
PORTS = range(FIRST_PORT, FIRST_PORT + 11000)  # above the random data ports, below the kernel's ephemeral ones
_given: collections.deque[int] = collections.deque(maxlen=1000)
START_S = 30.0
STOP_S = 15.0
KINDS = {"tcp": (socket.SOCK_STREAM,), "udp": (socket.SOCK_DGRAM,), "both": (socket.SOCK_STREAM, socket.SOCK_DGRAM)}


def free_port(kind: str = "tcp") -> int:
    """Return a loopback port that is free for "tcp", "udp" or "both", and none of the last ones."""
    while True:
        port = random.choice(PORTS)
        if port in _given:  # and perhaps not bound yet
            continue
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for socket_type in KINDS[kind]:
                sock = stack.enter_context(socket.socket(socket.AF_INET, socket_type))
                sock.bind(("127.0.0.1", port))
            _given.append(port)
            return port


def wait_until(predicate: Callable[[], object], timeout: float, why: str) -> object:
    """Return the first true value of `predicate`; raise AssertionError with `why` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (value := predicate()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {why}")
        time.sleep(0.01)
    return value


class Process:
    """A child process; its stdout and stderr are collected as `lines`. Use it in `with`: it is always ended, by pid."""

    def __init__(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, name: str = "") -> None:
        self.name = name or Path(argv[0]).name
        self.lines: list[str] = []
        paths = os.pathsep.join(_search_path())
        variables = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": paths, **(env or {})}
        self._popen = subprocess.Popen(
            argv, env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.pid: int = self._popen.pid
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            for line in self._popen.stdout:
                self.lines.append(line.decode(errors="backslashreplace").rstrip("\n"))

    @property
    def returncode(self) -> int | None:
        return self._popen.poll()

    def wait_for_line(self, pattern: str, timeout: float = START_S, start: int = 0) -> re.Match:
        """Return the match of the first line from index `start` on that `pattern` is found in."""
        expression = re.compile(pattern)

        def search() -> re.Match | None:
            ended = self.returncode is not None and not self._reader.is_alive()
            match = next(filter(None, map(expression.search, self.lines[start:])), None)
            if ended and not match:
                raise AssertionError(f"{self.name} ended with {self.returncode}, no {pattern!r} in\n{self.tail()}")
            return match

        try:
            return wait_until(search, timeout, f"{self.name} says {pattern!r}")
        except AssertionError as exc:
            raise AssertionError(f"{exc}\n{self.tail()}") from None

    def tail(self, count: int = 40) -> str:
        return "\n".join(f"{self.name}> {line}" for line in self.lines[-count:])

    def stop(self, sig: int = signal.SIGTERM, timeout: float = STOP_S) -> int:
        """Send `sig` and return the exit code; raise AssertionError when it does not end in time."""
        if self.returncode is None:
            self._popen.send_signal(sig)
        try:
            code = self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.name} did not end within {timeout:g} s of {sig!r}\n{self.tail()}") from None
        self._release()
        return code

    def kill(self) -> None:
        if self.returncode is None:
            self._popen.kill()
        self._popen.wait()
        self._release()

    def _release(self) -> None:
        self._reader.join(5)
        self._popen.stdout.close()

    def fds(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def rss_kib(self) -> int:
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s*(\d+) kB", status)[1])

    def cpu_s(self) -> float:
        """Return user and system seconds used so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def _search_path() -> list[str]:
    return [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]


def nodepass_server(tunnel: str, public: str, *, query: str = "", env: Mapping[str, str] | None = None) -> Process:
    return nodepass(f"server://{tunnel}/{public}", query, env, "our server")


def nodepass_client(tunnel: str, target: str, *, query: str = "", env: Mapping[str, str] | None = None) -> Process:
    return nodepass(f"client://{tunnel}/{target}", query, env, "our client")


def nodepass(url: str, query: str = "", env: Mapping[str, str] | None = None, name: str = "nodepass") -> Process:
    """Run the product on a URL; `query` without its question mark."""
    argv = [sys.executable, "-m", "nodepass_gevent", f"{url}?{query}" if query else url]
    return Process(argv, env=env, name=name)


def v1_server(tunnel: str, public: str, *options: str, env: Mapping[str, str] | None = None) -> Process:
    """Run the reference server."""
    argv = [sys.executable, str(PEERS / "v1_server.py"), tunnel, public, *options]
    return Process(argv, env=env, name="v1 server")


def v1_client(tunnel: str, target: str, *options: str, env: Mapping[str, str] | None = None) -> Process:
    """Run the reference client."""
    argv = [sys.executable, str(PEERS / "v1_client.py"), tunnel, target, *options]
    return Process(argv, env=env, name="v1 client")


@dataclass(frozen=True)
class Certificates:
    """Files of a throw-away authority and of a certificate by it."""

    ca: str
    crt: str
    key: str


@cache
def certificates(*names: str) -> Certificates:
    """Return a certificate for `names`, by default for localhost, 127.0.0.1 and ::1; its authority has no other."""
    directory = Path(tempfile.mkdtemp(prefix="nodepass-test-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    authority = trustme.CA()
    issued = authority.issue_cert(*(names or ("localhost", "127.0.0.1", "::1")))
    files = Certificates(*(str(directory / name) for name in ("ca.pem", "server.crt", "server.key")))
    authority.cert_pem.write_to_path(files.ca)
    Path(files.key).touch(0o600)
    issued.private_key_pem.write_to_path(files.key)
    for blob in issued.cert_chain_pems:
        blob.write_to_path(files.crt, append=True)
    return files


class Target:
    """A TCP and a UDP target at one port, as the client's target address names both."""

    def __init__(self) -> None:
        port = free_port("both")
        self.tcp = EchoTCP(port=port)
        self.udp = EchoUDP(port=port)
        self.address = f"127.0.0.1:{port}"

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.tcp.stop()
        self.udp.stop()


QUICK = {
    "SERVICE_COOLDOWN": "300ms",
    "REPORT_INTERVAL": "1s",
    "NODEPASS_LOG_RATE": "0",  # tests wait for lines, also behind floods
}
QUICK_SERVER = ("--cooldown", "0.2", "--report-interval", "0.2")
QUICK_CLIENT = ("--cooldown", "0.2", "--refill-interval", "0.1")


@dataclass
class Pair:
    """A server and a client that are connected, with the addresses to use them by. Kinds: "ours" and "ref"."""

    server_kind: str
    client_kind: str
    tls: int
    target: str
    server_options: Sequence[str] = ()  # of the reference; for ours use env
    client_options: Sequence[str] = ()
    query: str = ""  # of ours, server and client alike
    env: Mapping[str, str] = field(default_factory=dict)
    files: Certificates = field(default_factory=certificates)  # the server's in modes 1 and 2
    tunnel_port: int = field(default_factory=lambda: free_port("tcp"))
    public_port: int = field(default_factory=lambda: free_port("both"))
    server: Process | None = None
    client: Process | None = None

    @property
    def public(self) -> tuple[str, int]:
        return "127.0.0.1", self.public_port

    def start_server(self) -> None:
        tunnel, public = f"127.0.0.1:{self.tunnel_port}", f"127.0.0.1:{self.public_port}"
        files = f"crt={self.files.crt}&key={self.files.key}"
        if self.server_kind == "ref":
            options = ["--tls", str(self.tls), *QUICK_SERVER, *self.server_options]
            options += ["--crt", self.files.crt, "--key", self.files.key] if self.tls else []
            self.server = v1_server(tunnel, public, *options, env=self.env)
            return
        query = "&".join(filter(None, (f"tls={self.tls}", files if self.tls == 2 else "", self.query)))
        self.server = nodepass_server(tunnel, public, query=query, env=QUICK | dict(self.env))

    def start_client(self) -> None:
        tunnel = f"localhost:{self.tunnel_port}" if self.tls == 2 else f"127.0.0.1:{self.tunnel_port}"
        env = ({"SSL_CERT_FILE": self.files.ca} if self.tls == 2 else {}) | dict(self.env)
        if self.client_kind == "ref":
            # Reference to reference, the race of a launch and its id is nobody's to win.
            options = [*QUICK_CLIENT, *self.client_options, *(["--patient"] if self.server_kind == "ref" else [])]
            self.client = v1_client(tunnel, self.target, *options, env=env)
            return
        self.client = nodepass_client(tunnel, self.target, query=self.query, env=QUICK | env)

    def stop(self) -> None:
        for process in filter(None, (self.client, self.server)):
            process.kill()

    def logs(self) -> str:
        return "\n".join(process.tail() for process in (self.server, self.client) if process)


@contextlib.contextmanager
def pair(
    server_kind: str, client_kind: str, tls: int, target: str, *, probe: Probe | None = None, **options
) -> Iterator[Pair]:
    """Start both sides, wait until traffic passes, and end them by pid in any case.

    `probe(public)` says whether it does: `ends_cleanly` suits any target that ends when its user does, `comes_back` an
    echoing one; give one of your own for another. `options` are those of `Pair`.
    """
    both = Pair(server_kind, client_kind, tls, target, **options)
    try:
        both.start_server()
        both.start_client()
        wait_for_traffic(both, probe)
        yield both
    finally:
        both.stop()


def wait_for_traffic(both: Pair, probe: Probe | None = None, timeout: float = START_S) -> None:
    """Probe until an exchange succeeds; raise AssertionError with the logs of both processes."""
    probe = probe or ends_cleanly

    def passes() -> bool:
        for process in (both.server, both.client):
            if process.returncode is not None:
                raise AssertionError(f"{process.name} ended with {process.returncode}")
        return probe(both.public)

    try:
        wait_until(passes, timeout, f"traffic, {both.server_kind} server, {both.client_kind} client, tls {both.tls}")
    except AssertionError as exc:
        raise AssertionError(f"{exc}\n{both.logs()}") from None
