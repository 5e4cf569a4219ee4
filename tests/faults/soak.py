"""Faults in a random mix under load: ``scripts/soak MINUTES [--seed N]``.

Users come all the time, TCP and UDP, and compare what they get. One fault follows the other; each must be recovered
from in time. Between faults no user may fail; in one a user may be cut (the kernel of a killed process ends its
connections as if they were done), but never be given wrong bytes. After each round of faults the processes must be back
to what they used at its start. Beside all that, 5,000 exchanges are held idle from the first minute to the last.
"""

import argparse
import contextlib
import os
import random
import resource
import selectors
import signal
import socket
import sys
import threading
import time
from collections import Counter, defaultdict

from integration.targets import reset
from integration.users import ask, payload, talk

from .chaos import Relay, delayed, flipped, sliced
from .harness import (
    Figures,
    Namespace,
    Target,
    Tunnel,
    Users,
    complaints,
    descriptors,
    greenlets,
    injected,
    standing,
    wait_until,
)
from .peers import dial
from .test_callers import HELLO_CUT
from .test_exchanges import mixed_up
from .test_strangers import STATES, Strangers

RECOVERED_S = 20.0  # longest that a fault may be felt after its end
REST_S = 1.5  # between two faults: nobody may fail
ROUND = 12  # faults, and then a look at what is left
GROWN_KIB = 64 * 1024  # for the first crowds; an hour may not add to it
OUTAGES_S = (5, 30, 120)
IDLE, BATCH = 5000, 200  # exchanges
MODES = ((0, ""), (1, ""), (2, ""), (0, "protocol=1"), (1, "protocol=1"))


class Load:
    """Users who come one after the other, in rows, until stopped; what they saw is counted."""

    def __init__(self, tunnel, seed, rows=6):
        self.counts = Counter()
        self.problems = []
        self.epoch = 0  # odd while a fault is felt
        self._tunnel, self._seed = tunnel, seed
        self._stopped, self._paused = threading.Event(), threading.Event()
        self._busy = 0
        self._rows = [threading.Thread(target=self._come, args=(number,), daemon=True) for number in range(rows)]
        for row in self._rows:
            row.start()

    def _come(self, number):
        rng = random.Random(self._seed * 1000 + number)
        while not self._stopped.wait(rng.random() * 0.05):
            if self._paused.is_set():
                continue
            self._busy += 1
            try:
                self._visit(rng, "udp" if number == 0 else "tcp")
            finally:
                self._busy -= 1

    def _visit(self, rng, kind):
        epoch = self.epoch
        word = payload(
            rng.choice((1, 100, 5000, 200_000)) if kind == "tcp" else rng.choice((1, 1200, 8000)), rng.random()
        )
        try:
            got = talk(self._tunnel.public, word, 15.0) if kind == "tcp" else ask(self._tunnel.public, word, 3.0)
            failure = f"{len(got)} of {len(word)} bytes"
        except OSError as exc:
            got, failure = b"", str(exc)
        if got == word:
            self.counts[f"{kind} users served"] += 1
        elif not word.startswith(got) or (kind == "udp" and got):
            self.counts[f"{kind} users with wrong bytes"] += 1
            self.problems.append(f"{time.strftime('%H:%M:%S')} {kind} user: wrong bytes")
        elif epoch != self.epoch or epoch % 2:
            self.counts[f"{kind} users cut in a fault"] += 1
        else:
            self.counts[f"{kind} users failed without a fault"] += 1
            if kind == "tcp":  # a datagram may be lost
                self.problems.append(f"{time.strftime('%H:%M:%S')} a user failed without a fault: {failure}")

    def pause(self):
        self._paused.set()
        wait_until(lambda: not self._busy, 30, "the last users have gone")

    def resume(self):
        self._paused.clear()

    def stop(self):
        self._stopped.set()
        for row in self._rows:
            row.join()


