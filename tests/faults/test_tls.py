"""Faults of certificates and of TLS itself: wrong ones, files that change while they are in use, key updates."""

import contextlib
import datetime
import itertools
import os
import shutil
import signal
import subprocess

import pytest
import trustme
from integration.harness import certificates

from .harness import Tunnel, complaints, need
from .peers import dial, read_exactly, read_line

DAY = datetime.timedelta(days=1)


def issued(path, authority=None, names=("localhost",), **validity):
    """Write a certificate and its key; give the query that has a server use them."""
    made = (authority or trustme.CA()).issue_cert(*names, **validity)
    made.private_key_pem.write_to_path(path / "key.pem")
    made.cert_chain_pems[0].write_to_path(path / "crt.pem")
    return f"crt={path}/crt.pem&key={path}/key.pem"


def wrong_certificate(kind, path, authority):
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "expired": lambda: issued(path, authority, not_before=now - 9 * DAY, not_after=now - DAY),
        "not yet valid": lambda: issued(path, authority, not_before=now + DAY, not_after=now + 9 * DAY),
        "another name": lambda: issued(path, authority, names=("other.example",)),
        "unknown authority": lambda: issued(path),
    }[kind]()


REASONS = {
    "expired": "expired",
    "not yet valid": "not yet valid",
    "another name": "it is for .*other.example",
    "unknown authority": ".*(issue|authorit).*",
}


@pytest.mark.fault(68)
@pytest.mark.parametrize("protocol", ["auto", "1"])
@pytest.mark.parametrize("kind", REASONS)
def test_a_client_refuses_a_wrong_certificate_with_its_reason_and_takes_nothing_less(tmp_path, kind, protocol):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    tunnel = Tunnel("127.0.0.1:1", tls=1, env={"SSL_CERT_FILE": str(tmp_path / "ca.pem")}, limits={"pool_wait_s": 0.5})
    tunnel.query = f"protocol={protocol}"
    with contextlib.ExitStack() as stack:
        stack.callback(tunnel.stop)
        files = wrong_certificate(kind, tmp_path, authority)
        url = f"server://localhost:{tunnel.tunnel_port}/127.0.0.1:{tunnel.public_port}"
        tunnel.server = tunnel._start("server", url, f"tls=2&{files}", {}, ())
        tunnel.server.wait_for_line("listening")
        tunnel.client = tunnel._start("client", f"client://localhost:{tunnel.tunnel_port}/127.0.0.1:1", "tls=2", {}, ())
        tunnel.client.wait_for_line(rf"ERROR .*certificate .*refused.* ({REASONS[kind]})")
        with (
            dial(tunnel.public_port, timeout=10) as user,
            pytest.raises(ConnectionResetError),
        ):
            user.recv(1)


@pytest.mark.fault(69, 70)
def test_certificate_files_that_are_half_written_or_gone_leave_the_old_one_in_use(target, tmp_path):
    files = certificates()
    for name in ("crt", "key"):
        shutil.copy(getattr(files, name), tmp_path / name)
    paths = f"crt={tmp_path}/crt&key={tmp_path}/key"
    tunnel = Tunnel(target.address, tls=1)
    tunnel.start_server = lambda: start_with(tunnel, paths)
    whole = {name: (tmp_path / name).read_bytes() for name in ("crt", "key")}
    with tunnel:
        for name, content in itertools.product(whole, (b"part", b"", b"\x00\xff" * 100, None)):
            lines = len(tunnel.server.lines)
            (tmp_path / name).unlink()
            if content is not None:
                (tmp_path / name).write_bytes(whole[name][:100] if content == b"part" else content)
            os.kill(tunnel.server.pid, signal.SIGHUP)
            tunnel.server.wait_for_line("not reloaded, the old one stays in use", 10, lines)
            assert tunnel.served(5) == 5
            (tmp_path / name).write_bytes(whole[name] + b"\n\n")
        lines = len(tunnel.server.lines)
        issued(tmp_path)
        os.replace(tmp_path / "crt.pem", tmp_path / "crt")
        os.replace(tmp_path / "key.pem", tmp_path / "key")
        os.kill(tunnel.server.pid, signal.SIGHUP)
        tunnel.server.wait_for_line("INFO  certificate|WARN  certificate", 10, lines)
        assert tunnel.served(5) == 5
        assert not complaints(tunnel.client)


def start_with(tunnel, files):
    url = f"server://127.0.0.1:{tunnel.tunnel_port}/127.0.0.1:{tunnel.public_port}"
    tunnel.server = tunnel._start("server", url, f"tls=1&{files}", {}, ())


@pytest.mark.fault(71)
def test_key_updates_in_the_middle_of_an_exchange_disturb_nothing():
    need("openssl")
    tunnel = Tunnel("127.0.0.1:1", tls=1, query="protocol=1")
    with contextlib.ExitStack() as stack:
        stack.callback(tunnel.stop)
        tunnel.start_server()
        data_port = tunnel.server.wait_for_line(r"data port (\d+)")[1]
        control = stack.enter_context(dial(tunnel.tunnel_port))
        read_line(control)
        command = ["openssl", "s_client", "-connect", f"127.0.0.1:{data_port}"]
        peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        stack.callback(peer.wait)
        stack.callback(peer.kill)
        user = stack.enter_context(dial(tunnel.public_port))
        user.sendall(b"first\n")
        while not (line := read_line(control)).endswith(b"#1\n"):
            assert line
        seen, updates = b"", 0
        for number in range(5):
            for command in (b"k\n", b"K\n"):  # our keys; ours, and please yours
                peer.stdin.write(command)
                peer.stdin.flush()
                updates += 1
                while seen.count(b"KEYUPDATE") < updates:  # what comes in one read with a command is lost
                    seen += peer.stdout.read1(65536)
                word = b"word %d behind %b" % (number, command)
                user.sendall(word)
                while word not in seen:
                    seen += peer.stdout.read1(65536)
                peer.stdin.write(b"answer %d\n" % number)
                peer.stdin.flush()
                assert read_exactly(user, 9) == b"answer %d\n" % number
        peer.stdin.close()
        peer.stdout.close()
