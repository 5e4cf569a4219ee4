"""The way of a user from the public port to a launch; it does not know on which side of the tunnel it runs.

What is TCP's stands here, what is UDP's in ``datagrams``. Each exchange is one greenlet of ``exchanges``, the pool that
is the limit of them all; it outlives the session that launched it.
"""

import time
from collections.abc import Callable
from functools import partial

import gevent

from . import access
from . import log as logs
from .access import AccessLog
from .carrying import conclude, observe_answer, run, tell_full
from .config import Config
from .crew import Crew
from .datagrams import DatagramIngress, Entrance
from .errors import GONE, LaunchFailed, TunnelError
from .launching import Launched, Launcher, Link
from .metrics import Counters
from .relay import Exchange
from .transport import Stream
from .wire import Kind

_Begun = tuple[Launched, Exchange, float]  # an exchange that does not run yet, and since when (monotonic)


class Ingress:
    """Users of the public port; how a peer is found, ``Launcher`` knows."""

    def __init__(
        self,
        link: Callable[[float], Link],
        exchanges: Crew,
        config: Config,
        counters: Counters,
        entrance: Entrance | None = None,
    ) -> None:
        self._launcher = Launcher(link)
        self._exchanges = exchanges
        self._config = config
        self._counters = counters
        self._log = logs.of(config.name)
        self._access = AccessLog(config, access.PUBLIC)
        self._full = logs.Seldom(self._log)
        self.udp = DatagramIngress(self._launcher, exchanges, config, counters, entrance)

    def room(self) -> int:
        """Say for how many users there is room."""
        return self._exchanges.free_count()

    def wait_for_room(self) -> None:
        """Wait until there is room for a user."""
        if self._exchanges.full():
            tell_full(self._full, self._config)
            self._exchanges.wait_available()

    def settle(self, timeout_s: float) -> None:
        """Wait until nobody who has come waits for a launch, for ``timeout_s`` at most."""
        self._launcher.settle(timeout_s)

    def user(self, user: Stream, ended: Callable[[], object] | None = None) -> None:
        """Start the exchange of a TCP user; ``ended()`` is called behind it.

        With a data connection that is ready it is launched before anything else has its turn. Its greenlet must not be
        killed before it has begun: nobody else closes user and data connection. MemoryError: both are reset.
        """
        self._counters.tcp_exchanges += 1
        came = time.monotonic()
        begun = None
        try:
            launched = self._launcher.launch_at_once(Kind.TCP, user.peer)
            begun = self._begin(user, came, launched) if launched else None
            self._exchanges.spawn(self._tcp, user, came, begun, ended)
        except MemoryError:  # there is no greenlet to end this exchange
            self._counters.exchanges_failed += 1
            user.reset()
            if begun:
                id, data, link = begun[0]
                del link.launched[id]
                data.reset()
            if ended:
                ended()
            raise

    def _tcp(self, user: Stream, came: float, begun: _Begun | None, ended: Callable[[], object] | None) -> None:
        end = came + self._config.limits.pool_wait_s
        with user:
            try:
                if begun is None:
                    begun = self._begin(user, came, self._wait(came, end, user))
                if not self._carry(user, begun, end):
                    self._counters.launches_repeated += 1
                    begun = self._begin(user, came, self._wait(came, end, user))
                    self._carry(user, begun)
            except TunnelError as exc:
                self._counters.exchanges_failed += 1
                self._log.warning("user %s refused: %s", user, exc)
                self._access.nothing("tcp", b"", user.peer, came, (access.NO_DATA_CONNECTION, str(exc)))
                user.reset()
            except BaseException:
                if begun:
                    _, data, _ = begun[0]
                    data.reset()  # it may be that nothing was carried yet
                raise
            finally:
                if ended:
                    ended()

    def _wait(self, came: float, end: float, user: Stream) -> Launched:
        try:
            return self._launcher.launch(Kind.TCP, end - time.monotonic(), user.peer)
        except gevent.GreenletExit:
            self._access.nothing("tcp", b"", user.peer, came, (access.CUT, ""))
            raise

    def _begin(self, user: Stream, came: float, launched: Launched) -> _Begun:
        """Register the exchange of a user on the data connection that it was given."""
        id, data, link = launched
        try:
            on_answer = partial(observe_answer, self._counters, came)
            running = Exchange(user, data, self._config.limits.half_closed_timeout_s, on_answer)
            begun = launched, running, time.monotonic()
            link.launched[id] = running
        except MemoryError:  # nobody else closes it
            data.reset()
            raise
        return begun

    def _carry(self, user: Stream, begun: _Begun, end: float = 0) -> bool:
        """Carry a user on its data connection; False when that is dead before a byte and before ``end`` (0: never)."""
        (id, data, link), running, started = begun
        with data:
            tell = partial(self._access.tcp, id, user.peer, (user, data), started, running.traffic)
            try:
                error = run(running, self._config.limits.idle_timeout_s, self._counters, tell)
            finally:
                link.launched.pop(id, None)
            if end and not running.began and _is_dead(error, user, end):
                self._log.debug("data connection %s of user %s was dead: %s", id.decode(), user, error)
                data.reset()
                return False
            if isinstance(error, LaunchFailed):
                self._counters.launches_failed += 1
                self._log.warning("user %s reset: %s", user, error)
            tell(error)
            if error:
                conclude(user, data, error, running.complete, self._counters)
        return True


def _is_dead(error: BaseException | None, user: Stream, end: float) -> bool:
    """Whether an exchange that has read nothing, not even an end, from either side ended by its data connection.

    Nothing can be lost or come twice when its user is given another one. A peer that says so has not taken the
    connection; a broken one counts only while the user is as good as new, for later it is a target's own reset.
    """
    if isinstance(error, LaunchFailed):
        return error.why == GONE
    return isinstance(error, ConnectionError) and time.monotonic() < end and user.peek() is not False
