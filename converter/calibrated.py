"""Calibration as a step of the conversion: the statistics of a plan, by output and row."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from converter.errors import PlanError, UsageError
from converter.plan.model import Output, Plan
from converter.release import Release
from converter.source import open_folder
from converter.ui import Console
from quant.calibrate.pictures import Picture
from quant.calibrate.store import Statistics, cache_folder
from quant.recipe import CALIBRATED, CODED

CACHE: Final = "XDG_CACHE_HOME"
"""What moves the folder of the statistics."""
MOST_OF_PICTURES: Final = 2 << 30
"""Bytes of prepared pictures, which are all held during the pass."""


@dataclass(frozen=True, slots=True)
class Calibrated:
    """The statistics of one plan, by output and row."""

    statistics: Statistics

    @property
    def digest(self) -> str:
        """sha256 of the statistics: with the plan, it decides every byte."""
        return self.statistics.digest

    def moments(self, out: Output, start: int, stop: int) -> np.ndarray | None:
        """Moments for rows of an output of method "imatrix", in blocks of its group size.

        None for other methods, and for a matrix that the statistics leave out.
        """
        from quant.moments import narrowed

        if out.quant is None or out.quant.method != "imatrix":
            return None
        name = out.rule.module
        if name not in self.statistics:
            return None
        stacked = len(out.expr.shape) == 3
        found = self.statistics.rows(name, start, stop) if stacked else self.statistics[name]
        return narrowed(found, out.quant.group_size)

    def parts(self, out: Output, start: int, stop: int) -> dict[str, np.ndarray] | None:
        """Rows of the stored tensors of an output of method "gptq" or "autoround".

        None for other methods, and for a matrix that the statistics leave out.
        """
        if out.quant is None or out.quant.method not in CODED:
            return None
        names = {role: f"{out.rule.module}.{role}" for role in out.stored}
        if not all(name in self.statistics for name in names.values()):
            return None
        return {role: self.statistics.rows(name, start, stop) for role, name in names.items()}


def statistics_of(
    plan: Plan,
    release: Release,
    *,
    data: Path | None,
    beside: Path,
    console: Console,
    trust_remote_code: bool = False,
    folder: Path | None = None,
) -> Calibrated | None:
    """The statistics that ``plan`` needs, from the cache or a pass over the text at ``data``.

    ``folder`` holds the torch checkpoint to run where it is not the release itself. A quantized
    release is calibrated as decoded, in a folder next to ``beside`` meanwhile. Raises UsageError
    where the text is not the planned one, PlanError where the release cannot be calibrated.
    """
    calibration = plan.options.calibration
    tasks = [] if calibration is None else _tasks(plan.outputs)
    if calibration is None or not tasks:
        return None
    from converter.execute.folder import explain  # execute itself takes what is calibrated
    from converter.plain import plain_release  # which executes a plan itself
    from quant.calibrate.pictures import pictures_in
    from quant.calibrate.run import calibrate
    from quant.calibrate.text import CalibrationError, calibration_of, read_text

    try:
        now = calibration_of(data, sequences=calibration.sequences, length=calibration.length)
        if now != calibration:
            raise UsageError(f"--calibration-data {data}: changed since it was planned")
        with ExitStack() as stack:
            plain = stack.enter_context(plain_release(folder or release.local(), beside=beside))
            checkpoint = open_folder(plain)
            stack.enter_context(explain(cache_folder(), CACHE))
            found = calibrate(
                plain,
                tasks,
                reader=stack.enter_context(checkpoint.open()),
                shapes={name: info.shape for name, info in checkpoint.tensors.items()},
                text=read_text(data),
                calibration=calibration,
                source=identity(plan, release),
                say=console.say,
                tuning=plan.options.tuning,
                more=lambda: picture_rows(plain, pictures_in(data), trust=trust_remote_code),
                trust_remote_code=trust_remote_code,
            )
    except CalibrationError as error:
        raise PlanError([str(error)]) from error
    return Calibrated(found)


def picture_rows(
    folder: Path, pictures: Sequence[Picture], *, trust: bool = False
) -> list[dict[str, Any]]:
    """Keyword arguments of a forward call for each picture, by the release's own processor.

    Raises CalibrationError naming the picture that cannot be read or prepared.
    """
    if not pictures:
        return []
    from PIL import Image

    from quant.errors import CalibrationError
    from validate.processor import load_processor, picture_inputs
    from validate.reference import ReferenceError

    try:
        processor = load_processor(folder, trust_remote_code=trust)
    except (OSError, ValueError, ImportError, ReferenceError) as error:
        raise CalibrationError(f"{folder}: its processor cannot be loaded: {error}") from error
    rows, held = [], 0
    for picture in pictures:
        try:
            with Image.open(picture.path) as image:
                inputs = picture_inputs(processor, image.convert("RGB"), picture.question)
        except Exception as error:  # whatever a file provokes in Pillow or a processor
            raise CalibrationError(
                f"--calibration-data: {picture.path} cannot be prepared: {error!r}"
            ) from error
        held += sum(getattr(value, "nbytes", 0) for value in inputs.values())
        if held > MOST_OF_PICTURES:
            raise CalibrationError(
                f"--calibration-data: the pictures up to {picture.path} take over "
                f"{MOST_OF_PICTURES >> 30} GiB prepared; give fewer or smaller ones"
            )
        rows.append(inputs)
    return rows


def _tasks(outputs: Sequence[Output]) -> list[Any]:
    from quant.calibrate.links import Task

    return [
        Task(
            module=out.rule.module,
            expr=out.expr,
            dtype=out.dtype,
            spec=out.quant,
            table=out.rule.tied,
        )
        for out in outputs
        if out.quant is not None and out.quant.method in CALIBRATED
    ]


def identity(plan: Plan, release: Release) -> dict[str, Any]:
    """What tells this release's content from any other's."""
    where = {} if release.snapshot else {"folder": str(release.local().resolve())}
    return {**plan.source, **where, "stamp": release.stamp()}
