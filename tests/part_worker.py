"""Makes a part of a conversion, or finishes it, in a process that a test can kill."""

import os
import time
from pathlib import Path

from release_helpers import FOUR_BIT, make

from converter.execute import run, units
from converter.execute.parts import Part
from converter.plan import Options, layout

SHARD_BYTES = 200_000
RECIPES = (Options(), FOUR_BIT)


def make_part(source: Path, out: Path, number: int, count: int, slowly: bool = False) -> None:
    layout.lay_out.__kwdefaults__["shard_bytes"] = SHARD_BYTES
    units.UNIT_BYTES, run.FLUSH_BYTES = 16 << 10, 32 << 10
    os.fsync = os.fdatasync = lambda descriptor: None  # a kill takes nothing from the page cache
    if slowly:
        encode = run.encode

        def waiting(*arguments, **named):
            time.sleep(0.05)
            return encode(*arguments, **named)

        run.encode = waiting
    make(source, out, *RECIPES, workers=1, part=Part(number, count))
