"""Faults of the tunnel key: who has none, another one, a recorded one, or sits in the middle; files; where it shows."""

import base64
import contextlib
import os
import re
import secrets
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest
from integration.harness import v1_client, wait_until
from integration.targets import EchoTCP
from integration.users import payload, talk

from nodepass_gevent import cli

from .chaos import TO_CLIENT, TO_SERVER, ManInTheMiddle, Relay
from .harness import FORBIDDEN, SLACK, Tunnel, run, standing
from .peers import dial, how_it_ends, read_line, secured

KEY, OTHER_KEY = "m4rked-k3y of enough characters", "0ther-k3y of enough characters"
SHOWN = [KEY, KEY.encode().hex(), base64.b64encode(KEY.encode())[:20].decode(), quote(KEY)]  # as it might be
NOT_EVEN_THE_KEY = re.compile(FORBIDDEN.pattern + "|" + "|".join(map(re.escape, SHOWN)))
WAITS = {"caller_timeout_s": 1.0, "authentication_timeout_s": 1.0, "pool_wait_s": 1.0}


@pytest.fixture(scope="module")
def kept(target, tmp_path_factory):
    """A tunnel with a key that all rows here share. Its client calls through a relay; its server has room for more."""
    path = tmp_path_factory.mktemp("key") / "tunnel.key"
    write(path, KEY)
    query = f"log=debug&log-rate=0&tunnel-key-file={path}"
    tunnel = Tunnel(target.address, 1, query, limits=WAITS, forbidden=NOT_EVEN_THE_KEY)
    tunnel.server_env = {"MAX_POOL_CAPACITY": "64"}
    with ManInTheMiddle(tunnel.tunnel_port) as relay:
        tunnel.dialled = relay.port
        with tunnel:
            yield tunnel, relay, path


@pytest.fixture
def keyed(kept):
    """Hold it to the standing figures, the key being in no log among them."""
    tunnel, relay, _ = kept
    with standing(tunnel):
        yield tunnel, relay


def write(path, *keys):
    """Write a key file as one would: readable by nobody else."""
    path.unlink(missing_ok=True)
    path.touch(0o600)
    path.write_bytes(b"".join(key if isinstance(key, bytes) else f"{key}\n".encode() for key in keys))


def since(process):
    """Give what waits for lines that a process has yet to say."""
    start = len(process.lines)
    return lambda pattern: process.wait_for_line(pattern, 30, start)


def forget(process, pattern):
    """Take the complaints that a test provoked out of a log."""
    process.lines[:] = [line for line in process.lines if not re.search(pattern, line)]


@pytest.mark.fault(5)
def test_a_v1_client_is_closed_in_time_and_given_no_user(keyed):
    tunnel, _ = keyed
    server_says = since(tunnel.server)
    with (
        EchoTCP() as own,
        Relay(tunnel.tunnel_port, "127.0.0.2") as elsewhere,
        v1_client(f"127.0.0.1:{elsewhere.port}", own.address, "--cooldown", "0.2"),
    ):
        began = time.monotonic()
        with dial(tunnel.tunnel_port, "127.0.0.2") as silent:
            assert re.fullmatch(rb"//off\?v=2&n=[\w-]{22}&a=psk1#1\n", read_line(silent))
            assert how_it_ends(silent)[0] == b""
        assert time.monotonic() - began < SLACK * WAITS["caller_timeout_s"]
        server_says(r"refused caller 127\.0\.0\.2:.*perhaps it has no tunnel key")
        assert tunnel.served(50) == 50
        assert not own.seen


@pytest.mark.fault(6)
def test_an_address_is_kept_out_from_its_third_wrong_proof_and_no_other_one_is(keyed):
    tunnel, relay = keyed
    server_says = since(tunnel.server)
    with Relay(tunnel.tunnel_port, "127.0.0.2") as elsewhere, contextlib.ExitStack() as stack:
        url, env = f"client://127.0.0.1:{elsewhere.port}/127.0.0.1:1", {"TUNNEL_KEY": OTHER_KEY}
        query, tunnel.query = tunnel.query, ""
        stranger = stack.enter_context(tunnel._start("stranger", url, "", env, ()))
        tunnel.query = query
        server_says(r"address 127\.0\.0\.2 is kept out for 5 s: wrong proofs of the tunnel key: 3")
        stranger.wait_for_line("ERROR .*closed on the proof of the tunnel key")
        for _ in range(2):
            with contextlib.suppress(ConnectionResetError), dial(tunnel.tunnel_port, "127.0.0.2") as kept_out:
                assert read_line(kept_out) == b""
        relay.cut()
        assert tunnel.recovers(SLACK * 1) < SLACK * 1
        wrong = [line for line in tunnel.server.lines if "proof of the tunnel key is wrong" in line]
        assert len(wrong) == 3 and all("127.0.0.2" in line for line in wrong)


