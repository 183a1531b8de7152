"""Converts in forks of one warm process, so that a test can kill conversions and nothing else.

Usage: kill_server.py SOURCE UNIT_BYTES FLUSH_BYTES. For each output folder on stdin it prints the
process id of the conversion, and its exit status when it has ended. Beside a finished output lies
a file with the number of units that were converted.
"""

import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from release_helpers import FOUR_BIT, make  # noqa: E402

from converter.execute import run, units  # noqa: E402
from converter.plan import Options  # noqa: E402

RECIPES = (Options(), FOUR_BIT)
calls = 0


def main() -> None:
    source = Path(sys.argv[1])
    make(source, source.with_name("warm"), *RECIPES, workers=2)  # compiles and imports
    units.UNIT_BYTES, run.FLUSH_BYTES = int(sys.argv[2]), int(sys.argv[3])
    os.pwrite = _slowly(os.pwrite)
    os.fsync = os.fdatasync = lambda descriptor: None  # a kill takes nothing from the page cache
    run.encode = _counted(run.encode)
    print("ready", flush=True)
    for line in sys.stdin:
        out = Path(line.strip())
        child = os.fork()
        if not child:
            make(source, out, *RECIPES, workers=2)
            out.with_name(f"{out.name}.count").write_text(str(calls))
            os._exit(0)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)


def _slowly(pwrite):
    """Writes in pieces with a pause between, so that kills fall into the middle of them."""

    def piece(descriptor, data, offset):
        time.sleep(0.0003)
        return pwrite(descriptor, data[: max(4096, len(data) // 2)], offset)

    return piece


def _counted(encode):
    def counting(*arguments, **named):
        global calls
        calls += 1
        return encode(*arguments, **named)

    return counting


if __name__ == "__main__":
    main()
