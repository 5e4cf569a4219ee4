"""The command line alone: its parser, the commands, and the words and options that each of them takes."""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import configargparse

from . import configfile
from .configfile import Entry
from .errors import ConfigError
from .settings import BY_NAME, SETTINGS
from .url import FORMS
from .usage import EXAMPLES, USAGE
from .values import did_you_mean, shown

_CONFIGURATION = "configuration"
SOURCE = "command line"
SHOWS_ALL = "; nodepass --help shows all of them"
LINE_ONLY = ("config", "only", "show-config", "version", "help")  # options that are no settings
_LACKS_VALUE = re.compile("argument (?:-[a-z]/)?(--[a-z-]+): expected one argument")  # argparse's words


@dataclass(frozen=True)
class Command:
    """A word that stands in the place of running tunnels."""

    words: tuple[str, ...] = ()  # what follows it, in this order
    flags: Mapping[str, str] = field(default_factory=dict)  # own options without a value, and their help
    options: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # own ones with a value: its name, and help
    alone: bool = False  # it takes no setting
    numbered: bool = False  # %(process_num)d stands for a number, as supervisord has it
    of_process: bool = False  # it needs no tunnel, only what is said for all of them


COMMANDS: Mapping[str, Command] = {
    "genkey": Command(alone=True),
    "check": Command(flags={"json": "check: print what was found as JSON"}),
    "generate config": Command(alone=True),
    "generate supervisor": Command(
        words=("NAME",),
        options={
            "numprocs": ("N", "generate supervisor: so many processes; %%(process_num)d is the number of each"),
            "log-dir": ("DIR", "generate supervisor: where supervisord keeps the log (default: /var/log)"),
        },
        numbered=True,
    ),
    "generate systemd": Command(
        words=("NAME",), flags={"user": "generate systemd: a unit for a user's own systemd, systemctl --user"}
    ),
    "generate systemd-template": Command(alone=True),
    "status": Command(
        flags={"json": "status: print /status.json", "watch": "status: again and again, until Ctrl-C"}, of_process=True
    ),
    "health": Command(flags={"ready": "health: and every tunnel has its peer"}, of_process=True),
}
_NO_COMMAND = Command()
_FIRST_WORDS = tuple(dict.fromkeys(name.partition(" ")[0] for name in COMMANDS))
PROCESS_NUM = re.compile(r"(%\(process_num\)0?[0-9]{0,2}[ds])")


def command_of(action: str) -> Command:
    """Give what an action takes: a command, or what is none, as to run tunnels."""
    return COMMANDS.get(action, _NO_COMMAND)


@dataclass(frozen=True)
class Line:
    """What the command line says: a command or "run", files, settings."""

    action: str
    files: tuple[str, ...] = ()
    only: str | None = None  # the name of a tunnel
    given: Mapping[str, Entry] = field(default_factory=dict)
    words: tuple[str, ...] = ()  # of the command
    flags: frozenset[str] = frozenset()
    options: Mapping[str, str] = field(default_factory=dict)
    rest: tuple[str, ...] = ()  # what is behind the command, its words and flags

    def numbered(self, number: int) -> dict[str, Entry]:
        """Give the settings as they are for one of several processes, where the command has such."""
        if not command_of(self.action).numbered:
            return dict(self.given)
        return {name: entry._replace(text=numbered(entry.text, number)) for name, entry in self.given.items()}


class _Parser(configargparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        lacking = _LACKS_VALUE.fullmatch(message)
        if lacking:
            option = lacking[1]
            metavar = self._option_string_actions[option].metavar
            raise ConfigError(f"{option} is followed by {metavar} [from {SOURCE}]")
        raise ConfigError(re.split(" ['\"]", message)[0])  # argparse quotes the value, which may be a secret


class _Once(argparse.Action):
    """Refuses an option that is given twice, as a query or a file refuses a key: which one is meant?"""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            raise ConfigError(f"{self.dest}: given twice [from {SOURCE}]")
        setattr(namespace, self.dest, _whole(values))


def _whole(value: Any) -> Any:
    """Give back a value that is ``--``: argparse takes that away and leaves an empty list."""
    return "--" if value == [] else value


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
            action=_Once,
            dest=setting.name,
            env_var=setting.env,
            metavar=setting.metavar,
            help=f"{setting.help} (environment: {setting.env}, default: {setting.default})",
        )
    group = groups[_CONFIGURATION]
    add = group.add_argument
    add("-c", "--config", metavar="FILE", action="append", help="read a file, or all *.conf of a directory; repeatable")
    add("--only", metavar="NAME", action=_Once, help="run this [tunnel NAME] alone")
    add("--show-config", action="store_true", help="print every setting with its source, and exit")
    add("-V", "--version", action="store_true", help="print the version, and exit")
    add("-h", "--help", action="store_true", help="print this, and exit")
    flags: dict[str, list[str]] = {}
    for command in COMMANDS.values():
        for name, text in command.flags.items():
            flags.setdefault(name, []).append(text)
        for name, (metavar, text) in command.options.items():
            add(f"--{name}", dest=name, metavar=metavar, action=_Once, help=text)
    for name, texts in flags.items():
        add(f"--{name}", action="store_true", help="; ".join(texts))
    return parser


