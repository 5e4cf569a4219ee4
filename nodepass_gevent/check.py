"""``nodepass check``: what would go wrong with a configuration, found without running it."""

import datetime
import errno
import json
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass

from . import configfile, descriptors, log_writer, net, options, ports, status_server
from .certificates import expired, load_authorities, load_certificate
from .config import Config, Process
from .errors import ConfigError, ConnectError, reason
from .keyring import read_keys, read_token
from .tls_context import EXPIRY_WARNING_DAYS, check_files, doubts
from .values import Address

OK, WARNING, ERROR = "ok", "warning", "error"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: str  # OK, WARNING or ERROR
    tunnel: str  # its name, or ""
    text: str

    def __str__(self) -> str:
        return f"{self.level:<8} {f'[{self.tunnel}] ' if self.tunnel else ''}{self.text}"


def check_settings(config: Config) -> None:
    """Refuse files of certificates and keys that cannot be used; raise ConfigError with where they are named."""
    try:
        check_files(config)
    except ConfigError as exc:
        names = ("ca",) if str(exc).startswith("ca:") else ("crt", "key")
        sources = [config.source(name) for name in names]
        raise ConfigError(f"{exc} [from {', '.join(dict.fromkeys(sources))}]") from exc
    read_keys(config)


def budget(process: Process, configs: Sequence[Config], taken: int) -> descriptors.Budget:
    """Make the limits of all tunnels fit what the system allows, with what status takes of it; raise ConfigError."""
    taken += status_server.DESCRIPTORS if process.status else 0
    return descriptors.plan(configs, descriptors.allowed(), taken)


def check(argv: Sequence[str], environ: Mapping[str, str]) -> list[Finding]:
    """Look at all that a command line and its files ask for."""
    findings: list[Finding] = []
    configs: list[Config] = []
    process = Process()
    for name, arguments in _one_by_one(argv, environ):
        try:
            parsed = options.parse(arguments, environ)
            read_token(parsed.process)
        except ConfigError as exc:
            findings.append(Finding(ERROR, name, str(exc)))
            continue
        process = parsed.process
        configs += parsed.configs
        findings += [Finding(WARNING, name, text) for text in parsed.warnings]
    findings = _told_once(findings)
    if not findings and not configs:
        findings.append(Finding(ERROR, "", "there is no tunnel: name one by a URL or in a file"))
    clashes = ports.clashes(ports.of_process(process, configs))
    for config in configs:
        findings += [Finding(level, config.name, text) for level, text in _look_at(config, clashes)]
    findings += [Finding(level, "", text) for level, text in _look_at_process(process, clashes)]
    return [*dict.fromkeys(findings), *_count_descriptors(process, configs)]


def _told_once(findings: Sequence[Finding]) -> list[Finding]:
    """Let what was found for several tunnels, as of [nodepass] or the environment, be told once and of none."""
    tunnels: dict[tuple[str, str], set[str]] = {}
    for each in findings:
        tunnels.setdefault((each.level, each.text), set()).add(each.tunnel)
    return [Finding(level, names.pop() if len(names) == 1 else "", text) for (level, text), names in tunnels.items()]


def report(findings: Iterable[Finding], *, as_json: bool) -> tuple[str, bool]:
    """Give the findings as lines or as JSON, and whether none is an error."""
    findings = list(findings)
    sound = not any(finding.level == ERROR for finding in findings)
    if as_json:
        return json.dumps({"ok": sound, "findings": list(map(asdict, findings))}, indent=2), sound
    return "\n".join(map(str, findings)), sound


def _one_by_one(argv: Sequence[str], environ: Mapping[str, str]) -> list[tuple[str, Sequence[str]]]:
    """Give a command line for each tunnel of a file, so that the mistake of one hides no other."""
    try:
        options.parse(argv, environ)
    except ConfigError:
        names = _tunnels(argv)
        if names:
            return [(name, [*argv, "--only", name]) for name in names]
    return [("", argv)]


