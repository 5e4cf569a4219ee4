"""Lines as a reader of the process sees them: each test runs a small script of its own."""

import contextlib
import os
import pty
import re
import select
import subprocess
import sys

import gevent
import pytest

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


def test_a_line_has_the_form_of_the_original():
    assert levels_and_messages(output(FIVE, "debug")) == [
        ("DEBUG", "message 10"),
        ("INFO", "message 20"),
        ("WARN", "message 30"),
        ("ERROR", "message 40"),
        ("FATAL", "message 50"),
    ]


@pytest.mark.parametrize(("level", "shown"), [("debug", 5), ("info", 4), ("warn", 3), ("error", 2), ("fatal", 1)])
def test_a_level_hides_what_is_below_it(level, shown):
    assert len(levels_and_messages(output(FIVE, level))) == shown


def test_the_level_can_change_while_running():
    code = """
logs.setup("error")
logs.set_level("info")
log.info("a")
logs.set_level("warn")
log.info("b")
logs.flush()
"""
    assert levels_and_messages(output(code)) == [("INFO", "a")]


def test_a_second_setup_does_not_write_lines_twice():
    code = 'logs.setup("error")\nlogs.setup("info")\nlog.info("once")\nlogs.flush()'
    assert levels_and_messages(output(code)) == [("INFO", "once")]


def test_only_lines_of_this_package_are_written():
    code = 'logs.setup("debug")\nlogging.getLogger("other").info("not ours")\nlog.info("ours")\nlogs.flush()'
    assert levels_and_messages(output(code)) == [("INFO", "ours")]


def test_lines_are_not_handed_to_the_root_logger_too():
    code = 'logging.basicConfig(stream=sys.stdout)\nlogs.setup("info")\nlog.info("once")\nlogs.flush()'
    assert levels_and_messages(output(code)) == [("INFO", "once")]


@pytest.mark.parametrize("setting", [{}, {"FORCE_COLOR": "1"}])
def test_a_pipe_gets_no_colour(setting):
    assert "\x1b" not in output(FIVE, "debug", env=setting)


def test_a_terminal_gets_the_level_in_colour():
    lines = on_a_terminal(FIVE, "debug").splitlines()
    assert len(lines) == 5
    for line in lines:
        assert re.fullmatch(r"[0-9 :.-]+  (\x1b\[[0-9;]+m)+[A-Z]+\x1b\[0m  message \d\d", line)


def test_no_color_is_obeyed_on_a_terminal():
    text = on_a_terminal(FIVE, "debug", env={"NO_COLOR": "1"})
    assert "\x1b" not in text
    assert len(levels_and_messages(text)) == 5


def test_a_stalled_reader_never_blocks_who_logs_and_is_told_what_was_dropped():
    with running(FLOOD + 'sys.stdin.readline()\nlog.info("last")\nlogs.flush()') as process:
        assert process.stderr.readline() == b"flooded\n"  # and nobody has read a line yet
        lines = iter(process.stdout.readline, b"")
        written = [next(lines) for _ in range(2000)]  # all that was kept: the writer has caught up
        process.stdin.write(b"\n")
        process.stdin.close()
        written += lines
    messages = levels_and_messages(b"".join(written).decode())
    numbered = [message for level, message in messages if level == "INFO" and message != "last"]
    dropped = [int(message.partition(" log lines dropped")[0]) for level, message in messages if level == "WARN"]
    assert ("INFO", "last") in messages[-2:]
    assert sum(dropped) + len(numbered) == 5_000
    assert 2000 <= len(numbered) < 4000


def test_lines_of_a_stalled_reader_do_not_hold_up_the_end_of_the_process():
    with running(FLOOD) as process:
        assert process.stderr.readline() == b"flooded\n"
        assert process.wait() == 0


def test_a_closed_pipe_ends_nothing():
    code = 'logs.setup("info")\nsys.stdin.readline()\nfor n in range(100): log.info("%d", n)\nlogs.flush()'
    with running(code) as process:
        process.stdout.close()
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


def test_a_full_disk_ends_nothing():
    with open("/dev/full", "wb") as full, running(FIVE, "debug", stdout=full) as process:
        _, err = process.communicate()
        assert (process.returncode, err) == (0, b"")


def test_a_wrong_log_call_does_not_raise():
    with running('logs.setup("info")\nlog.info("%d", "x")\nlog.info("next")\nlogs.flush()') as process:
        out, err = process.communicate()
    assert b"next" in out
    assert b"Logging error" in err


def test_text_that_is_not_unicode_does_not_end_the_writer():
    text = output('logs.setup("info")\nlog.info("\\udcff")\nlog.info("next")\nlogs.flush()')
    assert levels_and_messages(text) == [("INFO", "\\udcff"), ("INFO", "next")]


def test_a_logging_greenlet_does_not_stop_the_others_while_nobody_reads():
    code = FLOOD + 'import gevent\ngevent.sleep(0.01)\nprint("alive", file=sys.stderr, flush=True)'
    with running(code) as process:
        assert process.stderr.readline() == b"flooded\n"
        assert process.stderr.readline() == b"alive\n"
        assert not select.select([process.stderr], [], [], 0)[0] or process.stderr.read() == b""
