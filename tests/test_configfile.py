import io
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodepass_gevent.configfile import MAX_FILE, Entry, OneSection, format_entries, parse, read
from nodepass_gevent.errors import ConfigError

fuzz = settings(max_examples=300, deadline=None, database=None)

FILE = """\
# a comment
; another = one
log = debug

[nodepass]
tls=1   # encrypted
  semaphore_limit\t=\t5

[tunnel web]  # the web
url = server://:1/:2?tls=2&log=warn
[ tunnel   ssh-2.x_ ]
url = client://a#b:1/:2;x
"""


def test_entries_belong_to_their_sections_and_know_their_lines():
    file = parse(FILE, "file t.ini")
    assert file.defaults == [
        Entry("log", "debug", "file t.ini:3"),
        Entry("tls", "1", "file t.ini:6"),
        Entry("semaphore_limit", "5", "file t.ini:7"),
    ]
    assert [(section.name, section.source) for section in file.tunnels] == [
        ("web", "file t.ini:9"),
        ("ssh-2.x_", "file t.ini:11"),
    ]
    assert [section.entries for section in file.tunnels] == [
        [Entry("url", "server://:1/:2?tls=2&log=warn", "file t.ini:10")],
        [Entry("url", "client://a#b:1/:2;x", "file t.ini:12")],
    ]


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("k = [::1]:80", "[::1]:80"),
        ("k = a%2Fb%%", "a%2Fb%%"),
        ("k = true", "true"),
        ("k = a = b", "a = b"),
        ("k = a;b ;c", "a;b ;c"),
        ("k = a#b # c # d", "a#b"),
        ("k = a\t# c", "a"),
        ('k = "a # b"  # "c"', "a # b"),
        ('k = " a "', " a "),
        ('k = "a""b"', 'a"b'),
        ('k = a"b"', 'a"b"'),
        ("k = 'a'", "'a'"),
        ("k = a\r", "a"),
        ("k = a\x0bb\x85c", "a\x0bb\x85c"),
    ],
)
def test_a_value_is_taken_as_it_is_written(line, value):
    assert parse(line, "f").defaults == [Entry("k", value, "f:1")]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("log", "'log' is not followed by = and a value [from f:1]"),
        ("log =", "'log' is not followed by = and a value [from f:1]"),
        ("log = # info", "'log' is not followed by = and a value [from f:1]"),
        ('log = ""', "'log' is not followed by = and a value [from f:1]"),
        ("tunnel-key: s3cret s3cret", "the line is not a name, = and a value [from f:1]"),
        ("tunnel-key s3cret = s3cret", "the line is not a name, = and a value [from f:1]"),
        ("s3cret s3cret s3cret", "the line is not a name, = and a value [from f:1]"),
        ("= info", "'' is not followed by = and a value [from f:1]"),
        ('\nlog = "info', "'log': the quoted value does not end, or is followed by more [from f:2]"),
        ('log = "info" warn', "'log': the quoted value does not end, or is followed by more [from f:1]"),
        ("[tunel x]", "unknown section '[tunel x]' (did you mean '[tunnel name]'?); "),
        ("[nodepas]", "unknown section '[nodepas]' (did you mean '[nodepass]'?); "),
        ("[x]", "unknown section '[x]'; allowed: [nodepass], [tunnel NAME] [from f:1]"),
        ("[tunnel]", "unknown section '[tunnel]'; allowed: [nodepass], [tunnel NAME] [from f:1]"),
        ("[ Tunnel ]", "unknown section '[ Tunnel ]'; allowed: [nodepass], [tunnel NAME] [from f:1]"),
        ("[Nodepass]", "unknown section '[Nodepass]' (did you mean '[nodepass]'?)"),
        ("[nodepass", "section '[nodepass' does not end: ] is missing [from f:1]"),
        ("[tunnel web", "section '[tunnel web' does not end: ] is missing [from f:1]"),
        ("[nodepass] x", "unknown section '[nodepass] x'"),
        ("[tunnel a b]", "section: 'a b' is not a tunnel's name"),
        (
            "[tunnel -a]",
            "section: '-a' is not a tunnel's name; allowed: 1 to 64 ASCII letters, digits, '_', '.' or '-',"
            " the first a letter or digit [from f:1]",
        ),
        (f"[tunnel {'a' * 65}]", "is not a tunnel's name; allowed: 1 to 64 ASCII letters"),
        ("[tunnel a]\n[tunnel a]", "section '[tunnel a]' is there twice; first in f:1 [from f:2]"),
        ("[nodepass]\n[tunnel a]\n[nodepass]", "section '[nodepass]' is there twice; first in f:1 [from f:3]"),
    ],
)
def test_a_wrong_line_is_refused_with_its_number(text, error):
    with pytest.raises(ConfigError) as caught:
        parse(text, "f")
    assert error in str(caught.value)