@pytest.mark.fault(7)
def test_recorded_connections_played_back_are_given_nothing(keyed):
    """Byte for byte what the client sent: hello and data connections, proofs and tags, from its address and another."""
    tunnel, relay = keyed
    recorded = {}

    def record(link, direction, data):
        if direction is TO_SERVER:
            recorded[link] = recorded.get(link, b"") + data
        return [data]

    relay.rule = record
    relay.cut()
    tunnel.recovers(SLACK * 2)
    assert tunnel.served(5) == 5
    relay.rule = lambda _link, _direction, data: [data]
    played = list(recorded.values())
    assert any(b"#hello\n" in said[:100] for said in played) and any(b"#data\n" in said[:100] for said in played)
    connected = sum("connected, profile" in line for line in tunnel.server.lines)
    with ThreadPoolExecutor(10) as thieves:
        list(thieves.map(lambda said: play(tunnel, said, "127.0.0.3"), played))
        list(thieves.map(lambda said: play(tunnel, said, "127.0.0.1"), played))
    assert sum("connected, profile" in line for line in tunnel.server.lines) == connected


def play(tunnel, said, source):
    """Say what was recorded: what comes back is the first line and a handshake that fails, in a few kilobytes."""
    with contextlib.suppress(ConnectionError), dial(tunnel.tunnel_port, source) as thief:
        read_line(thief)
        thief.sendall(said)
        answer, _ = how_it_ends(thief)
        assert len(answer) < 4096 and b"word" not in answer


MIDDLES = {("hello",): "127.0.0.4", ("data",): "127.0.0.5", ("hello", "data"): "127.0.0.6"}  # and its address


@pytest.mark.fault(8)
@pytest.mark.parametrize("kinds", MIDDLES, ids="+".join)
def test_a_man_in_the_middle_who_ends_tls_on_both_legs_is_refused_by_both_and_reads_no_user(keyed, kinds):
    tunnel, relay = keyed
    server_says, client_says = since(tunnel.server), since(tunnel.client)
    relay.read = {"hello": b"", "data": b""}
    relay.kinds, relay.source = kinds, MIDDLES[kinds]
    relay.cut()
    try:
        if "hello" in kinds:
            client_says("closed on the proof of the tunnel key")
            server_says(f"refused caller {relay.source}.*: its proof of the tunnel key is wrong")
        else:
            server_says(f"data connection from {relay.source}: its tag is wrong")
            client_says("no data connection: ")
        with dial(tunnel.public_port) as user:
            user.sendall(b"the user's own words")
            assert how_it_ends(user) == (b"", "reset")
    finally:
        relay.kinds, relay.source = (), "127.0.0.1"
        relay.cut()
    tunnel.recovers(SLACK * 5)
    assert any(relay.read[kind] for kind in kinds)
    assert not any(b"user's" in read for read in relay.read.values())
    forget(tunnel.client, "ERROR .*closed on the proof of the tunnel key")


@pytest.mark.fault(9)
def test_a_proof_that_comes_a_byte_at_a_time_is_closed_at_its_deadline(keyed):
    tunnel, _ = keyed
    with dial(tunnel.tunnel_port, "127.0.0.8") as caller:
        read_line(caller)
        caller.sendall(b"//?v=2#hello\n")
        with secured(caller, "nodepass-ctl/2") as control:
            began = time.monotonic()
            with contextlib.suppress(OSError):
                for byte in b"//auth?n=" + b"A" * 900:
                    control.sendall(bytes([byte]))
                    time.sleep(0.05)  # the fault
            assert 0.5 < time.monotonic() - began < SLACK * WAITS["authentication_timeout_s"]


BEFORE_TLS = {
    "to the client behind the first line": lambda link, direction: direction is TO_CLIENT and not link.passed,
    "to the client before a ServerHello": lambda link, direction: direction is TO_CLIENT and b"#hello" in link.opening,
    "to the server before a ClientHello": lambda link, direction: direction is TO_SERVER and b"#hello" in link.opening,
}


@pytest.mark.fault(10)
@pytest.mark.parametrize("where", BEFORE_TLS)
def test_bytes_slipped_in_before_tls_open_no_session(keyed, where):
    tunnel, relay = keyed
    spoiled = set()

    def slip_in(link, direction, data):
        if link in spoiled or not BEFORE_TLS[where](link, direction):
            return [data]
        spoiled.add(link)
        if direction is TO_SERVER:
            line, newline, rest = data.partition(b"\n")
            return [line + newline + b"//0a1b2c3d#1\n" + rest]
        return [data + b"//0a1b2c3d#1\n" if "first line" in where else b"//0a1b2c3d#1\n" + data]

    says = since(tunnel.client)
    relay.rule = slip_in
    start = len(tunnel.client.lines)
    relay.cut()
    says("(bytes behind its first line|TLS|closed|reset).*; trying again")
    wait_until(lambda: len(spoiled) >= 2, 10, "the client has called again")
    assert not [line for line in tunnel.client.lines[start:] if "connected to" in line]
    relay.rule = lambda _link, _direction, data: [data]
    tunnel.recovers(SLACK * 5)


