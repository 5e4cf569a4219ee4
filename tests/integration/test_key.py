"""The tunnel key between processes: files, rotation, one side without it, v1 peers, and that it is shown nowhere."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .harness import (
    QUICK,
    QUICK_CLIENT,
    QUICK_SERVER,
    ROOT,
    Pair,
    Process,
    Target,
    free_port,
    nodepass_client,
    nodepass_server,
    pair,
    v1_client,
    v1_server,
    wait_until,
)  # fmt: skip
from .users import comes_back, ends_cleanly

PHRASE = "correct horse battery staple"


def genkey():
    argv = [sys.executable, "-m", "nodepass_gevent", "genkey"]
    return subprocess.run(argv, capture_output=True, check=True, cwd=ROOT, timeout=30).stdout.decode()


@pytest.fixture(scope="module")
def target():
    with Target() as echo:
        yield echo


@pytest.fixture
def key_file(tmp_path):
    """Write key files, as one would: whole, and readable by nobody else; give their path."""

    def write(*keys, name="tunnel.key"):
        path = tmp_path / name
        new = tmp_path / "new"
        new.touch(0o600)
        new.write_text("".join(f"{key.strip()}\n" for key in keys))
        new.rename(path)
        return str(path)

    return write


@pytest.mark.parametrize("tls", [1, 2], ids="tls={}".format)
@pytest.mark.parametrize("kind", ["made", "passphrase"])
def test_users_are_served_with_a_key_file(target, key_file, tls, kind):
    path = key_file(genkey() if kind == "made" else PHRASE)
    with pair("ours", "ours", tls, target.address, probe=comes_back, query=f"tunnel-key-file={path}") as both:
        assert all(comes_back(both.public) for _ in range(50))
        assert ends_cleanly(both.public)
        for process in (both.server, both.client):
            assert process.stop() == 0
            assert not [line for line in process.lines if re.search("ERROR|WARN .*refused caller|Traceback", line)]


def test_users_are_served_with_a_key_of_the_environment(target):
    with pair("ours", "ours", 1, target.address, env={"TUNNEL_KEY": PHRASE}) as both:
        assert comes_back(both.public)


def test_a_key_in_the_url_is_taken_with_a_warning(target, key_file):
    path = key_file(PHRASE)
    both = Pair("ours", "ours", 1, target.address, query=f"tunnel-key-file={path}")
    quoted = PHRASE.replace(" ", "%20")
    try:
        both.start_server()
        both.client = nodepass_client(f"{quoted}@127.0.0.1:{both.tunnel_port}", target.address, env=QUICK)
        both.client.wait_for_line("WARN .*tunnel-key can be read by everybody on this machine, with ps .from URL.")
        both.client.wait_for_line("INFO .*connected to .*, profile v2, tls 1")
        assert "horse" not in both.logs()
    finally:
        both.stop()


@pytest.mark.parametrize("tls", [1, 2], ids="tls={}".format)
def test_a_key_is_changed_without_downtime(target, key_file, tls):
    """Old; server takes both; client proves the new one; server takes the new one alone. Users come all the time."""
    old, new = genkey(), genkey()
    server_file, client_file = key_file(old, name="server.key"), key_file(old, name="client.key")
    with pair("ours", "ours", tls, target.address, query=f"tunnel-key-file={server_file}") as both:
        both.client.stop()
        both.query = f"tunnel-key-file={client_file}"
        both.start_client()
        both.client.wait_for_line("connected to")

        def reload(process, *keys):
            key_file(*keys, name="server.key" if process is both.server else "client.key")
            start = len(process.lines)
            os.kill(process.pid, signal.SIGHUP)
            process.wait_for_line("tunnel key: [12] read from", start=start)
            assert comes_back(both.public)

        reload(both.server, new, old)
        reload(both.client, new)
        reload(both.server, new)
        assert all(comes_back(both.public) for _ in range(20))  # the old session goes on
        both.client.kill()
        both.start_client()
        both.client.wait_for_line("connected to")
        assert comes_back(both.public)

        key_file(old, name="client.key")
        both.client.kill()
        both.start_client()
        both.client.wait_for_line("ERROR .*closed on the proof of the tunnel key: are it and tunnel-name the same")


def test_a_bad_key_file_at_a_reload_changes_nothing(target, key_file):
    path = key_file(PHRASE)
    with pair("ours", "ours", 1, target.address, query=f"tunnel-key-file={path}") as both:
        os.chmod(path, 0o644)
        os.kill(both.server.pid, signal.SIGHUP)
        both.server.wait_for_line("ERROR .*tunnel key not reloaded, the old one stays in use: .* has mode 0644")
        both.client.kill()
        os.chmod(path, 0o600)
        both.start_client()
        both.client.wait_for_line("connected to")
        assert comes_back(both.public)


# One side has it


@pytest.mark.parametrize("who", ["server", "client"])
def test_a_key_on_one_side_only_is_named_and_nobody_is_served(target, key_file, who):
    path = key_file(PHRASE)
    both = Pair("ours", "ours", 1, target.address)
    try:
        both.query = f"tunnel-key-file={path}" if who == "server" else ""
        both.start_server()
        both.query = f"tunnel-key-file={path}" if who == "client" else ""
        both.start_client()
        if who == "server":
            both.client.wait_for_line("ERROR .*the server asks for a tunnel key, and this client has none.* every 0.3")
            both.server.wait_for_line("WARN .*refused caller .*; perhaps it has no tunnel key, and this server asks")
        else:
            both.client.wait_for_line("ERROR .*the server has no tunnel key, and this client has one.* every 0.3 s")
        assert not any("connected" in line for line in (*both.server.lines, *both.client.lines))
    finally:
        both.stop()


def test_a_client_with_another_key_is_refused_and_waits(target, key_file):
    server_file, client_file = key_file(genkey(), name="server.key"), key_file(genkey(), name="client.key")
    both = Pair("ours", "ours", 1, target.address)
    try:
        both.query = f"tunnel-key-file={server_file}"
        both.start_server()
        both.query = f"tunnel-key-file={client_file}"
        both.start_client()
        both.client.wait_for_line("ERROR .*closed on the proof of the tunnel key: .* trying again every 0.3 s")
        both.server.wait_for_line("WARN .*refused caller .*: its proof of the tunnel key is wrong")
    finally:
        both.stop()


def test_a_v1_client_is_not_served_by_a_server_with_a_key(target, key_file):
    tunnel, public = free_port(), free_port("both")
    path = key_file(PHRASE)
    with nodepass_server(
        f"127.0.0.1:{tunnel}", f"127.0.0.1:{public}", query=f"tls=1&tunnel-key-file={path}", env=QUICK
    ) as server:
        server.wait_for_line("listening: .* with a tunnel key")
        with v1_client(f"127.0.0.1:{tunnel}", target.address, *QUICK_CLIENT):
            server.wait_for_line("WARN .*refused caller .*perhaps it has no")
            assert not any("connected" in line or "data port" in line for line in server.lines)


def test_a_client_with_a_key_does_not_serve_a_v1_server(target, key_file, tmp_path):
    tunnel, public = free_port(), free_port("both")
    files = Pair("ours", "ours", 1, target.address).files
    path = key_file(PHRASE)
    options = ("--tls", "1", "--crt", files.crt, "--key", files.key, *QUICK_SERVER)
    with (
        v1_server(f"127.0.0.1:{tunnel}", f"127.0.0.1:{public}", *options),
        nodepass_client(f"127.0.0.1:{tunnel}", target.address, query=f"tunnel-key-file={path}", env=QUICK) as client,
    ):
        client.wait_for_line("ERROR .*the server has no tunnel key, and this client has one.* trying again every 0.3 s")
        assert not any("connected" in line for line in client.lines)


# It is shown nowhere


def test_a_key_file_that_others_can_read_is_refused_in_one_line(key_file):
    path = key_file(PHRASE)
    os.chmod(path, 0o640)
    with nodepass_server("127.0.0.1:1", "127.0.0.1:2", query=f"tls=1&tunnel-key-file={path}") as server:
        wait_until(lambda: server.returncode is not None, 30, "it ends")
        assert server.stop() == 2
        assert server.lines == [
            f"nodepass: error: tunnel-key-file: '{path}' has mode 0640: others may use it; chmod 600 keeps them out "
            "[from URL query]"
        ]


@pytest.mark.parametrize("source", ["file", "environment", "config file"])
def test_the_key_is_in_no_log_no_command_line_and_no_shown_config(target, key_file, tmp_path, source):
    """A marked key, right on one side and then wrong, at the most detailed level of the log."""
    marked = "m4rked-k3y of enough characters"
    config = tmp_path / "nodepass.conf"
    config.write_text(f"tunnel-key = {marked}\n" if source == "config file" else "")
    env = QUICK | {"NODEPASS_LOG": "debug"} | ({"TUNNEL_KEY": marked} if source == "environment" else {})
    query = f"tls=1&tunnel-key-file={key_file(marked)}" if source == "file" else "tls=1"
    tunnel, public = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port('both')}"
    options = ["-c", str(config)] if source == "config file" else []

    def argv(url, *more):
        return [sys.executable, "-m", "nodepass_gevent", *options, f"{url}?{query}", *more]

    server_url, client_url = f"server://{tunnel}/{public}", f"client://{tunnel}/{target.address}"
    seen = []
    with Process(argv(server_url), env=env) as server, Process(argv(client_url), env=env) as client:
        client.wait_for_line("connected to")
        wait_until(lambda: comes_back(("127.0.0.1", int(public.rpartition(":")[2]))), 10, "traffic")
        seen += [Path(f"/proc/{process.pid}/cmdline").read_text() for process in (server, client)]
        with nodepass_client(tunnel, target.address, env=env | {"TUNNEL_KEY": "another key of 16 characters"}) as wrong:
            wrong.wait_for_line("ERROR .*closed on the proof of the tunnel key")
            seen += wrong.lines
        os.kill(server.pid, signal.SIGHUP)
        server.wait_for_line("SIGHUP")
        server.stop()
        client.stop()
        seen += [*server.lines, *client.lines]
    shown = subprocess.run(
        argv(server_url, "--show-config"), env=os.environ | env, capture_output=True, text=True, cwd=ROOT, timeout=30
    )
    assert shown.returncode == 0
    assert ("tunnel-key = ***" in shown.stdout) == (source != "file")
    broken = subprocess.run(
        argv(server_url, "--log", "loud"), env=os.environ | env, capture_output=True, text=True, cwd=ROOT, timeout=30
    )
    assert broken.returncode == 2
    text = "\n".join([*seen, shown.stdout, shown.stderr, broken.stdout, broken.stderr])
    assert "connected" in text and "m4rked" not in text and "k3y" not in text
