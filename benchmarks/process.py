"""Runs a command to its end and accounts for it as the operating system does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_RSS_UNIT = 1 if sys.platform == "darwin" else 1024
"""macOS counts ru_maxrss in bytes, Linux in KiB."""
_TAIL = 2000


class CommandError(RuntimeError):
    """A measured command failed or took too long; the message holds the end of its output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One finished command: wall and CPU seconds, and memory of its largest process."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    read_bytes: int | None
    """Bytes it got from read calls, page cache included; None where the system does not tell."""
    output: str


def run(
    command: Sequence[str | Path],
    *,
    log: Path,
    timeout: float,
    environment: Mapping[str, str] | None = None,
) -> Run:
    """Run ``command`` in a process group of its own; raises CommandError unless it exits with 0.

    The calling process must be small: until a child has loaded its program, the caller's memory
    counts as the child's.
    """
    words = [str(word) for word in command]
    env = {**os.environ, **(environment or {})}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # a checkout has bytecode then, as what pip installed
    expired = threading.Event()
    with log.open("w+b") as file:
        start = time.perf_counter()
        child = subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )

        def expire() -> None:
            expired.set()
            os.killpg(child.pid, signal.SIGKILL)

        timer = threading.Timer(timeout, expire)
        timer.daemon = True
        timer.start()
        try:
            read_bytes = _wait_unreaped(child.pid)
            timer.cancel()
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            raise
        finally:
            timer.cancel()
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        file.seek(max(0, file.tell() - _TAIL))
        output = file.read().decode(errors="replace")
    if child.returncode != 0:
        why = f"after {timeout:.0f} s" if expired.is_set() else f"with status {child.returncode}"
        raise CommandError(f"{' '.join(words)}: ended {why}\n{output}")
    return Run(
        seconds=seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_bytes=usage.ru_maxrss * _RSS_UNIT,
        read_bytes=read_bytes,
        output=output,
    )


def _wait_unreaped(pid: int) -> int | None:
    """Wait for the end of ``pid``, leave it for wait4, and return what it had read on Linux."""
    if not sys.platform.startswith("linux"):
        return None
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    try:
        lines = Path(f"/proc/{pid}/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("rchar:")), None)
