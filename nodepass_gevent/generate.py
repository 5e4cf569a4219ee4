"""What others are given to run this program: a program section of supervisord, a unit of systemd.

The command is the one that makes the text, the settings are those of its line, checked like any. What would not be
there, or not be secret, when supervisord or systemd runs it is refused: the environment of this shell, paths without
a beginning, a tunnel key on the line.
"""

import math
import os
import re
import shlex
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from . import options, ports
from .command_line import PROCESS_NUM, SOURCE, Line
from .config import FILES_READ, Config, setting_name
from .configfile import NAME, NAMES_ALLOWED
from .errors import ConfigError
from .options import Parsed
from .settings import BY_NAME
from .values import Address, shown, shown_path

START_S = 5  # wrong settings are told within that, also on a busy machine; supervisord then gives up after some tries
STOP_SLACK_S = 3  # the log is flushed, and a busy machine
LEAST_BYE_S = 2.0  # the default of drain-linger
UNKNOWN_STOP_S = 10.0  # of tunnels that a template does not know: the defaults need 7, and a process asks for more
MAX_PROCESSES = 100
FIRST_FREE_PORT = 1024  # below, a listener needs a capability
HOMES = ("/home/", "/root/", "/run/user/")  # what systemd's ProtectHome= hides from a unit, on any machine
CREDENTIALS = "/run/credentials/"
_OWN_PORTS = "such as 101%(process_num)02d"
_OWN_STATUS = "such as --status=127.0.0.1:91%(process_num)02d"
_LOG_DIR = "/var/log"
_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./?&~\[\]()-]+")
_LOST = re.compile(r"[ \t][;#]|[ \t\\]$")  # a comment of supervisord's, what ends a line, or joins it to the next


@dataclass(frozen=True)
class OwnCommand:
    """How this program is run again: absolute, and where from."""

    words: tuple[str, ...]
    directory: str | None = None


def own_command(script: str, python: str) -> OwnCommand:
    """Tell how to run this program again, by its script or else as a module, from the place that has it."""
    script = os.path.abspath(script)
    if os.path.basename(script) != "__main__.py" and os.access(script, os.X_OK):
        return OwnCommand((script,))
    package = os.path.dirname(os.path.abspath(__file__))
    return OwnCommand((os.path.abspath(python), "-m", os.path.basename(package)), os.path.dirname(package))


# supervisord


def supervisor(parsed: Parsed, argv: Sequence[str], command: OwnCommand) -> str:
    """Give the program section for the tunnels of a command line; ConfigError."""
    line = parsed.line
    name, count = _name(line), _number_of_processes(line)
    each = [parsed, *(options.parse(argv, {}, number) for number in range(1, count))]
    for one in each:
        _check(one)
    if _are_shared([{one.process.status} if one.process.status else set() for one in each]):
        raise ConfigError(
            f"numprocs: {count} processes need status addresses of their own, {_OWN_STATUS} [from {SOURCE}]"
        )
    words = [*command.words, *_arguments(line), *_reuse_port(each)]
    suffix = "_%(process_num)02d" if count > 1 else ""
    directory = line.options.get("log-dir", _LOG_DIR)
    _check_absolute("log-dir", directory, SOURCE)
    lines = {
        "command": " ".join(map(supervisor_word, words)),
        "directory": command.directory and _path(command.directory),
        "numprocs": count if suffix else None,
        "process_name": f"%(program_name)s{suffix}" if suffix else None,
        "autostart": "true",
        "autorestart": "unexpected",
        "exitcodes": 2,
        "startsecs": START_S,
        "stopsignal": "TERM",
        "stopwaitsecs": _stop_s(parsed.configs),
        "redirect_stderr": "true",
        "stdout_logfile": _path(os.path.join(directory, f"nodepass-{name}")) + f"{suffix}.log",
        "stdout_logfile_maxbytes": "20MB",
        "stdout_logfile_backups": 5,
    }
    body = "".join(f"{key}={value}\n" for key, value in lines.items() if value is not None)
    return _SECTION.format(name=name, body=body)


_SECTION = """\
; For supervisord's [include], as /etc/supervisor/conf.d/{name}.conf; supervisorctl update takes it up.
[program:{name}]
{body}; somebody else than supervisord's own user, who can read the keys:
;user=nodepass
"""


def supervisor_word(word: str) -> str:
    """Quote a word so that supervisord's parser leaves it alone and its shlex reads it; ``%(process_num)d`` is kept."""
    quoted = shlex.quote(word) if not _PLAIN.fullmatch(word) else word
    quoted = re.sub(" (?=[;#])", " ''", quoted)  # within single quotes: there a blank would begin a comment
    pieces = PROCESS_NUM.split(quoted)
    pieces[::2] = map(_doubled, pieces[::2])
    return "".join(pieces)


