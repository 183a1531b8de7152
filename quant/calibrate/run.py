"""Calibrating a release: statistics from the cache, or from a pass over the text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quant.calibrate.gather import Task, column_weights, gptq_parts
from quant.calibrate.store import Statistics, cache_file, load, save
from quant.calibrate.text import Calibration, tokenized

Say = Callable[[str], None]


def calibrate(
    folder: Path,
    tasks: Sequence[Task],
    *,
    text: str,
    calibration: Calibration,
    source: Mapping[str, Any],
    say: Say,
    trust_remote_code: bool = False,
) -> Statistics:
    """What the tasks' method needs: column weights for "imatrix", the codes for "gptq".

    ``source`` identifies the release's content. Column weights are cached and serve any bits,
    group and mode; GPTQ's codes depend on all settings, because each block is calibrated on the
    outputs of the quantized blocks before it. The same files, versions, processor and number of
    torch threads give the same statistics; what is made from them is the same everywhere.
    Raises CalibrationError.
    """
    key: dict[str, Any] = {
        "source": dict(source),
        "calibration": calibration.to_json(),
        "tensors": sorted((task.source, task.table) for task in tasks),
    }
    path = cache_file("imatrix", key)
    weights = load(path)
    codes_path = cache_file("gptq", key | {"tasks": [asdict(task) for task in tasks]})
    gptq = any(task.spec.method == "gptq" for task in tasks)
    if gptq and (found := load(codes_path)) is not None:
        say(f"calibration: reusing {codes_path}")
        return found
    if not gptq and weights is not None:
        say(f"calibration: reusing {path}")
        return weights
    sequences = tokenized(text, folder, calibration)
    if weights is None:
        say(f"calibration: activations of {len(sequences)} x {calibration.length} tokens")
        weights = save(path, column_weights(_blocks(folder, sequences, trust_remote_code), tasks))
    if not gptq:
        return weights
    say(f"calibration: gptq of {len(tasks)} matrices, block by block")
    return save(
        codes_path, gptq_parts(_blocks(folder, sequences, trust_remote_code), tasks, weights)
    )


def _blocks(folder: Path, sequences: Sequence[Sequence[int]], trust_remote_code: bool) -> Any:
    from quant.calibrate.blocks import Blocks, load_model

    return Blocks(load_model(folder, trust_remote_code=trust_remote_code), sequences)
