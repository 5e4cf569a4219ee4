"""What a tunnel says of itself to whoever looks: values of one moment. Times are Unix times, in seconds."""

import time
from dataclasses import dataclass, field


def wall_clock() -> float:
    """Give the time to show, which may step: nothing waits by it."""
    return time.time()


@dataclass(frozen=True)
class Peer:
    """The other side of a session that stands."""

    address: str
    profile: int  # of the wire protocol
    since: float
    ready: int  # data connections in the pool
    capacity: int  # that it aims at, or takes at most


@dataclass(frozen=True)
class Presented:
    """The certificate that this side presents."""

    fingerprint: str  # SHA-256, as openssl prints it
    pin: str
    expires: float


@dataclass(frozen=True)
class Ended:
    """How a session or a listener ended, or the try of one."""

    why: str
    at: float = field(default_factory=wall_clock)


@dataclass(frozen=True)
class Description:
    """What a role is and has now."""

    peers: tuple[Peer, ...]
    certificate: Presented | None
    left: Ended | None = None  # the last peer, where the role goes on without
    refused: Ended | None = None  # the last caller that was not taken for a peer