def _tunnels(argv: Sequence[str]) -> list[str]:
    try:
        line = options.read_line(argv)
        return [] if line.only else [section.name for section in configfile.read(line.files).tunnels]
    except ConfigError:
        return []


def _look_at_process(process: Process, clashes: Mapping[ports.Port, str]) -> Iterator[tuple[str, str]]:
    for port in ports.of_process(process, ()):
        yield _look_at_port(port, clashes)
    try:
        log_writer.check(process.log_to)
    except OSError as exc:
        yield ERROR, str(process.fault("log_to", f"cannot be opened: {reason(exc)}"))


def _look_at(config: Config, clashes: Mapping[ports.Port, str]) -> Iterator[tuple[str, str]]:
    yield OK, f"settings of {config.url}"
    try:
        check_settings(config)
    except ConfigError as exc:
        yield ERROR, str(exc)
    else:
        yield from _look_at_certificate(config)
        yield from _look_at_authorities(config)
    if config.role == "client":
        yield from (_resolve(what, address) for what, address in (("tunnel", config.tunnel), ("target", config.target)))
    for port in ports.of_tunnel(config):
        yield _look_at_port(port, clashes)


def _look_at_certificate(config: Config) -> Iterator[tuple[str, str]]:
    if not (config.crt and config.key):
        return
    certificate = load_certificate(config.crt, config.key)
    begins, expires = certificate.begins, certificate.expires
    now = datetime.datetime.now(datetime.timezone.utc)
    left = expires - now
    found = doubts(certificate, config.key, config.role, config.tls)
    yield from ((WARNING, doubt) for doubt in found)
    if left < datetime.timedelta():
        yield ERROR, f"crt: the certificate expired on {expires.date()} [from {config.source('crt')}]"
    elif begins > now:
        yield ERROR, f"crt: the certificate is not valid before {begins.date()} [from {config.source('crt')}]"
    elif left < datetime.timedelta(days=EXPIRY_WARNING_DAYS):
        yield WARNING, f"crt: the certificate expires on {expires.date()}, in {left.days} days"
    elif not found:
        yield OK, f"certificate, valid until {expires.date()}, and its key"


def _look_at_authorities(config: Config) -> Iterator[tuple[str, str]]:
    if not config.ca:
        return
    authorities = load_authorities(config.ca)
    if ends := expired(authorities):
        level = ERROR if len(ends) == len(authorities) else WARNING
        yield level, f"ca: {len(ends)} of {len(authorities)} authorities expired [from {config.source('ca')}]"
    else:
        yield OK, f"authorities: {len(authorities)}"


def _look_at_port(port: ports.Port, clashes: Mapping[ports.Port, str]) -> tuple[str, str]:
    if port in clashes:
        return ERROR, f"{port.what}: {clashes[port]}"
    return _bind(port.what, port.address, port.kind)


def _resolve(what: str, address: Address) -> tuple[str, str]:
    try:
        found = net.resolve(address)
    except ConnectError as exc:
        return WARNING, f"{what} {address}: {exc}"  # it may be there when it is needed: that is tried for ever
    texts = ", ".join(map(str, found))
    to = "" if texts == str(address) else f" to {texts}"
    return OK, f"{what} {address} resolves{to}; it was not called"


def _bind(what: str, address: Address, kind: int) -> tuple[str, str]:
    try:
        with closing(net.bind(address, kind)) as sock:
            if kind == socket.SOCK_STREAM:
                sock.listen(1)
    except ConnectError as exc:
        return WARNING, f"{what}: {exc}"
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            fine = "fine if it is by the service that is to be given this configuration"
            return WARNING, f"{what}: {reason(exc)}; {fine}"
        return ERROR, f"{what}: {reason(exc)}"
    return OK, f"{what}: {address} is free"


def _count_descriptors(process: Process, configs: Sequence[Config]) -> list[Finding]:
    if not configs:
        return []
    try:
        warnings = budget(process, configs, descriptors.taken()).warnings
    except ConfigError as exc:
        return [Finding(ERROR, "", str(exc))]
    return [Finding(WARNING, "", text) for text in warnings] or [Finding(OK, "", "open files: enough")]
