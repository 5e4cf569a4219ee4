"""Completion scripts by shtab, which knows parsers with subcommands: such a parser is made of ours and its commands."""

import argparse

import commands
import shtab

from nodepass_gevent.command_line import COMMANDS, Command, build_parser
from nodepass_gevent.settings import BY_NAME

_OURS = {action.option_strings[-1][2:]: action for action in build_parser()._actions if action.option_strings}
_OF_COMMANDS = {name for command in COMMANDS.values() for name in (*command.flags, *command.options)}
_EVERYWHERE = ("config", "only")  # of the options that are no settings


def script(shell: str) -> str:
    """Give the script for bash, zsh or fish."""
    parser = argparse.ArgumentParser(prog="nodepass", add_help=False)
    _add_options(parser, [name for name in _OURS if name not in _OF_COMMANDS])
    places = {"": parser.add_subparsers(dest="command")}
    for name, command in COMMANDS.items():
        group, _, word = name.rpartition(" ")
        if group not in places:
            made = places[""].add_parser(group, add_help=False, help=commands.GROUPS[group])
            places[group] = made.add_subparsers(dest=group)
        below = places[group].add_parser(word, add_help=False, help=commands.HELP[name])
        for each in command.words:
            below.add_argument(each)
        _add_options(below, _options_of(command))
    return shtab.complete(parser, shell)


def _options_of(command: Command) -> list[str]:
    if command.alone:
        return []
    settings = [name for name in BY_NAME if BY_NAME[name].of_process or not command.of_process]
    return [*settings, *_EVERYWHERE, *command.flags, *command.options]


def _add_options(parser: argparse.ArgumentParser, names: list[str]) -> None:
    for name in names:
        ours = _OURS[name]
        text = BY_NAME[name].help if name in BY_NAME else ours.help
        if ours.nargs == 0:
            parser.add_argument(*ours.option_strings, help=text, action="store_true")
            continue
        added = parser.add_argument(*ours.option_strings, help=text)
        if "FILE" in ours.metavar:
            added.complete = shtab.FILE
        elif ours.metavar == "DIR":
            added.complete = shtab.DIRECTORY
        elif "|" in ours.metavar:
            added.choices = ours.metavar.split("|")
