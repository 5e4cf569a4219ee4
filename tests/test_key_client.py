"""The tunnel key at the client: what it accepts of a server, and what it proves to it."""

import re

import gevent
import pytest
from keyed import KEY, OTHER_KEY
from secure import presented, transports
from support import as_stream, bounded, read_exactly
from test_client import server  # noqa: F401  the fixture

from nodepass_gevent import opening, tls
from nodepass_gevent.errors import KeyMismatch, PolicyError, ProtocolError
from nodepass_gevent.opening import ServerProof, Welcome
from nodepass_gevent.tunnel_key import EXPORTER_LABEL, Handshake, derive, format_key, parse_key

OFFER = b"?v=2&n=AAECAwQFBgcICQoLDA0ODw&later=1"  # what is unknown is proven, too
FIRST = b"//off" + OFFER + b"&a=psk1#1"
SESSION = b"\x01\x23\x45\x67\x89\xab\xcd\xef"
WELCOME = Welcome(SESSION, frozenset((b"need",)), 5, 100)
PASSPHRASE = "correct horse battery staple"


def exporter(transport):
    return transport.exporter(EXPORTER_LABEL, 32)


class Keyed:
    """A server with the key, up to where a test goes on by itself."""

    def __init__(self, scripted):
        self.scripted = scripted
        self.opened = []

    def run(self, first=FIRST, key=KEY, **settings):
        self.first = first
        self.scripted.run(tunnel_key=key, **settings)
        self.scripted.say(first + b"\n")
        return self

    def accept(self, sock, alpn):
        stream = as_stream(sock)
        self.opened.append(stream)
        with bounded():
            return tls.accept(stream, presented().contexts[alpn], alpn)

    def secure(self):
        """Read the hello, make the TLS handshake, read the client's proof."""
        sock = self.scripted.control
        self.hello = b""
        while not self.hello.endswith(b"\n"):
            self.hello += read_exactly(sock, 1)
        self.control = self.accept(sock, opening.ALPN_CONTROL)
        with bounded():
            self.proof = opening.parse_client_proof(self.control.recv(1000).removesuffix(b"\n"))
        return self

    def handshake(self, key=KEY, name="", **other):
        seen = {"first": self.first, "hello": self.hello[:-1], "exporter": exporter(self.control)}
        return Handshake(derive(key, name), **seen | {"nonce": self.proof.nonce} | other)

    def answer(self, handshake=None, tag=None, welcome=WELCOME, tail=b""):
        tag = tag or (handshake or self.handshake()).server_tag(welcome.session)
        self.control.sendall(opening.format_server_proof(ServerProof(tag, welcome)) + tail)
        return self

    def data(self):
        """Accept a data connection up to its tag."""
        sock = self.scripted.take(self.scripted.tunnel)
        sock.sendall(FIRST + b"\n")
        assert read_exactly(sock, 28) == b"//%b?v=2#data\n" % SESSION.hex().encode()
        data = self.accept(sock, opening.ALPN_DATA)
        with bounded():
            seen = data.recv_exactly(40)
        keys = self.handshake().session_keys(SESSION)
        assert seen == SESSION + keys.client_tag(exporter(data))
        return data, keys, seen[8:]

    def join(self, id):
        data, keys, tag = self.data()
        data.sendall(id + keys.server_tag(id, exporter(data), tag))
        return data

    def ended(self):
        return self.scripted.ended()


@pytest.fixture
def keyed(server):  # noqa: F811
    made = Keyed(server)
    with bounded(30):
        yield made
    made.scripted.running.kill()
    for stream in made.opened:
        stream.close()


def carries(keyed, data):
    data.sendall(b"question")
    with keyed.scripted.take(keyed.scripted.target) as target:
        assert read_exactly(target, 8) == b"question"
        target.sendall(b"answer")
        return data.recv_exactly(6) == b"answer"


def test_it_proves_its_key_and_serves_a_server_that_has_it_too(keyed):
    keyed.run().secure()
    assert keyed.hello == b"//?v=2#hello\n"  # in clear, and so without its capabilities
    assert keyed.proof.tag == keyed.handshake().client_tag
    assert keyed.proof.capabilities == {b"bye", b"fail", b"need", b"udp"}
    keyed.answer()
    data = keyed.join(b"0123abcd")
    keyed.control.sendall(b"//0123abcd#1\n")
    assert carries(keyed, data)


def test_its_nonce_is_another_each_time(server):  # noqa: F811
    nonces = set()
    for _ in range(3):
        keyed = Keyed(server).run().secure()
        nonces.add(keyed.proof.nonce)
        server.running.kill()
        for stream in keyed.opened:
            stream.close()
    assert len(nonces) == 3


