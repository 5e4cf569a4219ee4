"""One process, its file and SIGHUP: what changes, what goes on, and that nobody is dropped meanwhile."""

import contextlib
import hashlib
import os
import random
import signal
import socket
import sys
import threading

import pytest

from .harness import START_S, Process, Target, free_port, wait_until
from .load import Crowd, ask, datagram_user, visit
from .users import comes_back, read_exactly


class Site:
    """A process that runs a server and a client, ``web`` and ``in``, by a config file."""

    def __init__(self, path, target):
        self.path = path
        self.tunnel_port, self.public_port = free_port(), free_port("both")
        self.public = ("127.0.0.1", self.public_port)
        self.server = f"server://127.0.0.1:{self.tunnel_port}/127.0.0.1:{self.public_port}"
        self.client = f"client://127.0.0.1:{self.tunnel_port}/{target}"
        self.write()
        self.process = Process([sys.executable, "-m", "nodepass_gevent", "--config", str(path)], name="site")

    def write(self, common="", web="", into="", more=""):
        text = f"{common}\nservice-cooldown = 300ms\nshutdown-timeout = 200ms\n"
        text += f"[tunnel web]\nurl = {self.server}\n{web}\n[tunnel in]\nurl = {self.client}\n{into}\n{more}\n"
        self.path.write_text(text)

    def hang_up(self, line="SIGHUP: reading", **sections):
        """Write the file, have it read, and wait for a line."""
        self.write(**sections)
        start = len(self.process.lines)
        os.kill(self.process.pid, signal.SIGHUP)
        return self.process.wait_for_line(line, start=start)

    def ready(self):
        wait_until(lambda: comes_back(self.public), START_S, "traffic passes")


@pytest.fixture
def site(tmp_path):
    with Target() as target:
        made = Site(tmp_path / "nodepass.conf", target.address)
        with made.process:
            made.ready()
            yield made
            assert not [line for line in made.process.lines if "Traceback" in line], made.process.tail()


class Transfer(threading.Thread):
    """A user who sends without end and reads all back, until it is told to stop; then both hashes must agree."""

    def __init__(self, public):
        super().__init__(daemon=True)
        self.sent, self.received = hashlib.sha256(), hashlib.sha256()
        self.error = None
        self._public = public
        self._stopped = threading.Event()

    def run(self):
        rng = random.Random(1)
        try:
            with socket.create_connection(self._public, timeout=20) as user:
                reader = threading.Thread(target=self._read, args=[user], daemon=True)
                reader.start()
                while not self._stopped.wait(0.002):
                    data = rng.randbytes(20_000)
                    user.sendall(data)
                    self.sent.update(data)
                user.shutdown(socket.SHUT_WR)
                reader.join(20)
        except OSError as exc:
            self.error = exc

    def _read(self, user):
        try:
            while data := user.recv(65536):
                self.received.update(data)
        except OSError as exc:
            self.error = exc

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self._stopped.set()
        self.join(40)
        assert self.error is None
        assert self.received.digest() == self.sent.digest()


def test_a_transfer_and_new_users_go_on_through_every_change_of_the_file(site):
    other = f"[tunnel other]\nurl = server://127.0.0.1:{free_port()}/127.0.0.1:{free_port('both')}"
    with Transfer(site.public), Crowd(site.public, size=3, timeout=20.0) as crowd:

        def served_more():
            before = crowd.served
            wait_until(lambda: crowd.served > before + 20, START_S, "users are served")

        served_more()
        site.hang_up(r"\[web\] settings changed: log, idle-timeout", web="log = debug\nidle-timeout = 1h")
        served_more()
        site.hang_up("listening", web="log = debug\nidle-timeout = 1h", more=other)
        served_more()
        site.hang_up("configuration refused", web="semaphore-limit = many")
        served_more()
        site.hang_up(r"\[web\] settings changed: log, semaphore-limit, idle-timeout", web="semaphore-limit = 500")
        served_more()
        site.hang_up("connected to", web="semaphore-limit = 500", into="min-pool-capacity = 3")
        served_more()
        site.hang_up(r"\[in\] settings changed", web="semaphore-limit = 400", into="min-pool-capacity = 4")
        served_more()
    assert not crowd.errors


@pytest.mark.parametrize("side", ["web", "into"])
def test_users_who_wait_for_a_place_at_the_client_are_served_although_it_is_changed(site, side):
    with contextlib.ExitStack() as users:

        def come(word):
            user = users.enter_context(socket.create_connection(site.public, timeout=20))
            user.sendall(word)
            return user

        site.hang_up("connected to", into="semaphore-limit = 2")
        served = [come(b"served") for _ in range(2)]
        assert [read_exactly(user, 6, 20) for user in served] == [b"served"] * 2
        waiting = [come(b"waited") for _ in range(2)]
        site.process.wait_for_line(r"\[in\] all places are taken, 2 of semaphore-limit")
        limits = {"web": "semaphore-limit = 500"} if side == "web" else {}
        site.hang_up("taken up", into=f"semaphore-limit = {3 if side == 'into' else 2}", **limits)
        for user in served:
            user.close()
        assert [read_exactly(user, 6, 20) for user in waiting] == [b"waited"] * 2


