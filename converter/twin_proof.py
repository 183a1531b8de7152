"""A twin of a release converted and proven: what can be known before, or without, its weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from converter.errors import ConvertError
from converter.ui import Console


def judge_twin(config: dict[str, Any], folder: Path, *, workers: int) -> tuple[str, str]:
    """Verdict (pass, fail, unproven, unmade) and reason for a twin, made and removed here."""
    from converter.pipeline import Request, convert
    from converter.proof import prove
    from validate.twin import TwinError, make_twin

    console = Console(quiet=True)
    shutil.rmtree(folder, ignore_errors=True)
    source = folder / "source"
    try:
        source.parent.mkdir(parents=True)
        try:
            make_twin(config, source)
        except TwinError as error:
            return "unmade", str(error)
        request = Request(hf_path=str(source), mlx_path=folder / "mlx", workers=workers)
        made = convert(request, console)[0]
        try:
            report = prove(
                made.folder,
                source=source,
                console=console,
                plan=made.plan,
                arch=made.arch,
                workers=workers,
            )
        except ConvertError as error:  # the twin, not the release, has no reference
            return "unmade", str(error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    failed = [str(check["name"]) for check in report["checks"] if check["verdict"] == "fail"]
    return str(report["verdict"]), ", ".join(failed)