class Soak:
    """One tunnel through a relay, its load, and the faults."""

    def __init__(self, tls, query, rng, target):
        self.rng, self.target = rng, target
        self.tunnel = Tunnel(target.address, tls, query, env={"UDP_READ_TIMEOUT": "1s"})
        self.relay = Relay(self.tunnel.tunnel_port)
        if not query:  # a v1 client dials the data port past any relay
            self.tunnel.dialled = self.relay.port
        self.faults = [
            self.kill_server, self.kill_client, self.freeze_server, self.freeze_client, self.cut_control, self.cut_all,
            self.hold_all, self.slices, self.delay, self.flip, self.strangers, self.slow_readers, self.few_descriptors,
            self.hang_up, self.empty_datagrams, self.user_resets, self.accept_errors, self.stalled_handshakes,
            self.outage, self.crowd_of_resets,
        ]  # fmt: skip

    def kill_server(self):
        self.tunnel.server.kill()
        time.sleep(self.rng.choice((0, 1, 5)))
        self.tunnel.start_server()

    def kill_client(self):
        self.tunnel.client.kill()
        time.sleep(self.rng.choice((0, 1, 5)))
        self.tunnel.start_client()

    def _freeze(self, process):
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(self.rng.choice((0.5, 2, 6)))
        os.kill(process.pid, signal.SIGCONT)

    def freeze_server(self):
        self._freeze(self.tunnel.server)

    def freeze_client(self):
        self._freeze(self.tunnel.client)

    def cut_control(self):
        self.relay.cut(lambda link: link.control, reset=self.rng.random() < 0.5)

    def cut_all(self):
        self.relay.cut(reset=self.rng.random() < 0.5)

    def hold_all(self):
        held = list(self.relay.links)
        self.relay.hold(held)
        time.sleep(self.rng.choice((1, 5)))
        self.relay.cut(lambda link: link in held)
        self.relay.release()

    def _ruled(self, rule, seconds=3):
        self.relay.rule = rule
        time.sleep(seconds)
        self.relay.rule = lambda _link, _direction, data: [data]

    def slices(self):
        self._ruled(sliced(self.rng.choice((1, 100))))

    def delay(self):
        self._ruled(delayed(0.02))

    def flip(self):
        if self.tunnel.tls:
            self._ruled(flipped(at=self.rng.randrange(100_000)))

    def strangers(self):
        with Strangers(self.tunnel.tunnel_port, list(STATES.values()), count=300):
            time.sleep(2)

    def stalled_handshakes(self):
        with contextlib.ExitStack() as stack:
            for number in range(100):
                sock = stack.enter_context(dial(self.tunnel.tunnel_port, f"127.0.0.{1 + number % 3}"))
                with contextlib.suppress(OSError):
                    sock.sendall(b"//?v=2#hello\n" + HELLO_CUT)
            time.sleep(1)

    def slow_readers(self):
        with contextlib.ExitStack() as stack:
            for _ in range(30):
                user = stack.enter_context(dial(self.tunnel.public_port))
                user.setblocking(False)
                with contextlib.suppress(OSError):
                    for _ in range(100):
                        user.send(b"x" * 65536)
            time.sleep(2)

    def few_descriptors(self):
        if os.geteuid():
            return
        process = self.rng.choice(self.tunnel.processes)
        usual = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        few = descriptors(process) + 5
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (few, usual[1]))
        with contextlib.ExitStack() as stack:
            for _ in range(100):
                stack.enter_context(dial(self.tunnel.public_port))
            time.sleep(2)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, usual)

    def hang_up(self):
        for process in self.tunnel.processes:
            os.kill(process.pid, signal.SIGHUP)

    def empty_datagrams(self):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as user:
            for _ in range(2000):
                with contextlib.suppress(OSError):
                    user.sendto(b"", self.tunnel.public)

    def user_resets(self):
        for _ in range(200):
            with contextlib.suppress(OSError):
                user = dial(self.tunnel.public_port)
                user.sendall(b"x" * self.rng.randrange(1, 10_000))
                reset(user)

    def accept_errors(self):
        if os.geteuid():
            return
        error = self.rng.choice(("EMFILE", "ENOBUFS", "ECONNABORTED", "EINTR"))
        with injected(self.tunnel.server, "accept4", f"error={error}:when=1..20"):
            time.sleep(2)

    def crowd_of_resets(self):
        wrong = mixed_up(self.tunnel, 10_000)
        assert not wrong, f"users with bytes of others: {wrong[:3]}"

    def outage(self):
        """Let the network of another tunnel be down: that of this machine cannot be."""
        if os.geteuid():
            return
        with Namespace() as network, network.target() as target:
            options = {"prefix": network.prefix, "connect": network.connect}
            with Tunnel(target.address, self.tunnel.tls, self.tunnel.query, **options) as tunnel, standing(tunnel):
                network.run("ip", "link", "set", "lo", "down")
                time.sleep(self.rng.choice(OUTAGES_S))
                network.run("ip", "link", "set", "lo", "up")
                tunnel.recovers(10)


class Echo:
    """A target that can hold thousands of connections: one thread for all."""

    def __init__(self):
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    self._selector.register(self._listener.accept()[0], selectors.EVENT_READ)
                elif not self._answers(key.fileobj):
                    self._selector.unregister(key.fileobj)
                    key.fileobj.close()

    def _answers(self, conn):
        with contextlib.suppress(OSError):
            data = conn.recv(100)
            conn.sendall(data)
            return data


