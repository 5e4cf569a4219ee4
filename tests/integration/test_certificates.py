"""Certificates of both sides between processes: a pin copied from the log, reloads by SIGHUP, refusals at the start."""

import os
import signal
import subprocess
import sys

import pytest
import trustme

from .harness import QUICK, ROOT, START_S, Target, free_port, nodepass_client, nodepass_server, wait_until
from .users import comes_back


def write(authority, folder, *names):
    """Write an authority and a certificate of its; give the paths of ca, crt and key."""
    folder.mkdir(exist_ok=True)
    issued = authority.issue_cert(*(names or ("client.example",)))
    paths = [str(folder / name) for name in ("ca.pem", "crt.pem", "key.pem")]
    authority.cert_pem.write_to_path(paths[0])
    issued.cert_chain_pems[0].write_to_path(paths[1])
    issued.private_key_pem.write_to_path(paths[2])
    return paths


def test_both_sides_are_known_by_certificates_that_are_replaced_while_the_tunnel_runs(tmp_path):
    old, new = trustme.CA(), trustme.CA()
    _, crt, key = write(old, tmp_path / "server", "server.example")
    ca, own_crt, own_key = write(old, tmp_path / "client")
    tunnel, public = f"127.0.0.1:{free_port()}", ("127.0.0.1", free_port("both"))
    query = f"tls=1&crt={crt}&key={key}&ca={ca}"
    with Target() as target, nodepass_server(tunnel, f"127.0.0.1:{public[1]}", query=query, env=QUICK) as server:
        pin = server.wait_for_line(r"certificate [0-9A-F:]{95}, pin (sha256:[0-9a-f]{64}), valid until")[1]
        server.wait_for_line("listening")
        with nodepass_client(tunnel, target.address, query=f"pin={pin}", env=QUICK) as nobody:
            nobody.wait_for_line(
                "ERROR .*the peer demands a certificate of this side: set crt and key; trying again every 0.3 s"
            )
        query = f"pin={pin}&crt={own_crt}&key={own_key}"
        with nodepass_client(tunnel, target.address, query=query, env=QUICK) as client:
            wait_until(lambda: comes_back(public), START_S, "traffic")
            write(new, tmp_path / "client")
            os.kill(server.pid, signal.SIGHUP)
            server.wait_for_line(
                "clients need a certificate of an authority in .*ca.pem.; certificates there: 1", start=3
            )
            os.kill(client.pid, signal.SIGHUP)
            client.wait_for_line("client certificate [0-9A-F:]{95}", start=3)
            wait_until(lambda: comes_back(public), START_S, "traffic with the new certificates")


@pytest.mark.parametrize(
    ("url", "why"),
    [
        (
            "client://127.0.0.1:1/127.0.0.1:2?ca=/nonexistent",
            "ca: cannot read '/nonexistent': no such file or directory",
        ),
        ("client://127.0.0.1:1/127.0.0.1:2?ca=setup.cfg", "ca: 'setup.cfg' is not a certificate in PEM form"),
        (
            "client://127.0.0.1:1/127.0.0.1:2?crt=setup.cfg&key=setup.cfg",
            "crt: 'setup.cfg' is not a certificate in PEM",
        ),
        ("server://127.0.0.1:1/127.0.0.1:2?tls=1&ca=setup.cfg", "ca: 'setup.cfg' is not a certificate in PEM form"),
        ("server://127.0.0.1:1/127.0.0.1:2?tls=1&ca=/dev/null", "ca: '/dev/null' is not a regular file"),
        ("server://127.0.0.1:1/127.0.0.1:2?ca=/dev/null", "ca: '/dev/null' demands certificates of clients, and needs"),
    ],
)
def test_a_file_that_cannot_be_used_ends_it_at_once_with_one_line_and_code_2(url, why):
    done = subprocess.run(
        [sys.executable, "-m", "nodepass_gevent", url], capture_output=True, text=True, timeout=START_S, cwd=ROOT
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"nodepass: error: {why}") and done.stderr.endswith("[from URL query]\n")
    assert done.stderr.count("\n") == 1


def test_the_pin_is_what_openssl_computes(tmp_path):
    _, crt, key = write(trustme.CA(), tmp_path / "server", "server.example")
    command = f"openssl x509 -in {crt} -noout -pubkey | openssl pkey -pubin -outform DER | openssl dgst -sha256 -r"
    digest = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout.split()[0]
    query = f"tls=1&crt={crt}&key={key}"
    with nodepass_server(f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port('both')}", query=query) as server:
        assert server.wait_for_line("pin sha256:([0-9a-f]{64}),")[1] == digest
