"""A scene to look at: one process with two tunnel servers, one with their clients, a target, and a crowd of users.

``python -m integration.scene DIRECTORY [SECONDS]`` plays it for a while and saves pictures of the page there.
"""

import contextlib
import math
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .browser import chromium
from .harness import QUICK, Process, Target, free_port, wait_until
from .targets import Seen, reset
from .users import comes_back, talk

PICTURES = {  # file: width, height, whether dark
    "status-light.png": (1200, 1360, False),
    "status-dark.png": (1200, 1360, True),
    "status-phone.png": (360, 1400, False),
    "status-waiting.png": (360, 1400, True),
}


def serve(conn, seen: Seen) -> None:
    """Answer ``SIZE DELAY_S`` by as many bytes after as much time; echo anything else."""
    data = conn.recv(64)
    words = data.split()
    if len(words) == 2 and words[0].isdigit():
        time.sleep(float(words[1]))
        conn.sendall(bytes(int(words[0])))
    elif data == b"cut":
        reset(conn)
        return
    elif data:
        conn.sendall(data)
    while conn.recv(65536):
        pass
    seen.how = "end"


@dataclass
class Scene:
    """Two processes, where the first one's tunnels are used, and where both are asked how they are."""

    server: Process
    client: Process
    files: list[Path]  # of their settings
    public: dict[str, tuple[str, int]]
    status: str
    client_status: str


@contextlib.contextmanager
def scene(directory: Path, query: str = "tls = 1") -> Iterator[Scene]:
    """Start it, wait until users are served by both tunnels, and end it."""
    target = Target()
    target.tcp.behaviour = serve
    names = ("web", "database")
    tunnels = {name: (free_port(), free_port("both")) for name in names}
    ports = [free_port(), free_port()]
    texts = [f"status = 127.0.0.1:{port}\nlog = info\n" for port in ports]
    for name, (tunnel, public) in tunnels.items():
        texts[0] += f"[tunnel {name}]\nurl = server://127.0.0.1:{tunnel}/127.0.0.1:{public}\n{query}\n"
        texts[1] += f"[tunnel {name}]\nurl = client://127.0.0.1:{tunnel}/{target.address}\n"
    files = [directory / "server.conf", directory / "client.conf"]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    command = [sys.executable, "-m", "nodepass_gevent", "--config"]
    with contextlib.ExitStack() as running:
        running.enter_context(target)
        server, client = (running.enter_context(Process([*command, str(file)], env=QUICK)) for file in files)
        public = {name: ("127.0.0.1", port) for name, (_, port) in tunnels.items()}
        for name in names:
            wait_until(lambda name=name: comes_back(public[name]), 30, f"traffic through {name}")
        yield Scene(server, client, files, public, *(f"http://127.0.0.1:{port}" for port in ports))


@contextlib.contextmanager
def crowd(publics: list[tuple[str, int]], busy: int = 12, cut: float = 0.0) -> Iterator[None]:
    """Users who come and go, more and fewer of them, and a share whose target resets their connection."""
    leave = threading.Event()

    def be_users(number: int) -> None:
        draw = random.Random(number)
        while not leave.wait(draw.expovariate(2)):
            wave = 0.55 + 0.45 * math.sin(time.monotonic() / 25)
            if number > busy * wave:
                continue
            with contextlib.suppress(OSError):
                size, delay_s = int(draw.lognormvariate(11, 1.5)), draw.lognormvariate(-4.5, 1)
                word = b"cut" if draw.random() < cut else b"%d %f" % (size, delay_s)
                talk(draw.choice(publics), word, 20)

    threads = [threading.Thread(target=be_users, args=(number,), daemon=True) for number in range(busy)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        leave.set()
        for thread in threads:
            thread.join()


def take_pictures(directory: Path, seconds: float) -> None:
    """Play the scene for a while, then picture the page: under load, in trouble, and without clients."""
    with tempfile.TemporaryDirectory() as files, scene(Path(files)) as here, chromium() as browser:

        def picture(name: str, ready: str) -> None:
            width, height, dark = PICTURES[name]
            page = browser.open(here.status + "/", width=width, height=height, dark=dark)
            page.wait_for(ready)
            (directory / name).write_bytes(page.picture(height))
            print(name, *page.complaints)
            page.close()

        with crowd(list(here.public.values())):
            time.sleep(seconds)
            picture("status-light.png", "rows.length > 5")
            picture("status-phone.png", "rows.length > 5")
        with crowd(list(here.public.values()), cut=0.05):
            time.sleep(seconds / 10)
            picture("status-dark.png", "rows.length > 5")
        here.client.kill()
        picture("status-waiting.png", "last && !last.ready")


if __name__ == "__main__":
    take_pictures(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 280)
