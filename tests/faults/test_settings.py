"""Wrong settings: one line, exit code 2, and never a default instead."""

import pytest

from nodepass_gevent import cli

URLS = [
    "", "x", "ftp://a:1/b:2", "server://", "server://:1", "server://:1/", "server://:1/:2/x", "server://[::1/:2",
    "server://:1/:99999", "server://:-1/:2", "client://:0/:2", "server://:1/:2?tls=9", "server://:1/:2?tls=1&tls=0",
    "server://:1/:2?nonsense=1", "server://:1/:2#1", "server://:1/:2?log=%00", "server://:1/:2?log=%",
    "server://:1/:2?log=\x1b[2J", "server://::1:1/:2", "server://:1/:2?tls=2", "server://:1/:1",
    "server://:1/:2?" + "x=1&" * 3000, "server://a b:1/:2", "server://:1e4/:2",
]  # fmt: skip


@pytest.mark.fault(76)
@pytest.mark.parametrize("url", URLS, ids=lambda url: ascii(url[:40]))
def test_a_wrong_url_is_one_line_and_exit_code_2(url, capsys):
    assert cli.main([url]) == 2
    printed, said = capsys.readouterr()
    assert printed == "" and len(said) < 1000
    assert len(said.splitlines()) == 1 and said[:-1].isprintable() and said.startswith("nodepass: error: ")


@pytest.mark.fault(77)
@pytest.mark.parametrize("number", ["-1", "1e3", "abc", "0", "9" * 30, "0x10", "1\n"])
@pytest.mark.parametrize("name", ["SEMAPHORE_LIMIT", "MIN_POOL_CAPACITY", "REPORT_INTERVAL"])
def test_a_wrong_number_in_the_environment_is_named_and_no_default_takes_its_place(name, number, capsys, monkeypatch):
    monkeypatch.setenv(name, number)
    assert cli.main(["server://127.0.0.1:0/127.0.0.1:0"]) == 2
    printed, said = capsys.readouterr()
    assert printed == "" and f"environment variable {name}" in said and len(said.splitlines()) == 1
