"""Memory of the calibrated methods on a release of gigabytes, as whole processes.

``python -m benchmarks.calibration`` makes a Qwen3 release of random weights, converts it with every
calibrated method to 4 bits, and writes what the largest process held to ``calibration.md`` and
``calibration.json``. Weights, moments and codes are held a block at a time, so the length of the
calibration text does not show, beyond hidden states of up to 1 GiB in memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from benchmarks.process import run

MOST: Final = 4 << 30
"""The most bytes that a calibrated conversion may hold."""
_TEXT: Final = Path(__file__).parent.parent / "tests" / "fixtures" / "tinylm" / "calibration.txt"
_PACKAGES: Final = ("torch", "transformers", "numpy", "numba")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One conversion: the memory of its largest process, and its time."""

    method: str
    bits: int
    peak_bytes: int
    seconds: float
    cpu_seconds: float


def measure(source: Path, method: str, bits: int, given: argparse.Namespace, work: Path) -> Row:
    """Convert ``source`` with an empty cache."""
    command: list[Any] = [sys.executable, "-m", "converter", "--hf-path", source]
    command += ["--mlx-path", work / "out", "--overwrite", "--no-validate", "--workers", 2]
    command += ["-q", "--q-bits", bits, "--q-method", method, "--calibration-data", _TEXT]
    command += ["--calibration-sequences", given.sequences, "--calibration-length", given.length]
    if method == "autoround":
        command += ["--tuning-iterations", given.iterations]
    cache = work / "cache"
    done = run(
        [str(word) for word in command],
        log=work / "log",
        timeout=given.limit,
        environment={"XDG_CACHE_HOME": str(cache)},
    )
    shutil.rmtree(cache, ignore_errors=True)
    return Row(
        method=method,
        bits=bits,
        peak_bytes=done.peak_bytes,
        seconds=done.seconds,
        cpu_seconds=done.cpu_seconds,
    )


def page(rows: list[Row], size: int, given: argparse.Namespace) -> str:
    """The table as Markdown."""
    used = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    tuned = any(row.method == "autoround" for row in rows)
    steps = f"`autoround` took {given.iterations} steps in each block. " if tuned else ""
    lines = "\n".join(
        f"| `{row.method}` | {row.bits} | {row.peak_bytes / 2**20:.0f} MiB | "
        f"{'met' if row.peak_bytes <= MOST else 'NOT MET'} | {row.seconds:.0f} | "
        f"{row.cpu_seconds:.0f} |"
        for row in rows
    )
    return (
        "# Memory of calibrated conversions\n\n"
        "Written by `python -m benchmarks.calibration`. A Qwen3 release of "
        f"{size / 1e9:.1f} GB (random bf16 weights, hidden size 2048) converted whole, "
        f"calibrated on {given.sequences} x {given.length} tokens, from an empty cache; peak "
        "memory is that of the whole process as the system accounts for it. Weights, moments and "
        "codes are held a block at a time, moments in lots of 1 GiB, so it depends on the widest "
        "block, not on the size of the release; of the text only hidden states are held, up to "
        f"1 GiB of them. {steps}Seconds are of a shared machine and say little. {used}.\n\n"
        "| method | bits | peak memory | <= 4 GiB | s | CPU s |\n|---|---|---|---|---|---|\n"
        f"{lines}\n"
    )


def main() -> int:
    """Write the page; exit status 1 where a conversion holds more than it may."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.2)
    parser.add_argument("--methods", nargs="*", default=["imatrix", "gptq", "autoround"])
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--iterations", type=int, default=2, help="of autoround")
    parser.add_argument("--limit", type=float, default=7200, help="seconds for each conversion")
    parser.add_argument("--work", type=Path, help="where to put about 4 GB for the time being")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=given.work) as folder:
        work = Path(folder)
        source = work / "release"
        maker = [sys.executable, "-m", "benchmarks.checkpoint", str(source)]
        run([*maker, "--bytes", str(given.gigabytes * 1e9)], log=work / "log", timeout=given.limit)
        size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        for method in given.methods:
            row = measure(source, method, 2 if method == "autoround" else 4, given, work)
            rows.append(row)
            print(f"{method}: {row.peak_bytes / 2**20:.0f} MiB in {row.seconds:.0f} s", flush=True)
            data = {
                "bytes": size,
                "sequences": given.sequences,
                "length": given.length,
                "iterations": given.iterations,
                "versions": {name: version(name) for name in _PACKAGES},
                "rows": [asdict(row) for row in rows],
            }
            (given.out / "calibration.json").write_text(json.dumps(data, indent=1) + "\n")
            (given.out / "calibration.md").write_text(page(rows, size, given))
    return 1 if any(row.peak_bytes > MOST for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
