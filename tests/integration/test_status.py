"""Status of real processes: it follows what happens, and whoever asks cannot hurt the tunnel."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

from .harness import ROOT, Process, free_port, wait_until
from .scene import scene
from .users import ask, comes_back, read_exactly, talk

TOKEN = "0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    with scene(tmp_path_factory.mktemp("scene")) as made:
        yield made
        lines = made.server.lines + made.client.lines
        assert not [line for line in lines if "  ERROR  " in line or "Traceback" in line]


def get(url):
    """Give code and text."""
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, exc.read().decode()


def tunnel(status, name="web"):
    document = json.loads(get(f"{status}/status.json?since=1e12")[1])
    return next(each for each in document["tunnels"] if each["name"] == name)


def metric(status, name, **labels):
    """Give the value of a metric of the tunnel "web"."""
    for line in get(f"{status}/metrics")[1].splitlines():
        match = re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line)
        if match and match[1] == name and dict(re.findall(r'(\w+)="(.*?)"', match[2])) == {"tunnel": "web", **labels}:
            return float(match[3])
    raise AssertionError(f"no {name} {labels}")


def command(*arguments, **env):
    argv = [sys.executable, "-m", "nodepass_gevent", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_an_exchange_is_counted_with_its_bytes_while_it_runs_on_both_sides(here):
    before = [tunnel(status)["counters"]["bytes_down"] for status in (here.status, here.client_status)]
    with socket.create_connection(here.public["web"], 30) as user:
        user.sendall(b"300000 0")
        assert len(read_exactly(user, 300000)) == 300000
        for status, count in zip((here.status, here.client_status), before, strict=True):
            now = tunnel(status)
            assert now["exchanges"] == 1
            assert now["counters"]["bytes_down"] == count + 300000
    for status, count in zip((here.status, here.client_status), before, strict=True):
        wait_until(lambda status=status: not tunnel(status)["exchanges"], 30, "the exchange ends")
        assert tunnel(status)["counters"]["bytes_down"] == count + 300000
        assert metric(status, "nodepass_transferred_bytes_total", direction="down") == count + 300000


def test_a_udp_session_is_counted_while_it_runs(here):
    before = tunnel(here.status, "database")["counters"]
    assert ask(here.public["database"], b"datagram") == b"datagram"
    for status in (here.status, here.client_status):
        now = tunnel(status, "database")
        assert (now["exchanges"], now["counters"]["udp_sessions"]) == (1, 1)
        assert now["counters"]["datagrams_down"] == before["datagrams_down"] + 1
        assert now["counters"]["bytes_down"] == before["bytes_down"] + 8


def test_the_time_to_the_first_byte_is_that_of_the_target(here):
    name = "nodepass_time_to_first_byte_seconds"
    before = [
        (metric(each, f"{name}_count"), metric(each, f"{name}_sum")) for each in (here.status, here.client_status)
    ]
    talk(here.public["web"], b"10 0.4")
    for status, (count, total) in zip((here.status, here.client_status), before, strict=True):
        assert metric(status, f"{name}_count") == count + 1
        assert 0.4 <= metric(status, f"{name}_sum") - total < 3


def test_the_commands_tell_the_same(here):
    file = ["--config", str(here.files[0])]
    done = command("status", *file)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Serving: 2 tunnels, each with its peer, ")
    done = command("health", "--ready", *file)
    assert (done.returncode, done.stdout, done.stderr) == (0, "healthy: ready\n", "")
    done = command("health", NODEPASS_STATUS=here.status.removeprefix("http://"))
    assert (done.returncode, done.stdout) == (0, "healthy: ok\n")
    done = command("health", NODEPASS_STATUS=f"127.0.0.1:{free_port()}")
    assert (done.returncode, done.stderr) == (1, "")
    assert re.fullmatch("unhealthy: 127.0.0.1:[0-9]+: connection refused; does .* run[?]\n", done.stdout)
    argv = [sys.executable, "-m", "nodepass_gevent", "status", "--watch", *file]
    with Process(argv) as watching:
        wait_until(lambda: len([line for line in watching.lines if line.startswith("Serving: ")]) > 1, 30, "two looks")
        assert watching.stop(signal.SIGINT) == 0
    with open("/dev/full", "w") as disk:
        done = subprocess.run(argv, stdout=disk, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "nodepass: error: standard output: no space left on device\n")


def test_lines_that_a_full_disk_has_cost_are_told():
    port, ports = free_port(), (free_port(), free_port("both"))
    argv = [sys.executable, "-m", "nodepass_gevent", f"server://127.0.0.1:{ports[0]}/127.0.0.1:{ports[1]}"]
    with Process([*argv, "--log-to", "/dev/full", "--status", f"127.0.0.1:{port}"]):
        status = ["status", "--status", f"127.0.0.1:{port}"]
        wait_until(lambda: command(*status).returncode == 0, 30, "it answers")
        said = command(*status).stdout
    assert re.search(r", no exchanges\. \d log lines? lost in the last minute: no space left on device\.\n", said), said
    assert " warn  log lines are lost: no space left on device\n" in said, said


def exchanges(public, number):
    """Be users one after the other; give how long each took."""
    times = []
    for _ in range(number):
        began = time.monotonic()
        assert len(talk(public, b"1000 0")) == 1000
        times.append(time.monotonic() - began)
    return times


def test_slow_and_hostile_callers_do_not_slow_the_tunnel(here):
    usual = exchanges(here.public["web"], 100)
    host, port = here.status.removeprefix("http://").split(":")
    leave = threading.Event()

    def hammer(path):
        while not leave.is_set():
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1) as caller:
                caller.sendall(b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path)
                caller.recv(1)  # and no more of it

    with contextlib.ExitStack() as stack:
        for number in range(100):
            caller = stack.enter_context(socket.socket())
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            caller.connect((host, int(port)))
            caller.sendall((b"GET /status.json HTT", b"GET /status.json HTTP/1.1\r\n\r\n")[number % 2])
        hammers = [threading.Thread(target=hammer, args=(path,)) for path in (b"/metrics", b"/status.json", b"/") * 2]
        for thread in hammers:
            thread.start()
        try:
            meanwhile = exchanges(here.public["web"], 100)
        finally:
            leave.set()
            for thread in hammers:
                thread.join()
        assert sum(meanwhile) < 3 * sum(usual) + 1
        assert max(meanwhile) < 3 * max(usual) + 1
        assert get(f"{here.status}/healthz") == (200, "ok\n")


def test_a_hang_up_moves_the_status_and_nothing_else(here):
    old, new, text = here.status, f"127.0.0.1:{free_port()}", here.files[0].read_text()
    os.kill(here.server.pid, signal.SIGHUP)
    here.server.wait_for_line("SIGHUP: reading")
    assert get(f"{old}/healthz") == (200, "ok\n")
    assert len([line for line in here.server.lines if "status: http" in line]) == 1  # it goes on as it is
    with socket.create_connection(here.public["web"], 30) as user:
        user.sendall(b"10 0")
        assert read_exactly(user, 10) == bytes(10)
        here.files[0].write_text(text.replace(old.removeprefix("http://"), new))
        os.kill(here.server.pid, signal.SIGHUP)
        here.server.wait_for_line(f"status: http://{new}/")
        here.status = f"http://{new}"
        assert tunnel(here.status)["exchanges"] == 1
        with pytest.raises(urllib.error.URLError):
            get(f"{old}/healthz")
        assert not [line for line in here.server.lines if "settings changed" in line]
    here.files[0].write_text(re.sub("^status = .*\n", "", text))
    os.kill(here.server.pid, signal.SIGHUP)

    def is_off():
        try:
            get(f"{here.status}/healthz")
        except OSError:
            return True
        return False

    wait_until(is_off, 30, "the status is off")
    assert comes_back(here.public["web"])
    here.files[0].write_text(text)
    os.kill(here.server.pid, signal.SIGHUP)
    here.status = old
    wait_until(lambda: not is_off(), 30, "the status is on again")


def test_readiness_follows_the_peer_and_tells_why_it_is_missing(here):
    assert get(f"{here.status}/readyz") == (200, "ready\n")
    os.kill(here.server.pid, signal.SIGSTOP)  # nobody there, and nothing said
    try:
        lost = ("connecting", "failing")
        wait_until(lambda: tunnel(here.client_status)["condition"] in lost, 60, "the client misses its server")
        code, text = get(f"{here.client_status}/readyz")
        assert code == 503
        assert re.match("not ready\nweb: (Not connected: .*; trying again in|Connecting to) ", text), text
        assert get(f"{here.client_status}/healthz") == (200, "ok\n")
    finally:
        os.kill(here.server.pid, signal.SIGCONT)
    wait_until(lambda: get(f"{here.client_status}/readyz")[0] == 200, 60, "the client has its server again")
    wait_until(lambda: get(f"{here.status}/readyz")[0] == 200, 60, "the server has its client again")
    assert tunnel(here.client_status)["failures"] >= 1
    assert "s ago: " in tunnel(here.client_status)["words"]


def test_a_taken_port_is_said_and_tried_again_while_the_tunnel_runs(tmp_path):
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text(TOKEN)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port, ports = taken.getsockname()[1], (free_port(), free_port("both"))
        url = f"server://127.0.0.1:{ports[0]}/127.0.0.1:{ports[1]}"
        argv = [sys.executable, "-m", "nodepass_gevent", url, "--status", f"127.0.0.1:{port}"]
        with Process([*argv, "--status-token-file", str(token)]) as server:
            server.wait_for_line(
                f"WARN  status: address already in use: 127.0.0.1:{port}; trying again, the tunnels go"
            )
            server.wait_for_line("listening: tunnel")
            taken.close()
            server.wait_for_line(f"status: http://127.0.0.1:{port}/")
            assert get(f"http://127.0.0.1:{port}/status.json")[0] == 401
            status = ["--status", f"127.0.0.1:{port}", "--status-token-file", str(token)]
            done = command("status", *status)
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout.startswith(
                "Waiting: no client is connected, no exchanges; nothing wrong in the last minute."
            )
            assert command("health", "--ready", *status).returncode == 1
            assert server.stop() == 0
