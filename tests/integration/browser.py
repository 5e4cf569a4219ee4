"""Chromium without a window, by its DevTools protocol: pages are opened, asked and pictured, their complaints kept."""

import base64
import contextlib
import json
import tempfile
from collections.abc import Iterator
from typing import Any

import websocket

from . import programs
from .harness import Process, wait_until

ANSWER_S = 30.0  # a loaded machine draws slowly


class Browser:
    """A running Chromium; its pages share nothing with those of other runs."""

    def __init__(self, profile: str) -> None:
        options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
        quiet = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
        own = (f"--user-data-dir={profile}", "--remote-debugging-port=0")
        argv = [programs.require("chromium"), *options, *quiet, *own]
        self.process = Process([*argv, "about:blank"], env={"HOME": profile})
        address = self.process.wait_for_line(r"DevTools listening on (ws://\S+)")[1]
        self._socket = websocket.create_connection(address, timeout=ANSWER_S, suppress_origin=True)
        self._number = 0
        self.complaints: dict[str, list[str]] = {}  # by session

    def open(self, url: str, *, width: int = 1200, height: int = 900, dark: bool = False) -> "Page":
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.complaints[session] = []
        page = Page(self, session, target)
        for domain in ("Runtime", "Log", "Page", "Network"):
            page.call(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        page.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        page.call("Page.navigate", url=url)
        page.wait_for(f"location.href == {json.dumps(url)} && document.readyState == 'complete'")  # scripts have begun
        return page

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and give its result; what the page says meanwhile is kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        self._socket.send(json.dumps(message | ({"sessionId": session} if session else {})))
        while True:
            answer = json.loads(self._socket.recv())
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        kept = self.complaints.get(event.get("sessionId", ""), [])
        match event["method"], event["params"]:
            case "Runtime.exceptionThrown", said:
                kept.append(json.dumps(said["exceptionDetails"]))
            case "Runtime.consoleAPICalled", said if said["type"] in ("error", "warning", "assert"):
                kept.append(json.dumps(said["args"]))
            case "Log.entryAdded", said if said["entry"]["level"] in ("error", "warning"):
                kept.append(said["entry"]["text"])

    def close(self) -> None:
        self._socket.close()
        self.process.kill()


class Page:
    """One page."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self._browser, self._session, self._target = browser, session, target

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def ask(self, expression: str) -> Any:
        """Evaluate JavaScript in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression: str, timeout: float = ANSWER_S) -> Any:
        """Wait until JavaScript is true, and give its value."""
        return wait_until(lambda: self.ask(expression), timeout, f"{expression}; the page: {self.text}")

    @property
    def text(self) -> str:
        return self.ask("document.body ? document.body.innerText : ''")

    @property
    def complaints(self) -> list[str]:
        """What the console has had of errors and warnings."""
        self.ask("1")
        return self._browser.complaints[self._session]

    def picture(self, height: int) -> bytes:
        """Give the page as PNG, its upper part where it is longer."""
        width = self.ask("innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(shot["data"])

    def close(self) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Run one for a while."""
    with tempfile.TemporaryDirectory(prefix="nodepass-browser-", ignore_cleanup_errors=True) as profile:
        browser = Browser(profile)
        try:
            yield browser
        finally:
            browser.close()
