"""Processes that share their ports, restarted one after the other under load: ``scripts/restarts N [--processes N]``.

Users come all the time, each with a connection of its own for one question. None may be refused or reset.
"""

import argparse
import contextlib
import os
import random
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping

from .harness import Process, free_port, nodepass_client, nodepass_server, wait_until
from .targets import EchoTCP

QUESTION = b"question"
PATIENCE_S = 15.0  # of a user
SETTLED_S = 60.0  # until each process has its client


class Shared:
    """Server processes on the same two ports, and as many clients; use it in ``with``."""

    def __init__(self, target: str, count: int = 2, env: Mapping[str, str] | None = None) -> None:
        self.tunnel, self.public = (f"127.0.0.1:{free_port('both')}" for _ in range(2))
        self.address = ("127.0.0.1", int(self.public.rpartition(":")[2]))
        self.env = env
        self.servers = [self.serve() for _ in range(count)]
        self.clients = [nodepass_client(self.tunnel, target, env=env) for _ in range(count)]

    def serve(self) -> Process:
        return nodepass_server(self.tunnel, self.public, query="reuse-port=1", env=self.env)

    def wait_until_open(self, server: Process) -> None:
        server.wait_for_line("public .*: open", SETTLED_S)

    def restart(self, number: int) -> None:
        """End a server by SIGTERM, start another one, and wait until it takes users."""
        assert self.servers[number].stop() == 0
        self.servers[number] = self.serve()
        self.wait_until_open(self.servers[number])

    def count(self, server: Process, counter: str = "tcp_exchanges") -> int:
        """Ask a server how many users it has had."""
        start = len(server.lines)
        os.kill(server.pid, signal.SIGUSR2)
        line = server.wait_for_line("since the start: ", start=start).string
        return int(line.partition(f"{counter} ")[2].partition(",")[0] or 0)

    def __enter__(self) -> "Shared":
        try:
            for server in self.servers:
                self.wait_until_open(server)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in (*self.clients, *self.servers):
            process.kill()


class Users:
    """Users in rows, one after the other, while the block runs; ``ends`` counts how it went, ``times`` how long."""

    def __init__(self, address: tuple[str, int], rows: int = 8, pause_s: float = 0.0) -> None:
        self.ends: Counter[str] = Counter()
        self.times: list[float] = []
        self._address = address
        self._pause_s = pause_s  # on average
        self._stop = threading.Event()
        self._rows = [threading.Thread(target=self._come, daemon=True) for _ in range(rows)]

    def _come(self) -> None:
        while not self._stop.wait(random.uniform(0, 2 * self._pause_s)):
            started = time.monotonic()
            try:
                with socket.create_connection(self._address, PATIENCE_S) as user:
                    user.settimeout(PATIENCE_S)
                    user.sendall(QUESTION)
                    end = "served" if user.recv(len(QUESTION)) == QUESTION else "cut"
            except OSError as exc:
                end = type(exc).__name__
            self.ends[end] += 1
            self.times.append(time.monotonic() - started)

    @property
    def served(self) -> int:
        return self.ends["served"]

    def wait_for(self, more: int) -> None:
        """Wait until so many more have been served."""
        enough = self.served + more
        wait_until(lambda: self.served >= enough, 60, f"{more} users are served")

    def __enter__(self) -> "Users":
        for row in self._rows:
            row.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for row in self._rows:
            row.join()


def main() -> int:
    parser = argparse.ArgumentParser(description="Restart server processes that share their ports, under load.")
    parser.add_argument("restarts", type=int)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--pause", type=float, default=0.05, help="of a user between two connections, s, on average")
    options = parser.parse_args()
    with EchoTCP() as target, Shared(target.address, options.processes) as shared:
        with Users(shared.address, pause_s=options.pause) as users:
            users.wait_for(2000)
            shares = [shared.count(server) for server in shared.servers]
            for number in range(options.restarts):
                shared.restart(number % options.processes)
                users.wait_for(50)
    late = sum(time > 0.9 for time in users.times)
    print("share of users:", ", ".join(f"{share / sum(shares):.1%}" for share in shares), f"of {sum(shares)}")
    print(f"restarts: {options.restarts}, users: {len(users.times)}, {dict(users.ends)}")
    print(f"users who waited for 0.9 s or more: {late}, longest: {max(users.times):.2f} s")
    return int(set(users.ends) != {"served"})


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