def _number_of_processes(line: Line) -> int:
    text = line.options.get("numprocs", "1")
    if not re.fullmatch("[0-9]{1,4}", text) or not 1 <= int(text) <= MAX_PROCESSES:
        raise ConfigError(f"numprocs: {shown(text)} is not within 1 to {MAX_PROCESSES} [from {SOURCE}]")
    return int(text)


def _reuse_port(each: Sequence[Parsed]) -> list[str]:
    """Give the option by which several processes share their ports, where they do and do not say so."""
    servers = [[config for config in one.configs if config.role == "server"] for one in each]
    if _are_shared([{Address("", config.data_port or 0) for config in one} for one in servers]):
        raise ConfigError(f"numprocs: {len(each)} processes need data ports of their own, {_OWN_PORTS} [from {SOURCE}]")
    if not _are_shared([{address for config in one for address in (config.tunnel, config.target)} for one in servers]):
        return []
    setting = BY_NAME["reuse-port"]
    if all(config.value(setting.field) for config in servers[0]):
        return []
    if setting.name in each[0].line.given:
        raise servers[0][0].fault(setting.field, f"must be 1 for {len(each)} processes on the same ports")
    if len(servers[0]) < len(each[0].configs):  # an option would be refused for the clients
        raise ConfigError(
            f"numprocs: {len(each)} processes need {setting.name} = 1 in each server's section [from {SOURCE}]"
        )
    return [f"--{setting.name}=1"]


def _are_shared(of_each: Sequence[set[Address]]) -> bool:
    """Say whether processes have addresses in common, but for ports that the system chooses."""
    named = [address for addresses in of_each for address in addresses if address.port]
    return len(set(named)) < len(named)


# systemd


def systemd(parsed: Parsed, command: OwnCommand) -> str:
    """Give the unit for the tunnels of a command line; ConfigError."""
    name = _name(parsed.line)
    _check(parsed)
    if "user" in parsed.line.flags:
        start = " ".join(map(systemd_word, [*command.words, *_arguments(parsed.line)]))
        return _USER_UNIT.format(
            name=name, start=start, stop_s=_stop_s(parsed.configs), first=_directory(command), filters=_FILTERS
        )
    if parsed.process.log_to not in ("stdout", "stderr"):
        raise parsed.process.fault("log_to", "cannot be written by the unit; its log goes to the journal")
    read = [("config", os.path.abspath(path), SOURCE) for path in parsed.line.files]
    for setting, path, source in [*read, *_files(parsed)] if read else ():  # without a file they become credentials
        if path.startswith(HOMES):
            raise ConfigError(f"{setting}: {shown_path(path)}: homes are hidden from the unit [from {source}]")
    credentials, extra = [], []
    if parsed.line.files:
        paths = dict.fromkeys(path for _, path, _ in _files(parsed))
        needed = [path for path in paths if not path.startswith(CREDENTIALS)]
        extra += [f"# to be read by the unit's user: {_doubled(path)}" for path in needed]
    else:
        for setting, path, _ in _files(parsed):
            if not path.startswith(CREDENTIALS):
                credentials.append(setting)
                extra.append(f"LoadCredential={setting}:{_path(path)}")
    words = map(systemd_word, [*command.words, *_arguments(parsed.line, credentials)])
    listening = (port.address.port for port in ports.of_process(parsed.process, parsed.configs))
    low = any(0 < number < FIRST_FREE_PORT for number in listening)  # 0: the system chooses, and none of these
    start = " ".join([*words, *(f"--{name}=%d/{name}" for name in credentials)])  # %d is where systemd puts them
    return _unit(name, start, _stop_s(parsed.configs), command, extra, low)


def systemd_template(command: OwnCommand) -> str:
    """Give the template unit nodepass@.service, whose instance NAME has the file /etc/nodepass/NAME.conf."""
    start = " ".join([*map(systemd_word, command.words), "--config=/etc/nodepass/%i.conf"])
    extra = ["EnvironmentFile=-/etc/nodepass/%i.env"]
    return _unit("%i", start, _stop_s(()), command, extra, low_ports=True)


