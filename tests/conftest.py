"""The product runs on patched greenlets, and so does its test suite: patched before anything else is imported."""

from gevent import monkey

monkey.patch_all()

from exchanges import egress, ingress, udp_target  # noqa: E402, F401
from listeners import accepted, deaf, listener  # noqa: E402, F401
from support import no_leaks, pair, spawn  # noqa: E402, F401  fixtures for every test module
from tunnel import connect, said, serve  # noqa: E402, F401
