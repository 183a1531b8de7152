"""A stage in a process of its own, so that whatever kills it kills one stage and nothing else."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Final

from converter.batch.failures import Failure, classify
from converter.batch.orders import Answer, Order

BEAT_S: Final = 1.0
_CHUNK: Final = 1 << 16
WARM: Final = ("converter.batch.warm",)
"""What a proof imports; a forked child finds it loaded."""


def context(preload: Sequence[str] = WARM) -> Any:
    """How children start here: forked from a server with ``preload`` on Linux, afresh elsewhere.

    MLX may be forked only where it runs on a CPU.
    """
    if not sys.platform.startswith("linux"):
        return multiprocessing.get_context("spawn")
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(list(preload))
    return forkserver


@dataclass(slots=True)
class Child:
    """A running stage, as its parent sees it."""

    process: Any
    messages: Connection
    output: Connection
    stage: str
    order: Order
    started: float = field(default_factory=time.time)
    peak_memory: int | None = None
    answer: Answer | Failure | None = None
    _line: bytes = b""

    def pump(self, say: Callable[[str], None]) -> None:
        """Take what the child has sent, without waiting; its lines go to ``say``."""
        while _ready(self.messages):
            try:
                kind, value = self.messages.recv()
            except (EOFError, OSError):
                break
            if kind == "memory":
                self.peak_memory = value
            else:
                self.answer = value
        while _ready(self.output):
            try:
                chunk = os.read(self.output.fileno(), _CHUNK)
            except OSError:
                break
            if not chunk:
                break
            *lines, self._line = (self._line + chunk).split(b"\n")
            for line in lines:
                say(line.decode("utf-8", "replace").rstrip())

    def ended(self, say: Callable[[str], None]) -> Answer | Failure | None:
        """What the stage came to, None while it runs; a child that died is a crash."""
        self.pump(say)
        if self.process.is_alive():
            return None
        self.process.join()
        self.pump(say)
        if self._line:
            say(self._line.decode("utf-8", "replace"))
        self.messages.close()
        self.output.close()
        return self.answer or Failure("crash", death(self.process.exitcode, self.stage))

    def kill(self) -> None:
        """End it at once, with all that it started."""
        if self.process.is_alive():
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                self.process.kill()


def start(stage: str, order: Order, work: Callable[[Order], Answer], ctx: Any) -> Child:
    """Begin a stage in a child process."""
    messages, theirs = ctx.Pipe(duplex=False)
    output, wire = ctx.Pipe(duplex=False)
    process = ctx.Process(target=run, args=(work, order, theirs, wire), name=f"convert-{stage}")
    process.start()
    theirs.close()
    wire.close()
    return Child(process, messages, output, stage, order)


def run(
    work: Callable[[Order], Answer], order: Order, messages: Connection, wire: Connection
) -> None:
    """The child's side: do the work and send what it came to."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(wire.fileno(), 1)
    os.dup2(wire.fileno(), 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 (lives as long as it)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    lock = threading.Lock()
    threading.Thread(target=_beat, args=(messages, lock), daemon=True).start()
    try:
        outcome: Answer | Failure = work(order)
    except BaseException as error:
        if isinstance(error, SystemExit | KeyboardInterrupt):
            raise
        outcome = classify(error)
        if outcome.kind in ("internal", "crash"):
            import traceback

            traceback.print_exc()
    with lock:
        messages.send(("memory", peak_memory()))
        messages.send(("answer", outcome))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of libraries must not keep it


def _beat(messages: Connection, lock: threading.Lock) -> None:
    """Tell the peak of memory every second, and die with the parent."""
    while True:
        try:
            with lock:
                messages.send(("memory", peak_memory()))
        except OSError:
            os.killpg(0, signal.SIGKILL)
        time.sleep(BEAT_S)


def peak_memory() -> int:
    """Most bytes that this process has held in memory."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def death(status: int | None, stage: str) -> str:
    """How a process ended, in words."""
    if status is not None and status < 0:
        name = signal.Signals(-status).name
        why = ", as the system does when memory runs out" if -status == signal.SIGKILL else ""
        return f"the process was killed by {name} in stage {stage}{why}"
    return f"the process ended with status {status} in stage {stage} and said nothing"


def _ready(connection: Connection) -> bool:
    try:
        return not connection.closed and connection.poll()
    except (OSError, BrokenPipeError):
        return False
