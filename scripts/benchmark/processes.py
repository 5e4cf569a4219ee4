"""Processes that the benchmark starts and ends, what they use up, and ports for them. Linux only."""

import contextlib
import os
import random
import re
import resource
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

HOST = "127.0.0.1"
PORTS = range(10000, 32000)  # below those that the kernel gives to outgoing connections
END_S = 5.0


def free_port() -> int:
    """Find a loopback port that is free for TCP and UDP."""
    while True:
        port = random.choice(PORTS)
        with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp, contextlib.suppress(OSError):
            tcp.bind((HOST, port))
            udp.bind((HOST, port))
            return port


def raise_descriptor_limit() -> int:
    """Allow as many descriptors as may be; give their number."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


class Process:
    """A child, ended by its pid when the block ends."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], cwd: Path, log: BinaryIO) -> None:
        self._popen = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **env}, cwd=cwd
        )
        self.pid = self._popen.pid

    @property
    def ended(self) -> bool:
        return self._popen.poll() is not None

    def cpu_s(self) -> float:
        """Give the seconds of processor time used so far, with children's."""
        return sum(_cpu_ticks(pid) for pid in _tree(self.pid)) / os.sysconf("SC_CLK_TCK")

    def cpu_ns(self) -> int:
        """Give the nanoseconds of processor time of its living threads; ``cpu_s`` counts in steps of 10 ms."""
        tasks = Path(f"/proc/{self.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def rss_kib(self) -> int:
        return sum(_rss_kib(pid) for pid in _tree(self.pid))

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self._popen.terminate()
        try:
            self._popen.wait(END_S)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()


def _tree(pid: int) -> Iterator[int]:
    """Give a process and its descendants (sshd forks)."""
    yield pid
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                yield from _tree(int(child))


def _cpu_ticks(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return sum(map(int, fields[11:15]))  # user, system, and both of children that have ended


def _rss_kib(pid: int) -> int:
    try:
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        found = None
    return int(found[1]) if found else 0


def wait_until(condition: Callable[[], object], timeout_s: float) -> bool:
    """Wait for a condition; say whether it came true in time."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
