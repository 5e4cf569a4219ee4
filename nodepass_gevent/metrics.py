"""Counters of one tunnel: plain integers, written in the data path, read by whoever shows them."""

from dataclasses import dataclass, fields


@dataclass(slots=True)
class Counters:
    """What has happened since the start. Bytes are user data; up is user to target."""

    tcp_exchanges: int = 0
    udp_exchanges: int = 0  # of one datagram and its answer
    udp_sessions: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    datagrams_up: int = 0
    datagrams_down: int = 0
    exchanges_failed: int = 0  # ended by a reset, a timeout or a missing data connection
    launches_lost: int = 0  # a launch whose data connection never came
    launches_failed: int = 0  # the peer said so
    launches_repeated: int = 0  # the data connection proved dead before a byte; its user was given another one
    signals_malformed: int = 0
    signals_unknown: int = 0
    signals_stale: int = 0  # about a launch that is no more, or works
    datagrams_dropped_busy: int = 0  # over the limit of exchanges
    datagrams_dropped_size: int = 0  # outside of sessions: empty, or longer than UDP_DATA_BUF_SIZE
    datagrams_dropped_rate: int = 0  # over udp-rate-per-address
    datagrams_dropped_queue: int = 0  # a session's data connection was full, or ended
    datagrams_dropped_network: int = 0  # a session's, not taken by the network they were for
    datagrams_refused: int = 0  # the target's host said that nobody listens
    datagrams_kept_out: int = 0  # from an address that is not allowed, or over users-per-address
    datagrams_unanswered: int = 0
    users_kept_out: int = 0  # from an address that is not allowed, or over users-per-address
    callers_refused: int = 0
    callers_kept_out: int = 0  # from an address that is not allowed, or has a penalty
    data_connections_refused: int = 0
    certificates_refused: int = 0  # of clients
    tags_wrong: int = 0  # proofs of the tunnel key that do not fit
    accept_pauses: int = 0  # out of descriptors or memory

    def __str__(self) -> str:
        counted = ((field.name, getattr(self, field.name)) for field in fields(self))
        return ", ".join(f"{name} {value}" for name, value in counted if value) or "nothing yet"