def test_signals_may_come_right_behind_the_answer_and_all_of_it_byte_by_byte(keyed):
    keyed.run().secure()
    tag = keyed.handshake().server_tag(SESSION)
    for byte in opening.format_server_proof(ServerProof(tag, WELCOME)) + b"\n//0123abcd#1\n":
        keyed.control.sendall(bytes([byte]))
        gevent.sleep(0)
    assert carries(keyed, keyed.join(b"0123abcd"))


def test_the_name_of_the_tunnel_stands_in_hello_and_key(keyed):
    keyed.run(key=parse_key(PASSPHRASE), tunnel_name="site-a").secure()
    assert keyed.hello == b"//site-a?v=2#hello\n"
    assert keyed.proof.tag == keyed.handshake(parse_key(PASSPHRASE), "site-a").client_tag


# One side has the key, the other has not


@pytest.mark.parametrize(
    ("first", "why"),
    [
        (b"//off" + OFFER + b"#1", "the server has no tunnel key, and this client has one: set it there too"),
        (b"//1234" + OFFER + b"#0", "the server has no tunnel key"),
        (b"//1234#1", "the server has no tunnel key"),
        (b"//off#1", "the server has no tunnel key"),
        (b"//off" + OFFER + b"&a=psk1#0", "the server offers no TLS, or no profile v2, and a tunnel key needs both"),
        (b"//1234?a=psk1#1", "the server offers no TLS, or no profile v2"),
        (b"//1234?v=3&a=psk1#1", "the server offers no TLS, or no profile v2"),
        (b"//off" + OFFER + b"&a=psk2#1", "the server asks for a tunnel key by method 'psk2', unknown here"),
        (b"//off" + OFFER + b"&a=#1", "the server asks for a tunnel key by method '', unknown here"),
    ],
)
def test_with_a_key_a_server_without_it_is_refused_by_policy(keyed, first, why):
    ended = keyed.run(first).ended()
    assert isinstance(ended, PolicyError) and why in str(ended)


@pytest.mark.parametrize("protocol", ["auto", "1", "2"])
@pytest.mark.parametrize("port", [b"off", b"1234"])
@pytest.mark.parametrize("method", [b"psk1", b"later"])
def test_without_a_key_a_server_with_one_is_refused_by_policy(server, protocol, port, method):  # noqa: F811
    server.run(protocol=protocol)
    server.say(b"//%b%b&a=%b#1\n" % (port, OFFER, method))
    ended = server.ended()
    assert isinstance(ended, PolicyError) and "the server asks for a tunnel key" in str(ended)
    assert ("this client has none: set tunnel-key-file" in str(ended)) == (method == b"psk1")


def test_the_least_tls_mode_holds_with_a_key_too(keyed):
    ended = keyed.run(tls=2).ended()
    assert isinstance(ended, PolicyError) and "offers tls 1, and tls=2 accepts no less than 2" in str(ended)


# Answers that prove nothing

WRONG = {
    "of another key": lambda keyed: {"handshake": keyed.handshake(OTHER_KEY)},
    "of another tunnel": lambda keyed: {"handshake": keyed.handshake(name="other")},
    "of another connection": lambda keyed: {"handshake": keyed.handshake(exporter=bytes(32))},
    "of another nonce": lambda keyed: {"handshake": keyed.handshake(nonce=bytes(16))},
    "of another first line": lambda keyed: {"handshake": keyed.handshake(first=FIRST[:-1] + b"2")},
    "of another session": lambda keyed: {"tag": keyed.handshake().server_tag(bytes(8))},
    "of the client itself": lambda keyed: {"tag": keyed.proof.tag},
    "that is nothing": lambda keyed: {"tag": bytes(32)},
}


@pytest.mark.parametrize("which", WRONG)
def test_a_server_without_the_key_is_refused_and_no_data_connection_dialled(keyed, which):
    keyed.run().secure()
    keyed.answer(**WRONG[which](keyed))
    ended = keyed.ended()
    assert isinstance(ended, KeyMismatch) and "the server's proof of the tunnel key is wrong" in str(ended)
    keyed.scripted.tunnel.settimeout(0.05)
    with pytest.raises(TimeoutError):
        keyed.scripted.tunnel.accept()


def test_a_first_line_that_was_changed_on_its_way_is_noticed(keyed):
    """The server said another first line than the client has read."""
    keyed.run().secure()
    sent = FIRST.replace(b"AAEC", b"BBEC")
    assert keyed.proof.tag != keyed.handshake(first=sent).client_tag
    keyed.answer(keyed.handshake(first=sent))
    assert isinstance(keyed.ended(), KeyMismatch)


@pytest.mark.parametrize(
    "answer",
    [b"\n", b"//0123456789abcdef?c=need&i=5&p=9#welcome\n", b"//auth?s=ASNFZ4mrze8#s\n", b"\x00" * 9 + b"\n"],
)
def test_an_answer_that_is_no_proof_is_refused(keyed, answer):
    keyed.run().secure().control.sendall(answer)
    assert isinstance(keyed.ended(), ProtocolError)


