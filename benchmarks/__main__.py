"""``python -m benchmarks``: measure, print the table, write results.md and results.json."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from benchmarks import machine
from benchmarks.bench import Bench
from benchmarks.cases import CASES
from benchmarks.process import CommandError
from benchmarks.report import Row, as_json, as_markdown, as_text

_HERE = Path(__file__).parent


def main() -> int:
    """Run the chosen cases; 0 when all of them could be measured, met or not."""
    given = _arguments()
    work: Path = given.work.resolve() / "run"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    bench = Bench(
        work=work,
        size=given.gigabytes * 1e9,
        slow_size=(given.slow_gigabytes or given.gigabytes) * 1e9,
        rounds=given.rounds,
        large=given.large,
        timeout=given.timeout,
    )
    busy = machine.load()
    rows: list[Row] = []
    failed = False
    try:
        for name in given.only or CASES:
            bench.say(f"{name}: {CASES[name].__doc__}")
            try:
                rows += CASES[name](bench)
            except CommandError as error:
                failed = True
                bench.say(f"{name}: could not be measured: {error}")
    finally:
        if not given.keep:
            shutil.rmtree(work, ignore_errors=True)
    facts = {**machine.describe(), "load before": f"{busy:.1f}", "load after": _load()}
    print(as_text(rows))
    remarks = _remarks(given.gigabytes, given.rounds)
    _write(given.markdown, as_markdown(rows, facts=facts, remarks=remarks))
    settings = {"gigabytes": given.gigabytes, "rounds": given.rounds, "large": given.large}
    _write(given.json, as_json(rows, facts=facts, given=settings))
    return 1 if failed else 0


def _remarks(gigabytes: float, rounds: int) -> list[str]:
    return [
        f"A Qwen3 text model of {gigabytes:g} GB, random bf16 weights. Every figure is of whole "
        f"processes, {rounds} rounds in turn; ratios are taken within a round and the median "
        "round is quoted. The source was read once beforehand, so all find it in the page cache.",
        "What this converter does and the stock ones do not is inside its time: it checks that "
        "weights are finite, flushes its output to the disk, and hashes every file.",
    ]


def _load() -> str:
    return f"{machine.load():.1f}"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(path, file=sys.stderr)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.2, help="size of the main release")
    parser.add_argument("--slow-gigabytes", type=float, help="release for mxfp4, nvfp4, mxfp8")
    parser.add_argument("--only", nargs="+", choices=list(CASES), metavar="NAME", help=_names())
    parser.add_argument("--rounds", type=int, default=3, help="repetitions (default 3)")
    parser.add_argument("--large", action="store_true", help="memory at 8 and 32 GB: 12 GB of disk")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one command")
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="folder for all files")
    parser.add_argument("--keep", action="store_true", help="leave the work folder")
    parser.add_argument("--markdown", type=Path, default=_HERE / "results.md", metavar="FILE")
    parser.add_argument("--json", type=Path, default=_HERE / "results.json", metavar="FILE")
    given = parser.parse_args()
    if given.gigabytes <= 0 or given.rounds < 1 or given.timeout <= 0:
        parser.error("--gigabytes, --rounds and --timeout must be positive")
    return given


def _names() -> str:
    return "of " + ", ".join(CASES)


if __name__ == "__main__":
    sys.exit(main())
