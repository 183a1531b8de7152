"""``convert report``: finished runs side by side, from the reports that they left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from converter.acceptance import acceptance_report, identity
from converter.errors import PlanError, UsageError
from converter.execute.folder import MANIFEST
from converter.manifest import read_manifest
from converter.naming import folder_names
from converter.page import conversion
from converter.source.strict_json import MAX_JSON_BYTES, parse_object

_PARITY: Final = "parity.json"


def gather(places: Sequence[Path]) -> dict[str, Any]:
    """The runs of output folders, or of parity.json files, as validate.runs describes them.

    Raises UsageError for a place without a parity report, and for a file that is none.
    """
    files = [_report_of(place) for place in places]
    names = folder_names([file.parent if file.name == _PARITY else file for file in files])
    runs = []
    for name, file in zip(names, files, strict=True):
        data = _read(file)
        out = file.parent
        # A report that was copied elsewhere says what it says, without what lay beside it.
        beside = file.name == _PARITY and (out / MANIFEST).is_file()
        made = conversion(out) if beside else None
        runs.append(
            _facts(
                file,
                data,
                name=name,
                conversion=made,
                recorded=read_manifest(out).data if beside else None,
                acceptance=acceptance_report(out) if file.name == _PARITY else None,
                stale=beside and (data["plan"], data.get("checkpoint")) != identity(out),
            )
        )
    return {"runs": runs}


def _facts(file: Path, data: dict[str, Any], **known: Any) -> dict[str, Any]:
    from validate.runs import run_facts

    try:
        return run_facts(data, **known)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        told = f"{type(error).__name__}: {error}"
        raise UsageError(f"{file}: is no parity report: {told}") from error


def _report_of(place: Path) -> Path:
    if place.is_dir():
        place = place / _PARITY
        if not place.is_file():
            raise UsageError(
                f"{place.parent}: has no parity.json; `convert validate --hf-path SRC --mlx-path "
                f"{place.parent}` writes one"
            )
    if not place.is_file():
        raise UsageError(f"{place}: there is no such folder or file")
    return place


def _read(file: Path) -> dict[str, Any]:
    if file.stat().st_size > MAX_JSON_BYTES:
        raise UsageError(f"{file}: is no parity report: {file.stat().st_size} bytes are too many")
    try:
        data = parse_object(file.read_bytes(), file.name)
    except (OSError, PlanError) as error:
        raise UsageError(f"{file}: cannot be read as a parity report: {error}") from error
    lacks = [
        key for key in ("verdict", "plan", "reference", "runtime", "checks") if key not in data
    ]
    if lacks:
        raise UsageError(f"{file}: is no parity report; it lacks {', '.join(lacks)}")
    return data
