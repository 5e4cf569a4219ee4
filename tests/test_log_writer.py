"""Where lines go, and what becomes of them when that place does not take them."""

import os
import re
import select
import stat

import pytest
from log_scripts import FIVE, FLOOD, levels_and_messages, output, running


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


# Files


def test_a_file_is_appended_to_and_closed_to_others(tmp_path):
    path = tmp_path / "log"
    code = 'os.umask(0)\nlogs.setup("info", sys.argv[1])\nlog.info("%s", sys.argv[2])\nlogs.flush()'
    for word in ("a", "b"):
        assert output(code, str(path), word) == ""
    assert levels_and_messages(path.read_text()) == [("INFO", "a"), ("INFO", "b")]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("path", ["", "missing/log", "pipe"])
def test_a_file_that_cannot_be_opened_changes_nothing(tmp_path, path):
    os.mkfifo(tmp_path / "pipe")  # without a reader: to open it must not wait for one
    code = """
logs.setup("info")
try:
    logs.setup("debug", sys.argv[1], "json")
except OSError:
    log.info("as before")
log.debug("a detail")
logs.flush()
"""
    assert levels_and_messages(output(code, str(tmp_path / path))) == [("INFO", "as before")]


def test_lines_go_to_another_place_from_the_moment_that_it_is_named(tmp_path):
    code = """
for number, to in enumerate((sys.argv[1], "stdout", sys.argv[2], "stderr")):
    logs.setup("info", to)
    log.info("%d", number)
    logs.flush()
"""
    with running(code, str(tmp_path / "a"), str(tmp_path / "b")) as process:
        out, err = process.communicate()
    texts = [(tmp_path / "a").read_text(), out.decode(), (tmp_path / "b").read_text(), err.decode()]
    assert list(map(levels_and_messages, texts)) == [[("INFO", str(number))] for number in range(4)]


def test_a_renamed_file_is_left_for_a_new_one(tmp_path):
    path = tmp_path / "log"
    code = """
logs.setup("info", sys.argv[1])
log.info("a")
logs.flush()
os.rename(sys.argv[1], sys.argv[1] + ".1")
log.info("b")
logs.flush()
logs.reopen()
log.info("c")
logs.flush()
"""
    assert output(code, str(path)) == ""
    assert levels_and_messages((tmp_path / "log.1").read_text()) == [("INFO", "a"), ("INFO", "b")]
    assert levels_and_messages(path.read_text()) == [("INFO", "c")]


def test_a_file_that_cannot_be_opened_again_is_an_error_in_the_old_one(tmp_path):
    path = tmp_path / "d" / "log"
    path.parent.mkdir()
    code = """
logs.setup("info", sys.argv[1])
os.rename(os.path.dirname(sys.argv[1]), sys.argv[2])
logs.reopen()
log.info("a")
logs.flush()
"""
    assert output(code, str(path), str(tmp_path / "e")) == ""
    (level, message), last = levels_and_messages((tmp_path / "e" / "log").read_text())
    assert level == "ERROR" and re.search("cannot open '.*d/log' again, .*: no such file or directory", message)
    assert last == ("INFO", "a")


def test_a_stream_is_not_opened_again():
    code = 'logs.setup("info")\nlogs.reopen()\nlog.info("a")\nlogs.flush()'
    assert levels_and_messages(output(code)) == [("INFO", "a")]


def test_one_thread_writes_however_often_the_log_is_set_up():
    code = """
def threads():
    return len(os.listdir("/proc/self/task"))

logs.setup("info", os.devnull)
before = threads(), len(os.listdir("/proc/self/fd"))
for number in range(20):
    logs.setup("debug", ("stdout", "stderr", os.devnull)[number % 3], ("text", "json")[number % 2], number)
    logs.reopen()
print((threads(), len(os.listdir("/proc/self/fd"))) == before)
"""
    assert output(code) == "True\n"


# What is missing


def test_lines_that_could_not_be_written_are_counted_and_said_once_lines_go_out_again(tmp_path):
    code = """
logs.setup("info", "/dev/full")
for number in range(3):
    log.info("lost")
logs.flush()
print(logs.dropped())
print(*[e for e in logs.recent() if e.level == "warn"])
logs.setup("info", sys.argv[1])
log.info("a")
log.info("b")
logs.flush()
print(logs.dropped().lost, logs.dropped().still)
"""
    full, event, freed = output(code, str(tmp_path / "log")).splitlines()
    assert full == "Dropped(slow=0, failed=3, held_back=0, why='no space left on device', still=True)"
    assert re.fullmatch(
        r"Event\(time=.*, level='warn', tunnel='', message='log lines are lost: no space left on device'\)", event
    )
    assert freed == "3 False"
    lines = levels_and_messages((tmp_path / "log").read_text())
    assert sorted(lines) == [
        ("INFO", "a"),
        ("INFO", "b"),
        ("WARN", "3 log lines could not be written: no space left on device"),
    ]


