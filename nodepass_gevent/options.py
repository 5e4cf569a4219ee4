"""How the value of each setting is found: flag > URL query > environment > file > default.

The parser, the keys of query and file, the conversion and --show-config all follow from the table in
``settings``. ConfigArgParse merges the sources. Nothing here prints, exits or starts anything.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn

import configargparse

from . import configfile
from .config import Config, Limits, setting_text
from .configfile import Entry
from .errors import ConfigError
from .settings import BY_NAME, SETTINGS, Setting
from .url import FORMS, TunnelURL, parse_url
from .usage import EXAMPLES, USAGE
from .values import did_you_mean, printable, shown

_LIMITS = [each.name for each in fields(Limits)]
_CONFIGURATION = "configuration"
# fmt: off
LATER_KEYS = frozenset(("min", "max", "mode", "dial", "read", "rate", "slot", "proxy", "block", "dns", "notcp",
                        "noudp", "type", "quic", "pool"))
# fmt: on
_HAS_KEY = re.compile(r"(?i)(?:server|client)://[^/?]*@")
ALIASES = {"cert": "crt"}  # the original's install script writes cert, the original reads crt
COMMANDS = ("genkey",)
LINE_ONLY = ("config", "show-config", "version", "help")


class _Parser(configargparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(re.split(" ['\"]", message)[0])  # argparse quotes the value, which may be a secret


def build_parser() -> configargparse.ArgumentParser:
    """Build the command line's parser; it leaves every value as text, and what is not given as None."""
    parser = _Parser(
        prog="nodepass",
        usage=USAGE,
        description="A TCP and UDP tunnel with a pool of one-time data connections.",
        epilog=EXAMPLES,
        formatter_class=configargparse.RawDescriptionHelpFormatter,
        config_file_parser_class=configfile.OneSection,
        add_env_var_help=False,
        add_help=False,
        allow_abbrev=False,
    )
    names = dict.fromkeys([setting.group for setting in SETTINGS] + [_CONFIGURATION])
    groups = {name: parser.add_argument_group(name) for name in names}
    groups[BY_NAME["url"].group].add_argument("positional", nargs="?", metavar="URL", help=FORMS)
    for setting in SETTINGS:
        groups[setting.group].add_argument(
            f"--{setting.name}",
            dest=setting.name,
            env_var=setting.env,
            metavar=setting.metavar,
            help=f"{setting.help} (environment: {setting.env}, default: {setting.default})",
        )
    group = groups[_CONFIGURATION]
    group.add_argument("-c", "--config", metavar="FILE", help="read settings and tunnels from a file")
    group.add_argument("--show-config", action="store_true", help="print every setting with its source, and exit")
    group.add_argument("-V", "--version", action="store_true", help="print the version, and exit")
    group.add_argument("-h", "--help", action="store_true", help="print this, and exit")
    return parser


