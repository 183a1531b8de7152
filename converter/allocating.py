"""Allocation as a step of planning: cached losses, or a measuring pass over the weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from arch_maps.ops import RowReader
from converter.adapter import Fusion
from converter.adapter.torch_folder import fused_folder
from converter.allocate import allocate, cached
from converter.calibrated import CACHE, identity
from converter.errors import PlanError, UsageError
from converter.execute.folder import explain
from converter.losses import Measured, covered, measure, tasks_of
from converter.plan.model import Plan
from converter.plan.options import Options
from converter.release import Release
from converter.source import open_folder
from converter.ui import Console
from quant.calibrate.store import cache_folder


def allocated(
    draft: Plan,
    release: Release,
    fusion: Fusion | None,
    *,
    data: Path | None,
    console: Console,
    workers: int,
    trust_remote_code: bool = False,
) -> Options:
    """The options of ``draft`` with formats chosen for its target size.

    ``draft`` has one spec for all and decides what there is to choose; ``data`` is the calibration
    text. Raises UsageError for a size out of reach, PlanError for what cannot be measured.
    """

    def say(line: str) -> None:
        console.say(f"allocation: {line}")

    statistics = None
    if draft.options.calibration is not None:
        statistics = _sensitivities(
            draft, release, fusion, data=data, say=say, trust_remote_code=trust_remote_code
        )
        say(covered(draft, statistics))

    def make() -> Measured:
        say("measuring what each matrix loses in each format")
        with ExitStack() as stack:
            rows: RowReader = stack.enter_context(release.source.open())
            if fusion is not None:
                rows = stack.enter_context(fusion.open(rows))
            tick = stack.enter_context(console.progress("measure", unit="matrices"))
            return measure(
                draft,
                rows,
                statistics=statistics,
                workers=workers,
                config=release.source.config,
                progress=tick,
            )

    with explain(cache_folder(), CACHE):
        return allocate(draft, cached(draft, release.content(), make, say=say))


def _sensitivities(
    draft: Plan,
    release: Release,
    fusion: Fusion | None,
    *,
    data: Path | None,
    say: Callable[[str], None],
    trust_remote_code: bool,
) -> Any:
    from quant.calibrate.fisher import sensitivities
    from quant.calibrate.text import CalibrationError, calibration_of, read_text

    calibration = draft.options.calibration
    assert calibration is not None
    with ExitStack() as stack:
        folder = release.local()
        if fusion is not None:
            beside = cache_folder() / release.name
            folder = stack.enter_context(fused_folder(release, fusion, beside=beside))
        try:
            sizes = {"sequences": calibration.sequences, "length": calibration.length}
            if calibration_of(data, **sizes) != calibration:
                raise UsageError(f"--calibration-data {data}: changed since it was planned")
            checkpoint = open_folder(folder)
            stack.enter_context(explain(cache_folder(), CACHE))
            return sensitivities(
                folder,
                tasks_of(draft),
                reader=stack.enter_context(checkpoint.open()),
                shapes={name: info.shape for name, info in checkpoint.tensors.items()},
                text=read_text(data),
                calibration=calibration,
                source=identity(draft, release),
                say=say,
                trust_remote_code=trust_remote_code,
            )
        except CalibrationError as error:
            raise PlanError([str(error)]) from error