def test_the_count_of_what_was_held_back_is_a_line_that_may_be_lost():
    code = """
logs.setup("info", "/dev/full", rate=1)
for number in range(11):
    log.info("lost %d", number)
logs.flush()
print(logs.dropped().failed, logs.dropped().held_back)
"""
    assert output(code) == "11 1\n"


def test_a_line_that_was_cut_by_a_full_disk_does_not_spoil_the_next(tmp_path):
    code = """
import resource
logs.setup("info", sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))  # so large may a file become
log.info("a")
logs.flush()
for number in range(2):
    log.info("lost " * 20)
    logs.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.info("b")
logs.flush()
print(logs.dropped().failed)
"""
    assert output(code, str(tmp_path / "log")) == "2\n"
    lines = (tmp_path / "log").read_text().splitlines()
    assert re.search(r"INFO  (lost )+\w*$", lines[1])
    assert levels_and_messages("\n".join([lines[0], *lines[2:]])) == [
        ("INFO", "a"),
        ("INFO", "b"),
        ("WARN", "2 log lines could not be written: file too large"),
    ]


def test_a_full_pipe_that_does_not_block_loses_nothing():
    code = """
os.set_blocking(1, False)
logs.setup("info")
for number in range(1500):
    log.info("%0200d", number)
print("logged", file=sys.stderr, flush=True)
sys.stdin.readline()
logs.flush()
"""
    with running(code) as process:
        assert process.stderr.readline() == b"logged\n"  # five times what a pipe holds, and nobody has read
        process.stdin.write(b"\n")
        out, err = process.communicate()
        assert err == b""
    assert [int(message) for _, message in levels_and_messages(out.decode())] == list(range(1500))


def test_dropped_lines_can_be_counted_from_within():
    code = FLOOD + "print(logs.dropped(), file=sys.stderr, flush=True)"
    with running(code) as process:
        process.stderr.readline()
        slow = int(re.search(rb"slow=(\d+), failed=0, held_back=0", process.stderr.readline())[1])
    assert 1000 <= slow <= 3000


def test_why_lines_are_lost_is_kept_as_an_event_once_for_each_reason():
    code = """
from nodepass_gevent import log_writer
logs.setup("info", "/dev/full")
most, log_writer.MAX_QUEUED = log_writer.MAX_QUEUED, 0
print(logs.dropped().still)
for number in range(3):
    log.info("dropped")
print(logs.dropped())
log_writer.MAX_QUEUED = most
for number in range(3):
    log.info("lost")
    logs.flush()
print(*[e.message for e in logs.recent() if e.level == "warn"], sep="\\n")
"""
    assert output(code).splitlines() == [
        "False",
        "Dropped(slow=3, failed=0, held_back=0, why='the reader of the log is too slow', still=True)",
        "log lines are lost: the reader of the log is too slow",
        "log lines are lost: no space left on device",
    ]


# Too many of a kind


KINDS = """
logs.setup("info", rate=1)
for number in range(30):
    log.info("one %d", number)
    log.warning("one %d", number)
    logs.of("web").info("one %d", number)
    log.info("access %d", number, extra={"event": "exchange"})
"""


def test_what_is_too_much_of_one_kind_is_held_back_and_counted():
    lines = levels_and_messages(
        output(KINDS + "logs.flush()\nprint(logs.dropped(), file=sys.stdout)").rpartition("Dr")[0]
    )
    for level, prefix in (("INFO", ""), ("WARN", ""), ("INFO", "[web] ")):
        assert [line for line in lines if line[0] == level and line[1].startswith(f"{prefix}one")] == [
            (level, f"{prefix}one {number}") for number in range(10)
        ]
        assert (level, f"{prefix}20 more like it in the last 1 s, the first: one 10") in lines
    assert sum("access" in message for _, message in lines) == 30
    assert len(lines) == 3 * 11 + 30


def test_what_was_held_back_is_said_when_its_window_ends_though_nothing_else_is_logged():
    code = """
from nodepass_gevent import log_limit
log_limit.WINDOW_S = 0.3
logs.setup("info", rate=10)
for number in range(5):
    log.info("one %d", number)
print("logged", file=sys.stderr, flush=True)
sys.stdin.readline()
"""
    with running(code) as process:
        process.stderr.readline()
        lines = levels_and_messages(b"".join(process.stdout.readline() for _ in range(4)).decode())
    assert lines[-1] == ("INFO", "2 more like it in the last 1 s, the first: one 3")


def test_a_flood_does_not_push_out_what_is_kept_as_recent():
    code = KINDS + "logs.flush()\nprint([e.message for e in logs.recent() if 'more' in e.message], file=sys.stderr)"
    with running(code) as process:
        _, err = process.communicate()
    assert err.decode().count("20 more like it in the last 1 s, the first: one 10") == 3
