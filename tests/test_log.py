"""Lines as a reader of the process sees them: each test runs a small script of its own."""

import json
import re
from datetime import datetime

import pytest
from log_scripts import FIVE, levels_and_messages, on_a_terminal, output


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


def test_what_goes_on_and_on_is_a_warning_once_a_minute():
    code = """
logs.setup("debug")
now = [1000.0]
logs.time.monotonic = lambda: now[0]
seldom = logs.Seldom(logs.of(""))
for passed_s in (0, 1, 58, 1, 60):
    now[0] += passed_s
    seldom.warning("at %d", now[0])
seldom.warning("another %d", now[0])
logs.flush()
"""
    assert levels_and_messages(output(code)) == [
        ("WARN", "at 1000"),
        ("DEBUG", "at 1001"),
        ("DEBUG", "at 1059"),
        ("WARN", "at 1060"),
        ("WARN", "at 1120"),
        ("WARN", "another 1120"),
    ]


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


# Tunnels


TUNNELS = """
logs.setup("info")
web, dotted, nameless = (logs.of(name) for name in ("web", "web.inner", ""))
"""


def test_a_line_of_a_tunnel_says_which():
    code = TUNNELS + 'web.info("a")\ndotted.warning("b")\nnameless.info("c")\nlog.info("d")\nlogs.flush()'
    assert levels_and_messages(output(code)) == [
        ("INFO", "[web] a"),
        ("WARN", "[web.inner] b"),
        ("INFO", "c"),
        ("INFO", "d"),
    ]


def test_each_tunnel_has_a_level_of_its_own_which_changes_while_running():
    code = (
        TUNNELS
        + """
def all_say(text):
    for logger in (web, dotted, nameless, log):
        logger.info(text)

logs.set_level("error", "web")
logs.set_level("info", "web.inner")
all_say("a")
logs.set_level("debug", "web")
logs.set_level("warn")
logs.set_level("error", "web.inner")
all_say("b")
web.debug("c")
logs.flush()
"""
    )
    assert levels_and_messages(output(code)) == [
        ("INFO", "[web.inner] a"),
        ("INFO", "a"),
        ("INFO", "a"),
        ("INFO", "[web] b"),
        ("DEBUG", "[web] c"),
    ]


def test_a_tunnel_on_a_terminal_stands_behind_the_coloured_level():
    line = on_a_terminal('logs.setup("info")\nlogs.of("web").info("a")\nlogs.flush()').rstrip()
    assert re.fullmatch(r"[0-9 :.-]+  (\x1b\[[0-9;]+m)+INFO\x1b\[0m  \[web\] a", line)


# JSON


def objects(text):
    return [json.loads(line) for line in text.splitlines()]


def test_json_is_one_object_per_line_with_the_same_fields_in_each():
    code = """
logs.setup("debug", form="json")
logs.of("web").warning("%s is \\"late\\"\\n%s", "x", "ü\\x1b")
log.debug("b")
logs.flush()
"""
    first, second = objects(output(code))
    for each, rest in ((first, ("warn", "web", 'x is "late"\nü\x1b')), (second, ("debug", "", "b"))):
        assert list(each) == ["time", "level", "tunnel", "message"]
        assert tuple(each.values())[1:] == rest
        moment = datetime.fromisoformat(each["time"])
        assert moment.tzinfo and abs((datetime.now(moment.tzinfo) - moment).total_seconds()) < 30
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d", each["time"])


def test_json_keeps_the_fields_of_a_line_and_a_traceback_in_one():
    code = """
logs.setup("info", form="json")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("a")
log.info("b", extra={"bytes_up": 5, "user": "u"})
logs.flush()
"""
    failed, told = objects(output(code))
    assert list(failed) == ["time", "level", "tunnel", "message", "exception"]
    assert list(told) == ["time", "level", "tunnel", "message", "bytes_up", "user"]
    assert failed["exception"].splitlines()[-1] == "ZeroDivisionError: division by zero"
    assert (told["message"], told["bytes_up"], told["user"]) == ("b", 5, "u")


def test_json_on_a_terminal_has_no_colour():
    text = on_a_terminal('logs.setup("info", form="json")\nlog.info("a")\nlogs.flush()', env={"FORCE_COLOR": "1"})
    assert objects(text)[0]["message"] == "a"


def test_the_form_can_change_while_running():
    code = 'logs.setup("info")\nlog.info("a")\nlogs.setup("info", form="json")\nlog.info("b")\nlogs.flush()'
    first, second = output(code).splitlines()
    assert levels_and_messages(first) == [("INFO", "a")]
    assert json.loads(second)["message"] == "b"


# What others show of it


def test_recent_lines_are_kept_but_no_details_and_no_access_lines():
    code = """
logs.setup("debug", os.devnull)
for number in range(200):
    logs.of("web").info(f"line {number}")
log.debug("a detail")
log.info("an exchange", extra={"event": "exchange"})
log.warning("%d apples", 3)
events = logs.recent()
print(len(events), *[(e.level, e.tunnel, e.message) for e in (events[0], *events[-2:])], sep="\\n")
print(all(0 <= time.time() - e.time < 30 for e in events))
"""
    assert output("import time\n" + code).splitlines() == [
        "100",
        "('info', 'web', 'line 101')",
        "('info', 'web', 'line 199')",
        "('warn', '', '3 apples')",
        "True",
    ]


def test_without_a_log_there_is_nothing_to_tell():
    nothing = "[] Dropped(slow=0, failed=0, held_back=0, why='', still=False)\n"
    assert output("print(logs.recent(), logs.dropped())") == nothing