def numbered(text: str, number: int) -> str:
    """Put a number where ``%(process_num)d`` stands."""
    return PROCESS_NUM.sub(lambda match: match[0] % {"process_num": number}, text)


def _split_command(argv: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Give the command, or "run", and the arguments behind it."""
    for count in (2, 1):
        if " ".join(argv[:count]) in COMMANDS:
            return " ".join(argv[:count]), tuple(argv[count:])
    if argv and argv[0] in _FIRST_WORDS and not {"-h", "--help"} & set(argv):
        kinds = [name.partition(" ")[2] for name in COMMANDS if name.startswith(f"{argv[0]} ")]
        wrong = f", not by {shown(argv[1])}{did_you_mean(argv[1], kinds)}" if len(argv) > 1 else ""
        raise ConfigError(f"{argv[0]} is followed by {', '.join(kinds[:-1])} or {kinds[-1]}{wrong} [from {SOURCE}]")
    return "run", tuple(argv)


def read(parser: configargparse.ArgumentParser, argv: Sequence[str]) -> Line:
    """Split a command line; raise ConfigError for words and options that nobody knows."""
    action, behind = _split_command(argv)
    command = command_of(action)
    words, rest = behind[: len(command.words)], behind[len(command.words) :]
    namespace, unknown = parser.parse_known_args(list(rest), env_vars={}, config_file_contents="")
    values = vars(namespace)
    for name in ("help", "version"):
        if values[name]:
            return Line(name)
    lacking = len(words) < len(command.words) or any(word.startswith("-") or "://" in word for word in words)
    if lacking or (command.alone and rest):
        raise ConfigError(f"{action} is followed by {' '.join(command.words) or 'nothing'} [from {SOURCE}]")
    values["url"] = _url(action, values["positional"], values["url"], unknown)
    flags = frozenset(name for each in COMMANDS.values() for name in each.flags if values[name])
    own = {name: values[name] for each in COMMANDS.values() for name in each.options if values[name] is not None}
    alien = (flags - set(command.flags)) | (own.keys() - set(command.options))
    _refuse_unknown(command, unknown or [f"--{name}" for name in sorted(alien)])
    given = {name: Entry(name, values[name], SOURCE) for name in BY_NAME if values[name] is not None}
    rest = tuple(word for word in rest if word.removeprefix("--") not in flags)
    if values["show_config"] and action == "run":
        action = "show-config"
    return Line(action, tuple(map(_whole, namespace.config or ())), namespace.only, given, words, flags, own, rest)


def _url(action: str, word: str | None, option: str | None, unknown: Sequence[str]) -> str | None:
    """Give the URL, which is an argument or --url; refuse a word that is none, and both at once."""
    if word is None:
        return option
    if command_of(action).of_process and "://" not in word:
        raise ConfigError(f"{action}: whom to ask says --status HOST:PORT, or --config FILE [from {SOURCE}]")
    if not any(other.startswith("--") for other in unknown):  # whose value this may be
        _refuse_command(word)
    if option is not None:
        raise ConfigError(f"url: given twice, as an argument and as --url [from {SOURCE}]")
    return word


def _refuse_unknown(command: Command, unknown: Sequence[str]) -> None:
    """Refuse the first option or argument that nobody knows, or that belongs to another command."""
    if not unknown:
        return
    word = unknown[0].partition("=")[0]
    owners = [name for name, each in COMMANDS.items() if word.removeprefix("--") in {*each.flags, *each.options}]
    known = [f"--{name}" for name in (*BY_NAME, *LINE_ONLY, *command.flags, *command.options)]
    hint = f", which belongs to {' and '.join(owners)}" if owners else did_you_mean(word, known)
    if word.startswith("--"):
        hint = hint or SHOWS_ALL
    raise ConfigError(f"unknown option or argument {shown(word)}{hint} [from {SOURCE}]")


def _refuse_command(word: str) -> None:
    """Keep words that are no URL free for commands to come."""
    if word in _FIRST_WORDS:
        raise ConfigError(f"{word}: a command stands first [from {SOURCE}]")
    if "://" not in word:
        address = ":" in word and not word.startswith(("server:", "client:"))
        hint = "an address stands behind server:// or client://" if address else f"a tunnel is {FORMS}"
        hint = "; --help shows all" if word == "help" else did_you_mean(word, _FIRST_WORDS) or f"; {hint}"
        raise ConfigError(f"unknown command {shown(word)}{hint} [from {SOURCE}]")
