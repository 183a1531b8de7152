"""Faults on demand or at a rate: what a network and a busy hub do to a client, reproducibly."""

import hashlib
import re
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
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
    body; ignore_range: answer with the whole file; move_branch: somebody commits to the repository
    just before the request is answered.
    """

    kind: Literal["refuse", "lose_response", "corrupt", "truncate", "ignore_range", "move_branch"]
    method: str
    path: str
    status: int = 503
    times: int = 1
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Weather:
    """Faults of a bad night: each request meets one with a probability of `rate`.

    Which one depends on nothing but the seed, the request, and how often it has been made before,
    so that it is the same whatever else goes on. `kinds` are faults whose `method` and `path` say
    which requests they can strike; their `times` does not matter.
    """

    rate: float
    seed: int = 0
    kinds: tuple[Fault, ...] = field(default_factory=lambda: BAD_NIGHT)

    def strike(self, method: str, path: str, before: int) -> Fault | None:
        """The fault that strikes a request that was made `before` times already."""
        draw = hashlib.sha256(f"{self.seed} {method} {path} {before}".encode()).digest()
        if int.from_bytes(draw[:8], "big") >= self.rate * 2**64:
            return None
        able = [kind for kind in self.kinds if kind.method == method and re.search(kind.path, path)]
        return able[int.from_bytes(draw[8:16], "big") % len(able)] if able else None


def _busy(method: str) -> tuple[Fault, ...]:
    return tuple(
        Fault(kind="refuse", method=method, path=".", status=status)
        for status in (429, 500, 502, 503, 504)
    )


BAD_NIGHT: tuple[Fault, ...] = (
    *(fault for method in ("GET", "HEAD", "POST", "PUT") for fault in _busy(method)),
    Fault(kind="refuse", method="POST", path="/commit/", status=409),
    Fault(kind="lose_response", method="POST", path="/commit/"),
    Fault(kind="lose_response", method="POST", path="/api/repos/create"),
    *(Fault(kind=kind, method="GET", path="/resolve/") for kind in ("corrupt", "truncate")),
    Fault(kind="truncate", method="GET", path="/api/models"),
    Fault(kind="ignore_range", method="GET", path="/resolve/"),
)
"""What passes: a busy or failing hub, cut and damaged bodies, ignored ranges, lost answers."""


class Faults:
    """The faults of one server; may be added to while it runs."""

    def __init__(self, faults: Sequence[Fault] = (), *, weather: Weather | None = None) -> None:
        self._lock = threading.Lock()
        self._left: list[tuple[Fault, int]] = [(fault, fault.times) for fault in faults]
        self.weather = weather
        """May be changed while the server runs."""
        self._made: Counter[tuple[str, str]] = Counter()
        self.requests: list[tuple[str, str]] = []
        """(method, path) of every request so far, in order."""
        self.struck: Counter[str] = Counter()
        """How often each kind of fault was met; of refusals, each status."""
        self.mover: Callable[[str], None] | None = None
        """Commits to the repository that a path is about; set by the server."""

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
                    return self._count(fault)
            before = self._made[method, path]
            self._made[method, path] += 1
            fault_or_none = self.weather and self.weather.strike(method, path, before)
            return self._count(fault_or_none) if fault_or_none else None

    def _count(self, fault: Fault) -> Fault:
        self.struck[str(fault.status) if fault.kind == "refuse" else fault.kind] += 1
        return fault

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
            elif fault.kind == "move_branch":
                assert self.mover is not None, "these faults are not those of a staging hub"
                self.mover(scope["path"])
                await app(scope, receive, send)
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
