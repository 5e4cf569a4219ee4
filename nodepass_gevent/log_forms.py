"""The two forms of a log line: the original's text, and one JSON object per line. Knows neither level nor file.

Text is ``2006-01-02 15:04:05.000  LEVEL  [tunnel] message``. In JSON, ``time``, ``level``, ``tunnel`` and ``message``
stand in every line; what is logged with ``extra`` stands beside them, and a traceback in ``exception``.
"""

import logging
from datetime import datetime
from typing import Any

import colorlog
from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

TUNNEL = f"{__package__}.tunnel"  # the logger of a tunnel without a name; a named one's has its name behind a dot

_COLORS = {"DEBUG": "blue", "INFO": "green", "WARN": "yellow", "ERROR": "red", "FATAL": "bold_red"}
_TEXT = "%(asctime)s.%(msecs)03d  {}%(levelname)s{}  %(place)s%(message)s"
_TIME = "%Y-%m-%d %H:%M:%S"


def make_formatter(form: str, *, colored: bool) -> logging.Formatter:
    """Make the formatter for ``text`` or ``json``, of records that are placed; ``colored`` is for text alone."""
    if form == "json":
        return _JSON()
    if not colored:
        return logging.Formatter(_TEXT.format("", ""), _TIME)
    return colorlog.ColoredFormatter(
        _TEXT.format("%(log_color)s", "%(reset)s"),
        datefmt=_TIME,
        log_colors=_COLORS,
        reset=False,  # it stands in the form already
        force_color=True,
    )


def place(record: logging.LogRecord) -> str:
    """Note in a record which tunnel it is about, and give its name: empty for the process, and where none has one."""
    name = record.name.removeprefix(f"{TUNNEL}.") if record.name.startswith(f"{TUNNEL}.") else ""
    record.tunnel, record.place = name, f"[{name}] " if name else ""
    return name


class _JSON(JsonFormatter):
    def __init__(self) -> None:
        super().__init__(
            ["tunnel", "message"],
            rename_fields={"exc_info": "exception"},
            reserved_attrs=[*RESERVED_ATTRS, "place"],
            json_ensure_ascii=False,
        )

    def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        moment = datetime.fromtimestamp(record.created).astimezone()
        log_data["time"] = moment.isoformat(timespec="milliseconds")
        log_data["level"] = record.levelname.lower()
        super().add_fields(log_data, record, message_dict)
