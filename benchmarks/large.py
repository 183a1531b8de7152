"""A checkpoint larger than memory, converted and proven: ``python -m benchmarks.large``.

Makes a bf16 release of Qwen3 8B's layers, as many as ``--gigabytes`` asks for, with the vocabulary
of Qwen3.5 and random weights throughout, converts it to 4 bits, and judges the output against it in
a process that may take no more than ``--limit``. A small release is judged both ways, and the
figures compared. Writes ``large.md`` and ``large.json`` beside this file. Needs the release's size
and a third of it on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.process import run

HERE = Path(__file__).parent
SMALL_BYTES = 3e7
EVERYTHING = "1000TB"
"""A limit that no run of the small release reaches."""
_EVERY_S = 0.5
CONVERT = (sys.executable, "-c", "from converter.cli import main; main()")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One measured command."""

    what: str
    seconds: float
    peak_bytes: int
    """Resident memory of its largest process."""
    tree_bytes: int
    """The most that all its processes together held, sampled."""
    read_bytes: int | None


class Bench:
    """Runs commands in ``work`` and keeps account of them."""

    def __init__(self, work: Path, timeout: float) -> None:
        self.work = work
        self.timeout = timeout
        self.steps: list[Step] = []

    def step(self, what: str, *words: str | Path, measured: bool = True) -> str:
        """Run a command to its end; its output."""
        print(f"{what} ...", file=sys.stderr, flush=True)
        with _Tree() as tree:
            done = run(words, log=self.work / "log", timeout=self.timeout)
        print(f"  {done.seconds:.0f} s, {gib(done.peak_bytes)}", file=sys.stderr, flush=True)
        if measured:
            self.steps.append(
                Step(
                    what=what,
                    seconds=round(done.seconds, 1),
                    peak_bytes=done.peak_bytes,
                    tree_bytes=max(tree.most, done.peak_bytes),
                    read_bytes=done.read_bytes,
                )
            )
        return done.output

    def make(self, folder: Path, *words: str) -> int:
        """A release of random weights; the bytes of its weights."""
        made = (sys.executable, "-m", "benchmarks.checkpoint")
        said = self.step(f"making {folder.name}", *made, folder, *words, measured=False)
        return int(said.split()[-1])

    def convert(self, source: Path, out: Path, *words: str) -> None:
        """Convert without judging."""
        command = (*CONVERT, "--hf-path", source, "--mlx-path", out, "--no-validate", "--quiet")
        self.step(f"convert {' '.join(words) or 'bf16'}, {source.name}", *command, *words)

    def validate(self, what: str, source: Path, out: Path, limit: str) -> dict[str, Any]:
        """Judge an output; its parity report."""
        command = (*CONVERT, "validate", "--hf-path", source, "--mlx-path", out)
        self.step(what, *command, "--memory-limit", limit)
        found: dict[str, Any] = json.loads((out / "parity.json").read_text(encoding="utf-8"))
        return found


def main() -> int:
    """Measure, write both files, and return 0 when the bound was kept and the report passed."""
    given = _arguments()
    work: Path = given.work.resolve() / "large"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    bench = Bench(work, given.timeout)
    facts = {**machine.describe(), "load before": f"{machine.load():.1f}"}
    try:
        source, out = work / "large", work / "large-4bit"
        size = bench.make(source, "--wide", "--bytes", str(given.gigabytes * 1e9))
        bench.convert(source, out, "-q", "--q-bits", "4")
        report = bench.validate("validate, large, block by block", source, out, given.limit)
        judged = bench.steps[-1]
        shutil.rmtree(source)
        small = _small(bench)
    finally:
        if not given.keep:
            shutil.rmtree(work, ignore_errors=True)
    facts["load after"] = f"{machine.load():.1f}"
    data = {
        "machine": facts,
        "source_bytes": size,
        "limit": given.limit,
        "judged": asdict(judged),
        "steps": [asdict(step) for step in bench.steps],
        "verdict": report["verdict"],
        "checks": [_short(check) for check in report["checks"]],
        "small": small,
    }
    given.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    given.markdown.write_text(as_markdown(data), encoding="utf-8")
    print(as_markdown(data))
    from converter.memory import size_of

    kept = judged.tree_bytes <= size_of(given.limit, "--limit")
    return 0 if kept and report["verdict"] == "pass" else 1


