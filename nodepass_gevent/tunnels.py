"""The tunnels of this process, by name: started, changed, replaced and drained, each for itself."""

import time
from collections.abc import Callable, Iterable, Iterator

import gevent
from gevent.pool import Group

from . import log as logs
from .config import Config, setting_name
from .errors import ConfigError, TunnelsRefused, reason
from .service import Role, Service
from .values import Address

BEGUN_POLL_S = 0.5  # another role may come in the place of one that has not begun

MakeRole = Callable[[Config, Role | None], Role]  # the second is the one in whose place it comes


class Tunnels:
    """A table of services. ``make(config, before)`` gives the role of a tunnel."""

    def __init__(self, make: MakeRole) -> None:
        self._make = make
        self._services: dict[str, Service] = {}
        self._leaving: set[Service] = set()  # stopped, and their exchanges go on
        self._retiring = Group()  # all at once: a peer may be slow to answer a bye
        self._drains = Group()

    def __iter__(self) -> Iterator[Service]:
        """Give the services that accept users."""
        return iter(self._services.values())

    def __len__(self) -> int:
        return len(self._services)

    def exchanges(self) -> int:
        """Count the exchanges, also of tunnels that have been replaced or removed."""
        return sum(len(service.role.exchanges) for service in (*self._services.values(), *self._leaving))

    @property
    def stop_s(self) -> float:
        """How long ``stop`` may take by the settings."""
        times = self._shutdown_timeouts_s().items()
        return max((service.role.config.leave_s + timeout_s for service, timeout_s in times), default=0.0)

    def describe(self) -> str:
        """Say in words what there is."""
        peers, exchanges = sum(service.role.peers for service in self), self.exchanges()
        counts = ((len(self), "tunnel", ""), (peers, "peer", " connected"), (exchanges, "exchange", ""))
        return ", ".join(f"{count} {word}{'' if count == 1 else 's'}{more}" for count, word, more in counts)

    def wait_begun(self) -> None:
        """Wait until each tunnel listens, is connected, or has tried to once."""
        while waiting := [service.role for service in self if not service.role.begun.is_set()]:
            waiting[0].begun.wait(BEGUN_POLL_S)

    def apply(self, configs: Iterable[Config]) -> int:
        """Make the tunnels those of ``configs``: what is not named there is drained, what has not changed goes on.

        Gives the number of those that were added, changed or removed. Those that could not be made are left as they
        were; TunnelsRefused says at the end which, and why.
        """
        wanted, changed, failures = {config.name: config for config in configs}, 0, []
        for name in [name for name in self._services if name not in wanted]:
            self._remove(name)
            changed += 1
        self._retiring.join()  # first: another one may have their addresses
        for name, config in wanted.items():
            if name:  # that without a name has the level of the process
                logs.set_level(config.log, name)
            try:
                changed += self._change(self._services[name], config) if name in self._services else self._add(config)
            except (ConfigError, OSError) as exc:  # a file has gone bad since it was checked; no descriptors
                failures.append(f"{name}: {reason(exc)}" if name else reason(exc))
        self._retiring.join()
        if failures:
            raise TunnelsRefused("; ".join(failures), changed)
        return changed

    def reload(self) -> None:
        """Let all look at their files, and end pauses."""
        for service in self:
            service.reload()

    def stop(self) -> int:
        """Drain all, each within its own SHUTDOWN_TIMEOUT; give the number of exchanges that were cut."""
        timeouts_s = self._shutdown_timeouts_s()
        for service in timeouts_s:  # before anything waits: what ends meanwhile is not tried again
            service.role.exchanges.draining = True
        self._drains.kill()
        gevent.joinall([gevent.spawn(service.stop) for service in timeouts_s])
        begun = time.monotonic()
        cut = 0
        for service, timeout_s in sorted(timeouts_s.items(), key=lambda item: item[1]):
            spent_s = time.monotonic() - begun
            cut += service.drain(max(timeout_s - spent_s, 0))
        for service in self:
            logs.of(service.role.config.name).info("%s: %s", service.role, service.role.counters)
        return cut

    def _shutdown_timeouts_s(self) -> dict[Service, float]:
        """Say how long each may be drained: exchanges under former settings for as long as those of now say."""
        timeouts_s = {service: service.role.config.shutdown_timeout_s for service in (*self, *self._leaving)}
        for service in self:
            timeouts_s |= dict.fromkeys(service.former, timeouts_s[service])
        return timeouts_s

    def _add(self, config: Config) -> bool:
        service = self._services[config.name] = Service(self._make(config, None))
        service.start()
        return True

    def _remove(self, name: str) -> None:
        service = self._services.pop(name)
        timeout_s, exchanges = service.role.config.shutdown_timeout_s, service.exchanges
        if exchanges:
            logs.of(name).warning("tunnel removed; exchanges: %d, cut in %g s if they last", exchanges, timeout_s)
        else:
            logs.of(name).info("tunnel removed")
        self._retire(service, timeout_s)
        for former in service.former:
            self._drains.spawn(self._drain, former, timeout_s)

    def _change(self, service: Service, config: Config) -> bool:
        """Give a running tunnel its new settings, if there are any; some need a new role, but for times and levels."""
        before = service.role.config
        changes = before.changes(config)
        if not changes:
            return False
        logs.of(config.name).info("settings changed: %s", ", ".join(_told(name, before, config) for name in changes))
        if before.adopt(config):
            return True
        same_side = config.role == before.role
        new = self._services[config.name] = Service(self._make(config, service.role if same_side else None))
        new.former = service.former | {service}
        self._retire(service, None, new)
        return True

    def _retire(self, service: Service, timeout_s: float | None, new: Service | None = None) -> None:
        """Stop a service, let its exchanges end, and start the one that comes in its place."""
        self._leaving.add(service)
        self._retiring.spawn(self._replace, service, timeout_s, new)

    def _replace(self, service: Service, timeout_s: float | None, new: Service | None) -> None:
        service.stop()
        service.role.retire()
        self._drains.spawn(self._drain, service, timeout_s)
        if new:
            if exchanges := len(service.role.exchanges):
                name = service.role.config.name
                logs.of(name).info("exchanges that go on under the former settings: %d", exchanges)
            new.start()

    def _drain(self, service: Service, timeout_s: float | None) -> None:
        cut = service.drain(timeout_s)
        self._leaving.discard(service)
        for other in self:
            other.former.discard(service)
        if cut:
            logs.of(service.role.config.name).info("%s: exchanges cut: %d", service.role, cut)


def _told(name: str, before: Config, now: Config) -> str:
    """Name a setting that has changed, an address with what it was and is."""
    old, new = getattr(before, name, None), getattr(now, name, None)
    moved = f" {old} -> {new}" if isinstance(old, Address) else ""
    word = "public" if name == "target" and now.role == "server" else setting_name(name)
    return word + moved
