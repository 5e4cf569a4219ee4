"""What the tests of ingress and egress share: settings, counters and the exchanges themselves."""

from dataclasses import replace

from support import LIMITS, LOOPBACK, wait_until

from nodepass_gevent.config import Address, Config
from nodepass_gevent.crew import Crew
from nodepass_gevent.metrics import Counters

LIMIT = 2000  # bytes of a datagram here
SHORT_S = 0.02  # a deadline that a test waits out
ID = b"0a1b2c3d"


def configure(**settings):
    """Make a Config; what is a limit goes there."""
    limits = {name: settings.pop(name) for name in list(settings) if hasattr(LIMITS, name)}
    return Config(
        **{
            "role": "server",
            "tunnel": LOOPBACK,
            "target": Address("127.0.0.1", 1),
            "semaphore_limit": 4,
            "max_pool_capacity": 16,
            "udp_data_buf_size": LIMIT,
            "limits": replace(LIMITS, **limits),
            **settings,
        }
    )


def happened(counters):
    """Give what was counted, without the zeros."""
    return {name: getattr(counters, name) for name in counters.__slots__ if getattr(counters, name)}


class Side:
    """What an Ingress and an Egress have in common: the exchanges, the settings, the counters."""

    def __init__(self, settings):
        self.config = configure(**settings)
        self.counters = Counters()
        self.exchanges = Crew(self.config.semaphore_limit)

    def end(self):
        """End what is left."""
        self.exchanges.kill()

    @property
    def counted(self):
        """Wait until all exchanges have ended, and give what was counted."""
        wait_until(lambda: len(self.exchanges) == 0)
        return happened(self.counters)
