"""The man page: the parser's options, the commands, and what docs/operations.rst says of signals and exit codes."""

import re
from collections.abc import Iterator
from pathlib import Path

import commands

from nodepass_gevent import __version__
from nodepass_gevent.command_line import COMMANDS, build_parser
from nodepass_gevent.usage import EXAMPLES, USAGE

_OPERATIONS = Path(__file__).resolve().parents[2] / "docs" / "operations.rst"
_ESCAPES = {"\\": "\\e", "-": "\\-", "'": "\\(aq", "`": "\\(ga", "~": "\\(ti", "^": "\\(ha"}
_DESCRIPTION = """\
A server with a public address and a client beside a service hold a control channel; the client keeps connections ready.
A user who comes to the server's public port is connected through one of them to the service. The server decides on TLS;
the client can be told what it has to be.
"""
_FILES = {
    "FILE of --config": "key = value; in [nodepass] for all tunnels, in [tunnel NAME] for one. None is read unasked.",
    "share/doc/nodepass-gevent/examples/nodepass.conf": "An example, as nodepass generate config prints it.",
}
_ENVIRONMENT = {
    "of each option": "Stands with it, above. A blank value is none.",
    "SSL_CERT_FILE, SSL_CERT_DIR": "Authorities in place of the system's, for tls=2 without --ca.",
    "NO_COLOR, FORCE_COLOR": "No colours in the log on a terminal; colours elsewhere, too.",
}


def page() -> str:
    """Give the page in the roff of man(7)."""
    parser = build_parser()
    order, _, examples = EXAMPLES.partition("\n\nexamples:\n")
    formatter = parser._get_formatter()
    parts = [
        f'.TH NODEPASS 1 "" "nodepass-gevent {__version__}" "User Commands"\n.ad l\n.nh\n',
        f".SH NAME\nnodepass \\- {_text(_lower_first(parser.description))}\n",
        ".SH SYNOPSIS\n.nf\n" + "".join(f"{_text(line.strip())}\n" for line in USAGE.splitlines()) + ".fi\n",
        f".SH DESCRIPTION\n{_text(_DESCRIPTION)}.PP\n{_text(order)}\n",
        ".SH COMMANDS\n",
        *(_item(" ".join((name, *command.words)), commands.HELP[name]) for name, command in COMMANDS.items()),
        ".SH OPTIONS\n",
    ]
    for group in parser._action_groups:
        if group._group_actions:
            parts.append(f".SS {_text(group.title.capitalize() if group.title.islower() else group.title)}\n")
        for action in group._group_actions:
            names = action.option_strings or [action.metavar]
            value = f" {action.metavar}" if action.option_strings and action.nargs != 0 else ""
            parts.append(_item(", ".join(names), formatter._expand_help(action), value))
    for title, rows in (
        ("SIGNALS", _table("signal")),
        ("EXIT STATUS", _table("code")),
        ("ENVIRONMENT", _ENVIRONMENT.items()),
        ("FILES", _FILES.items()),
    ):
        parts += [f".SH {title}\n", *(_item(name, text) for name, text in rows)]
    parts.append(".SH EXAMPLES\n.nf\n")
    for line in examples.splitlines():
        command, _, comment = line.strip().partition("    # ")
        said = f"# {_text(comment)}\n" if comment else ""
        parts.append(f"{said}{_text(command)}\n.sp\n")
    parts.append(".fi\n.SH SEE ALSO\n.BR supervisord (1),\n.BR systemd.service (5)\n")
    return "".join(parts)


def _lower_first(text: str) -> str:
    """Make a sentence what stands behind a name."""
    return (text[0].lower() + text[1:]).rstrip(".")


def _text(text: str) -> str:
    """Escape what would mean something to roff, at the beginning of a line too."""
    escaped = "".join(_ESCAPES.get(char, char) for char in text)
    return re.sub(r"^(?=\.)", r"\\&", escaped, flags=re.MULTILINE)


def _item(name: str, text: str, value: str = "") -> str:
    value = f"\\fI{_text(value)}\\fR" if value else ""
    return f".TP\n\\fB{_text(name)}\\fR{value}\n{_text(text)}\n"


def _table(heading: str) -> Iterator[tuple[str, str]]:
    """Read the rows of a table of two columns, by the heading of its first one; a row goes on where that is blank."""
    text = re.search(rf"^(=+ =+)\n{heading} .*\n\1\n((?:.+\n)+?)\1\n", _OPERATIONS.read_text(), re.MULTILINE)
    width = text[1].index(" ")
    for row in re.split(r"\n(?=\S)", text[2].replace("``", "")):
        lines = row.splitlines()
        yield lines[0][:width].strip(), " ".join(line[width:].strip() for line in lines)