def test_a_file_is_read_with_its_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "t.ini"
    path.write_bytes(b"\xef\xbb\xbflog = debug\r\ncrt = /caf\xc3\xa9\r\n")
    assert read([str(path)]).defaults == [
        Entry("log", "debug", f"file {path}:1"),
        Entry("crt", "/caf\u00e9", f"file {path}:2"),
    ]


def test_a_file_that_is_no_text_is_refused_with_the_line(tmp_path):
    path = tmp_path / "t.ini"
    path.write_bytes(b"log = debug\ncrt = \xff\n")
    with pytest.raises(ConfigError) as caught:
        read([str(path)])
    assert str(caught.value) == f"config: the file is not UTF-8 text [from file {path}:2]"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("none.ini", "no such file or directory"),
        (".", "no file in the directory ends in .conf"),
        ("a\0b", "null byte"),
        ("\udcff\n", "no such file"),
    ],
)
def test_an_unreadable_file_is_refused_with_the_reason(tmp_path, name, why):
    with pytest.raises(ConfigError) as caught:
        read([f"{tmp_path}/{name}"])
    assert why in str(caught.value)
    assert str(caught.value).isprintable()


def test_only_a_regular_file_is_read_again_and_a_pipe_without_a_writer_is_refused_at_once(tmp_path):
    (tmp_path / "a.conf").write_text("x = 1\n")
    assert read([str(tmp_path)], again=True).defaults[0].text == "1"
    os.mkfifo(tmp_path / "b.conf")
    with pytest.raises(ConfigError, match=r"only a regular file is read again, no pipe \[from file .*b\.conf\]"):
        read([str(tmp_path)], again=True)


def test_files_and_the_files_of_directories_are_read_as_one_in_the_order_of_their_names(tmp_path):
    (tmp_path / "main.ini").write_text("log = debug\n")
    directory = tmp_path / "conf.d"
    directory.mkdir()
    for name, text in (("b.conf", "[tunnel b]\nx = 1\n"), ("a.conf", "[tunnel a]\n"), ("c.ini", "?"), (".d.conf", "?")):
        (directory / name).write_text(text)
    sections = read([str(tmp_path / "main.ini"), str(directory)])
    assert sections.defaults == [Entry("log", "debug", f"file {tmp_path}/main.ini:1")]
    assert [section.name for section in sections.tunnels] == ["a", "b"]
    assert sections.tunnels[1].entries == [Entry("x", "1", f"file {directory}/b.conf:2")]


def test_a_section_that_stands_in_two_files_is_refused_with_both_places(tmp_path):
    for name in ("a.conf", "b.conf"):
        (tmp_path / name).write_text("\n[tunnel web]\n")
    with pytest.raises(ConfigError) as caught:
        read([str(tmp_path)])
    assert str(caught.value) == (
        f"section '[tunnel web]' is there twice; first in file {tmp_path}/a.conf:2 [from file {tmp_path}/b.conf:2]"
    )


def test_only_the_entries_of_files_that_others_can_read_are_named(tmp_path):
    for name, mode in (("a.conf", 0o600), ("b.conf", 0o644)):
        (tmp_path / name).write_text(f"[tunnel {name}]\nlog = info\n")
        (tmp_path / name).chmod(mode)
    assert read([str(tmp_path)]).open_to_others == [Entry("log", "info", f"file {tmp_path}/b.conf:2")]


def test_a_file_has_a_size_limit(tmp_path):
    path = tmp_path / "t.ini"
    path.write_bytes(b"#" * MAX_FILE)
    assert read([str(path)]).defaults == []
    path.write_bytes(b"#" * (MAX_FILE + 1))
    with pytest.raises(ConfigError, match="larger than 1048576 bytes"):
        read([str(path)])
    with pytest.raises(ConfigError, match="larger than 1048576 bytes"):
        read(["/dev/zero"])


values = st.text(min_size=1).filter(lambda text: "\n" not in text) | st.text('"# \t;a=[', min_size=1)


@fuzz
@given(st.dictionaries(st.sampled_from(["log", "tls", "crt"]), values))
def test_any_entries_survive_printing_and_parsing(texts):
    text = format_entries(Entry(key, value, "somewhere") for key, value in texts.items())
    assert {entry.key: entry.text for entry in parse(text, "f").defaults} == texts
    assert OneSection().parse(io.StringIO(text)) == texts


def test_entries_are_printed_with_their_sources():
    assert format_entries([Entry("log", "a # b", "URL query")]) == 'log = "a # b"'.ljust(40) + " # URL query\n"


@fuzz
@given(st.text() | st.text('[]tunelx =#;"\n\r'))
def test_any_text_is_a_file_or_a_config_error_of_one_line(text):
    try:
        parse(text, "f")
    except ConfigError as exc:
        assert str(exc).isprintable()
