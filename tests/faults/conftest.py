"""Fixtures of the faults: an echoing target, and tunnels that tests share as long as they survive."""

import contextlib

import pytest

from .harness import Target, Tunnel, standing


@pytest.fixture(scope="session")
def target():
    with Target() as echo:
        yield echo


@pytest.fixture(scope="session")
def tunnels(target):
    """Give a tunnel for a TLS mode and a query; one that a test broke is replaced."""
    kept = {}

    def give(tls=0, query=""):
        tunnel = kept.get((tls, query))
        if not tunnel or len(tunnel.processes) < 2:
            tunnel = kept[tls, query] = stack.enter_context(Tunnel(target.address, tls, query))
        return tunnel

    with contextlib.ExitStack() as stack:
        yield give


@pytest.fixture(params=[0, 1], ids="tls={}".format)
def tunnel(request, tunnels):
    """Give a running tunnel, and hold it to the standing figures afterwards."""
    with standing(tunnels(request.param)) as running:
        yield running


@pytest.fixture
def tunnel0(tunnels):
    """The same without TLS alone, where TLS makes no difference."""
    with standing(tunnels(0)) as running:
        yield running


@pytest.fixture
def tunnel1(tunnels):
    """The same with TLS alone."""
    with standing(tunnels(1)) as running:
        yield running
