"""The stock programs as child processes: one launcher, time limits, nothing left behind."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final

from validate.acceptance.model import RowFailure

# Runs `python -m MODULE ARGS` unchanged, after the fast BLAS is loaded where MLX's own is slow.
_LAUNCH: Final = (
    "import runpy, sys; from validate.runtime import prepare_mlx; prepare_mlx(); "
    "sys.argv = sys.argv[1:]; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)
_ROOT: Final = Path(__file__).parents[2]
_THEIRS: Final = ("APC_", "KV_", "MLX_VLM_", "MAX_KV_SIZE", "QUANTIZED_KV_START", "TOP_LOGPROBS_K")
"""Settings that the runtimes read from the environment: the user's must not change a verdict."""
_ERROR: Final = re.compile(
    r"^(?:[\w.]+(?:Error|Exception|Exit|Interrupt)|usage|.*: error)\b.*", re.M
)
_SHOWN: Final = 600
GRACE_S: Final = 20.0
"""How long a program may take to end by itself after it was asked to."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """``python -m module arguments``, with environment settings of the runtime's own."""

    module: str
    arguments: tuple[str, ...]
    settings: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        settings = [f"{key}={shlex.quote(value)}" for key, value in self.settings.items()]
        words = [shlex.quote(word) for word in ("python", "-m", self.module, *self.arguments)]
        return " ".join([*settings, *words])

    def start(self, *, cwd: Path, log: IO[bytes]) -> subprocess.Popen[bytes]:
        """Start it in a process group of its own; both outputs go to ``log``."""
        return subprocess.Popen(
            self._argv(),
            cwd=cwd,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def run(self, *, cwd: Path, limit_s: float) -> str:
        """What it prints; RowFailure with the program's own words when it fails or is too slow."""
        process = subprocess.Popen(
            self._argv(),
            cwd=cwd,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=limit_s)
        except BaseException as error:
            end(process)
            process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise RowFailure(f"no answer within {limit_s:.0f} s") from None
            raise
        end(process)
        if process.returncode:
            text = (err + out).decode(errors="replace")
            raise RowFailure(f"exit status {process.returncode}: {last_error(text)}")
        return out.decode(errors="replace")

    def _argv(self) -> list[str]:
        return [sys.executable, "-c", _LAUNCH, self.module, *self.arguments]

    def _environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(_THEIRS)}
        path = os.pathsep.join(p for p in (str(_ROOT), kept.get("PYTHONPATH")) if p)
        # Everything is local: a look at a hub would only add delays and chance.
        fixed = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        return {**kept, **fixed, **self.settings}


def end(process: subprocess.Popen[bytes], *, grace_s: float = 0.0) -> None:
    """End a process and all that it started; ``grace_s`` seconds to end by itself first."""
    if process.poll() is None and grace_s:
        process.terminate()  # a server of uvicorn then writes what it still has to
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    # It may be gone already, with its whole group.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_error(text: str) -> str:
    """The last exception that a program reported, or the end of what it said."""
    found = list(_ERROR.finditer(text))
    told = text[found[-1].start() :] if found else text[-_SHOWN:]
    return " ".join(told.split())[:_SHOWN] or "it said nothing"


def arguments(
    *words: "str | Path | int | float", **flags: "str | Path | int | float"
) -> Sequence[str]:
    """``words``, then ``--name value`` of each keyword."""
    named = [part for key, value in flags.items() for part in (f"--{key.replace('_', '-')}", value)]
    return [str(word) for word in (*words, *named)]
