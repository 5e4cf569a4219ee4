"""The config file: ``key = value`` lines in ``[nodepass]`` and ``[tunnel NAME]`` sections.

Lines before the first section belong to ``[nodepass]``, whose settings hold for every tunnel. ``#`` and ``;`` start
a comment line, a blank and ``#`` a comment behind a value. A value in double quotes is taken as it stands, ``""``
being one quote. No interpolation, no lists. Knows no setting: which keys there are is not decided here.
"""

import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TextIO

import configargparse

from .errors import ConfigError, reason
from .files import open_at_once
from .values import did_you_mean, printable, shown

MAX_FILE = 1 << 20  # bytes; a thousand tunnels have about 300 KiB
SHORTEST_SECRET = 16  # characters
_NO_KEY = re.compile(r"[\s:]")  # is in no setting's name
_BLANK = " \t\r"
_SECTION = re.compile(r"\[[ \t]*(?:nodepass|tunnel[ \t]+([^\]]*?))[ \t]*\][ \t]*(?:[#;].*)?")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")  # of a tunnel
NAMES_ALLOWED = "1 to 64 ASCII letters, digits, '_', '.' or '-', the first a letter or digit"  # the same in words
_QUOTED = re.compile(r'"((?:[^"]|"")*)"[ \t]*(?:#.*)?')
_COMMENT = re.compile(r"(?:^|[ \t]+)#.*")


class Entry(NamedTuple):
    """One setting as somebody wrote it."""

    key: str
    text: str
    source: str


class Section(NamedTuple):
    """The settings of one ``[tunnel NAME]``."""

    name: str
    source: str
    entries: list[Entry]


class Sections(NamedTuple):
    """All that the files say."""

    defaults: list[Entry]
    tunnels: list[Section]
    open_to_others: list[Entry]  # from files that can be read by more than their owner and root


def read(paths: Sequence[str], *, again: bool = False) -> Sections:
    """Read config files, and every ``*.conf`` of directories by name, as if they were one; raise ConfigError.

    They are not read ``again`` where they are no regular files: a pipe nobody writes to would block the whole process.
    """
    whole, seen = Sections([], [], []), dict[str, str]()
    for path in _files(paths):
        text, label, open_to_others = _read_one(path, again=again)
        _parse_into(whole, seen, text, label)
        if open_to_others:
            entries = whole.defaults + [entry for section in whole.tunnels for entry in section.entries]
            whole.open_to_others.extend(entry for entry in entries if entry.source.startswith(f"{label}:"))
    return whole


def _files(paths: Sequence[str]) -> Iterator[str]:
    for path in paths:
        if not os.path.isdir(path):
            yield path
            continue
        try:
            names = sorted(name for name in os.listdir(path) if name.endswith(".conf") and not name.startswith("."))
        except OSError as exc:
            raise ConfigError(f"config: cannot read the directory: {reason(exc)} [from {printable(path)}]") from exc
        if not names:
            raise ConfigError(f"config: no file in the directory ends in .conf [from {printable(path)}]")
        yield from (os.path.join(path, name) for name in names)


def _read_one(path: str, *, again: bool) -> tuple[str, str, bool]:
    """Give a file's text, what its entries are said to be from, and whether others can read it."""
    label = printable(path)
    try:
        with open(path, "rb", opener=open_at_once if again else None) as file:
            mode = os.fstat(file.fileno()).st_mode
            if again and not stat.S_ISREG(mode):
                raise ConfigError(f"config: only a regular file is read again, no pipe [from file {label}]")
            open_to_others = bool(mode & (stat.S_IRGRP | stat.S_IROTH))
            data = file.read(MAX_FILE + 1)
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the path
        raise ConfigError(f"config: cannot read the file: {reason(exc)} [from file {label}]") from exc
    if len(data) > MAX_FILE:
        raise ConfigError(f"config: the file is larger than {MAX_FILE} bytes [from file {label}]")
    try:
        return data.decode("utf-8-sig"), f"file {label}", open_to_others
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        raise ConfigError(f"config: the file is not UTF-8 text [from file {label}:{line}]") from exc