def _small(bench: Bench) -> list[dict[str, Any]]:
    """The figures of a small release, bf16 and 4-bit, judged whole and block by block."""
    source = bench.work / "small"
    bench.make(source, "--hidden", "512", "--bytes", str(SMALL_BYTES))
    rows = []
    for name, words in {"bf16": (), "4bit": ("-q", "--q-bits", "4")}.items():
        out = bench.work / f"small-{name}"
        bench.convert(source, out, *words)
        whole, streamed = (
            bench.validate(f"validate, small {name}, {how}", source, out, limit)
            for how, limit in (("whole", EVERYTHING), ("block by block", "0GB"))
        )
        before = {_key(check): check for check in whole["checks"]}
        for check in streamed["checks"]:
            other = before.get(_key(check))
            if other is not None and check["name"] in ("logits", "loss", "greedy", "decode"):
                rows.append({**_short(check), "output": name, "whole": other["value"]})
    shutil.rmtree(source)
    return rows


def _key(check: dict[str, Any]) -> tuple[Any, ...]:
    return check["name"], check["modality"], check.get("runtime")


def _short(check: dict[str, Any]) -> dict[str, Any]:
    names = ("name", "modality", "runtime", "value", "threshold", "verdict", "note")
    return {name: check.get(name) for name in names}


def as_markdown(data: dict[str, Any]) -> str:
    """The page: what was run, within which memory, and what the reports say."""
    size = data["source_bytes"]
    last = data["judged"]
    lines = [
        "# Proving what does not fit into memory",
        "",
        f"A bf16 release of {size / 1e9:.1f} GB (layers of Qwen3 8B, a vocabulary of "
        "248,320, random weights), which whole in "
        f"float32 would be {2 * size / 2**30:.1f} GiB, judged under a limit of {data['limit']}: "
        f"**{data['verdict']}**, with at most **{gib(last['tree_bytes'])}** resident.",
        "",
        "| command | seconds | largest process | all together | read |",
        "|---|---|---|---|---|",
    ]
    for step in data["steps"]:
        read = "" if step["read_bytes"] is None else f"{step['read_bytes'] / 1e9:.1f} GB"
        lines.append(
            f"| {step['what']} | {step['seconds']:.0f} | {gib(step['peak_bytes'])} | "
            f"{gib(step['tree_bytes'])} | {read} |"
        )
    lines += ["", "## The report of the large one", "", "| | runtime | input | check | value |"]
    lines += ["|---|---|---|---|---|"]
    for check in data["checks"]:
        value = "" if check["value"] is None else f"{check['value']:.3g}"
        lines.append(
            f"| {check['verdict']} | {check['runtime']} | {check['modality']} | "
            f"{check['name']} | {value} |"
        )
    lines += [
        "",
        "## The same numbers as whole",
        "",
        f"A release of {SMALL_BYTES / 1e6:g} MB, judged whole and block by block. A whole run goes "
        "12 tokens past each prompt, one block by block 4, so `decode` and `greedy` are of other "
        "positions.",
        "",
        "| output | runtime | input | check | whole | block by block |",
        "|---|---|---|---|---|---|",
    ]
    for row in data["small"]:
        lines.append(
            f"| {row['output']} | {row['runtime']} | {row['modality']} | {row['name']} | "
            f"{row['whole']:.6g} | {row['value']:.6g} |"
        )
    lines += ["", "## Machine", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in data["machine"].items()]
    return "\n".join(lines) + "\n"


def gib(size: float) -> str:
    """Bytes as GiB."""
    return f"{size / 2**30:.2f} GiB"


class _Tree:
    """Samples what all descendants of this process hold together, as ``ps`` tells it."""

    def __init__(self) -> None:
        self.most = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Tree:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(_EVERY_S):
            self.most = max(self.most, descendants_bytes(os.getpid()))


def descendants_bytes(root: int) -> int:
    """Resident bytes of all processes below ``root``."""
    command = ("ps", "-A", "-o", "pid=,ppid=,rss=,comm=")
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    rows = [line.split(None, 3) for line in listed.splitlines()]
    mine, total = {str(root)}, 0
    grown = True
    while grown:
        below = [row for row in rows if row[1] in mine and row[0] not in mine]
        grown = bool(below)
        mine |= {row[0] for row in below}
        total += sum(int(row[2]) for row in below if row[3].strip() != "ps")
    return total * 1024


def _arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large", description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=12, help="size of the large release")
    parser.add_argument("--limit", default="6GiB", help="memory that judging it may take")
    parser.add_argument("--timeout", type=float, default=7200, help="seconds for one command")
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="folder for all files")
    parser.add_argument("--keep", action="store_true", help="leave the work folder")
    parser.add_argument("--markdown", type=Path, default=HERE / "large.md", metavar="FILE")
    parser.add_argument("--json", type=Path, default=HERE / "large.json", metavar="FILE")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
