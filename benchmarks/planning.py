"""Times the steps of planning inside one process: ``python -m benchmarks.planning FOLDER``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def timed_plan(folder: Path) -> dict[str, float]:
    """Seconds to open a release, to match its map, and to build its plan; and its tensors."""
    from converter.plan import Options, build_plan
    from converter.plan.match import find_map, match_release
    from converter.source.folder import open_folder
    from quant.recipe import QuantSpec

    start = time.perf_counter()
    source = open_folder(folder)
    opened = time.perf_counter()
    match = match_release(source, find_map(source.config))
    matched = time.perf_counter()
    build_plan(source, match, Options(quant=QuantSpec.make("affine")))
    built = time.perf_counter()
    return {
        "open": opened - start,
        "match": matched - opened,
        "build": built - matched,
        "tensors": len(source.tensors),
    }


if __name__ == "__main__":
    print(json.dumps(timed_plan(Path(sys.argv[1]))))
