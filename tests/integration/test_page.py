"""The page of status in a real browser: it says how things are, its numbers move under load, and nothing complains."""

import os
import re
import signal
import sys

import pytest

from .browser import chromium
from .harness import Process, free_port
from .scene import crowd, scene

TOKEN = "0123456789abcdef0123456789abcdef"
WIDE, PHONE = 1200, 360


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    with scene(tmp_path_factory.mktemp("scene")) as made:
        yield made


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


def color(page, selector, name="backgroundColor"):
    return page.ask(f"getComputedStyle(document.querySelector('{selector}')).{name}")


def brightness(color):
    return sum(map(int, re.findall("[0-9]+", color)[:3]))


def test_numbers_move_under_load(here, browser):
    page = browser.open(here.status + "/", width=WIDE)
    page.wait_for("rows.length > 1")
    assert page.ask("document.getElementById('words').textContent").startswith(
        "Serving: 2 tunnels, each with its peer, "
    )
    assert page.ask("document.getElementById('words').className") == "good"
    for trouble in ("log_lines_lost_in_last_minute: 1", "configuration_refused: {why: 'tls', at: 1}"):
        assert page.ask(f"tone({{...last, {trouble}}})") == "warn"
    drawn = page.ask("document.querySelector('#plots path.down').getAttribute('d')")
    with crowd(list(here.public.values())):
        page.wait_for("document.getElementById('throughput-bytes_down').textContent.match(/[1-9].* [kM]B/)")
        page.wait_for("+document.getElementById('exchanges-begun').textContent > 0")
        page.wait_for("document.getElementById('first-byte-first_byte_mean_s').textContent.match(/[1-9].* m?s/)")
        page.wait_for("document.querySelector('.tunnel dl').textContent.match(/carried[0-9.]+ [kM]B down/)")
        page.wait_for(
            "document.querySelector('.tunnel dl').textContent.match(/pool[1-9][0-9]* data connections? ready/)"
        )
        page.wait_for("document.querySelector('.tunnel .gauge rect').getAttribute('width') > 0")
        count = page.ask("rows.length")
        page.wait_for(f"rows.length > {count}")
    assert page.ask("document.querySelector('#plots path.down').getAttribute('d')") != drawn
    assert page.ask("document.getElementById('errors-errors').textContent") == "0"
    until = r"/certificateuntil 20\d\d-\d\d-\d\d, 36[45] days leftSHA-256 ([0-9A-F]{2}:){31}[0-9A-F]{2}/"
    assert page.ask(f"{until}.test(document.querySelector('.tunnel dl').textContent)")
    assert page.ask("document.querySelectorAll('#events .message').length > 0")
    assert page.complaints == []
    page.close()


def test_a_fresh_page_shows_the_past(here, browser):
    first = browser.open(here.status + "/")
    first.wait_for("rows.length > 3")
    oldest = first.ask("rows[0].time")
    first.close()
    second = browser.open(here.status + "/")
    second.wait_for(f"rows.length && rows[0].time <= {oldest}")
    second.close()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, PHONE])
def test_both_themes_fit_both_widths(here, browser, width, dark):
    page = browser.open(here.status + "/", width=width, dark=dark)
    page.wait_for("rows.length > 1")
    assert (brightness(color(page, "body")) < 200) == dark
    assert (brightness(color(page, "body", "color")) > 500) == dark
    assert page.ask("document.documentElement.scrollWidth") == width
    cut = """[...document.querySelectorAll('main *, header *')].filter(each => each.children.length == 0
        && each.textContent && each.getBoundingClientRect().right > innerWidth).map(each => each.textContent)"""
    assert page.ask(cut) == []
    assert page.complaints == []
    assert page.picture(400).startswith(b"\x89PNG")
    page.close()


def test_what_goes_wrong_is_told_in_words_and_colour(here, browser):
    page = browser.open(here.status + "/", width=PHONE)
    page.wait_for("rows.length > 1")
    with crowd([here.public["web"]], cut=1.0):
        page.wait_for("+document.getElementById('errors-errors').textContent > 0")
    page.wait_for(
        "document.getElementById('words').textContent.match(/web: [0-9]+ exchanges? failed in the last minute/)"
    )
    assert page.ask("document.getElementById('words').className") == "warn"
    assert page.complaints == []
    page.close()


def test_a_lost_client_and_a_lost_process_are_told(tmp_path, browser):
    with scene(tmp_path) as made:
        page = browser.open(made.status + "/", width=WIDE)
        page.wait_for("last && last.ready")
        made.client.kill()
        page.wait_for("document.getElementById('words').textContent.startsWith('None of 2 tunnels serving')")
        page.wait_for("document.getElementById('words').className == 'warn'")
        page.wait_for("document.querySelector('.tunnel').textContent.includes('last trouble')")
        page.wait_for("document.querySelector('#events li').textContent.includes('warn')")
        assert page.complaints == []
        os.kill(made.server.pid, signal.SIGSTOP)
        page.wait_for("document.getElementById('words').textContent.includes('does not answer: it takes too long')")
        assert page.ask("document.getElementById('words').className") == "bad"
        os.kill(made.server.pid, signal.SIGCONT)
        page.wait_for("document.getElementById('words').className == 'warn'")
        made.server.stop()
        page.wait_for("document.getElementById('words').textContent.includes('does not answer: it cannot be reached')")
        page.close()


def test_the_page_asks_for_the_token(tmp_path, browser):
    token, port = tmp_path / "token", free_port()
    token.touch(0o600)
    token.write_text(TOKEN)
    file = tmp_path / "t.conf"
    file.write_text(
        f"status = 127.0.0.1:{port}\nstatus-token-file = {token}\n"
        f"url = server://127.0.0.1:{free_port()}/127.0.0.1:{free_port('both')}\n"
    )
    with Process([sys.executable, "-m", "nodepass_gevent", "--config", str(file)]) as server:
        server.wait_for_line("status: http")
        page = browser.open(f"http://127.0.0.1:{port}/")
        page.wait_for("!document.getElementById('login').hidden")
        for given, told in (("wrong-" + TOKEN, "not the right one"), (TOKEN, "Waiting: no client is connected")):
            page.ask(f"document.getElementById('token').value = '{given}'")
            page.ask("document.querySelector('#login button').click()")
            page.wait_for(f"document.getElementById('words').textContent.includes('{told}')")
        assert page.ask("document.getElementById('login').hidden")
        assert all("401" in complaint for complaint in page.complaints)
        page.close()