def parse(text: str, label: str) -> Sections:
    """Parse the text of a config file; ``label`` and the line number name each entry's source."""
    sections = Sections([], [], [])
    _parse_into(sections, {}, text, label)
    return sections


def _parse_into(sections: Sections, seen: dict[str, str], text: str, label: str) -> None:
    """Add what a file says to ``sections``; ``seen`` has the sources of the sections so far."""
    entries = sections.defaults
    for number, line in enumerate(text.split("\n"), start=1):
        line, source = line.strip(_BLANK), f"{label}:{number}"
        if not line or line[0] in "#;":
            continue
        if line[0] != "[":
            entries.append(_entry(line, source))
            continue
        name = _section_name(line, source)
        if name in seen:
            raise ConfigError(f"section {shown(line)} is there twice; first in {seen[name]} [from {source}]")
        seen[name] = source
        entries = sections.defaults
        if name:
            entries = []
            sections.tunnels.append(Section(name, source, entries))


def _section_name(line: str, source: str) -> str:
    """Return the tunnel's name, or "" for ``[nodepass]``."""
    match = _SECTION.fullmatch(line)
    if "]" not in line:
        raise ConfigError(f"section {shown(line)} does not end: ] is missing [from {source}]")
    if not match:
        nameless = line.strip(f"[]{_BLANK}").lower() == "tunnel"  # of which the guess would tell nothing new
        hint = "" if nameless else did_you_mean(line, ("[nodepass]", "[tunnel name]"))
        raise ConfigError(f"unknown section {shown(line)}{hint}; allowed: [nodepass], [tunnel NAME] [from {source}]")
    name = match[1]
    if name is not None and not NAME.fullmatch(name):
        raise ConfigError(f"section: {shown(name)} is not a tunnel's name; allowed: {NAMES_ALLOWED} [from {source}]")
    return name or ""


def _entry(line: str, source: str) -> Entry:
    key, equals, rest = line.partition("=")
    key, rest = key.rstrip(_BLANK), rest.strip(_BLANK)
    is_setting = equals and not _NO_KEY.search(key)
    if not is_setting and len(line) >= SHORTEST_SECRET:  # perhaps a tunnel key, so it is not shown
        raise ConfigError(f"the line is not a name, = and a value [from {source}]")
    if rest.startswith('"'):
        match = _QUOTED.fullmatch(rest)
        if not match:
            raise ConfigError(f"{shown(key)}: the quoted value does not end, or is followed by more [from {source}]")
        text = match[1].replace('""', '"')
    else:
        text = _COMMENT.sub("", rest)
    if not key or not text:
        raise ConfigError(f"{shown(key if equals else line)} is not followed by = and a value [from {source}]")
    return Entry(key, text, source)


def format_entries(entries: Iterable[Entry]) -> str:
    """Format settings, with their sources, so that ``parse`` reads them back."""
    return "".join(format_line(f"{entry.key} = {_quoted(entry.text)}", entry.source) for entry in entries)


def format_line(line: str, comment: str) -> str:
    """Format a line with a comment behind it."""
    return f"{line:<40} # {comment}\n"


def _quoted(text: str) -> str:
    plain = text and text[0] not in '"#' and text == text.strip(_BLANK) and not _COMMENT.search(text)
    return text if plain else '"' + text.replace('"', '""') + '"'


class OneSection(configargparse.ConfigFileParser):
    """The same syntax for ConfigArgParse, which is given one tunnel's settings at a time."""

    def get_syntax_description(self) -> str:
        return "key = value"

    def parse(self, stream: TextIO) -> dict[str, str]:
        return {entry.key: entry.text for entry in parse(stream.read(), "section").defaults}
