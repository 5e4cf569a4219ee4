"""The connections of a pool that nobody has taken yet."""

from collections.abc import Callable

from .alarm import Alarm
from .transport import Transport

ROUND_S = 1.0  # after each round a pool's capacity follows the demand


class Idle(dict[bytes, Transport]):
    """The idle connections by id, oldest first, each watched for what arrives on it from ``put`` until it is taken.

    Those that are left idle for a round get a deadline for acknowledgements; others are used before, and spared that.
    """

    def __init__(self, on_arrival: Callable[[bytes, Transport], None], user_timeout_s: float) -> None:
        super().__init__()
        self._on_arrival = on_arrival
        self._user_timeout_s = user_timeout_s
        self._bounded: set[bytes] = set()  # that have a deadline
        self._round = Alarm(ROUND_S)

    def put(self, id: bytes, transport: Transport) -> None:
        if not self._round.is_set:
            self._round.set(self._bound)
        transport.watch(self._arrived, id, transport)
        self[id] = transport  # last: without memory for the rest it is not kept

    def _arrived(self, id: bytes, transport: Transport) -> None:
        if self.get(id) is transport:
            self._on_arrival(id, transport)
        else:  # its taker does not watch it yet; to stop before something has come would cost a system call
            transport.unwatch()

    def _bound(self) -> None:
        for id in self.keys() - self._bounded:
            self[id].fail_when_unacknowledged(self._user_timeout_s)
            self._bounded.add(id)

    def ignore(self, id: bytes) -> None:
        """Stop watching a connection that stays: what arrived on it is for whoever takes it."""
        self[id].unwatch()

    def give(self, id: bytes) -> Transport:
        """Take a connection out, without its deadline."""
        transport = self.pop(id)
        if id in self._bounded:
            self._bounded.remove(id)
            transport.fail_when_unacknowledged(0)  # an exchange may wait for a slow line as long as TCP does
        return transport

    def give_oldest(self) -> tuple[bytes, Transport]:
        id = next(iter(self))
        return id, self.give(id)

    def close(self) -> None:
        """Reset all."""
        self._round.close()
        while self:
            self.give_oldest()[1].reset()