@pytest.mark.fault(30)
def test_of_a_thousand_strangers_with_tls_and_the_right_session_none_is_pooled(keyed):
    """They know the session, which travels in clear, and tags of another one."""
    tunnel, relay = keyed
    relay.read, relay.kinds, relay.source = {"hello": b"", "data": b""}, ("data",), "127.0.0.7"
    relay.cut()
    wait_until(lambda: len(relay.read["data"]) >= 40, 10, "a tag was read by a man in the middle")
    earlier = relay.read["data"][:40]
    relay.kinds, relay.source = (), "127.0.0.1"
    relay.cut()
    tunnel.recovers(SLACK * 5)
    line = next(link.opening for link in list(relay.links) if link.data).partition(b"\n")[0] + b"\n"
    session = bytes.fromhex(line[2:18].decode())
    said = [b"", secrets.token_bytes(40), session + secrets.token_bytes(32), earlier, session + earlier[8:]]

    def join(number):
        with dial(tunnel.tunnel_port, f"127.1.{number // 250}.{number % 250 + 1}") as stranger:
            stranger.sendall(line)
            read_line(stranger)
            with secured(stranger, "nodepass-data/2") as data:
                if number % 5 == 0 and number > 100:
                    return b""  # gone without a tag; the first ones wait
                data.sendall(said[number % 5])
                return how_it_ends(data)[0]

    words = [b"user %d " % number + payload(2000, number) for number in range(100)]
    start = len(tunnel.server.lines)
    with ThreadPoolExecutor(20) as strangers, ThreadPoolExecutor(2) as users:
        answers = users.map(lambda word: talk(tunnel.public, word, timeout=20), words)
        ends = list(strangers.map(join, range(1000)))
        assert list(answers) == words
    assert set(ends) == {b""}, "all got through TLS, and none further"
    assert sum("its tag is wrong" in line for line in tunnel.server.lines[start:]) > 700


BAD_FILES = {
    "mode 0644": lambda path: path.chmod(0o644),
    "missing": lambda path: path.unlink(),
    "empty": lambda path: write(path),
    "binary": lambda path: write(path, b"\x00\xff\xfe" * 20),
    "no text": lambda path: write(path, b"\x7fELF\x01" * 8),
    "three keys": lambda path: write(path, KEY, OTHER_KEY, KEY),
    "half a key": lambda path: write(path, "np1:AAAA"),
    "a megabyte": lambda path: write(path, b"a" * (1 << 20)),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
}
GOOD_FILES = [b"%b", b"\xef\xbb\xbf%b\n", b"# why\r\n\r\n  %b \r\n\r\n", b"%b\n\n\n"]


@pytest.mark.fault(70)
def test_a_bad_key_file_leaves_the_old_key_in_use_until_it_is_whole(kept, capsys):
    tunnel, relay, path = kept
    with standing(tunnel):
        for kind, spoil in BAD_FILES.items():
            write(path, KEY)
            spoil(path)
            says = since(tunnel.server)
            os.kill(tunnel.server.pid, signal.SIGHUP)
            says("ERROR .*tunnel key not reloaded, the old one stays in use")
            assert tunnel.served(1) == 1, kind
            assert cli.main([f"server://127.0.0.1:0/127.0.0.1:0?tls=1&tunnel-key-file={path}"]) == 2
            said = capsys.readouterr().err
            assert len(said.splitlines()) == 1 and said[:-1].isprintable() and "tunnel-key-file" in said, said
            path.rmdir() if path.is_dir() else None
        forget(tunnel.server, "tunnel key not reloaded|configuration refused")
        for text in GOOD_FILES:
            write(path, text % KEY.encode())
            says = since(tunnel.server)
            os.kill(tunnel.server.pid, signal.SIGHUP)
            says("tunnel key: 1 read from")
        relay.cut()
        tunnel.recovers(SLACK * 5)


RAISING = ",".join(
    f"nodepass_gevent.{where}@1"
    for where in ("authentication:verify", "authentication:prove", "authentication:prove_data", "tunnel_key:same")
)


@pytest.mark.fault(79)
def test_the_key_is_in_no_log_no_traceback_and_no_command_line(kept, target):
    env = {"TUNNEL_KEY": KEY, "FAULT_RAISE": RAISING}
    tunnel = Tunnel(target.address, 1, "log=debug", env)
    try:
        tunnel.start()
        lines = [line for process in (*tunnel.processes, *kept[0].processes) for line in process.lines]
        assert sum("injected" in line for line in lines) >= 3, "tracebacks of code that holds the key"
        seen = [*lines, run("ps", "-eww", "-o", "args")]
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                seen.append(path.read_bytes().decode(errors="replace"))
        assert not [text for text in seen for shown in SHOWN if shown in text]
    finally:
        tunnel.stop()
