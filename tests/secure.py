"""TLS for tests: connections of the product with itself, in the version of TLS that is asked for."""

from functools import cache

import gevent
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
        accepting = gevent.spawn(tls.accept, near, presented().context)
        dialled = tls.dial(far, client_context(version))
        return accepting.get(), dialled


def transports(kind):
    """Connect two transports of a kind: ``plain``, or the version of TLS."""
    near, far = stream_pair()
    return (near, far) if kind == "plain" else handshake(near, far, kind)
