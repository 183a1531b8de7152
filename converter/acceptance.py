"""Runtime acceptance of an output: run, and written beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from converter.atomic import write_atomic
from converter.errors import ConvertError, PlanError, UsageError
from converter.execute.folder import MANIFEST, explain
from converter.manifest import read_manifest
from converter.source.strict_json import parse_object

if TYPE_CHECKING:
    from validate.acceptance.model import Outcome

REPORT: Final = "acceptance.json"


def accept_output(
    out: Path,
    *,
    only: Sequence[str] = (),
    drafter: Path | None = None,
    image: Path | None = None,
    progress: Callable[[Outcome], None] | None = None,
) -> dict[str, Any]:
    """Run the rows on ``out`` and write acceptance.json; its content.

    Rows that ``only`` leaves out keep what an earlier run said of them, where a manifest tells that
    it was on the same files. Raises
    UsageError when no row has such a title, ConvertError when the folder is no checkpoint.
    """
    from validate.acceptance.facts import Facts
    from validate.acceptance.model import report_json
    from validate.acceptance.rows import ROWS
    from validate.acceptance.run import accept, chosen
    from validate.reference import ReferenceError
    from validate.runtime import prepare_mlx

    unknown = [text for text in only if not chosen([text])]
    if unknown:
        titles = "; ".join(row.title for row in ROWS)
        raise UsageError(f"--only {unknown[0]}: no row has such a title. Rows: {titles}")
    earlier = acceptance_report(out) if only else None  # a damaged one is told before hours pass
    prepare_mlx()
    try:
        facts = Facts.read(
            out.resolve(), drafter=drafter.resolve() if drafter else None, image=image
        )
    except ReferenceError as error:
        raise ConvertError(str(error)) from error
    outcomes, backend = accept(facts, only=only, progress=progress)
    plan, checkpoint = identity(out)
    report = report_json(outcomes, plan=plan, checkpoint=checkpoint, backend=backend)
    if earlier is not None:
        report = _merged(report, earlier, [(row.name, row.runtime) for row in ROWS])
    with explain(out):
        write_atomic(out / REPORT, json_text(report))
    return report


def acceptance_report(out: Path) -> dict[str, Any] | None:
    """What the stock programs did with exactly these files; None where that is not known."""
    return report_of(out, REPORT)


def report_of(out: Path, name: str) -> dict[str, Any] | None:
    """What the JSON file ``name`` beside an output says, where it is of exactly these files.

    Nothing ties such a file to a checkpoint without a manifest, so there it is None as well.
    Raises ConvertError for a damaged one.
    """
    path, wanted = out / name, identity(out)
    if wanted == (None, None) or not path.is_file():
        return None
    try:
        report = parse_object(path.read_bytes(), name)
    except PlanError as error:
        raise ConvertError(f"{path}: is damaged ({error}); remove it") from error
    return report if (report.get("plan"), report.get("checkpoint")) == wanted else None


def identity(out: Path) -> tuple[str | None, str | None]:
    """Plan and hash over all files of an output; none of a checkpoint that was made elsewhere."""
    if not (out / MANIFEST).is_file():
        return None, None
    manifest = read_manifest(out)
    return manifest.plan, manifest.checkpoint


def _merged(
    report: dict[str, Any], earlier: dict[str, Any], order: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """The rows of both, the newer where both have one, in the order of a whole run."""
    from validate.acceptance.model import verdict_of

    rows = {(row["name"], row["runtime"]): row for row in (*earlier["rows"], *report["rows"])}
    kept = [rows[key] for key in order if key in rows]
    return {**report, "verdict": verdict_of(row["verdict"] for row in kept), "rows": kept}


def json_text(report: dict[str, Any]) -> str:
    """A report as it is written beside an output."""
    return json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
