"""Calibrating a release: statistics from the cache, or from a pass over the calibration set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from arch_maps.ops import RowReader, describe
from quant.calibrate.gather import FEW_TOKENS, TOKENS, Gathering
from quant.calibrate.links import Task
from quant.calibrate.loading import Shapes
from quant.calibrate.store import Statistics, Store
from quant.calibrate.text import Calibration, model_rows, tokenized

Say = Callable[[str], None]
_WIDTH: Final = 64
"""Columns of a block of moments, where no group is wider."""
_VERSIONS: Final = ("torch", "transformers")


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
    more: Callable[[], Sequence[Mapping[str, Any]]] = tuple,
    trust_remote_code: bool = False,
) -> Statistics:
    """What the tasks' method needs: moments for "imatrix", the codes for "gptq".

    ``reader`` and ``shapes`` give the tensors of the release in ``folder``; ``source`` identifies
    its content; ``more`` makes further rows, such as of pictures. Moments are cached and serve any
    bits, mode and group up to their width; GPTQ's codes depend on all settings, because each block
    is calibrated on the outputs of the quantized blocks before it. An interrupted pass goes on at
    the block where it stopped. The same files, versions and processor give the same statistics,
    whatever the number of threads; what is made from them is the same everywhere. Raises
    CalibrationError.
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
    gptq = any(task.spec.method == "gptq" for task in tasks)
    moments_store = Store("moments", key | {"width": width})
    recipes = sorted((t.module, t.dtype, sorted(asdict(t.spec).items())) for t in tasks)
    store = Store("gptq", key | {"recipes": recipes}) if gptq else moments_store
    if (found := store.finished()) is not None:
        say(f"calibration: reusing {store.folder}")
        return found

    from quant.calibrate.stream import StreamedModel

    rows = [*model_rows(tokenized(text, folder, calibration)), *more()]
    streamed = StreamedModel(folder, reader, shapes, trust_remote_code=trust_remote_code)
    gathering = Gathering(streamed, tasks, rows, reader, shapes)
    moments = moments_store.finished()
    if moments is None and (not gptq or any(task.table for task in tasks)):
        say(f"calibration: activations of {len(rows)} sequences")
        moments = gathering.moments(moments_store, width=width)
    if gptq:
        say(f"calibration: gptq of {len(tasks)} matrices, block by block")
        found = gathering.gptq(store, moments)
    else:
        assert moments is not None, "they were just made"
        found = moments
    for line in coverage(tasks, found):
        say(f"calibration: {line}")
    return found


def coverage(tasks: Sequence[Task], found: Statistics) -> list[str]:
    """What the statistics leave out: matrices without a product, experts with few tokens."""
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
    return lines
