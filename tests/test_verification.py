"""What each side demands of the other's certificate, right and wrong, on every kind of connection."""

import logging
import os
import re
import socket
import ssl
import warnings
from dataclasses import dataclass

import gevent
import pytest
from authority import ANY, CLIENT, DAYS, SERVER, Issued, make_authority, write_authorities
from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL, crypto
from secure import VERSIONS, stream_pair
from support import as_stream, bounded

from nodepass_gevent import opening, tls
from nodepass_gevent.certificates import Certificate, make_certificate
from nodepass_gevent.config import Pins
from nodepass_gevent.errors import CertificateRefused, PolicyError, RefusedByPeer
from nodepass_gevent.tls_context import ALPNS, SELF_SIGNED, VERIFIED, ClientContext, ClientPolicy, ServerCertificate
from nodepass_gevent.verification import name_problem, names_no_host

HOST = "tunnel.example"
every_kind = pytest.mark.parametrize("alpn", ALPNS, ids=["v1 data", "v2 control", "v2 data"])


@pytest.fixture(scope="module")
def authority():
    return make_authority()


@pytest.fixture(scope="module")
def other():
    return make_authority("another authority")


@dataclass
class Ends:
    """What came of a handshake on each side: a transport, or the error."""

    client: object
    server: object
    raw: object  # the server's Stream

    @property
    def works(self):
        if not isinstance(self.client, tls.TLSStream) or not isinstance(self.server, tls.TLSStream):
            return False
        self.server.sendall(b"x")
        return self.client.recv(10) == b"x"


@pytest.fixture
def shake(no_leaks):
    """Make both handshakes."""
    opened = []

    def make(server, policy, mode=VERIFIED, alpn=b"", version=None):
        near, far = stream_pair()
        opened.extend((near, far))
        how = policy.context(mode, alpn)
        if version:
            how.context.set_max_proto_version(VERSIONS[version])
        accepting = gevent.spawn(attempt, tls.accept, near, server.contexts[alpn], alpn)
        client = attempt(tls.dial, far, how)
        if isinstance(client, CertificateRefused):
            tls.tell(far, client, 0.01)
        return Ends(client, accepting.get(), near)

    with bounded(20):
        yield make
    for stream in opened:
        stream.close()


def attempt(function, *arguments):
    try:
        return function(*arguments)
    except (OSError, PolicyError) as exc:
        return exc


@pytest.fixture
def present(tmp_path):
    """Make what a server presents, from what was issued."""

    def make(issued, ca=None):
        return ServerCertificate(*issued.write(tmp_path / "server").values(), ca)

    return make


@pytest.fixture
def ca(authority, tmp_path):
    return write_authorities(tmp_path / "ca.pem", authority)


# The client's ca


@every_kind
def test_a_certificate_of_the_own_authority_is_accepted(shake, present, authority, ca, alpn):
    assert shake(present(authority.issue(HOST)), ClientPolicy(HOST, ca=ca), alpn=alpn).works


@every_kind
def test_a_certificate_of_another_authority_is_refused_by_ca(shake, present, other, ca, alpn):
    issued = other.issue(HOST)
    ends = shake(present(issued), ClientPolicy(HOST, ca=ca), alpn=alpn)
    text = str(ends.client)
    assert isinstance(ends.client, CertificateRefused)
    assert text.startswith(f"certificate of {HOST} refused by ca: no authority known here has issued it, or")
    assert text.endswith(f"(fingerprint {present(issued).certificate.fingerprint})")
    assert isinstance(ends.server, RefusedByPeer) and "of no authority that is known there" in str(ends.server)


