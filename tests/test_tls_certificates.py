"""Certificates: what is made, read and reloaded by a server, and what a client verifies in mode 2."""

import datetime
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gevent
import pytest
import trustme
from authority import Issued
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa, x25519
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from OpenSSL import crypto
from secure import client_context, stream_pair
from support import bounded, out_of_descriptors

from nodepass_gevent import tls, tls_context
from nodepass_gevent.certificates import load_certificate, make_certificate
from nodepass_gevent.config import Address, Config
from nodepass_gevent.errors import ConfigError, PolicyError
from nodepass_gevent.tls_context import SELF_SIGNED, VERIFIED, ClientPolicy, ServerCertificate, check_files

NOW = datetime.datetime.now(datetime.timezone.utc)
DAY = datetime.timedelta(days=1)


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


def write(issued, folder):
    """Write a certificate with its chain, and its key; give the paths."""
    crt, key = folder / "crt.pem", folder / "key.pem"
    crt.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    key.write_bytes(issued.private_key_pem.bytes())
    return str(crt), str(key)


@pytest.fixture
def files(authority, tmp_path):
    return write(authority.issue_cert("localhost"), tmp_path)


@pytest.fixture
def trusted(authority, tmp_path, monkeypatch):
    """Make the authority one of the system's, as an operator does."""
    path = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(path)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))


@pytest.fixture
def dial(no_leaks):
    """Make the client's handshake with a server; give its transport."""
    opened = []

    def shake(server, host, mode=VERIFIED, version="1.3"):
        near, far = stream_pair()
        opened.extend((near, far))
        accepting = gevent.spawn(swallow, tls.accept, near, server.contexts[b""])
        with bounded():
            try:
                return tls.dial(far, client_context(version, mode, host))
            finally:
                far.reset() if accepting.ready() else None
                accepting.kill()

    yield shake
    for stream in opened:
        stream.close()


def swallow(function, *arguments):
    try:
        return function(*arguments)
    except OSError as exc:
        return exc


def test_the_made_certificate_is_self_signed_p256_and_valid_for_a_year():
    made = make_certificate()
    (certificate,) = made.chain
    assert isinstance(certificate.public_key().curve, ec.SECP256R1)
    assert certificate.issuer == certificate.subject
    certificate.verify_directly_issued_by(certificate)
    assert certificate.not_valid_before_utc < NOW < certificate.not_valid_after_utc
    assert 364 * DAY < made.expires - NOW < 366 * DAY


def test_two_made_certificates_differ():
    assert make_certificate().fingerprint != make_certificate().fingerprint


def test_the_fingerprint_is_the_one_that_openssl_shows():
    made = make_certificate()
    assert made.fingerprint == crypto.X509.from_cryptography(made.chain[0]).digest("sha256").decode()


def test_the_fingerprint_and_the_end_of_validity_are_logged(caplog):
    caplog.set_level(logging.INFO, "nodepass_gevent")
    certificate = ServerCertificate(None, None).certificate
    assert certificate.fingerprint in caplog.text
    assert str(certificate.expires.date()) in caplog.text


def test_a_certificate_is_read_with_its_chain_and_key(authority, tmp_path):
    issued = authority.create_child_ca().issue_cert("localhost")
    loaded = load_certificate(*write(issued, tmp_path))
    assert len(loaded.chain) == 2
    assert loaded.chain[0].public_key() == loaded.key.public_key()


@pytest.mark.parametrize("broken", ["crt", "key"])
def test_a_missing_file_is_named(files, broken):
    path = dict(zip(("crt", "key"), files, strict=True))[broken]
    os.unlink(path)
    with pytest.raises(ConfigError, match=f"cannot read '{path}': no such file"):
        load_certificate(*files)


@pytest.mark.parametrize("broken", ["crt", "key"])
def test_what_is_no_file_is_refused_and_waited_for_by_nobody(files, broken):
    path = dict(zip(("crt", "key"), files, strict=True))[broken]
    os.unlink(path)
    os.mkfifo(path)
    with subprocess.Popen(["sh", "-c", 'sleep 3; exec timeout 3 sh -c ": > $0" "$0"', path]) as writer:  # ends a wait
        with pytest.raises(ConfigError, match=f"^{broken}: '{path}' is not a regular file$"):
            load_certificate(*files)
        waited = writer.poll() is not None
        writer.kill()
    assert not waited


@pytest.mark.parametrize("content", [b"", b"\xff\x00garbage", b"-----BEGIN CERTIFICATE-----\nAAAA\n"])
@pytest.mark.parametrize("broken", ["crt", "key"])
def test_a_file_without_pem_is_named(files, broken, content):
    path = dict(zip(("crt", "key"), files, strict=True))[broken]
    with open(path, "wb") as file:
        file.write(content)
    with pytest.raises(ConfigError, match=f"^{broken}: '{path}' is not a .* in PEM form$"):
        load_certificate(*files)