class Idlers:
    """Exchanges that say a word at the start and one at the end, through a tunnel that no fault is aimed at."""

    def __init__(self, stack):
        many = {"MIN_POOL_CAPACITY": "64", "MAX_POOL_CAPACITY": "8192", "SEMAPHORE_LIMIT": "8192"}
        self._tunnel = stack.enter_context(Tunnel(Echo().address, 1, "log=debug", many))
        self.count = min(IDLE, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2 - 1000)
        kib = [process.rss_kib() for process in self._tunnel.processes]
        # Batch by batch: who has come waits for a data connection no longer than others would.
        self._users = [stack.enter_context(Users(self._tunnel, BATCH)) for _ in range(self.count // BATCH)]
        self.count, self._began = len(self._users) * BATCH, time.monotonic()
        grown = [process.rss_kib() - before for process, before in zip(self._tunnel.processes, kib, strict=True)]
        self.kib = max(grown) / self.count

    def end(self):
        """Say how many are alive; give the problems."""
        ends = [line for process in self._tunnel.processes for line in process.lines if " exchange " in line]
        alive = sum(users.alive() for users in self._users)
        minutes = (time.monotonic() - self._began) / 60
        print(f"idle exchanges alive: {alive} of {self.count} after {minutes:.1f} minutes, {self.kib:.0f} KiB each")
        problems = [
            f"idle: {process.name} says {line}" for process in self._tunnel.processes for line in complaints(process)
        ]
        return problems + [f"idle exchanges: {self.count - alive} ended: {ends[-6:]}"] * (alive < self.count)


def settled(tunnel, at_rest):
    """Wait until both processes are as they were; give what is not."""
    left = []
    for process, figures in zip((tunnel.server, tunnel.client), at_rest, strict=True):
        for what, now, before in (
            ("descriptors", descriptors, figures.fds),
            ("greenlets", greenlets, figures.greenlets),
        ):
            try:
                wait_until(lambda p=process, n=now, b=before: n(p) <= b, 20, what)
            except AssertionError:
                left.append(f"{process.name}: {now(process)} {what}, {before} at the start")
        if process.rss_kib() - figures.kib > GROWN_KIB:
            left.append(f"{process.name}: {process.rss_kib()} KiB, {figures.kib} at the start")
    return left


def one_tunnel(mode, rng, until, total):
    """Soak one tunnel for a round of faults; give the problems."""
    problems = []
    with Target() as target, contextlib.ExitStack() as stack:
        soak = Soak(*mode, rng, target)
        stack.enter_context(soak.relay)
        tunnel = stack.enter_context(soak.tunnel)
        tunnel.served(200, size=20_000, at_once=30)  # its first crowd: it grows once
        at_rest = [Figures.of(process) for process in tunnel.processes]
        load = Load(tunnel, rng.getrandbits(30))
        stack.callback(load.stop)
        time.sleep(REST_S)
        for fault in rng.sample(soak.faults, min(ROUND, len(soak.faults))):
            if time.monotonic() > until:
                break
            print(f"{time.strftime('%H:%M:%S')} tls {mode[0]} {mode[1] or 'v2'}: {fault.__name__}", flush=True)
            load.epoch += 1
            complaints_before = len(problems)
            olds = (tunnel.server, tunnel.client)
            try:
                fault()
                total.recoveries[fault.__name__].append(tunnel.recovers(RECOVERED_S))
            except AssertionError as exc:
                problems.append(f"{fault.__name__}: {exc}")
                return problems
            time.sleep(REST_S)  # users who came in the fault end
            for process in {*olds, tunnel.server, tunnel.client}:
                problems += [f"{fault.__name__}: {process.name} says {line}" for line in complaints(process)]
                process.lines[:] = [line for line in process.lines if line not in complaints(process)]
            load.epoch += 1
            time.sleep(REST_S)
            total.survived[fault.__name__] += len(problems) == complaints_before
        load.pause()
        problems += settled(tunnel, at_rest) + load.problems
        total.users += load.counts
        total.kib = max(total.kib, *(process.rss_kib() for process in tunnel.processes))
    return problems


class Total:
    def __init__(self):
        self.recoveries, self.survived, self.users, self.kib = defaultdict(list), Counter(), Counter(), 0

    def show(self, problems):
        print(f"\n{'fault':<20}{'tried':>7}{'survived':>10}{'recovery, median and longest, s':>34}")
        for name, taken_s in sorted(self.recoveries.items()):
            taken_s = sorted(taken_s)
            longest = f"{taken_s[len(taken_s) // 2]:.2f}  {taken_s[-1]:.2f}"
            print(f"{name:<20}{len(taken_s):>7}{self.survived[name]:>10}{longest:>34}")
        for what, count in sorted(self.users.items()):
            print(f"{what}: {count}")
        print(f"largest process at the end of a round: {self.kib >> 10} MiB")
        for problem in problems:
            print(f"PROBLEM {problem:.1500}")
        print("soak: " + (f"{len(problems)} problems" if problems else "all faults survived, nothing left behind"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/soak")
    parser.add_argument("minutes", type=float)
    parser.add_argument("--seed", type=int, default=random.getrandbits(30))
    given = parser.parse_args()
    print(f"soak: {given.minutes:g} minutes, seed {given.seed}", flush=True)
    rng, until, total, problems = random.Random(given.seed), time.monotonic() + 60 * given.minutes, Total(), []
    modes = rng.sample(MODES, len(MODES))
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with contextlib.ExitStack() as stack:
        idlers = Idlers(stack)
        while time.monotonic() < until:
            problems += one_tunnel(modes[0], rng, until, total)
            modes.append(modes.pop(0))
        problems += idlers.end()
    total.show(problems)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
