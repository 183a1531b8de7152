"""A headless Chromium over its DevTools protocol: open a page, run scripts in it, watch for errors.

https://chromedevtools.github.io/devtools-protocol/
"""

import json
import subprocess
import time
import urllib.request
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from validate.acceptance.model import RowFailure
from validate.acceptance.process import end

_POLL_S: Final = 0.5
_START_S: Final = 60.0
_FLAGS: Final = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-background-networking", "--remote-debugging-port=0"),
)
"""No sandbox, because it needs privileges that containers lack; the page is our own."""


class Page:
    """One page in a browser of its own, which ends with the context."""

    def __init__(self, url: str, *, chromium: str, work: Path) -> None:
        self._url = url
        self._profile = work / "chromium"
        self._browser = subprocess.Popen(
            [chromium, *_FLAGS, f"--user-data-dir={self._profile}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._open = ExitStack()
        self._socket: Any = None
        self._count = 0
        self._events: list[dict[str, Any]] = []

    def __enter__(self) -> "Page":
        try:
            self._connect()
            for domain in ("Runtime", "Page", "Log"):
                self.call(f"{domain}.enable")
            self.call("Page.navigate", url=self._url)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        self._open.close()
        end(self._browser)

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page, waited for; None while there is none."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        return answer.get("result", {}).get("value")

    def until(self, script: str, otherwise: str, *, limit_s: float) -> None:
        """Evaluate again and again until it is true; RowFailure ``otherwise`` after a time."""
        deadline = time.monotonic() + limit_s
        while not self.evaluate(script):
            if time.monotonic() > deadline:
                raise RowFailure(f"{otherwise} within {limit_s:.0f} s")
            time.sleep(_POLL_S)

    def errors(self) -> list[str]:
        """Exceptions that scripts of the page did not catch."""
        thrown = [e["params"] for e in self._events if e["method"] == "Runtime.exceptionThrown"]
        details = [one["exceptionDetails"] for one in thrown]
        return [d.get("exception", {}).get("description") or d["text"] for d in details]

    def said(self) -> list[str]:
        """What stands in the console: of scripts, and of the browser about the page."""
        entries = [e["params"]["entry"] for e in self._events if e["method"] == "Log.entryAdded"]
        calls = [e["params"] for e in self._events if e["method"] == "Runtime.consoleAPICalled"]
        return [entry["text"] for entry in entries] + [str(call["args"]) for call in calls]

    def show(self, *, width: int, height: int = 900, scheme: str = "light") -> None:
        """Lay the page out anew: its size in pixels, ``light`` or ``dark``."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def press(self, key: str) -> None:
        """One key, such as ``Tab``."""
        for kind in ("keyDown", "keyUp"):
            code = {"Tab": 9, "Enter": 13}[key]
            self.call(
                "Input.dispatchKeyEvent",
                **{"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code},
                **({"text": "\r"} if key == "Enter" else {}),
            )

    def _connect(self) -> None:
        # Chromium writes the port that it chose as the first line of this file.
        told = self._profile / "DevToolsActivePort"
        deadline = time.monotonic() + _START_S
        while not (told.is_file() and told.read_text(encoding="utf-8").strip()):
            if time.monotonic() > deadline or self._browser.poll() is not None:
                raise RowFailure("Chromium did not start")
            time.sleep(_POLL_S)
        port = told.read_text(encoding="utf-8").split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=_START_S) as answer:
            targets = json.loads(answer.read())
        page = next(one for one in targets if one["type"] == "page")
        # Installed with mlx-vlm, whose server speaks over it.
        client: Any = import_module("websockets.sync.client")
        socket = client.connect(page["webSocketDebuggerUrl"], max_size=None)
        self._socket = self._open.enter_context(socket)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer to a command of the protocol."""
        self._count += 1
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": params}))
        while True:
            told = json.loads(self._socket.recv(timeout=_START_S))
            if told.get("id") == self._count:
                result: dict[str, Any] = told.get("result", {})
                return result
            if "method" in told:
                self._events.append(told)