def systemd_word(word: str) -> str:
    """Quote a word for ExecStart."""
    text = _doubled(word).replace("$", "$$")
    if _PLAIN.fullmatch(text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _unit(name: str, start: str, stop_s: int, command: OwnCommand, extra: Iterable[str], low_ports: bool) -> str:
    if start.lstrip('"').startswith(HOMES):
        why = "homes are hidden from the unit; install it elsewhere, such as in /opt/nodepass"
        raise ConfigError(f"the command is {shown(start.split()[0])}, and {why}")
    ports = _LOW_PORTS if low_ports else _NO_LOW_PORTS
    first = _directory(command) + "".join(f"{line}\n" for line in extra)
    return _UNIT.format(name=name, start=start, stop_s=stop_s, first=first, ports=ports, filters=_FILTERS)


def _directory(command: OwnCommand) -> str:
    return f"WorkingDirectory={_path(command.directory)}\n" if command.directory else ""


_LOW_PORTS = "AmbientCapabilities=CAP_NET_BIND_SERVICE\nCapabilityBoundingSet=CAP_NET_BIND_SERVICE"
_NO_LOW_PORTS = "CapabilityBoundingSet=\nPrivateUsers=yes"
_SERVICE = """\
[Service]
Type=notify
NotifyAccess=main
WatchdogSec=30s
ExecStart={start}
ExecReload=/bin/kill -HUP $MAINPID
{first}Restart=on-failure
RestartSec=1s
RestartPreventExitStatus=2
# the process itself asks for more when its tunnels have a longer SHUTDOWN_TIMEOUT
TimeoutStopSec={stop_s}s
LimitNOFILE=65536
"""
_FILTERS = """\
NoNewPrivileges=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
UMask=0077
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM
"""
_UNIT = f"""\
[Unit]
Description=NodePass tunnel {{name}}
Wants=network-online.target
After=network-online.target

{_SERVICE}
DynamicUser=yes
{{ports}}
ProtectSystem=strict
ProtectHome=yes
ProtectProc=invisible
ProcSubset=pid
ProtectClock=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
PrivateTmp=yes
PrivateDevices=yes
PrivateIPC=yes
RemoveIPC=yes
KeyringMode=private
{{filters}}
[Install]
WantedBy=multi-user.target
"""
_USER_UNIT = f"""\
# For a user's own systemd, as ~/.config/systemd/user/nodepass-{{name}}.service
[Unit]
Description=NodePass tunnel {{name}}

{_SERVICE}
{{filters}}
[Install]
WantedBy=default.target
"""


# Both


def _name(line: Line) -> str:
    (name,) = line.words
    if not NAME.fullmatch(name):
        raise ConfigError(f"{shown(name)} is no name; allowed: {NAMES_ALLOWED} [from {SOURCE}]")
    return name


def _check(parsed: Parsed) -> None:
    """Refuse what would not be as it is now, or not be secret, where another program starts this one."""
    for config in (parsed.process, *parsed.configs):
        for setting, source in config.sources.items():
            if source.startswith("environment variable"):
                give = "tunnel-key-file" if setting == "tunnel-key" else setting
                raise ConfigError(f"{setting}: the service has another environment; give --{give} [from {source}]")
    for config in parsed.configs:
        source = config.source("tunnel-key")
        if source in (SOURCE, "URL", "URL query"):
            raise ConfigError(f"tunnel-key: ps and this text would show it; use tunnel-key-file [from {source}]")
    for setting, path, source in _files(parsed):
        _check_absolute(setting, path, source)
    if parsed.process.log_to not in ("stdout", "stderr"):
        _check_absolute("log-to", parsed.process.log_to, parsed.process.source("log-to"))


def _check_absolute(setting: str, path: str, source: str) -> None:
    if not path.startswith("/") or not path.isprintable():
        raise ConfigError(
            f"{setting}: {shown_path(path)} must begin with /: the service starts elsewhere [from {source}]"
        )


def _arguments(line: Line, without: Container[str] = ()) -> list[str]:
    """Write a line's settings again, but those of ``without``, its files with their whole path."""
    for path in line.files:
        if not path.isprintable():
            raise ConfigError(f"config: {shown_path(path)} holds control characters [from {SOURCE}]")
    given = [entry for name, entry in line.given.items() if name != "url" and name not in without]
    words = [f"--config={os.path.abspath(path)}" for path in line.files]
    words += [f"--only={line.only}"] if line.only else []
    words += [f"--{entry.key}={entry.text}" for entry in given]
    return [*words, line.given["url"].text] if "url" in line.given else words


def _files(parsed: Parsed) -> list[tuple[str, str, str]]:
    """Give the files that are read, as setting, path and the setting's source."""
    found = []
    for config in (*parsed.configs, parsed.process):
        for field in FILES_READ:
            if path := getattr(config, field, None):
                found.append((setting_name(field), path, config.source(setting_name(field))))
    return found


def _stop_s(configs: Iterable[Config]) -> int:
    """Give the seconds that a stop can take: bye, the exchanges, and some more."""
    stops = [config.shutdown_timeout_s + max(config.leave_s, LEAST_BYE_S) for config in configs]
    return math.ceil(max(stops, default=UNKNOWN_STOP_S)) + STOP_SLACK_S


def _path(path: str) -> str:
    """Write a path that stands alone behind its key, where nothing can be quoted; ConfigError."""
    if _LOST.search(path):
        raise ConfigError(f"{shown_path(path)} would not be read as it stands: ' ;', ' #', or a blank or \\ at its end")
    return _doubled(path)


def _doubled(text: str) -> str:
    return text.replace("%", "%%")