def test_a_server_that_closes_on_the_proof_makes_it_ask_whether_the_keys_are_the_same(keyed):
    keyed.run().secure().control.reset()
    ended = keyed.ended()
    assert isinstance(ended, KeyMismatch)
    assert re.search("closed on the proof of the tunnel key: are it and tunnel-name the same on both", str(ended))


def test_a_busy_server_is_told_from_a_wrong_key(keyed):
    keyed.run().secure().control.sendall(b"//?why=busy#bye\n")
    ended = keyed.ended()
    assert not isinstance(ended, KeyMismatch) and "the server has another client" in str(ended)


def test_an_answer_that_does_not_come_ends_with_its_deadline(keyed):
    ended = keyed.run(opening_timeout_s=0.3).secure().ended()
    assert isinstance(ended, TimeoutError) and "welcome: timed out after 0.3 s" in str(ended)


# Data connections

DATA_WRONG = {
    "of another id": lambda data, keys, tag: keys.server_tag(b"00000000", exporter(data), tag),
    "of another connection": lambda data, keys, tag: keys.server_tag(b"0123abcd", bytes(32), tag),
    "of another tag": lambda data, keys, tag: keys.server_tag(b"0123abcd", exporter(data), bytes(32)),
    "of the client itself": lambda data, keys, tag: tag,
    "that is nothing": lambda data, keys, tag: bytes(32),
}


@pytest.mark.parametrize("which", DATA_WRONG)
def test_a_data_connection_whose_server_end_proves_nothing_ends_the_session(keyed, which):
    keyed.run().secure().answer()
    data, keys, tag = keyed.data()
    data.sendall(b"0123abcd" + DATA_WRONG[which](data, keys, tag))
    keyed.control.sendall(b"//0123abcd#1\n")
    data.sendall(b"question")
    ended = keyed.ended()
    assert isinstance(ended, KeyMismatch) and "the server's tag on a data connection is wrong" in str(ended)
    assert keyed.scripted.client.counters.tcp_exchanges == 0


def test_an_id_without_its_tag_is_no_data_connection(keyed):
    keyed.run(id_timeout_s=0.3).secure().answer()
    data, _, _ = keyed.data()
    data.sendall(b"0123abcd" + bytes(31))
    with bounded(), pytest.raises(ConnectionError):
        data.recv_exactly(1)
    assert keyed.join(b"00000001")


def test_the_user_s_bytes_may_come_right_behind_the_tag(keyed):
    keyed.run().secure().answer()
    data, keys, tag = keyed.data()
    data.sendall(b"0123abcd" + keys.server_tag(b"0123abcd", exporter(data), tag) + b"question")
    keyed.control.sendall(b"//0123abcd#1\n")
    with keyed.scripted.take(keyed.scripted.target) as target:
        assert read_exactly(target, 8) == b"question"


def test_a_reload_changes_the_key_of_the_next_session(server, tmp_path):  # noqa: F811
    path = tmp_path / "tunnel.key"
    path.touch(0o600)
    path.write_text(format_key(OTHER_KEY.data))
    first = Keyed(server).run(key=None, tunnel_key_file=str(path)).secure()
    assert first.proof.tag == first.handshake(OTHER_KEY).client_tag
    path.write_text(f"{format_key(KEY.data)}\n{format_key(OTHER_KEY.data)}\n")
    server.client.reload()
    server.running.kill()
    again = Keyed(server)
    again.first = FIRST
    server.running = gevent.spawn(server._run)
    server.control = server.take(server.tunnel)
    server.say(FIRST + b"\n")
    again.secure()
    assert again.proof.tag == again.handshake(KEY).client_tag
    server.running.kill()
    for stream in (*first.opened, *again.opened):
        stream.close()


def test_the_session_goes_on_while_the_key_is_changed(keyed, tmp_path):
    path = tmp_path / "tunnel.key"
    path.touch(0o600)
    path.write_text(format_key(KEY.data))
    keyed.run(key=None, tunnel_key_file=str(path)).secure().answer()
    path.write_text(format_key(OTHER_KEY.data))
    keyed.scripted.client.reload()
    data = keyed.join(b"0123abcd")
    keyed.control.sendall(b"//0123abcd#1\n")
    assert carries(keyed, data)


def test_a_connection_of_tls_1_2_gives_no_exporter_value():
    near, far = transports("1.2")
    for end in (near, far):
        with pytest.raises(ProtocolError, match="binds nothing"):
            end.exporter(EXPORTER_LABEL, 32)
        end.close()


def test_both_ends_of_a_connection_have_one_exporter_value_and_no_other_has_it():
    values = set()
    for _ in range(2):
        near, far = transports("1.3")
        assert exporter(near) == exporter(far) and len(exporter(near)) == 32
        values.add(exporter(near))
        near.close()
        far.close()
    assert len(values) == 2