@dataclass(frozen=True)
class Parsed:
    """What the command line asks for: run, show-config, or, without configs, genkey, help, version or usage."""

    action: str
    configs: tuple[Config, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Line:
    """The command line alone."""

    action: str
    file: str | None
    given: Mapping[str, Entry]


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> Parsed:
    """Merge all sources into one Config per tunnel; raise ConfigError. A blank environment value is none."""
    parser = build_parser()
    line = _read_line(parser, argv)
    if line.action in ("help", "version", *COMMANDS):
        return Parsed(line.action)
    environ = {name: value for name, value in environ.items() if value.strip()}
    warnings: list[str] = []
    configs = []
    for name, section in _read_sections(line, environ, warnings).items():
        given = _merge(parser, line.given, environ, section)
        if "url" not in given:
            if line.file is None:
                return Parsed("usage")
            raise ConfigError(f"url: no tunnel is named; allowed: url = {FORMS} [from file {printable(line.file)}]")
        url = _read_url(given["url"])
        given = _merge(parser, {**_read_query(url, given["url"], warnings), **line.given}, environ, section)
        configs.append(_make_config(name, url, given, warnings))
    return Parsed(line.action, tuple(configs), tuple(warnings))


def _read_line(parser: configargparse.ArgumentParser, argv: Sequence[str]) -> _Line:
    namespace, unknown = parser.parse_known_args(list(argv), env_vars={}, config_file_contents="")
    values = vars(namespace)
    action = next((name for name in ("help", "version", "show_config") if values[name]), "run").replace("_", "-")
    if action in ("help", "version"):
        return _Line(action, None, {})
    if values["positional"] in COMMANDS:
        if len(argv) > 1:
            raise ConfigError(f"{values['positional']} is followed by nothing [from command line]")
        return _Line(values["positional"], None, {})
    if values["positional"] is not None:
        _refuse_command(values["positional"])
        if values["url"] is not None:
            raise ConfigError("url: given twice, as an argument and as --url [from command line]")
        values["url"] = values["positional"]
    if unknown:
        word = unknown[0].partition("=")[0]
        hint = did_you_mean(word, [f"--{name}" for name in (*BY_NAME, *LINE_ONLY)])
        raise ConfigError(f"unknown option or argument {shown(word)}{hint} [from command line]")
    texts = {name: values[name] for name in BY_NAME if values[name] is not None}
    given = {name: Entry(name, text, "command line") for name, text in texts.items()}
    return _Line(action, namespace.config, given)


def _refuse_command(word: str) -> None:
    """Keep words that are no URL free for commands to come."""
    if "://" not in word:
        address = ":" in word and not word.startswith(("server:", "client:"))
        hint = "an address stands behind server:// or client://" if address else f"a tunnel is {FORMS}"
        hint = did_you_mean(word, COMMANDS) or f"; {hint}"
        raise ConfigError(f"unknown command {shown(word)}{hint} [from command line]")


def _read_sections(line: _Line, environ: Mapping[str, str], warnings: list[str]) -> dict[str, dict[str, Entry]]:
    """Return the file's settings for each tunnel by its name; "" is the only tunnel of a file without sections."""
    if line.file is None:
        return {"": {}}
    file = configfile.read(line.file)
    if file.open_to_others:
        keys = [
            each for each in file.entries() if each.key in ("tunnel-key", "tunnel_key") or _HAS_KEY.match(each.text)
        ]
        warnings += [
            f"tunnel-key can be read by others: chmod 600 keeps them out [from {each.source}]" for each in keys
        ]
    defaults = _collect(file.defaults, BY_NAME, warnings)
    if not file.tunnels:
        return {"": defaults}
    for source, present in (
        ("command line", "url" in line.given),
        (f"environment variable {BY_NAME['url'].env}", BY_NAME["url"].env in environ),
        (defaults["url"].source if "url" in defaults else "", "url" in defaults),
    ):
        if present:
            raise ConfigError(f"url: not allowed beside the [tunnel NAME] sections of the file [from {source}]")
    tunnels = {}
    for section in file.tunnels:
        tunnels[section.name] = {**defaults, **_collect(section.entries, BY_NAME, warnings)}
        if "url" not in tunnels[section.name]:
            raise ConfigError(f"url: missing in [tunnel {section.name}] [from {section.source}]")
    return tunnels


def _read_url(entry: Entry) -> TunnelURL:
    try:
        return parse_url(entry.text)
    except ConfigError as exc:
        raise ConfigError(f"url: {exc} [from {entry.source}]") from exc


def _read_query(url: TunnelURL, entry: Entry, warnings: list[str]) -> dict[str, Entry]:
    """Return the URL's query by setting name; an empty value, as of an unset shell variable, is refused."""
    source = "URL query" if entry.source == "command line" else f"URL query, {entry.source}"
    keys = [name for name in BY_NAME if name != "url"]
    entries = [Entry(key, text, source) for key, text in url.query]
    if url.key is not None:
        entries.append(Entry("tunnel-key", url.key, source.replace(" query", "")))
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
            raise ConfigError(f"{name}: given twice; first in {found[name].source} [from {entry.source}]")
        found[name] = entry._replace(key=name)
    return found


def _hint(name: str, known: Iterable[str]) -> str:
    if name in LINE_ONLY:
        return ", an option of the command line only"
    if name in LATER_KEYS:
        return ", which belongs to a later NodePass release"
    return did_you_mean(name, known) or "; nodepass --help shows all of them"


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
    values = {BY_NAME[each].field: _convert(BY_NAME[each], entry) for each, entry in given.items() if each != "url"}
    sources = {each: entry.source for each, entry in given.items()}
    values["limits"] = Limits(**{field: values.pop(field) for field in _LIMITS if field in values})
    config = Config(role=url.role, tunnel=url.tunnel, target=url.target, name=name, sources=sources, **values)
    if config.role == "server" and config.crt and config.tls == 0:
        warnings.append(f"crt and key are not used, as tls is 0 [from {config.source('tls')}]: nothing is encrypted")
    source = config.source("tunnel-key")
    if source in ("command line", "URL", "URL query"):
        warnings.append(
            f"tunnel-key can be read by everybody on this machine, with ps [from {source}]; in a file it cannot"
        )
    return config


def _convert(setting: Setting, entry: Entry) -> Any:
    try:
        if not entry.text.isprintable() or not entry.text:
            text = "the value" if setting.secret else shown(entry.text)
            raise ConfigError(f"{text} is empty or holds control characters")
        return setting.read(entry.text)
    except ConfigError as exc:
        raise ConfigError(f"{setting.name}: {exc} [from {entry.source}]") from exc


def show(configs: Iterable[Config]) -> str:
    """Format every setting of every tunnel with its source, as a config file."""
    return "\n".join(_show_one(config) for config in configs)


def _show_one(config: Config) -> str:
    lines = [f"[tunnel {config.name}]\n"] if config.name else []
    for setting in SETTINGS:
        value, source = config.value(setting.field), config.source(setting.name)
        if value is None:
            lines.append(configfile.format_line(f"# {setting.name} =", f"{source}: {setting.unset}"))
        else:
            lines.append(configfile.format_entries([Entry(setting.name, setting_text(setting.field, value), source)]))
    return "".join(lines)
