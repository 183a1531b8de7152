"""Faults on demand: what a network and a busy hub do to a client, reproducible in a test."""

import re
import threading
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True)
class Fault:
    """What goes wrong for the first `times` requests that match; `path` is a regular expression.

    refuse: answer `status` without doing the work; lose_response: do the work, then answer
    `status`; corrupt: flip a byte of the body, same size; truncate: break off halfway through the
    body; ignore_range: answer with the whole file.
    """

    kind: Literal["refuse", "lose_response", "corrupt", "truncate", "ignore_range"]
    method: str
    path: str
    status: int = 503
    times: int = 1
    headers: tuple[tuple[str, str], ...] = ()


class Faults:
    """The faults of one server; may be added to while it runs."""

    def __init__(self, faults: Sequence[Fault] = ()) -> None:
        self._lock = threading.Lock()
        self._left: list[tuple[Fault, int]] = [(fault, fault.times) for fault in faults]
        self.requests: list[tuple[str, str]] = []
        """(method, path) of every request so far, in order."""

    def add(self, fault: Fault) -> None:
        """Arm one more fault."""
        with self._lock:
            self._left.append((fault, fault.times))

    def take(self, method: str, path: str) -> Fault | None:
        """The fault that strikes this request, used up once."""
        with self._lock:
            self.requests.append((method, path))
            for position, (fault, left) in enumerate(self._left):
                if left and fault.method == method and re.search(fault.path, path):
                    self._left[position] = (fault, left - 1)
                    return fault
        return None

    def wrap(self, app: AsgiApp) -> AsgiApp:
        """The application with these faults in front of it."""

        async def faulty(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            fault = self.take(scope["method"], scope["path"])
            if fault is None:
                await app(scope, receive, send)
            elif fault.kind == "refuse":
                await _answer(fault, send)
            elif fault.kind == "lose_response":
                await app(scope, receive, _discard)
                await _answer(fault, send)
            elif fault.kind == "ignore_range":
                kept = [(k, v) for k, v in scope["headers"] if k.lower() != b"range"]
                await app({**scope, "headers": kept}, receive, send)
            elif fault.kind == "corrupt":
                await app(scope, receive, _corrupting(send))
            else:
                await app(scope, receive, _truncating(send))

        return faulty


async def _discard(message: Message) -> None:
    """Send an answer nowhere."""


async def _answer(fault: Fault, send: Send) -> None:
    headers = [(k.encode(), v.encode()) for k, v in fault.headers]
    await send(
        {
            "type": "http.response.start",
            "status": fault.status,
            "headers": [(b"content-length", b"0"), *headers],
        }
    )
    await send({"type": "http.response.body", "body": b""})


def _corrupting(send: Send) -> Send:
    done = False

    async def corrupt(message: Message) -> None:
        nonlocal done
        body = message.get("body", b"")
        if message["type"] == "http.response.body" and body and not done:
            done = True
            message = {**message, "body": bytes([body[0] ^ 1]) + body[1:]}
        await send(message)

    return corrupt


def _truncating(send: Send) -> Send:
    done = False

    async def truncate(message: Message) -> None:
        nonlocal done
        if done:
            return
        if message["type"] == "http.response.body":
            body = message.get("body", b"")
            done = True
            # The body is never completed: the server closes the connection when the app returns.
            message = {**message, "body": body[: len(body) // 2], "more_body": True}
        await send(message)

    return truncate
