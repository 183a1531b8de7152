"""Calibrating a release: statistics from the cache, or from a pass over the calibration set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np

from arch_maps.ops import RowReader, describe
from quant.calibrate.coding import FEW_TOKENS, TOKENS
from quant.calibrate.gather import TUNED, Gathering
from quant.calibrate.links import Task
from quant.calibrate.loading import Shapes
from quant.calibrate.store import Say, Statistics, Store
from quant.calibrate.text import Calibration, model_rows, tokenized
from quant.recipe import CODED
from quant.tune import Tuning

_WIDTH: Final = 64
"""Columns of a block of moments, where no group is wider."""
_VERSIONS: Final = ("torch", "transformers")
CODES_REVISION: Final = 3
"""Raised when "gptq" or "autoround" gives other codes: theirs on disk are then not taken."""


def calibrate(
    folder: Path,
    tasks: Sequence[Task],
    *,
    reader: RowReader,
    shapes: Shapes,
    text: str,
    calibration: Calibration,
    source: Mapping[str, Any],
    say: Say,
    tuning: Tuning | None = None,
    more: Callable[[], Sequence[Mapping[str, Any]]] = tuple,
    trust_remote_code: bool = False,
) -> Statistics:
    """What the tasks' method needs: moments for "imatrix", the codes for "gptq" and "autoround".

    ``reader`` and ``shapes`` give the tensors of the release in ``folder``; ``source`` identifies
    its content; ``tuning`` says how "autoround" tunes; ``more`` makes further rows, such as of
    pictures. Moments are cached and serve any bits, mode and group up to their width; codes depend
    on all settings, because each block is calibrated on the outputs of the quantized blocks before
    it. An interrupted pass goes on at the block where it stopped. The same files, versions and
    processor give the same statistics, whatever the number of threads; what is made from them is
    the same everywhere. Raises CalibrationError.
    """
    width = max([_WIDTH, *(task.spec.group_size for task in tasks)])
    key: dict[str, Any] = {
        "source": dict(source),
        "calibration": calibration.to_json(),
        "versions": {
            name: version(name)
            for name in (*_VERSIONS, *(("pillow",) if calibration.pictures else ()))
        },
        "matrices": sorted((task.module, describe(task.expr), task.table) for task in tasks),
    }
    coded = next((task.spec.method for task in tasks if task.spec.method in CODED), None)
    if coded != "autoround":
        tuning = None
    moments_store = Store("moments", key | {"width": width})
    recipes = sorted((t.module, t.dtype, sorted(asdict(t.spec).items())) for t in tasks)
    settings: dict[str, Any] = {
        **{"recipes": recipes, "revision": CODES_REVISION},
        "numpy": version("numpy"),
    }
    if tuning is not None:
        settings["tuning"] = tuning.to_json()
    store = moments_store if coded is None else Store(coded, key | settings)

    def tell(line: str) -> None:
        say(f"calibration: {line}")

    def made() -> Statistics:
        from quant.calibrate.stream import StreamedModel

        rows = [*model_rows(tokenized(text, folder, calibration)), *more()]
        streamed = StreamedModel(folder, reader, shapes, trust_remote_code=trust_remote_code)
        gathering = Gathering(streamed, tasks, rows, reader, shapes)

        def moments() -> Statistics:
            tell(f"activations of {len(rows)} sequences")
            return gathering.moments(moments_store, width=width)

        if coded is None:
            found = moments()
        else:
            seen = None
            if any(task.table for task in tasks):
                seen = moments_store.get(moments, tell)
            tell(f"{coded} of {len(tasks)} matrices, block by block")
            found = gathering.codes(store, seen, tuning)
        for line in coverage(tasks, found):
            tell(line)
        return found

    return store.get(made, tell)


def coverage(tasks: Sequence[Task], found: Statistics) -> list[str]:
    """What the statistics leave out: matrices without a product, experts with few tokens, blocks
    that tuning did not make better.
    """
    lines = []
    served = [t for t in tasks if t.module in found or f"{t.module}.weight" in found]
    if len(served) < len(tasks):
        lost = next(t.module for t in tasks if t not in served)
        lines.append(
            f"{len(tasks) - len(served)} matrices stand for no product of the reference, such as "
            f"{lost}: method search"
        )
    counts = [found[TOKENS + t.module] for t in served if TOKENS + t.module in found]
    if counts:
        few = sum(int((count < FEW_TOKENS).sum()) for count in counts)
        lines.append(
            f"{sum(map(len, counts))} experts' matrices saw {min(int(c.min()) for c in counts)} to "
            f"{max(int(c.max()) for c in counts)} tokens each; the {few} with less than "
            f"{FEW_TOKENS} are judged by what all experts of their layer saw"
        )
    losses = [found[name] for name in found.names if name.startswith(TUNED)]
    if losses:
        before, after = np.mean(losses, axis=0)
        kept = sum(float(old) == float(new) for old, new in losses)
        lines.append(
            f"tuning took the error of {len(losses)} blocks from {before:.4f} to {after:.4f} of "
            f"their outputs' energy; {kept} of them keep the codes of gptq"
        )
    return lines