def test_with_an_own_authority_the_systems_count_for_nothing(shake, present, other, ca, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", write_authorities(tmp_path / "system.pem", other))
    server = present(other.issue(HOST))
    assert shake(server, ClientPolicy(HOST)).works
    assert isinstance(shake(server, ClientPolicy(HOST, ca=ca)).client, PolicyError)


def test_several_authorities_may_stand_in_the_file(shake, present, authority, other, tmp_path):
    both = write_authorities(tmp_path / "both.pem", authority, other)
    for issuer in (authority, other):
        assert shake(present(issuer.issue(HOST)), ClientPolicy(HOST, ca=both)).works


def test_an_authority_that_is_no_root_is_enough(shake, present, authority, tmp_path):
    child = authority.child()
    policy = ClientPolicy(HOST, ca=write_authorities(tmp_path / "child.pem", child))
    assert shake(present(child.issue(HOST)), policy).works
    assert isinstance(shake(present(authority.issue(HOST)), policy).client, PolicyError)


def test_a_self_signed_certificate_is_its_own_authority(shake, tmp_path):
    made = Issued(make_certificate().chain, None)
    server = ServerCertificate(None, None)
    policy = ClientPolicy(HOST, ca=write_authorities(tmp_path / "own.pem", Issued(server.certificate.chain, None)))
    assert "names no host" in str(shake(server, policy).client)  # known, but a made one has no name
    policy = ClientPolicy(HOST, ca=write_authorities(tmp_path / "other.pem", made))
    assert "refused by ca: it is self-signed, and not known here (fingerprint" in str(shake(server, policy).client)


def test_a_chain_is_followed(shake, present, authority, ca):
    assert shake(present(authority.child().child("grandchild").issue(HOST)), ClientPolicy(HOST, ca=ca)).works


@pytest.mark.parametrize(
    ("issue", "why"),
    [
        (lambda root: root.issue(HOST, days=(-9, -2)), "it has expired on 20"),
        (lambda root: root.issue(HOST, days=(2, 9)), "it is not yet valid: it begins on 20"),
        (lambda root: root.issue(HOST, usage=(CLIENT,)), r"it is not made for this use \(extended key usage\)"),
        (lambda root: root.issue(HOST, usage=(ANY,)), r"it is not made for this use \(extended key usage\)"),
        (lambda root: root.child(days=(-9, -2)).issue(HOST), "certificate of an authority in its chain has expired on"),
        (
            lambda root: root.issue(common_name="x").issue(HOST),
            "certificate of an authority in its chain is not an authority's",
        ),
        (
            lambda root: root.child(path_length=0).child("b").issue(HOST),
            "its chain is longer than an authority in it allows",
        ),
        (lambda root: root.child().issue(HOST).alone, "or a certificate between is missing"),
    ],
)
def test_a_chain_that_is_wrong_is_refused_in_plain_words(shake, present, authority, ca, issue, why):
    refusal = shake(present(issue(authority)), ClientPolicy(HOST, ca=ca)).client
    with pytest.raises(CertificateRefused, match=f"^certificate of {HOST} refused by ca: .*{why}"):
        raise refusal


def test_a_chain_without_end_is_refused(shake, present, authority, ca):
    issuer = authority
    for number in range(12):
        issuer = issuer.child(f"child {number}")
    assert "refused by ca" in str(shake(present(issuer.issue(HOST)), ClientPolicy(HOST, ca=ca)).client)


def test_an_expired_authority_is_refused_and_warned_about(shake, present, tmp_path, caplog):
    old, young = make_authority(days=(-9, -2)), make_authority("young")
    path = write_authorities(tmp_path / "old.pem", old, young)
    policy = ClientPolicy(HOST, ca=path)
    assert f"ca: 1 of 2 in '{path}' expired, the last on 20" in caplog.text
    assert "has expired" in str(shake(present(old.issue(HOST)), policy).client)
    assert shake(present(young.issue(HOST)), policy).works


# The expected name


@every_kind
@pytest.mark.parametrize(
    ("name", "asked"), [(HOST, HOST), ("a.example.", "a.example"), ("192.0.2.1", None), ("::1", None)]
)
def test_the_name_of_sni_is_asked_for_and_expected_instead_of_the_hosts(
    shake, present, authority, ca, name, asked, alpn
):
    server = present(authority.issue(name.removesuffix(".")))
    ends = shake(server, ClientPolicy("127.0.0.1", sni=name, ca=ca), alpn=alpn)
    assert ends.works
    assert ends.server._connection.get_servername() == (asked and asked.encode())


@every_kind
@pytest.mark.parametrize("expected", ["b.example", "192.0.2.2", "::2"])
def test_another_name_is_refused_by_sni(shake, present, authority, ca, expected, alpn):
    server = present(authority.issue(HOST, "192.0.2.1", "::1", "x.example", "y.example", common_name="b.example"))
    ends = shake(server, ClientPolicy(HOST, sni=expected, ca=ca), alpn=alpn)
    assert isinstance(ends.client, CertificateRefused)
    names = f"{HOST}, x.example, y.example and 2 more"
    assert f"certificate of {HOST} refused by sni: it is for {names}, and not for {expected} (fin" in str(ends.client)
    assert isinstance(ends.server, ConnectionError) and "where a pin or a name is not that of" in str(ends.server)


def test_without_sni_the_host_is_expected_and_a_common_name_is_none(shake, present, authority, ca):
    assert "refused by tls=2: it is for a.example, and not" in str(
        shake(present(authority.issue("a.example")), ClientPolicy(HOST, ca=ca)).client
    )
    assert "refused by tls=2: it names no host" in str(
        shake(present(authority.issue(common_name=HOST)), ClientPolicy(HOST, ca=ca)).client
    )


def test_a_certificate_whose_names_are_no_hosts_names_none(authority):
    certificate = authority.issue("https://h.example/").chain[0]
    assert name_problem(certificate, HOST) == "it names no host (no subjectAltName)"
    assert name_problem(certificate, "192.0.2.1") == "it names no host (no subjectAltName)"
    assert names_no_host(certificate)


def test_the_names_of_a_certificate_are_escaped(shake, present, authority, ca):
    ends = shake(present(authority.issue("a\x1b[31m\nb.example")), ClientPolicy(HOST, ca=ca))
    assert isinstance(ends.client, PolicyError) and str(ends.client).isprintable()


def test_the_zone_of_an_address_stands_in_no_certificate(shake, present, authority, ca):
    assert shake(present(authority.issue("fe80::1")), ClientPolicy("fe80::1%eth0", ca=ca)).works


# Pins


@every_kind
def test_a_pinned_key_is_accepted_with_a_self_signed_certificate(shake, alpn):
    server = ServerCertificate(None, None)
    pin = Pins((bytes(32), server.certificate.key_digest))
    assert shake(server, ClientPolicy(HOST, pin=pin), SELF_SIGNED, alpn).works


@every_kind
def test_another_key_is_refused_by_pin_and_both_are_named(shake, alpn):
    server = ServerCertificate(None, None)
    expected = Pins((bytes(32), b"\x01" * 32))
    ends = shake(server, ClientPolicy(HOST, pin=expected), SELF_SIGNED, alpn)
    assert isinstance(ends.client, CertificateRefused)
    came = Pins((server.certificate.key_digest,))
    assert str(ends.client) == (
        f"certificate of {HOST} refused by pin: its key is {came}, expected sha256:{'00' * 32} or sha256:{'01' * 32}"
        f" (fingerprint {server.certificate.fingerprint})"
    )
    assert isinstance(ends.server, RefusedByPeer) and "or of another key than is pinned there" in str(ends.server)


def test_a_pin_that_is_the_certificates_fingerprint_is_recognised(shake):
    server = ServerCertificate(None, None)
    pin = Pins.parse(server.certificate.fingerprint)
    text = str(shake(server, ClientPolicy(HOST, pin=pin), SELF_SIGNED).client)
    assert "; what is expected is the fingerprint of the certificate, and not of its key" in text


def test_a_pin_holds_for_the_key_whatever_the_certificate(shake, present, authority):
    issued = authority.issue("x.example", days=(-9, -2), usage=(CLIENT,))
    assert shake(present(issued), ClientPolicy(HOST, pin=issued.pin), SELF_SIGNED).works


def test_in_mode_2_a_pin_and_the_chain_are_both_demanded(shake, present, authority, other, ca):
    right, foreign = authority.issue(HOST), other.issue(HOST)
    assert shake(present(right), ClientPolicy(HOST, ca=ca, pin=right.pin)).works
    assert "refused by pin" in str(shake(present(right), ClientPolicy(HOST, ca=ca, pin=foreign.pin)).client)
    assert "refused by ca" in str(shake(present(foreign), ClientPolicy(HOST, ca=ca, pin=foreign.pin)).client)


def test_a_pin_of_the_issuers_key_is_none_of_the_servers(shake, present, authority):
    child = authority.child()
    assert "refused by pin" in str(
        shake(present(child.issue(HOST)), ClientPolicy(HOST, pin=child.pin), SELF_SIGNED).client
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_demanded_holds_in_old_tls_too(shake, present, authority, other, ca, version):
    issued = authority.issue(HOST)
    assert shake(present(issued), ClientPolicy(HOST, ca=ca, pin=issued.pin), version=version).works
    for policy, mode in (
        (ClientPolicy(HOST, pin=Pins((bytes(32),))), SELF_SIGNED),
        (ClientPolicy("x.example", ca=ca), VERIFIED),
    ):
        assert isinstance(shake(present(issued), policy, mode, version=version).client, PolicyError)


# Certificates of clients


@pytest.fixture
def demanding(present, authority, ca):
    return present(authority.issue(HOST), ca)


def own(issued, tmp_path, **more):
    return ClientPolicy(HOST, **issued.write(tmp_path / "client"), **more)


@every_kind
@pytest.mark.parametrize("version", VERSIONS)
def test_a_client_with_a_certificate_of_the_authority_is_accepted(shake, demanding, authority, tmp_path, alpn, version):
    if version == "1.2" and alpn:
        pytest.skip("v2 has TLS 1.3 alone")
    for issuer in (authority, authority.child()):
        policy = own(issuer.issue(usage=(CLIENT,)), tmp_path)
        assert shake(demanding, policy, SELF_SIGNED, alpn, version).works


@every_kind
def test_a_client_without_a_certificate_is_refused_and_told(shake, demanding, alpn):
    ends = shake(demanding, ClientPolicy(HOST), SELF_SIGNED, alpn)
    assert isinstance(ends.server, CertificateRefused)
    assert str(ends.server) == "it has no certificate, and ca demands one"
    ends.raw.sendall(ends.server.alert)
    with pytest.raises(RefusedByPeer, match=r"^the peer demands a certificate of this side: set crt and key$"):
        ends.client.recv(10)


@every_kind
@pytest.mark.parametrize(
    ("how", "why", "told"),
    [
        ({"days": (-9, -2)}, "it has expired on 20", "of this side: it has expired, or is not yet"),
        ({"days": (2, 9)}, "it is not yet valid", "the peer refuses the certificate of this side: it "),
        (
            {"usage": (SERVER,)},
            "it is not made for this use (extended key usage)",
            "of this side: it is not made for this use",
        ),
        ({}, "no authority known here has issued it", "of no authority that is known there"),
    ],
)
def test_a_client_with_a_wrong_certificate_is_refused_and_told(
    shake, demanding, authority, other, tmp_path, how, why, told, alpn
):
    policy = own((authority if how else other).issue(**how), tmp_path)
    ends = shake(demanding, policy, SELF_SIGNED, alpn)
    assert isinstance(ends.server, CertificateRefused)
    assert f"its certificate is refused by ca: {why}" in str(ends.server)
    assert "(fingerprint " in str(ends.server)
    ends.raw.sendall(ends.server.alert)
    with pytest.raises(RefusedByPeer, match=told):
        ends.client.recv(10)


class Malformed:
    """Presents a certificate that OpenSSL takes and that is malformed inside, on either side."""

    def __init__(self, part):
        issued = make_authority()
        der = issued.chain[0].public_bytes(Encoding.DER)
        good, bad = {
            "end": (der[der.rindex(b"\x17\r") :][:4], b"\x17\rxx"),  # not a number in UTCTime
            "version": (b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x1b"),
        }[part]
        assert der.count(good) >= 1
        at = der.rindex(good)
        certificate = crypto.load_certificate(crypto.FILETYPE_ASN1, der[:at] + bad + der[at + len(good) :])
        self._made = SSL.Context(SSL.TLS_METHOD)
        with warnings.catch_warnings():  # cryptography's own class would not take it
            warnings.simplefilter("ignore", DeprecationWarning)
            self._made.use_certificate(certificate)
        self._made.use_privatekey(issued.key)
        self.contexts = {b"": self._made}

    def context(self, mode, alpn):
        return ClientContext(self._made, alpn, b"", False)


def test_a_client_with_a_malformed_certificate_is_refused(shake, demanding):
    ends = shake(demanding, Malformed("end"), SELF_SIGNED)
    assert isinstance(ends.server, CertificateRefused) and "refused by ca: it cannot be read" in str(ends.server)


@pytest.mark.parametrize(("part", "mode"), [("end", VERIFIED), ("version", SELF_SIGNED)])
def test_a_server_with_a_malformed_certificate_is_refused(shake, ca, part, mode):
    policy = ClientPolicy(HOST, **({"ca": ca} if mode == VERIFIED else {"pin": Pins((bytes(32),))}))
    ends = shake(Malformed(part), policy, mode)
    assert isinstance(ends.client, PolicyError) and re.search(
        "refused by (ca|pin): it cannot be read", str(ends.client)
    )


def test_a_self_signed_client_is_refused(shake, demanding, tmp_path):
    ends = shake(demanding, own(make_authority("a client"), tmp_path), SELF_SIGNED)
    assert "refused by ca: it is self-signed, and not known here" in str(ends.server)


def test_the_systems_authorities_admit_no_client(shake, demanding, other, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", write_authorities(tmp_path / "system.pem", other))
    assert isinstance(shake(demanding, own(other.issue(), tmp_path), SELF_SIGNED).server, CertificateRefused)


def test_a_client_does_not_show_its_certificate_to_a_wrong_server(shake, demanding, authority, tmp_path):
    policy = own(authority.issue(), tmp_path, pin=Pins((bytes(32),)))
    ends = shake(demanding, policy, SELF_SIGNED)
    assert isinstance(ends.client, CertificateRefused)
    assert isinstance(ends.server, ConnectionError) and not isinstance(ends.server, CertificateRefused)


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_no_session_is_resumed(no_leaks, demanding, authority, tmp_path, version):
    """A resumed session would be one whose certificate nobody looks at."""
    files = authority.issue().write(tmp_path / "client")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    context.load_cert_chain(files["crt"], files["key"])

    def call(listener, session):
        with socket.create_connection(listener.getsockname()) as plain:
            with context.wrap_socket(plain, session=session) as secure:
                assert secure.recv(1) == b"x"
                assert not secure.session_reused
                return secure.session

    with bounded(20), socket.create_server(("127.0.0.1", 0)) as listener:
        session = None
        for _ in range(2):
            calling = gevent.spawn(call, listener, session)
            sock, address = listener.accept()
            with as_stream(sock, address) as stream:
                transport = tls.accept(stream, demanding.contexts[b""])
                assert transport._connection.get_peer_certificate()
                transport.sendall(b"x")
                session = calling.get()


# Files that change


def fingerprint_of(issued):
    return Certificate(issued.chain, issued.key).fingerprint


def test_replaced_authorities_hold_for_the_next_connection(shake, demanding, authority, other, ca, tmp_path, caplog):
    caplog.set_level(logging.INFO, "nodepass_gevent")
    old, new = own(authority.issue(), tmp_path / "a"), own(other.issue(), tmp_path / "b")
    before = shake(demanding, old, SELF_SIGNED)
    write_authorities(tmp_path / "ca.pem", other, other)
    demanding.reload()
    assert f"clients need a certificate of an authority in '{ca}'; certificates there: 2" in caplog.text
    assert isinstance(shake(demanding, old, SELF_SIGNED).server, CertificateRefused)
    assert shake(demanding, new, SELF_SIGNED).works
    assert before.works


def test_a_client_reads_its_files_again(shake, present, authority, other, ca, tmp_path, caplog):
    caplog.set_level(logging.INFO, "nodepass_gevent")
    policy = own(other.issue(), tmp_path, ca=ca)
    server = present(authority.issue(HOST), ca)
    assert isinstance(shake(server, policy).server, CertificateRefused)
    renewed = authority.issue()
    renewed.write(tmp_path / "client")
    policy.reload()
    assert (
        f"client certificate {ServerCertificate(*renewed.write(tmp_path / 'x').values()).certificate.fingerprint}"
        in (caplog.text)
    )
    assert shake(server, policy).works
    write_authorities(tmp_path / "ca.pem", other)
    policy.reload()
    assert "refused by ca" in str(shake(server, policy).client)


@pytest.mark.parametrize("bad", [b"", b"half a file", None])
@pytest.mark.parametrize("name", ["ca", "crt", "key"])
def test_what_is_bad_stays_as_it_was_and_is_said_once(shake, present, authority, ca, tmp_path, caplog, name, bad):
    settings = {**authority.issue(HOST).write(tmp_path / "own"), "ca": ca}
    policy, server = ClientPolicy(HOST, **settings), ServerCertificate(*settings.values())
    with open(settings[name], "wb") as file:
        file.write(bad or b"")
    if bad is None:
        (tmp_path / settings[name]).unlink()
    for _ in range(2):
        policy.reload()
        server.reload()
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2 and errors[0] == errors[1]
    assert errors[0].startswith(f"not reloaded, the old one stays in use: {name}: ") and settings[name] in errors[0]
    assert shake(server, policy).works


def test_the_pin_is_logged_beside_the_fingerprint(caplog):
    caplog.set_level(logging.INFO, "nodepass_gevent")
    certificate = ServerCertificate(None, None).certificate
    pin = Pins((certificate.key_digest,))
    assert f"certificate {certificate.fingerprint}, pin {pin}, valid until " in caplog.text


@pytest.mark.parametrize(
    ("days", "words"),
    [(DAYS, ""), ((-1, 3), ", valid until "), ((-3, -1), ", expired on "), ((5, 30), ", not valid before ")],
)
def test_a_certificate_that_expires_soon_has_expired_or_is_not_valid_yet_is_a_warning(
    authority, tmp_path, caplog, days, words
):
    own(authority.issue(days=days), tmp_path)
    assert bool(caplog.records) is bool(words) and words in caplog.text


def test_a_certificate_that_peers_will_refuse_is_warned_about_at_the_start_and_when_it_is_replaced(
    authority, tmp_path, caplog
):
    def said():
        texts = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        caplog.clear()
        return texts

    no_host = "crt: the certificate names no host (no subjectAltName): with tls=2 clients refuse it"
    files = authority.issue().write(tmp_path)
    ServerCertificate(*files.values(), mode=SELF_SIGNED)
    assert not said()
    server = ServerCertificate(*files.values(), mode=VERIFIED)
    assert said() == [no_host]
    authority.issue(HOST, usage=(CLIENT,)).write(tmp_path)
    server.reload()
    use = "(extended key usage)"
    assert said() == [f"crt: the certificate is made for clients only {use}: with tls=2 clients refuse it"]
    policy = own(authority.issue(), tmp_path)
    assert not said()
    own(authority.issue(usage=(SERVER,)), tmp_path)
    policy.reload()
    text = f"crt: the certificate is made for servers only {use}: a server with ca refuses it"
    assert said() == [text, text]


def test_a_private_key_that_others_can_read_is_warned_about_at_the_start_and_when_it_is_replaced(
    authority, tmp_path, caplog
):
    files = authority.issue(HOST).write(tmp_path)
    server, policy = ServerCertificate(*files.values()), ClientPolicy(HOST, **files)
    assert not caplog.records
    os.chmod(files["key"], 0o644)
    authority.issue(HOST).write(tmp_path)
    server.reload()
    policy.reload()
    ServerCertificate(*files.values())
    ClientPolicy(HOST, **files)
    text = f"key: {files['key']!r} has mode 0644: others may read it; chmod 600 keeps them out"
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("WARNING", text)] * 4


def test_profiles_of_one_policy_have_contexts_of_their_own():
    policy = ClientPolicy(HOST)
    assert policy.context(SELF_SIGNED, opening.ALPN_DATA) is policy.context(SELF_SIGNED, opening.ALPN_DATA)
    assert len({id(policy.context(SELF_SIGNED, alpn).context) for alpn in ALPNS}) == 3
