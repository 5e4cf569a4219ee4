"""Policies of both sides in a running tunnel: who is let in, what is said, and that nothing weaker is tried."""

import contextlib
import socket
import time

import gevent
import pytest
from authority import make_authority, write_authorities
from support import BOUND_S, LIMITS, as_stream, bounded, read_exactly, wait_until
from tunnel import HERE, quiet

from nodepass_gevent import opening, tls
from nodepass_gevent.client import Client
from nodepass_gevent.config import Address, Config, Limits, Pins
from nodepass_gevent.errors import ConnectError, PolicyError, ProtocolError, SessionLost
from nodepass_gevent.tls_context import ServerCertificate

NONCE = bytes(16)
SESSION = b"0123456789abcdef"
WRONG_PIN = Pins((bytes(32),))
profiles = pytest.mark.parametrize("profile", ["1", "auto"])


@pytest.fixture(scope="module")
def authority():
    return make_authority()


@pytest.fixture(scope="module")
def other():
    return make_authority("another authority")


@pytest.fixture
def ca(authority, tmp_path):
    return write_authorities(tmp_path / "ca.pem", authority)


@pytest.fixture
def target(no_leaks):
    """A service behind the client, which answers with what it was asked, backwards."""

    def answer(sock):
        with sock:
            sock.sendall(read_exactly(sock, 4)[::-1])

    def accept():
        while True:
            answering.append(gevent.spawn(answer, listener.accept()[0]))

    answering = []
    with socket.create_server((HERE, 0)) as listener:
        accepting = gevent.spawn(accept)
        yield Address(HERE, listener.getsockname()[1])
        gevent.killall([accepting, *answering])


@pytest.fixture
def join(no_leaks, target):
    """Run clients in greenlets that give what ended them."""
    running = []

    def start(port, **settings):
        defaults = {"tunnel": Address(HERE, port), "target": target, "min_pool_capacity": 2, "network": "tcp"}
        client = Client(Config(role="client", **{**defaults, **settings}))

        def run():
            try:
                client.run()
            except (OSError, ConnectError, PolicyError, ProtocolError, SessionLost) as exc:
                return exc

        running.append((client, gevent.spawn(run)))
        return running[-1][1]

    with bounded(30):
        yield start
    for client, greenlet in running:
        greenlet.kill()
        client.exchanges.kill()


def answered(running):
    with socket.create_connection((HERE, running.public), BOUND_S) as user:
        user.sendall(b"1234")
        return read_exactly(user, 4) == b"4321"


@profiles
@pytest.mark.parametrize("mode", [1, 2])
def test_users_are_served_where_every_demand_is_met(serve, join, authority, ca, tmp_path, profile, mode):
    issued = authority.issue(HERE, "tunnel.example")
    running = serve(tls=mode, **issued.write(tmp_path), ca=ca, protocol=profile)
    client = {**authority.issue().write(tmp_path, "client"), "pin": issued.pin}
    if mode == 2:
        client.update(tls=2, ca=ca, sni="tunnel.example")
    joined = join(running.tunnel, **client)
    assert answered(running) and answered(running)
    assert not joined.ready()


@profiles
@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"tls": 2}, f"certificate of {HERE} refused by tls=2: no authority known here has issued it"),
        ({"ca": "other"}, f"certificate of {HERE} refused by ca: no authority known here has issued it"),
        ({"ca": "ca", "sni": "x.example"}, f"certificate of {HERE} refused by sni: it is for {HERE}, and not for x.ex"),
        ({"pin": WRONG_PIN}, f"certificate of {HERE} refused by pin: its key is sha256:"),
        ({"pin": WRONG_PIN, "ca": "ca"}, f"certificate of {HERE} refused by pin: its key is sha256:"),
    ],
)
def test_a_server_that_a_client_does_not_accept_is_refused_in_either_profile(
    serve,
    said,
    join,
    authority,
    other,
    ca,
    tmp_path,
    profile,
    settings,
    why,
):
    files = {"ca": ca, "other": write_authorities(tmp_path / "other.pem", other)}
    settings = {name: files.get(value, value) if name == "ca" else value for name, value in settings.items()}
    mode = 1 if "pin" in settings and "ca" not in settings else 2
    running = serve(tls=mode, **authority.issue(HERE).write(tmp_path), protocol=profile)
    ended = join(running.tunnel, **settings).get()
    assert isinstance(ended, PolicyError) and str(ended).startswith(why)
    assert profile == "1" or not said.find("client .* connected")
    told = "the peer refuses the certificate of this side|where a pin or a name is not that of the certificate"
    wait_until(lambda: said.find(f"(refused caller|data connection) .*: .*({told})"))  # and is not only reset


@profiles
@pytest.mark.parametrize(
    ("issue", "why"),
    [
        (
            lambda root: make_authority(),
            "it is self-signed, and not known here; a copy of it as ca makes it known (fin",
        ),
        (lambda root: root.issue("x.example"), f"it is for x.example, and not for {HERE} (fingerprint "),
    ],
)
def test_a_client_with_a_pin_alone_is_told_that_the_server_asks_for_more(
    serve, join, authority, ca, tmp_path, monkeypatch, profile, issue, why
):
    monkeypatch.setenv("SSL_CERT_FILE", ca)
    issued = issue(authority)
    running = serve(tls=2, **issued.write(tmp_path), protocol=profile)
    ended = join(running.tunnel, pin=issued.pin).get()
    assert isinstance(ended, PolicyError)
    assert str(ended).startswith(f"certificate of {HERE} refused by tls=2, which the server asks for: {why}")


