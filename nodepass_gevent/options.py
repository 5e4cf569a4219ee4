"""How the value of each setting is found: flag > URL query > environment > file > default.

The parser, the keys of query and file, the conversion and --show-config all follow from the table in
``settings``. ConfigArgParse merges the sources. Nothing here prints, exits or starts anything.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import configargparse

from . import command_line, configfile
from .command_line import Line, build_parser, command_of
from .config import Config, Limits, Process, setting_text
from .configfile import Entry
from .errors import ConfigError
from .settings import BY_NAME, SETTINGS, Setting
from .url import FORMS, TunnelURL, parse_url
from .values import closest, did_you_mean, printable, shown

_LIMITS = [each.name for each in fields(Limits)]
LATER_KEYS = dict.fromkeys(("mode", "dial", "read", "rate", "block", "dns", "type", "quic", "pool"), "") | {
    "min": "min-pool-capacity",
    "max": "max-pool-capacity",
    "slot": "semaphore-limit",
    "proxy": "proxy-protocol",
    "notcp": "network=udp",
    "noudp": "network=tcp",
}
PREFIX = "NODEPASS_"
_NO_SETTINGS = frozenset(("NODEPASS_SINGLE_FILE",))  # by which the launcher of the single file names itself
_KUBERNETES = re.compile(r"[A-Z0-9_]*_SERVICE_(?:HOST|PORT(?:_[A-Z0-9_]+)?)|[A-Z0-9_]*_PORT_[0-9]+_[A-Z]+(?:_[A-Z]+)?")
_KUBERNETES_PORT = re.compile("(?:tcp|udp|sctp)://")  # in each pod beside a service called nodepass: NODEPASS_PORT
_HAS_KEY = re.compile(r"(?i)(?:server|client)://[^/?]*@")
ALIASES = {"cert": "crt"}  # the original's install script writes cert, the original reads crt
_NO_LINE, _UNSET = Line("run"), Process()
_OF_TUNNEL = [setting.name for setting in SETTINGS if not setting.of_process]


@dataclass(frozen=True)
class Parsed:
    """What the command line asks for: run, show-config, a command, or, without configs, help, version or usage."""

    action: str
    process: Process = _UNSET
    configs: tuple[Config, ...] = ()
    warnings: tuple[str, ...] = ()
    line: Line = _NO_LINE


def read_line(argv: Sequence[str]) -> Line:
    """Split the command line; raise ConfigError."""
    return command_line.read(build_parser(), argv)


def parse(argv: Sequence[str], environ: Mapping[str, str], number: int = 0, *, again: bool = False) -> Parsed:
    """Merge all sources into one Config per tunnel; raise ConfigError. A blank environment value is none.

    ``number`` is that of a process, for commands that make several of one line; for ``again`` see ``configfile.read``.
    """
    parser = build_parser()
    line = command_line.read(parser, argv)
    command = command_of(line.action)
    if line.action in ("help", "version") or command.alone:
        return Parsed(line.action)
    environ = {name: value for name, value in environ.items() if value.strip()}
    _refuse_unknown_variables(environ)
    warnings: list[str] = []
    defaults, tunnels = _read_sections(line, environ, warnings, again=again)
    line_given = line.numbered(number)
    process_given: Mapping[str, Entry] = line_given
    configs = []
    for name, section in tunnels.items():
        given = _merge(parser, line_given, environ, section)  # for the URL, whose query is a source, too
        if "url" not in given:
            if command.of_process:
                continue
            if not line.files:
                if line.action.startswith("generate "):
                    raise ConfigError(f"{line.action}: no tunnel is named; a URL or --config FILE does")
                return Parsed("usage")
            files = ", ".join(f"file {printable(path)}" for path in line.files)
            raise ConfigError(f"url: no tunnel is named; allowed: url = {FORMS} [from {files}]")
        url = _read_url(given["url"])
        query = _read_query(url, given["url"], warnings, of_process=not name)
        given = _merge(parser, {**query, **line_given}, environ, section)
        if not command.of_process:
            configs.append(_make_config(name, url, given, warnings))
        if not name:  # the only one
            process_given = {**query, **line_given}
    process = _make_process(_merge(parser, process_given, environ, defaults))
    return Parsed(line.action, process, tuple(configs), tuple(warnings), line)


def _refuse_unknown_variables(environ: Mapping[str, str]) -> None:
    """Refuse what has our prefix and is no setting: a mistyped NODEPASS_TLS would encrypt nothing."""
    known = {name.removeprefix(PREFIX): name for name in (setting.env for setting in SETTINGS)}
    for name, value in environ.items():
        if not name.startswith(PREFIX) or name in _NO_SETTINGS or name in known.values():
            continue
        if _KUBERNETES.fullmatch(name) or (name.endswith("_PORT") and _KUBERNETES_PORT.match(value)):
            continue
        meant = closest(name.removeprefix(PREFIX), known)
        hint = f" (did you mean {known[meant]}?)" if meant else command_line.SHOWS_ALL
        raise ConfigError(f"unknown environment variable {printable(name)}{hint}")


def _read_sections(
    line: Line, environ: Mapping[str, str], warnings: list[str], *, again: bool
) -> tuple[dict[str, Entry], dict[str, dict[str, Entry]]]:
    """Return what the files say for all, and for each tunnel by its name; "" is the only one where none has a name."""
    file = configfile.read(line.files, again=again)
    for each in file.open_to_others:
        if each.key in ("tunnel-key", "tunnel_key") or _HAS_KEY.match(each.text):
            warnings.append(f"tunnel-key can be read by others: chmod 600 keeps them out [from {each.source}]")
    defaults = _collect(file.defaults, BY_NAME, warnings)
    if not file.tunnels:
        _refuse_only(line, ())
        return defaults, {"": defaults}
    for source, present in (
        (command_line.SOURCE, "url" in line.given),
        (f"environment variable {BY_NAME['url'].env}", BY_NAME["url"].env in environ),
        (defaults["url"].source if "url" in defaults else "", "url" in defaults),
    ):
        if present:
            raise ConfigError(f"url: not allowed beside the [tunnel NAME] sections of the file [from {source}]")
    _refuse_only(line, [section.name for section in file.tunnels])
    tunnels = {}
    for section in file.tunnels:
        if line.only in (None, section.name):
            tunnels[section.name] = {**defaults, **_collect(section.entries, _OF_TUNNEL, warnings)}
            if "url" not in tunnels[section.name]:
                raise ConfigError(f"url: missing in [tunnel {section.name}] [from {section.source}]")
    return defaults, tunnels


def _refuse_only(line: Line, names: Sequence[str]) -> None:
    if line.only is not None and line.only not in names:
        there = f"there are {', '.join(names)}" if names else "there is no [tunnel NAME] section"
        hint = did_you_mean(line.only, names) or f"; {there}"
        raise ConfigError(f"only: no tunnel is called {shown(line.only)}{hint} [from {command_line.SOURCE}]")


def _read_url(entry: Entry) -> TunnelURL:
    try:
        return parse_url(entry.text)
    except ConfigError as exc:
        raise ConfigError(f"url: {exc} [from {entry.source}]") from exc


def _read_query(url: TunnelURL, entry: Entry, warnings: list[str], *, of_process: bool) -> dict[str, Entry]:
    """Return the URL's query by setting name; an empty value, as of an unset shell variable, is refused.

    ``of_process``: the URL is the only one, and may hold settings of the process.
    """
    where = "" if entry.source == command_line.SOURCE else f", {entry.source}"
    source = f"URL query{where}"
    keys = [name for name in (BY_NAME if of_process else _OF_TUNNEL) if name != "url"]
    entries = [Entry(key, text, source) for key, text in url.query]
    if url.key is not None:
        entries.append(Entry("tunnel-key", url.key, f"URL{where}"))
    found = _collect(entries, keys, warnings)
    for name, each in found.items():
        if not each.text.strip():
            raise ConfigError(f"{name}: the value is empty; leave the key out for the default [from {source}]")
    return found


def _collect(entries: Iterable[Entry], known: Iterable[str], warnings: list[str]) -> dict[str, Entry]:
    """Index entries by setting name; refuse unknown keys and those given twice."""
    found: dict[str, Entry] = {}
    for entry in entries:
        name = entry.key.replace("_", "-")
        if name in ALIASES:
            warnings.append(f"{entry.key} is read as {ALIASES[name]}, which is its name [from {entry.source}]")
            name = ALIASES[name]
        if name not in known:
            raise ConfigError(f"unknown key {shown(entry.key)}{_hint(name, known)} [from {entry.source}]")
        if name in found:
            first = "" if entry.source == found[name].source else f"; first in {found[name].source}"
            raise ConfigError(f"{name}: given twice{first} [from {entry.source}]")
        found[name] = entry._replace(key=name)
    return found


def _hint(name: str, known: Iterable[str]) -> str:
    if name in command_line.LINE_ONLY:
        return ", an option of the command line only"
    if name in BY_NAME and name != "url":
        return ", which holds for all tunnels: it belongs to [nodepass]"
    if name in LATER_KEYS:
        here = f"; here there is {LATER_KEYS[name]}" if LATER_KEYS[name] else ""
        return f", which belongs to a later NodePass release{here}"
    return did_you_mean(name, known) or command_line.SHOWS_ALL


def _merge(
    parser: configargparse.ArgumentParser,
    given: Mapping[str, Entry],
    environ: Mapping[str, str],
    section: Mapping[str, Entry],
) -> dict[str, Entry]:
    """Let ConfigArgParse choose between what is given (flags and query), the environment and the file."""
    namespace = parser.parse_args(
        [f"--{name}={entry.text}" for name, entry in given.items()],
        env_vars=environ,
        config_file_contents=configfile.format_entries(section.values()),
    )
    sources = {name: entry.source for name, entry in given.items()}
    for origin, settings in parser.get_source_to_settings_dict().items():
        for key, (action, _) in settings.items():
            if origin == "environment_variables":
                sources[action.dest] = f"environment variable {key}"
            elif origin.startswith("config_file"):
                sources[action.dest] = section[key].source
    return {name: Entry(name, vars(namespace)[name], source) for name, source in sources.items()}


def _make_config(name: str, url: TunnelURL, given: Mapping[str, Entry], warnings: list[str]) -> Config:
    given = {each: entry for each, entry in given.items() if not BY_NAME[each].of_process}
    values = _values({each: entry for each, entry in given.items() if each != "url"})
    sources = {each: entry.source for each, entry in given.items()}
    values["limits"] = Limits(**{field: values.pop(field) for field in _LIMITS if field in values})
    config = Config(role=url.role, tunnel=url.tunnel, target=url.target, name=name, sources=sources, **values)
    if config.role == "server" and config.crt and config.tls == 0:
        warnings.append(f"crt and key are not used, as tls is 0 [from {config.source('tls')}]: nothing is encrypted")
    if config.role == "client" and not config.tunnel.host:
        where = f"[from {config.source('url')}]"
        warnings.append(f"the URL names no server before {config.tunnel}: this machine itself is called {where}")
    source = config.source("tunnel-key")
    if source in (command_line.SOURCE, "URL", "URL query"):
        warnings.append(
            f"tunnel-key can be read by everybody on this machine, with ps [from {source}]; in a file it cannot"
        )
    return config


def _make_process(given: Mapping[str, Entry]) -> Process:
    given = {name: entry for name, entry in given.items() if BY_NAME[name].of_process}
    return Process(**_values(given), sources={name: entry.source for name, entry in given.items()})


def _values(given: Mapping[str, Entry]) -> dict[str, Any]:
    """Convert texts, and index them by field."""
    return {BY_NAME[name].field: _convert(BY_NAME[name], entry) for name, entry in given.items()}


def _convert(setting: Setting, entry: Entry) -> Any:
    try:
        if not entry.text.isprintable() or not entry.text:
            text = "the value" if setting.secret else shown(entry.text)
            raise ConfigError(f"{text} is empty or holds control characters")
        return setting.read(entry.text)
    except ConfigError as exc:
        raise ConfigError(f"{setting.name}: {exc} [from {entry.source}]") from exc


def show(process: Process, configs: Iterable[Config]) -> str:
    """Format every setting of every tunnel with its source, as a config file."""
    parts = ["".join(_show_one(process, setting) for setting in SETTINGS if setting.of_process)]
    for config in configs:
        head = f"[tunnel {config.name}]\n" if config.name else ""
        lines = [_show_one(config, BY_NAME[name]) for name in _OF_TUNNEL]
        parts.append(head + "".join(lines))
    return "\n".join(parts)


def _show_one(config: Config | Process, setting: Setting) -> str:
    value, source = config.value(setting.field), config.source(setting.name)
    if isinstance(config, Config) and setting.field == "tls" and source == "default" and config.role == "client":
        least, name = config.tls_demanded
        if least > config.tls:  # as a value it would contradict what demands more
            return configfile.format_line("# tls =", f"default: {name} demands {least}")
    if value is None:
        return configfile.format_line(f"# {setting.name} =", f"{source}: {setting.unset}")
    return configfile.format_entries([Entry(setting.name, setting_text(setting.field, value), source)])
