"""The addresses of the target: looked up when first needed, kept while they serve, and renewed behind the users' backs.

A resolver is slow beside a connect, and has few threads. So a crowd shares one look-up, and nobody waits for one while
an address is known that is not stale. A name may lead elsewhere although its old address answers: it is looked up
again now and then.
"""

import math
import time

import gevent

from .errors import ConnectError
from .net import Endpoint, resolve
from .values import Address, is_literal

RENEW_S = 30.0  # as long as the name servers of moving services let their answers live
STALE_S = 300.0  # behind that: an address so old may be another machine's, and who comes waits for the look-up


class TargetAddresses:
    """The endpoints of ``address``, in the order to try."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._literal = is_literal(address.host)
        self._endpoints: list[Endpoint] = []
        self._renew_at = math.inf
        self._answered: tuple = ()  # sockaddr
        self._look_up: gevent.Greenlet | None = None  # that runs

    def get(self) -> list[Endpoint]:
        """Give the endpoints; waits only where none are known, or they are stale. Raises ConnectError."""
        if not self._endpoints:
            found = self._resolve() if self._literal else self._looked_up().get()
            if isinstance(found, ConnectError):
                raise ConnectError(str(found), found.why)  # one of its own: a traceback holds who waited
            return found
        late_s = time.monotonic() - self._renew_at
        if late_s >= 0:
            look_up = self._looked_up()
            if late_s >= STALE_S:
                look_up.get()  # a resolver that fails takes nothing away
                return self.get()
        return self._endpoints

    def prefer(self, answered: tuple) -> None:
        """Begin with the sockaddr that has answered: users do not all wait for one before it that is silent."""
        self._answered = answered
        if self._endpoints and self._endpoints[0].sockaddr != answered:
            self._endpoints = self._in_order(self._endpoints)

    def forget(self) -> None:
        """Look the name up before it is used again: it may have moved."""
        self._endpoints = []

    def _in_order(self, endpoints: list[Endpoint]) -> list[Endpoint]:
        return sorted(endpoints, key=lambda endpoint: endpoint.sockaddr != self._answered)

    def _looked_up(self) -> gevent.Greenlet:
        """Begin a look-up, unless one runs; its error is what it gives."""
        if self._look_up is None:
            self._look_up = gevent.spawn(self._resolve)
        return self._look_up

    def _resolve(self) -> list[Endpoint] | ConnectError:
        try:
            self._endpoints = self._in_order(resolve(self._address))
        except ConnectError as exc:
            return exc
        else:
            return self._endpoints
        finally:
            self._look_up = None
            self._renew_at = math.inf if self._literal else time.monotonic() + RENEW_S
