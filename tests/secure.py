"""TLS for tests: connections of the product with itself, in the version of TLS that is asked for."""

import re
from functools import cache

import gevent
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from OpenSSL import SSL
from support import BOUND_S, as_stream, bounded, tcp_pair

from nodepass_gevent import tls
from nodepass_gevent.tls_context import SELF_SIGNED, ClientPolicy, ServerCertificate

VERSIONS = {"1.2": SSL.TLS1_2_VERSION, "1.3": SSL.TLS1_3_VERSION}


@cache
def presented():
    """Make the certificate that servers of tests present; once, for it costs time."""
    return ServerCertificate(None, None)


def client_context(version, mode=SELF_SIGNED, host="localhost", **demands):
    """Make what to dial with, in a version of TLS."""
    made = ClientPolicy(host, **demands).context(mode)
    made.context.set_min_proto_version(VERSIONS[version])
    made.context.set_max_proto_version(VERSIONS[version])
    return made


def stream_pair():
    """Connect two Streams over loopback."""
    near, far = tcp_pair()
    return near, as_stream(far)


def handshake(near, far, version="1.3"):
    """Turn two connected Streams into TLSStreams, the first one being the server."""
    with bounded(BOUND_S):
        accepting = gevent.spawn(tls.accept, near, presented().contexts[b""])
        dialled = tls.dial(far, client_context(version))
        return accepting.get(), dialled


def transports(kind):
    """Connect two transports of a kind: ``plain``, or the version of TLS."""
    near, far = stream_pair()
    return (near, far) if kind == "plain" else handshake(near, far, kind)


class KeyUpdater:
    """Makes records that ask the other side for a key update, as no TLS library for Python does (RFC 8446, 4.6.3).

    To be made of a dialled TLS 1.3 connection that has not sent a byte since its handshake, with the secret of its log.
    """

    def __init__(self, connection, key_log):
        ciphers = {"TLS_AES_256_GCM_SHA384": (hashes.SHA384(), 32), "TLS_AES_128_GCM_SHA256": (hashes.SHA256(), 16)}
        self._hash, self._key_size = ciphers[connection.get_cipher_name()]
        self._secret = bytes.fromhex(re.search(rb"CLIENT_TRAFFIC_SECRET_0 \w+ (\w+)", b"\n".join(key_log))[1].decode())

    def record(self):
        """Give a KeyUpdate that demands one in return; from then on the next key counts."""
        key, nonce = self._expand(b"key", self._key_size), self._expand(b"iv", 12)
        plain = b"\x18\x00\x00\x01\x01" + b"\x16"  # key_update, update_requested; handshake
        header = b"\x17\x03\x03" + (len(plain) + 16).to_bytes(2, "big")
        self._secret = self._expand(b"traffic upd", self._hash.digest_size)
        return header + AESGCM(key).encrypt(nonce, plain, header)  # the first under its key: the nonce is the iv

    def _expand(self, label, size):
        info = size.to_bytes(2, "big") + bytes([6 + len(label)]) + b"tls13 " + label + b"\0"
        return HKDFExpand(self._hash, size, info).derive(self._secret)


def key_updater(near, far):
    """Connect as ``handshake`` does; give both ends, and what makes key updates for the first one."""
    key_log = []
    made = client_context("1.3")
    made.context.set_keylog_callback(lambda _connection, line: key_log.append(line))
    with bounded(BOUND_S):
        accepting = gevent.spawn(tls.accept, near, presented().contexts[b""])
        dialled = tls.dial(far, made)
        return accepting.get(), dialled, KeyUpdater(dialled._connection, key_log)
