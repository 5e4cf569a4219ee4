"""The connections of a pool that nobody has taken yet."""

from collections.abc import Callable, Iterator

from .transport import Alarm, Transport

ROUND_S = 1.0  # after each round a pool's capacity follows the demand


class Idle:
    """The idle connections by id, oldest first, each watched for what arrives on it.

    Those that are left idle for a round get a deadline for acknowledgements; others are used before, and spared that.
    """

    def __init__(self, on_arrival: Callable[[bytes, Transport], None], user_timeout_s: float) -> None:
        self._on_arrival = on_arrival
        self._user_timeout_s = user_timeout_s
        self._by_id: dict[bytes, Transport] = {}
        self._bounded: set[bytes] = set()  # that have a deadline
        self._round = Alarm(ROUND_S)

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, id: bytes) -> bool:
        return id in self._by_id

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._by_id)

    def add(self, id: bytes, transport: Transport) -> None:
        self._by_id[id] = transport
        transport.watch(self._on_arrival, id, transport)
        if not self._round.is_set:
            self._round.set(self._bound)

    def _bound(self) -> None:
        for id in self._by_id.keys() - self._bounded:
            self._by_id[id].fail_when_unacknowledged(self._user_timeout_s)
            self._bounded.add(id)

    def ignore(self, id: bytes) -> None:
        """Stop watching a connection that stays: what arrived on it is for whoever takes it."""
        self._by_id[id].unwatch()

    def pop(self, id: bytes) -> Transport:
        transport = self._by_id.pop(id)
        if id in self._bounded:
            self._bounded.remove(id)
            transport.fail_when_unacknowledged(0)  # an exchange may wait for a slow line as long as TCP does
        transport.watch(transport.unwatch)  # once: its taker watches next, and to go on costs no system call
        return transport

    def pop_oldest(self) -> tuple[bytes, Transport]:
        id = next(iter(self._by_id))
        return id, self.pop(id)

    def close(self) -> None:
        """Reset all."""
        self._round.close()
        while self._by_id:
            self.pop_oldest()[1].reset()