@pytest.mark.parametrize("form", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
def test_swapped_files_are_an_error_that_asks_whether_they_are(files, authority, form):
    crt, key = files
    private = make_certificate().key
    with open(key, "wb") as file:
        file.write(private.private_bytes(Encoding.PEM, form, NoEncryption()))
    swapped = "are crt and key swapped[?]$"
    with pytest.raises(ConfigError, match=f"^crt: '{key}' holds a private key, and no certificate: {swapped}"):
        load_certificate(key, crt)
    with pytest.raises(ConfigError, match=f"^key: '{crt}' holds a certificate, and no private key: {swapped}"):
        load_certificate(crt, crt)
    assert check(ca=key) == f"ca: '{key}' holds a private key, and no certificate"


@pytest.mark.parametrize("broken", ["crt", "key"])
def test_a_file_of_both_of_which_one_is_broken_is_not_taken_for_swapped(files, broken):
    crt, key = (Path(path).read_bytes() for path in files)
    good, bad = (key, crt) if broken == "crt" else (crt, key)
    path = dict(zip(("crt", "key"), files, strict=True))[broken]
    head, middle, tail = bad.split(b"\n", 2)
    Path(path).write_bytes(good + b"\n".join([head, b"AAAA" + middle, tail]))
    with pytest.raises(ConfigError, match=f"^{broken}: '{path}' is not a .* in PEM form$"):
        load_certificate(*files)


LEVEL_2 = """\
openssl_conf = all
[all]
ssl_conf = tls
[tls]
system_default = level
[level]
CipherString = DEFAULT@SECLEVEL=2
"""


def test_a_key_that_is_too_short_for_tls_is_named(tmp_path):
    key = rsa.generate_private_key(65537, 1024)
    subject = make_certificate().chain[0].subject
    short = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(NOW)
        .not_valid_after(NOW + DAY)
        .sign(key, hashes.SHA256())
    )
    files = Issued((short,), key).write(tmp_path)
    (tmp_path / "openssl.cnf").write_text(LEVEL_2)  # as it comes, whatever is configured here
    code = f"from test_tls_certificates import check; print(check(**{files}))"
    run = subprocess.run(
        [sys.executable, "-c", f"from gevent import monkey; monkey.patch_all(); {code}"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OPENSSL_CONF": str(tmp_path / "openssl.cnf")},
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    why = "its key is too short; RSA wants 2048 bits at least"
    assert run.stdout.strip() == f"crt: '{files['crt']}' cannot be used for TLS: {why}"


def test_a_key_that_does_not_fit_is_named(files, authority, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    _, other = write(authority.issue_cert("localhost"), folder)
    with pytest.raises(ConfigError, match=f"^key: '{other}' does not fit the certificate '{files[0]}'$"):
        load_certificate(files[0], other)


def test_a_key_behind_a_passphrase_is_an_error_that_says_so(files):
    form = PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
    with open(files[1], "wb") as file:
        file.write(make_certificate().key.private_bytes(Encoding.PEM, *form))
    with pytest.raises(ConfigError, match="protected by a passphrase") as caught:
        load_certificate(*files)
    assert "secret" not in str(caught.value)


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("version", ["1.2", "1.3"])
@pytest.mark.parametrize(
    ("identity", "host"),
    [
        ("localhost", "localhost"),
        ("localhost", "LocalHost."),
        ("*.example.org", "a.example.org"),
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
    ],
)
def test_a_certificate_of_a_known_authority_for_the_right_name_is_taken(
    authority, dial, tmp_path, identity, host, version
):
    server = ServerCertificate(*write(authority.issue_cert(identity), tmp_path))
    assert dial(server, host, version=version)


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize(
    ("identity", "host"),
    [
        ("localhost", "example.org"),
        ("*.example.org", "a.b.example.org"),
        ("*.example.org", "example.org"),
        ("127.0.0.1", "127.0.0.2"),
        ("127.0.0.1", "localhost"),
        ("localhost", "127.0.0.1"),
    ],
)
def test_a_certificate_for_another_name_is_refused(authority, dial, tmp_path, identity, host):
    server = ServerCertificate(*write(authority.issue_cert(identity), tmp_path))
    with pytest.raises(
        PolicyError,
        match=rf"^certificate of {host} refused by tls=2: it is for .*, and not for {host} \(fingerprint [0-9A-F:]+\)$",
    ):
        dial(server, host)


@pytest.mark.usefixtures("trusted")
def test_a_common_name_alone_is_no_name(authority, dial, tmp_path):
    server = ServerCertificate(*write(authority.issue_cert(common_name="localhost"), tmp_path))
    with pytest.raises(PolicyError, match="names no host"):
        dial(server, "localhost")


@pytest.mark.usefixtures("trusted")
def test_an_unknown_authority_is_refused(dial, tmp_path):
    server = ServerCertificate(*write(trustme.CA().issue_cert("localhost"), tmp_path))
    with pytest.raises(PolicyError, match="localhost refused by tls=2: no authority known here has issued it"):
        dial(server, "localhost")


@pytest.mark.usefixtures("trusted")
def test_a_self_signed_certificate_is_refused(dial):
    with pytest.raises(
        PolicyError, match=r"by tls=2: it is self-signed, and not known here; a copy of it as ca makes it known [(]fin"
    ):
        dial(ServerCertificate(None, None), "localhost")


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize(
    ("validity", "why"),
    [
        ({"not_before": NOW - 2 * DAY, "not_after": NOW - DAY}, f"has expired on {(NOW - DAY).date()}"),
        ({"not_before": NOW + DAY, "not_after": NOW + 2 * DAY}, f"is not yet valid: it begins on {(NOW + DAY).date()}"),
    ],
)
def test_a_certificate_out_of_its_time_is_refused_with_the_reason(authority, dial, tmp_path, validity, why):
    server = ServerCertificate(*write(authority.issue_cert("localhost", **validity), tmp_path))
    with pytest.raises(PolicyError, match=f"^certificate of localhost refused by tls=2: it {why}"):
        dial(server, "localhost")


@pytest.mark.usefixtures("trusted")
def test_a_chain_is_presented_whole(authority, dial, tmp_path):
    server = ServerCertificate(*write(authority.create_child_ca().issue_cert("localhost"), tmp_path))
    assert dial(server, "localhost")


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("names", [700, 2400])  # more than one record, and more than one batch of them
def test_a_certificate_of_many_names_is_presented_whole(authority, dial, tmp_path, names):
    others = [f"host-{number:04}.a-domain.example" for number in range(names)]
    server = ServerCertificate(*write(authority.issue_cert("localhost", *others), tmp_path))
    assert dial(server, "localhost")


@pytest.mark.usefixtures("trusted")
def test_a_chain_without_its_middle_is_refused(authority, dial, tmp_path):
    crt, key = write(authority.create_child_ca().issue_cert("localhost"), tmp_path)
    with open(crt, "r+b") as file:
        leaf, end, _ = file.read().partition(b"-----END CERTIFICATE-----\n")
        file.truncate(len(leaf + end))
    with pytest.raises(PolicyError, match="no authority known here has issued it, or a certificate between is missing"):
        dial(ServerCertificate(crt, key), "localhost")


def test_the_directory_of_authorities_is_honoured(authority, dial, files, tmp_path, monkeypatch):
    known = tmp_path / "authorities"
    known.mkdir()
    monkeypatch.setenv("SSL_CERT_DIR", str(known))
    server = ServerCertificate(*files)
    with pytest.raises(PolicyError):
        dial(server, "localhost")
    pem = authority.cert_pem.bytes()
    name = crypto.load_certificate(crypto.FILETYPE_PEM, pem).subject_name_hash()
    (known / f"{name:08x}.0").write_bytes(pem)
    assert dial(server, "localhost")


def test_without_the_settings_a_private_authority_is_unknown(dial, files):
    with pytest.raises(PolicyError, match="no authority known here has issued it, or a certificate between is missing"):
        dial(ServerCertificate(*files), "localhost")


def test_mode_1_takes_any_certificate(dial):
    assert dial(ServerCertificate(None, None), "example.org", mode=SELF_SIGNED)


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, "nodepass_gevent")
    return caplog


def presented_to(transport):
    return transport._connection.get_peer_certificate(as_cryptography=True)


@pytest.mark.usefixtures("trusted")
def test_changed_files_are_presented_after_a_reload(authority, dial, files, tmp_path, log):
    server = ServerCertificate(*files)
    old = server.certificate
    write(authority.issue_cert("localhost"), tmp_path)
    server.reload()
    assert server.certificate != old
    assert server.certificate.fingerprint in log.text
    assert presented_to(dial(server, "localhost")) == server.certificate.chain[0]


def test_unchanged_files_are_not_read_again(files, log):
    server = ServerCertificate(*files)
    before = server.contexts[b""]
    log.clear()
    server.reload()
    assert server.contexts[b""] is before
    assert not log.records


def test_files_whose_permissions_were_changed_are_read_again(files):
    server = ServerCertificate(*files)
    before = server.contexts[b""]
    os.chmod(files[1], 0o400)
    server.reload()
    assert server.contexts[b""] is not before


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("bad", [b"", b"half a certificate", None])
def test_a_bad_new_file_keeps_the_old_one_and_says_so_once(dial, files, log, bad):
    server = ServerCertificate(*files)
    old = server.certificate
    if bad is None:
        os.unlink(files[0])
    else:
        with open(files[0], "wb") as file:
            file.write(bad)
    for _ in range(2):
        server.reload()
    assert server.certificate is old
    (error,) = [record for record in log.records if record.levelno == logging.ERROR]
    assert "the old one stays in use" in error.getMessage() and files[0] in error.getMessage()
    assert dial(server, "localhost")


def test_files_that_are_replaced_one_after_the_other_are_taken_when_both_are_there(authority, files, tmp_path, log):
    folder = tmp_path / "new"
    folder.mkdir()
    new = write(authority.issue_cert("localhost"), folder)
    server = ServerCertificate(*files)
    old = server.certificate
    shutil.move(new[0], files[0])
    server.reload()
    assert server.certificate is old
    shutil.move(new[1], files[1])
    server.reload()
    assert server.certificate != old


def test_a_made_certificate_outlives_a_reload():
    server = ServerCertificate(None, None)
    old = server.certificate
    server.reload()
    assert server.certificate is old


@pytest.mark.parametrize("make", [ServerCertificate, lambda crt, key: ClientPolicy("h", crt=crt, key=key)])
def test_that_the_end_of_a_certificate_has_come_near_is_a_warning_once_though_no_file_changed(
    make, authority, tmp_path, log, monkeypatch
):
    side = make(*write(authority.issue_cert("localhost", not_after=NOW + 20 * DAY), tmp_path))
    monkeypatch.setattr(tls_context, "EXPIRY_WARNING_DAYS", 30)  # it is later, as it were
    os.unlink(tmp_path / "key.pem")
    for _ in range(2):
        side.reload()
    told = [(record.levelname, record.getMessage().rpartition(", ")[2]) for record in log.records]
    words = f"valid until {(NOW + 20 * DAY).date()}"
    assert [each for each in told if each[1].startswith("valid")] == [("INFO", words), ("WARNING", words)]


def test_a_reload_leaves_connections_as_they_are(authority, dial, files, tmp_path):
    server = ServerCertificate(*files)
    transport = dial(server, "localhost", mode=SELF_SIGNED)
    write(authority.issue_cert("localhost"), tmp_path)
    server.reload()
    transport.sendall(b"x")
    assert presented_to(transport) != server.certificate.chain[0]


def test_files_for_which_there_is_no_descriptor_are_read_the_next_time(authority, files, tmp_path, log):
    server = ServerCertificate(*files)
    old = server.certificate
    write(authority.issue_cert("localhost"), tmp_path)
    with out_of_descriptors():
        server.reload()
    assert server.certificate is old and "too many open files" in log.text
    server.reload()
    assert server.certificate != old


def test_a_bad_certificate_at_the_start_is_an_error(files):
    os.unlink(files[1])
    with pytest.raises(ConfigError):
        ServerCertificate(*files)


# Before anything runs


def check(**settings):
    config = Config(role="client", tunnel=Address("h", 1), target=Address("h", 2), **settings)
    try:
        return check_files(config)
    except ConfigError as exc:
        assert str(exc).isprintable()
        return str(exc)


def test_files_that_can_be_used_pass_and_nothing_is_logged(authority, files, tmp_path, log):
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    assert check(crt=files[0], key=files[1], ca=str(tmp_path / "ca.pem")) is None
    assert check() is None
    assert not log.records


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "cannot read '{}': no such file or directory"),
        (b"", "'{}' is not a certificate in PEM form"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "'{}' is not a certificate in PEM form"),
        (bytes(1 << 20) + b"x", "'{}' is larger than 1048576 bytes"),
    ],
)
def test_a_file_of_authorities_that_cannot_be_used_is_named(tmp_path, content, why):
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    assert check(ca=str(path)) == "ca: " + why.format(path)


def test_a_key_that_signs_nothing_is_named(authority, tmp_path):
    key = x25519.X25519PrivateKey.generate()
    leaf = make_certificate()
    odd = (
        x509.CertificateBuilder()
        .subject_name(leaf.chain[0].subject)
        .issuer_name(leaf.chain[0].subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(NOW)
        .not_valid_after(NOW + DAY)
        .sign(leaf.key, hashes.SHA256())
    )
    crt, path = tmp_path / "crt.pem", tmp_path / "key.pem"
    crt.write_bytes(odd.public_bytes(Encoding.PEM))
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    assert check(crt=str(crt), key=str(path)).startswith(f"crt: '{crt}' cannot be used for TLS: ")
