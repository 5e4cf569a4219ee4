"""The derivations and proofs of psk1: recorded vectors, and a second computation with the openssl command line."""

import hmac
import json
import shutil
import subprocess
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodepass_gevent import tunnel_key
from nodepass_gevent.errors import ConfigError
from nodepass_gevent.tunnel_key import Handshake, derive, format_key, parse_key, same

VECTORS = json.loads((Path(__file__).parent / "vectors" / "psk1.json").read_text())
KEY = "np1:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8"
SESSION = bytes(8)


class Vector:
    """One recorded case, its values as bytes."""

    def __init__(self, case):
        self.name = case["case"]
        self.key = case.get("key") or case["passphrase"]
        self.tunnel_name = case.get("tunnel_name", "")
        self.first, self.hello, self.id = (case[name].encode() for name in ("first", "hello", "data_id"))
        hexadecimal = ("root", "exporter", "transcript", "client_nonce", "client_tag", "session_id", "server_tag")
        hexadecimal += ("session_key", "data_exporter", "data_client_tag", "data_server_tag")
        for name in hexadecimal:
            setattr(self, name, bytes.fromhex(case[name]))
        self.data_keys = [bytes.fromhex(key) for key in case["data_keys"]]


@pytest.fixture(params=VECTORS, ids=lambda case: case["case"])
def vector(request):
    return Vector(request.param)


def handshake(vector, **other):
    inputs = {name: getattr(vector, name) for name in ("first", "hello", "exporter")} | {"nonce": vector.client_nonce}
    root = derive(parse_key(vector.key), vector.tunnel_name)
    return Handshake(root, **inputs | other)


def test_the_recorded_vectors_are_computed(vector):
    assert derive(parse_key(vector.key), vector.tunnel_name).root == vector.root
    control = handshake(vector)
    assert control.client_tag == vector.client_tag
    assert control.server_tag(vector.session_id) == vector.server_tag
    data = control.session_keys(vector.session_id)
    assert [data.client_key, data.server_key] == vector.data_keys
    assert data.client_tag(vector.data_exporter) == vector.data_client_tag
    assert data.server_tag(vector.id, vector.data_exporter, vector.data_client_tag) == vector.data_server_tag


class OpenSSL:
    """The same computations by the openssl command line, written from the text of the protocol."""

    def _run(self, *argv, data=b""):
        return subprocess.run(["openssl", *argv], input=data, capture_output=True, check=True).stdout

    def kdf(self, name, **options):
        options = [part for key, value in options.items() for part in ("-kdfopt", f"{key}:{value}")]
        return bytes.fromhex(self._run("kdf", "-keylen", "32", *options, name).decode().replace(":", ""))

    def scrypt(self, passphrase, salt):
        return self.kdf("SCRYPT", hexpass=passphrase.hex(), hexsalt=salt.hex(), n=32768, r=8, p=1)

    def extract(self, salt, data):
        return self.kdf("HKDF", digest="SHA256", mode="EXTRACT_ONLY", hexkey=data.hex(), hexsalt=salt.hex())

    def expand(self, key, info):
        return self.kdf("HKDF", digest="SHA256", mode="EXPAND_ONLY", hexkey=key.hex(), hexinfo=info.hex())

    def sha256(self, data):
        return self._run("dgst", "-sha256", "-binary", data=data)

    def mac(self, key, *parts):
        argv = ("dgst", "-sha256", "-mac", "HMAC", "-macopt", f"hexkey:{key.hex()}", "-binary")
        return self._run(*argv, data=lp(*parts))


