"""The exceptions this package raises on purpose. No other module defines one.

    NodePassError
    ├── ConfigError         the operator's settings: one line, exit code 2
    │   └── TunnelsRefused      of some tunnels, while others are what their settings say
    ├── ProtocolError       a peer sent what the wire protocol does not allow
    ├── PolicyError         a peer is understood, and refused: TLS mode, certificate, name
    │   ├── Busy                the server takes no client now: as a rule it has one
    │   ├── CertificateRefused  by this side, within the TLS handshake
    │   ├── RefusedByPeer       the other way round; it is also the ConnectionError that it looks like
    │   └── KeyMismatch         its proof of the tunnel key is wrong
    ├── PeerLeft            a peer ends the session in good order
    ├── LaunchFailed        the peer cannot make an exchange of a launch
    └── TunnelError         a wait ended without what it waited for
        ├── ConnectError        no connection to the named address
        ├── SessionLost         the control channel ended
        │   ├── PeerSilent          by silence
        │   └── SessionEnded        in good order
        ├── PoolClosed          the session of this pool ended
        ├── NoDataConnection    none became ready in time, or it is gone
        ├── NoPlace             one of several processes has its client already
        └── NotCarried          the peer that has come lacks a capability

Errors of a socket stay ``OSError``; a peer that closed early is a ``ConnectionError``. ``reason`` words any of them.
"""


class NodePassError(Exception):
    """Base of every error raised here on purpose; ``str()`` is one line for the log."""


class ConfigError(NodePassError):
    """A setting is wrong; the text names the setting, its source and what is allowed."""


class TunnelsRefused(ConfigError):
    """Some tunnels could not be made, and are left as they were; ``others`` were added, changed or removed."""

    def __init__(self, text: str, others: int) -> None:
        super().__init__(text)
        self.others = others


class ProtocolError(NodePassError):
    """A peer broke the wire protocol."""


class PolicyError(NodePassError):
    """A peer asks for less security than this side accepts."""


class Busy(PolicyError):
    """The server takes no client now: asking sooner changes nothing, and yet it may mend itself."""


class CertificateRefused(PolicyError):
    """This side does not accept a peer's certificate; ``alert`` says so to the peer, and is still to be sent."""

    def __init__(self, text: str, alert: bytes) -> None:
        super().__init__(text)
        self.alert = alert


class RefusedByPeer(PolicyError, ConnectionAbortedError):
    """The peer does not accept this side's certificate, or misses one, and has ended the connection."""


class KeyMismatch(PolicyError):
    """A peer does not have our tunnel key."""


class PeerLeft(NodePassError):
    """A peer said bye."""


GONE = "gone"  # of these reasons the one after which a user may be given another data connection
_LAUNCH_FAILED = {  # by the word of the wire
    "resolve": "its client could not resolve the target's name",
    "refused": "its client's target refuses, or its setting network does",
    "timeout": "its client's target does not answer",
    "unreachable": "its client cannot reach the target",
    "busy": "its client has no place for it",
    GONE: "its data connection is gone",
    "silent": "its client is silent",  # no word of the wire: what this side says of it
}


class LaunchFailed(NodePassError):
    """The peer cannot make an exchange of a launch, for the reason ``why``, which may be one that is unknown here."""

    def __init__(self, why: str) -> None:
        known = _LAUNCH_FAILED.get(why)
        super().__init__(known or f"its client could not begin the exchange: {why or 'no reason given'}")
        self.why = why


class TunnelError(NodePassError):
    """Something the tunnel waited for did not come."""


class ConnectError(TunnelError):
    """No connection could be made; the text names the address and the reason, ``why`` is a word for the peer."""

    def __init__(self, text: str, why: str = "unreachable") -> None:
        super().__init__(text)
        self.why = why


class SessionLost(TunnelError):
    """The control channel ended after ``lived_s`` seconds; the text says how."""

    def __init__(self, text: str, lived_s: float) -> None:
        super().__init__(text)
        self.lived_s = lived_s


class PeerSilent(SessionLost):
    """The control channel ended because nothing had come on it for too long."""


class SessionEnded(SessionLost):
    """The control channel ended in good order: the peer said bye."""


class PoolClosed(TunnelError):
    """The pool's session ended while somebody waited for a data connection."""


class NoDataConnection(TunnelError):
    """No data connection became ready in time, or the one that was launched is gone."""


class NoPlace(TunnelError):
    """The process that took the call has its client; others on the same port may have none."""


class NotCarried(TunnelError):
    """The peer cannot carry what was to be launched."""


def reason(exc: BaseException) -> str:
    """Say why, in a few words: the text of an errno, which begins in lower case, or the exception's own."""
    if isinstance(exc, OSError) and exc.strerror:
        return exc.strerror[0].lower() + exc.strerror[1:]
    return str(exc) or type(exc).__name__