@pytest.mark.parametrize(
    ("offered", "settings", "why"),
    [
        (0, {"tls": 1}, "the server offers tls 0, and tls=1 accepts no less than 1"),
        (1, {"tls": 2}, "the server offers tls 1, and tls=2 accepts no less than 2"),
        (0, {"pin": WRONG_PIN}, "the server offers tls 0, and pin accepts no less than 1"),
        (1, {"sni": "x.example"}, "the server offers tls 1, and sni accepts no less than 2"),
        (1, {"ca": "ca"}, "the server offers tls 1, and ca accepts no less than 2"),
        (0, {"crt": "crt"}, "the server offers tls 0, and crt accepts no less than 1"),
    ],
)
@profiles
def test_a_server_that_offers_less_is_refused_by_the_setting_that_demands_more(
    serve,
    join,
    authority,
    ca,
    tmp_path,
    profile,
    offered,
    settings,
    why,
):
    if "ca" in settings:
        settings = {"ca": ca}
    if "crt" in settings:
        settings = authority.issue().write(tmp_path)
    ended = join(serve(tls=offered, protocol=profile).tunnel, **settings).get()
    assert isinstance(ended, PolicyError) and str(ended) == why


@profiles
@pytest.mark.parametrize("who", ["nobody", "stranger", "expired"])
def test_a_client_that_a_server_does_not_accept_is_refused_and_told(
    serve,
    said,
    join,
    authority,
    other,
    ca,
    tmp_path,
    profile,
    who,
):
    running = serve(tls=1, ca=ca, protocol=profile, tls_handshake_timeout_s=0.2)
    issued = {"nobody": None, "stranger": other.issue(), "expired": authority.issue(days=(-9, -2))}[who]
    settings = issued.write(tmp_path) if issued else {}
    ended = join(running.tunnel, **settings).get()
    assert isinstance(ended, PolicyError)
    told = {
        "nobody": "the peer demands a certificate of this side: set crt and key",
        "stranger": "the peer refuses the certificate of this side: it is of no authority that is known there, or of "
        "another key than is pinned there",
        "expired": "the peer refuses the certificate of this side: it has expired, or is not yet valid",
    }
    assert str(ended) == told[who]
    why = {
        "nobody": "no certificate, and ca demands one",
        "stranger": "no authority known here",
        "expired": "expired on",
    }
    refused = {"1": "refused data connection from", "auto": "refused caller"}[profile]
    wait_until(lambda: said.find(f"WARNING {refused} .*: it.*{why[who]}"))
    assert not said.find("client .* connected")
    assert running.counters.certificates_refused >= 1


def test_a_v1_client_without_a_certificate_is_held_to_the_deadline_and_never_known(serve, said, connect, ca):
    """Closed at once, or told at once, an original would dial again without pause."""
    running = serve(tls=1, ca=ca, tls_handshake_timeout_s=0.5)
    client = connect(running)
    data = client.secure(socket.create_connection((HERE, running.data), BOUND_S))
    started = time.monotonic()
    wait_until(lambda: said.find("WARNING refused data connection from 127.0.0.1: it has no certificate"))
    assert quiet(data) and quiet(client.control)
    with contextlib.suppress(OSError):
        assert not data.recv(8)
    assert time.monotonic() - started > 0.3
    assert quiet(client.control)
    data.close()


def test_refused_data_connections_are_warned_about_now_and_then(serve, said, connect, ca):
    running = serve(tls=1, ca=ca, tls_handshake_timeout_s=0.1)
    client = connect(running)
    for count in range(1, 4):
        with client.secure(socket.create_connection((HERE, running.data), BOUND_S)):
            wait_until(lambda count=count: running.counters.certificates_refused == count)
    assert len([line for line in said.lines if line.startswith("WARNING refused data connection")]) == 1


def test_a_v1_control_channel_is_warned_about_once(serve, said, join):
    running = serve(tls=1, protocol="1")
    pin = Pins((running.server._certificate.certificate.key_digest,))
    first = join(running.tunnel, pin=pin)
    assert answered(running)
    assert said.find("WARNING profile v1: the server's certificate is checked on data connections, but the control cha")
    first.kill()
    said.lines.clear()
    join(serve(tls=1).tunnel, pin=WRONG_PIN).get()
    assert not said.find("profile v1: ")


def test_protocol_2_accepts_no_plain_control_channel(serve, join):
    ended = join(serve(tls=1, protocol="1").tunnel, pin=WRONG_PIN, protocol="2").get()
    assert isinstance(ended, PolicyError) and "does not speak profile v2" in str(ended)


# A server that shows one certificate on the control channel and another one on data connections


