"""Two server processes on the same ports, and two clients: who serves whom, and what restarts do to users."""

import contextlib
import os
import signal
import socket
import sys

import pytest

from .harness import Process, Target, free_port, wait_until
from .load import datagram_user
from .restarts import Shared, Users
from .users import read_exactly

pytestmark = pytest.mark.timeout(300)  # on a busy machine a process takes a while to start, and to find its place
KEYED = {"NODEPASS_TLS": "1", "TUNNEL_KEY": "a passphrase of the tests"}


@pytest.fixture
def target():
    with Target() as target:
        yield target


@contextlib.contextmanager
def load(shared):
    """Let users come while the block runs; all of them must be served."""
    with Users(shared.address, pause_s=0.04) as users:
        yield users
    assert set(users.ends) == {"served"}, dict(users.ends)


def echoes(user, word=b"hello"):
    """Whether an exchange goes on."""
    try:
        user.sendall(word)
        return read_exactly(user, len(word), 10) == word
    except OSError:
        return False


@pytest.mark.parametrize("env", [{}, KEYED], ids=["plain", "keyed"])
def test_users_are_spread_and_none_is_refused_while_each_process_is_restarted(target, env):
    with Shared(target.address, env=env) as shared, load(shared) as users:
        users.wait_for(120)
        shares = [shared.count(server) for server in shared.servers]
        assert 0.2 < shares[0] / sum(shares) < 0.8
        for number in (0, 1):
            shared.restart(number)
            users.wait_for(30)
            assert shared.count(shared.servers[number]) > 0


def test_when_a_process_is_killed_the_other_goes_on_and_a_new_one_takes_its_place(target):
    with Shared(target.address) as shared, contextlib.ExitStack() as stack:
        long = [stack.enter_context(socket.create_connection(shared.address, 10)) for _ in range(20)]
        assert all(map(echoes, long))
        theirs = shared.count(shared.servers[1])
        assert 0 < theirs < len(long)
        shared.servers[0].kill()
        with load(shared) as users:
            users.wait_for(60)
            assert sum(map(echoes, long)) == theirs
            shared.servers[0] = shared.serve()
            shared.wait_until_open(shared.servers[0])
            users.wait_for(60)
        assert shared.count(shared.servers[0]) > 0


def test_when_all_processes_are_given_new_settings_at_once_no_user_is_refused(target, tmp_path):
    path = tmp_path / "nodepass.conf"

    class FromFile(Shared):
        def serve(self):
            self.write(100)
            return Process([sys.executable, "-m", "nodepass_gevent", "--config", str(path)], name="server")

        def write(self, limit):
            url = f"server://{self.tunnel}/{self.public}"
            path.write_text(f"[tunnel web]\nurl = {url}\nreuse-port = 1\nsemaphore-limit = {limit}\n")

    with FromFile(target.address) as shared, load(shared) as users:
        users.wait_for(60)
        shared.write(200)
        starts = [len(server.lines) for server in shared.servers]
        for server in shared.servers:
            os.kill(server.pid, signal.SIGHUP)
        for server, start in zip(shared.servers, starts, strict=True):
            server.wait_for_line("changed: semaphore-limit", start=start)
            server.wait_for_line("client .* connected", start=start)
        users.wait_for(60)


def test_a_flow_of_datagrams_stays_with_its_process_and_moves_when_that_ends(target):
    with Shared(target.address) as shared, contextlib.ExitStack() as stack:
        flows = {b"flow %d" % number: stack.enter_context(datagram_user(shared.address)) for number in range(24)}
        for _ in range(5):
            for word, user in flows.items():
                user.send(word)
                assert user.recv(100) == word
        sessions = [shared.count(server, "udp_sessions") for server in shared.servers]
        assert sum(sessions) == len(flows) and min(sessions) > 0
        assert len(set(target.udp.seen)) == len(flows)  # each has had one port at the target
        assert shared.servers[0].stop() == 0

        def is_answered(word):
            user = flows[word]
            user.settimeout(0.2)
            try:
                user.send(word)
                return user.recv(100) == word
            except OSError:
                return False

        for word in flows:
            wait_until(lambda word=word: is_answered(word), 10, f"{word} is answered")


def test_a_port_that_is_taken_by_another_program_is_said_to_be_and_tried_again(target):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        url = f"server://127.0.0.1:{free_port()}/127.0.0.1:{port}?reuse-port=1"
        with Process([sys.executable, "-m", "nodepass_gevent", url], name="server") as server:
            hint = "taken by a process without reuse-port, or of another user; trying again"
            server.wait_for_line(f"address already in use: 127.0.0.1:{port}, {hint}")
            taken.close()
            server.wait_for_line(f"listening: .*public 127.0.0.1:{port}")
