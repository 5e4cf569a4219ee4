"""TLSStream against Python's own ssl module, in an unpatched process at the other end."""

import contextlib
import hashlib
import socket
import subprocess
import sys

import gevent
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from secure import VERSIONS, client_context, presented
from support import as_stream

from nodepass_gevent import tls

DATA = bytes(range(256)) * 12_000  # about 3 MB

# Reads to the end of stream, then answers with the SHA-256 of what came, then with as many bytes, and ends.
PEER = """
import hashlib, socket, ssl, sys
side, version, port, crt = sys.argv[1:]
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if side == "server" else ssl.PROTOCOL_TLS_CLIENT)
context.minimum_version = context.maximum_version = getattr(ssl.TLSVersion, version)
if side == "server":
    context.load_cert_chain(crt)
else:
    context.check_hostname = False
    context.load_verify_locations(crt)
with socket.create_connection(("127.0.0.1", int(port)), 20) as plain:
    secure = context.wrap_socket(plain, server_side=side == "server", suppress_ragged_eofs=False)
    assert secure.version() == "TLSv" + version[-3:].replace("_", ".")
    read = b""
    while piece := secure.recv(100_000):
        read += piece
    secure.sendall(hashlib.sha256(read).digest())
    secure.sendall(read)
    secure.unwrap()
    print(len(read))
"""


@pytest.fixture
def pem(tmp_path):
    certificate = presented().certificate
    path = tmp_path / "both.pem"
    key = certificate.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(certificate.chain[0].public_bytes(Encoding.PEM) + key)
    return str(path)


@contextlib.contextmanager
def python_peer(side, version, pem):
    """Run the peer, which dials us; give our end of the connection as a Stream, and the process."""
    with socket.create_server(("127.0.0.1", 0)) as listener, gevent.Timeout(30):
        port = str(listener.getsockname()[1])
        argv = [sys.executable, "-c", PEER, side, "TLSv" + version.replace(".", "_"), port, pem]
        with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
            try:
                sock, address = listener.accept()
                with as_stream(sock, address) as stream:
                    yield stream, process
            finally:
                process.kill()


def ask(transport):
    """Send everything, end, and read what the peer answers to the end."""
    transport.sendall(DATA)
    transport.shutdown_write()
    answer = bytearray()
    while piece := transport.recv(65536):
        answer += piece
    return bytes(answer[:32]), bytes(answer[32:])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("theirs", ["client", "server"])
def test_python_reads_what_we_send_and_we_read_its_late_answer(no_leaks, pem, theirs, version):
    with python_peer(theirs, version, pem) as (stream, process):
        if theirs == "client":
            transport = tls.accept(stream, presented().contexts[b""])
        else:
            transport = tls.dial(stream, client_context(version))
        digest, data = ask(transport)
        assert (digest, data) == (hashlib.sha256(DATA).digest(), DATA)
        assert process.stdout.read() == b"%d\n" % len(DATA)
        assert process.wait() == 0


@pytest.mark.parametrize("version", VERSIONS)
def test_a_python_client_that_vanishes_is_a_cut(no_leaks, pem, version):
    with python_peer("client", version, pem) as (stream, process):
        transport = tls.accept(stream, presented().contexts[b""])
        transport.sendall(b"x")
        process.kill()
        with pytest.raises(ConnectionError):
            transport.recv(10)