class TwoFaced:
    """A server of one control channel and one data connection, each with a certificate of its own."""

    def __init__(self, stack, control, data, mode):
        self.stack, self.control, self.data, self.mode = stack, control, data, mode
        self.tunnel = self.listen()

    def listen(self):
        sock = self.stack.enter_context(socket.create_server((HERE, 0)))
        sock.settimeout(BOUND_S)
        return sock

    def take(self, sock, alpn=b"", line=None):
        taken, peer = sock.accept()
        stream = self.stack.enter_context(as_stream(taken, peer))
        if line:
            stream.sendall(line)
        return stream

    def run(self):
        first = opening.format_first_line(opening.FirstLine(None, self.mode), NONCE)
        control = self.take(self.tunnel, line=first)
        control.read_line(1024)
        secure = tls.accept(control, self.control.contexts[opening.ALPN_CONTROL], opening.ALPN_CONTROL)
        secure.sendall(b"//%b?c=need&i=5&p=9#welcome\n" % SESSION)
        data = self.take(self.tunnel, line=first)
        assert data.read_line(1024) == b"//%b?v=2#data" % SESSION
        accepted = tls.accept(data, self.data.contexts[opening.ALPN_DATA], opening.ALPN_DATA)
        accepted.sendall(b"0123abcd")
        return accepted


@pytest.fixture
def two_faced(no_leaks):
    with contextlib.ExitStack() as stack:
        yield lambda *settings: TwoFaced(stack, *settings)


@pytest.mark.parametrize("demand", ["ca", "sni", "pin"])
@pytest.mark.parametrize("data", ["right", "wrong"])
def test_data_connections_are_held_to_the_same_demands_as_the_control_channel(
    two_faced, join, authority, other, ca, tmp_path, demand, data
):
    right = authority.issue("tunnel.example")
    wrong = {"ca": other.issue("tunnel.example"), "sni": authority.issue("x.example"), "pin": authority.issue()}[demand]
    settings = {"ca": {"ca": ca, "sni": "tunnel.example"}, "sni": {"ca": ca, "sni": "tunnel.example"}}
    control = ServerCertificate(*right.write(tmp_path / "control").values())
    shown = ServerCertificate(*(right if data == "right" else wrong).write(tmp_path / "data").values())
    server = two_faced(control, shown, 1 if demand == "pin" else 2)
    joined = join(
        server.tunnel.getsockname()[1],
        min_pool_capacity=1,  # the pool dials one
        limits=Limits(drain_linger_s=0.1),  # for who is refused, and does not hang up here
        **settings.get(demand, {"pin": right.pin}),
    )
    serving = gevent.spawn(lambda: _outcome(server.run))
    if data == "right":
        assert not isinstance(serving.get(), OSError)
        assert not joined.ready()
        joined.kill()
        return
    ended = joined.get()
    assert isinstance(ended, PolicyError) and f"refused by {demand}: " in str(ended)
    assert isinstance(serving.get(), OSError)


def _outcome(function):
    try:
        return function()
    except OSError as exc:
        return exc


# Files that change while the tunnel runs


@profiles
def test_a_client_whose_authority_is_withdrawn_is_refused_its_next_data_connections(
    serve,
    said,
    join,
    authority,
    other,
    tmp_path,
    profile,
):
    path = tmp_path / "ca.pem"
    write_authorities(path, authority)
    running = serve(tls=1, ca=str(path), protocol=profile, tls_handshake_timeout_s=0.2)
    settings = authority.issue().write(tmp_path)
    joined = join(running.tunnel, **settings)
    assert answered(running)
    write_authorities(path, other, other)
    running.server.reload()
    with contextlib.suppress(OSError):
        answered(running)  # uses one up, so that the next one is dialled
    ended = joined.get()
    assert isinstance(ended, PolicyError) and "the peer refuses the certificate of this side" in str(ended)
    other.issue().write(tmp_path)
    join(running.tunnel, **settings)
    assert answered(running)


def test_a_client_reads_its_files_again_before_each_call(serve, join, authority, other, tmp_path):
    path = tmp_path / "ca.pem"
    write_authorities(path, other)
    running = serve(tls=2, **authority.issue(HERE).write(tmp_path))
    client = Client(
        Config(
            role="client", tunnel=Address(HERE, running.tunnel), target=Address(HERE, 1), ca=str(path), limits=LIMITS
        )
    )
    with pytest.raises(PolicyError, match="refused by ca"):
        client.run()
    write_authorities(path, authority, authority)
    calling = gevent.spawn(_outcome, client.run)
    wait_until(lambda: len(running.server._clients.current().pool) if running.server._clients.current() else 0)
    calling.kill()


@pytest.mark.parametrize("mode", [1, 2])
def test_a_server_warns_of_a_new_certificate_that_clients_will_refuse_in_its_mode(
    serve, said, authority, tmp_path, mode
):
    running = serve(tls=mode, **authority.issue(HERE).write(tmp_path))
    authority.issue().write(tmp_path)
    running.server.reload()
    assert said.find("INFO certificate .*, valid until ")
    words = "WARNING crt: the certificate names no host .no subjectAltName.: with tls=2 clients refuse it"
    assert bool(said.find(words)) is (mode == 2)
