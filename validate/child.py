"""Ask one of our scripts, in a limited child process, about what a stranger wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from validate import child_main

LONGEST: Final = 1 << 30
"""Bytes of an answer."""
# The child gets what Python and torch need to start, and no tokens.
_ENVIRONMENT: Final = ("PATH", "HOME", "TMPDIR", "LANG", "LD_LIBRARY_PATH", "SYSTEMROOT")


class ChildError(Exception):
    """No answer: out of time, stopped by a signal (its number is the message), or an error."""

    def __init__(self, kind: Literal["time", "signal", "error"], message: str = "") -> None:
        super().__init__(message)
        self.kind = kind


def ask(
    script: str,
    request: Mapping[str, Any],
    *,
    memory: int,
    seconds: float,
    patience: float = 0,
    file_bytes: int | None = None,
    longest: int = LONGEST,
    packages: bool = True,
    folder: Path | None = None,
) -> Any:
    """What ``answer(request)`` of the Python file ``script`` gives; raises ChildError.

    ``memory`` bytes of address space, ``seconds`` of processor time and ``patience`` more by the
    clock, files of ``file_bytes``, an answer of ``longest`` bytes; ``packages`` says whether it may
    import installed ones. It works in ``folder``, by default one that goes afterwards.
    """
    isolated = ["-I", "-B"] if packages else ["-I", "-S", "-B"]
    command = [sys.executable, *isolated, str(Path(child_main.__file__).resolve())]
    with tempfile.TemporaryDirectory(prefix="child-") as scratch:
        answer = Path(scratch) / "answer.json"
        order = {
            "script": str(Path(script).resolve()),
            "request": dict(request),
            "memory": memory,
            "seconds": max(1, int(seconds)),
            "file_bytes": file_bytes,
            "answer": str(answer),
        }
        try:
            child = subprocess.run(
                command,
                input=json.dumps(order).encode(),
                capture_output=True,
                timeout=seconds + patience,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                cwd=folder or scratch,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ChildError("time") from None
        if child.returncode < 0:
            raise ChildError("signal", str(-child.returncode))
        if answer.is_file() and (size := answer.stat().st_size) > longest:
            raise ChildError("error", f"there are {size} bytes to say of it, more than {longest}")
        if child.returncode or not answer.is_file():
            lines = child.stderr.decode(errors="replace").strip().splitlines()
            raise ChildError("error", lines[-1] if lines else "no answer")
        return json.loads(answer.read_bytes())
