"""Small scripts that log, each in a process of its own, and what a reader of that process sees."""

import contextlib
import os
import pty
import re
import subprocess
import sys

import gevent

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}  ([A-Z]+)  (.*)")
PREAMBLE = """
from gevent import monkey
monkey.patch_all()
import logging, os, sys
from nodepass_gevent import log as logs
log = logging.getLogger("nodepass_gevent.script")
"""
FIVE = """
logs.setup(sys.argv[1])
for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL):
    log.log(level, "message %d", level)
logs.flush()
"""
FLOOD = """
logs.setup("info")
for number in range(5_000):
    log.info("%0200d", number)
print("flooded", file=sys.stderr, flush=True)
"""
TIMEOUT_S = 30


def start(code, *arguments, **options):
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    options["env"] = {name: value for name, value in os.environ.items() if "COLOR" not in name} | options.get("env", {})
    return subprocess.Popen([sys.executable, "-W", "error", "-c", PREAMBLE + code, *arguments], **options)


@contextlib.contextmanager
def running(code, *arguments, **options):
    """Run a script; end it, and close its pipes, with the block."""
    with start(code, *arguments, **options) as process, gevent.Timeout(TIMEOUT_S):
        try:
            yield process
        finally:
            process.kill()


def output(code, *arguments, **options):
    """Run a script to its end; give its standard output, and fail when it said anything on stderr."""
    with running(code, *arguments, **options) as process:
        out, err = process.communicate()
        assert (process.returncode, err) == (0, b"")
        return out.decode()


def levels_and_messages(text):
    return [LINE.fullmatch(line).groups() for line in text.splitlines()]


def on_a_terminal(code, *arguments, **options):
    """Run a script whose standard output is a terminal; give what stood there."""
    master, terminal = pty.openpty()
    try:
        with running(code, *arguments, stdout=terminal, **options) as process:
            process.communicate()
        os.set_blocking(master, False)
        return os.read(master, 65536).decode()
    finally:
        os.close(master)
        os.close(terminal)