def lp(*parts):
    return b"".join(bytes([len(part) // 256, len(part) % 256]) + part for part in parts)


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs the openssl command line")
def test_the_openssl_command_line_computes_the_same(vector):
    ssl = OpenSSL()
    salt = b"nodepass-py/psk/v2" + vector.tunnel_name.encode()
    key = parse_key(vector.key)
    root = ssl.extract(salt, ssl.scrypt(key.data, salt) if key.is_passphrase else key.data)
    assert root == vector.root
    transcript = ssl.sha256(lp(b"nodepass-py v2 transcript", vector.first, vector.hello, vector.exporter))
    assert transcript == vector.transcript
    seen = (transcript, vector.client_nonce)
    client_tag = ssl.mac(ssl.expand(root, b"nodepass-py v2 ctl-client"), b"np2 ctl client", *seen)
    server_key = ssl.expand(root, b"nodepass-py v2 ctl-server")
    server_tag = ssl.mac(server_key, b"np2 ctl server", *seen, client_tag, vector.session_id)
    session_key = ssl.expand(ssl.extract(ssl.mac(root, b"np2 session salt", *seen), root), b"nodepass-py v2 session")
    assert session_key == vector.session_key
    data_client, data_server = (
        ssl.expand(session_key, b"nodepass-py v2 data " + side) for side in (b"client", b"server")
    )
    data_client_tag = ssl.mac(data_client, b"np2 data client", vector.session_id, vector.data_exporter)
    data_server_tag = ssl.mac(
        data_server, b"np2 data server", vector.session_id, vector.id, vector.data_exporter, data_client_tag
    )
    ours = handshake(vector)
    data = ours.session_keys(vector.session_id)
    assert (ours.client_tag, ours.server_tag(vector.session_id)) == (client_tag, server_tag)
    assert data.client_tag(vector.data_exporter) == data_client_tag
    assert data.server_tag(vector.id, vector.data_exporter, data_client_tag) == data_server_tag


@pytest.mark.parametrize("name", ["first", "hello", "exporter", "nonce"])
def test_every_part_of_the_handshake_is_in_every_tag(name):
    vector = Vector(VECTORS[0])
    honest, other = handshake(vector), handshake(vector, **{name: b"x" * 16})
    assert honest.client_tag != other.client_tag
    assert honest.server_tag(SESSION) != other.server_tag(SESSION)
    assert honest.session_keys(SESSION).client_key != other.session_keys(SESSION).client_key


def test_no_tag_serves_in_another_place():
    control = handshake(Vector(VECTORS[0]))
    data = control.session_keys(SESSION)
    e = bytes(32)
    tags = [
        control.client_tag, control.server_tag(SESSION), control.server_tag(b"12345678"), data.client_tag(e),
        data.client_tag(b"e" * 32), data.server_tag(b"deadbeef", e, data.client_tag(e)),
        data.server_tag(b"deadbeef", e, bytes(32)), data.server_tag(b"0badbeef", e, bytes(32)),
        control.session_keys(b"12345678").client_tag(e),
    ]  # fmt: skip
    assert len(set(tags)) == len(tags)


def test_the_name_of_the_tunnel_separates_tunnels_with_one_key():
    key = parse_key(KEY)
    assert len({derive(key, name).client_key for name in ("", "a", "b")}) == 3


def test_a_made_key_reads_back():
    assert parse_key(format_key(bytes(range(32)))) == parse_key(KEY)
    assert parse_key(f"  {KEY}\r\n").data == bytes(range(32))


def test_a_passphrase_is_the_same_however_its_letters_are_composed():
    text = "Übergrößenträgerin"
    composed, decomposed = (parse_key(unicodedata.normalize(form, text)) for form in ("NFC", "NFD"))
    assert composed == decomposed
    assert composed.data == unicodedata.normalize("NFC", text).encode() and composed.is_passphrase


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("s3cret-15-chars", "a passphrase has 16 to 1024 characters"),
        ("s3cret" * 200, "a passphrase has 16 to 1024 characters"),
        ("", "a passphrase has 16"),
        ("e\u0301" * 15, "a passphrase has 16"),  # 15 characters once composed
        ("s3cret\x00s3cret s3cret", "control characters"),
        ("s3cret\ns3cret s3cret", "control characters"),
        ("s3cret \udcff s3cret s3cret", "or is not UTF-8"),
        ("np1:", "is it whole?"),
        (KEY[:-1], "is it whole?"),
        (KEY + "=", "is it whole?"),
        (KEY + "A", "is it whole?"),
        (KEY[:-1] + "9", "is it whole?"),  # the same 32 bytes, not canonical
        (KEY.replace("AAEC", "+/EC"), "is it whole?"),
        ("np1:s3cret s3cret s3cret s3cret", "is it whole?"),
        ("***", "the key itself is needed"),
    ],
)
def test_what_is_no_key_is_refused_and_not_repeated(text, why):
    with pytest.raises(ConfigError, match=why) as caught:
        parse_key(text)
    assert "s3cret" not in str(caught.value) and str(caught.value).isprintable()


def test_nothing_that_holds_key_material_can_be_printed():
    root = derive(parse_key(KEY))
    control = Handshake(root, b"", b"", b"", b"")
    for secret in (parse_key(KEY), root, control, control.session_keys(SESSION)):
        assert f"{secret} {secret!r} {[secret]}" == "*** *** [***]"


def test_tags_are_compared_whole():
    tag = bytes(range(32))
    assert same(tag, bytes(range(32)))
    assert not same(tag, tag[:31]) and not same(tag, b"") and not same(tag, bytes(32))


def test_tags_are_compared_in_a_time_that_tells_nothing(monkeypatch):
    asked = []
    monkeypatch.setattr(hmac, "compare_digest", lambda *tags: asked.append(tags))
    same(b"a", b"b")
    assert asked == [(b"a", b"b")]


@settings(max_examples=300, deadline=None, database=None)
@given(st.text() | st.text("np1:AZaz09-_=", max_size=60).map("np1:{}".format))
def test_any_text_is_a_key_or_a_config_error_of_one_line(text):
    try:
        key = parse_key(text)
    except ConfigError as exc:
        assert str(exc).isprintable()
    else:
        assert key.is_passphrase or format_key(key.data) == unicodedata.normalize("NFC", text.strip())


def test_a_passphrase_is_stretched_by_scrypt(monkeypatch):
    """What a guess costs whoever grinds recorded tags."""
    given = {}
    monkeypatch.setattr(tunnel_key.hashlib, "scrypt", lambda data, **options: given.update(options) or bytes(32))
    derive(parse_key("correct horse battery staple"))
    assert {name: given[name] for name in "nrp"} == {"n": 32768, "r": 8, "p": 1}