def test_a_file_that_is_wrong_is_refused_with_its_place_and_the_old_one_goes_on(site):
    site.hang_up(
        r"ERROR  configuration refused, the old one goes on: tls: '7' is not one of 0, 1, 2 \[from file .*conf:6\]",
        web="tls = 7",
    )
    visit(site.public)
    site.path.unlink()
    os.kill(site.process.pid, signal.SIGHUP)
    site.process.wait_for_line("configuration refused, the old one goes on: config: cannot read the file: no such file")
    visit(site.public)
    site.hang_up(r"configuration taken up; tunnels added, changed or removed: 1", web="pool-wait = 7s")
    visit(site.public)
    site.hang_up(r"configuration taken up; tunnels added, changed or removed: 0", web="pool-wait = 7s")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_to_a_process_that_is_only_starting_does_not_end_it(number, tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    key = tmp_path / "key"
    key.touch(0o600)
    key.write_text("a passphrase, which takes a moment to be made a key")
    url = f"server://127.0.0.1:{free_port()}/127.0.0.1:{free_port('both')}"
    settings = f"[tunnel a]\nurl = {url}\ntls = 1\ntunnel-key-file = {key}\n"
    with Process([sys.executable, "-m", "nodepass_gevent", "--config", str(path)]) as process:
        with path.open("w") as pipe:  # it has opened the other end
            os.kill(process.pid, number)
            (tmp_path / "file").write_text(settings)
            (tmp_path / "file").rename(path)
            pipe.write(settings)
        if number == signal.SIGHUP:
            process.wait_for_line("SIGHUP: reading configuration")
            process.wait_for_line("configuration taken up; tunnels added, changed or removed: 0")
        process.wait_for_line("listening:")
        assert process.returncode is None


def test_settings_of_a_pipe_are_read_at_the_start_and_a_hang_up_goes_on_with_them_and_blocks_nothing():
    public = ("127.0.0.1", free_port("both"))
    settings = f"url = server://127.0.0.1:{free_port()}/127.0.0.1:{public[1]}"
    command = f"exec {sys.executable} -m nodepass_gevent --config <(echo '{settings}')"
    with Process(["bash", "-c", command]) as process:
        process.wait_for_line("listening:")
        os.kill(process.pid, signal.SIGHUP)
        process.wait_for_line("the old one goes on: config: only a regular file is read again, no pipe .*/dev/fd/")
        socket.create_connection(public, timeout=5).close()
        os.kill(process.pid, signal.SIGTERM)
        assert wait_until(lambda: process.returncode is not None, 10, "end")
        assert process.returncode == 0


def test_a_level_changes_without_a_restart(site):
    site.hang_up(r"\[web\] settings changed: log", common="log = debug")
    start = len(site.process.lines)
    visit(site.public)
    site.process.wait_for_line("DEBUG", start=start)
    assert not any("listening" in line for line in site.process.lines[start:])


def test_a_removed_tunnel_closes_its_ports_and_cuts_what_does_not_end_in_time(site):
    with socket.create_connection(site.public, timeout=20) as user:
        user.sendall(b"x")
        assert user.recv(1) == b"x"
        site.path.write_text(f"[tunnel in]\nurl = {site.client}\n")
        os.kill(site.process.pid, signal.SIGHUP)
        site.process.wait_for_line(r"\[web\] tunnel removed")
        site.process.wait_for_line("exchanges cut: 1")
        with pytest.raises(ConnectionError):  # a reset, at the latest of what is sent then
            while user.recv(1) or user.send(b"x"):
                pass
            raise ConnectionResetError
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(site.public, timeout=20).close()


def test_the_next_datagram_of_a_user_is_served_by_the_tunnel_in_the_place_of_the_old_one(site):
    with datagram_user(site.public) as user:
        ask(user)
        site.hang_up("connected to", web="semaphore-limit = 500")

        def answered():
            user.settimeout(1)
            try:
                ask(user)
            except OSError:
                return False
            return True

        wait_until(answered, START_S, "a datagram is answered")


def test_one_tunnel_of_the_file_runs_alone(tmp_path):
    path = tmp_path / "nodepass.conf"
    ports = [free_port() for _ in range(4)]
    text = "[tunnel {}]\nurl = server://127.0.0.1:{}/127.0.0.1:{}?network=tcp\n"
    path.write_text(text.format("a", *ports[:2]) + text.format("b", *ports[2:]))
    argv = [sys.executable, "-m", "nodepass_gevent", "--config", str(path), "--only", "b"]
    with Process(argv, name="only b") as process:
        process.wait_for_line(f"listening: tunnel 127.0.0.1:{ports[2]}")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", ports[0]), timeout=5).close()
        assert process.stop() == 0
