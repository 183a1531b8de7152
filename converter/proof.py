"""Proving a finished output: the runtime against the torch reference, reported beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from arch_maps.registry import ArchMap
from converter.blockwise import blockwise
from converter.diagnose import diagnose
from converter.diagnose.codes import codes_check
from converter.errors import ConvertError, GateError
from converter.execute.folder import explain
from converter.manifest import note_comparison, read_manifest
from converter.page import draw_page
from converter.plain import plain_release
from converter.plan import Plan
from converter.ui import Console
from converter.written import as_released, written_weights
from validate.checks import NOT_COMPARED, REFERENCE, Check, Report


def prove(
    out: Path,
    *,
    source: Path,
    console: Console,
    plan: Plan | None = None,
    kl_threshold: float | None = None,
    trust_remote_code: bool = False,
    workers: int = 2,
    arch: ArchMap | None = None,
    memory_limit: int | None = None,
) -> dict[str, Any]:
    """Judge the checkpoint ``out`` against the release in ``source``; the content of parity.json.

    Works on conversions of any origin; with ``plan`` the report vouches for exactly that plan and
    for the files of its manifest. ``arch`` is the map it was made with, None for the registry's.
    What needs more than ``memory_limit`` bytes, None for what is available, is run block by block.
    Raises ConvertError when nothing can be judged at all.
    """
    from validate.parity import run_parity
    from validate.reference import ReferenceError, lacks_class

    checkpoint = None
    plan_hash = None
    if (out / "conversion.json").is_file():
        manifest = read_manifest(out)
        plan_hash, checkpoint = manifest.plan, manifest.checkpoint
    seen = diagnose(out, source, arch=arch)
    release = source.name
    if any(check.verdict == "fail" for check in seen):
        # What a runtime would make of such files says less than what is wrong with them.
        return publish_report(_unrun(seen, plan_hash, source), out, checkpoint)
    with ExitStack() as stack:
        # A quantized release is compared by what its weights mean.
        source = stack.enter_context(plain_release(source, beside=out, arch=arch, workers=workers))
        console.say("  codes beside the release's weights")
        seen += codes_check(out, source, arch=arch)
        alone = bool(lacks_class(source, trust_remote_code=trust_remote_code))
        streaming = stack.enter_context(
            blockwise(out, source, plan=plan, arch=arch, limit=memory_limit, alone=alone)
        )
        dequantized = (
            None
            if alone or streaming is not None
            else stack.enter_context(_written_weights(out, source, plan, workers, arch))
        )
        try:
            report = run_parity(
                source=source,
                mlx_path=out,
                plan=plan_hash,
                dequantized=dequantized,
                kl_threshold=kl_threshold,
                progress=lambda text: console.say(f"  {text}"),
                trust_remote_code=trust_remote_code,
                arch=arch,
                streaming=streaming,
            )
        except ReferenceError as error:
            raise ConvertError(f"{source}: cannot be run as the reference: {error}") from error
    # Not the folders that only this run had: a report is the same bytes wherever it is made.
    reference = {**report.reference, "folder": release}
    report = replace(report, reference=reference, checks=(*seen, *report.checks))
    return publish_report(report, out, checkpoint)


def _unrun(seen: Sequence[Check], plan: str | None, source: Path) -> Report:
    """The report of a checkpoint whose files are at fault: no runtime was started."""
    reference = {"class": "not run", "folder": source.name}
    return Report(plan=plan, reference=reference, runtime={"runtimes": []}, checks=tuple(seen))


def publish_report(report: Report, out: Path, checkpoint: str | None) -> dict[str, Any]:
    """Write a report beside the output it is of; the content of parity.json."""
    from validate.report import write_json

    with explain(out):
        data = write_json(report, out, checkpoint=checkpoint, kv_cache=kv_report(out))
    if checkpoint is not None:
        note_comparison(out, NOT_COMPARED if data["verdict"] == "unproven" else None)
    draw_page(out)
    return data


def kv_report(out: Path) -> dict[str, Any] | None:
    """The measured KV-cache schemes of an output, None where none were studied."""
    from converter.kv import REPORT

    if not (out / REPORT).is_file():
        return None
    report: dict[str, Any] = json.loads((out / REPORT).read_text(encoding="utf-8"))
    return {key: report[key] for key in ("chosen", "stock", "flags", "not_honoured")}


def prove_drafter(out: Path, *, target: Path, console: Console) -> dict[str, Any]:
    """Judge a drafter beside the output it drafts for; the content of its parity.json."""
    from validate.speculative import judge_drafter

    made_here = (out / "conversion.json").is_file()
    manifest = read_manifest(out) if made_here else None
    plan = None if manifest is None else manifest.plan
    report = judge_drafter(
        out, target=target, plan=plan, progress=lambda text: console.say(f"  {text}")
    )
    return publish_report(report, out, None if manifest is None else manifest.checkpoint)


def own_report(out: Path) -> dict[str, Any] | None:
    """The parity report of exactly the plan and files of ``out``'s manifest, None without one."""
    path = out / "parity.json"
    if not path.is_file():
        return None
    manifest = read_manifest(out)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    mine = {"plan": manifest.plan, "checkpoint": manifest.checkpoint}
    return data if isinstance(data, dict) and data.items() >= mine.items() else None


def standing_report(out: Path, *, kl_threshold: float | None) -> dict[str, Any] | None:
    """The passing report that a proof of ``out`` by the same gates would repeat, None without one.

    Its page is drawn again: whoever wrote the report may have been killed before that.
    """
    data = own_report(out)
    if data is None or data.get("verdict") != "pass" or data.get("kv_cache") != kv_report(out):
        return None
    if not gated_alike(data, kl_threshold=kl_threshold):
        return None
    note_comparison(out, None)
    draw_page(out)
    return data


def gated_alike(report: Mapping[str, Any], *, kl_threshold: float | None) -> bool:
    """Whether a report's losses were held against this gate."""
    rows = [c for c in report["checks"] if str(c["name"]).rpartition("/")[2] == "loss"]
    return all(row["threshold"] == kl_threshold for row in rows)


def require_proof(out: Path, *, allow_unproven: bool = False) -> dict[str, Any]:
    """The report that lets exactly this output be published; raises GateError otherwise.

    ``allow_unproven`` accepts one that had no torch class to compare with, but no failed check.
    """
    manifest = read_manifest(out)
    path = out / "parity.json"
    if not path.is_file():
        raise GateError(
            f"{out}: has no parity report, so it is not published; run "
            f"`convert validate --hf-path SRC --mlx-path {out}` first"
        )
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if data.get("plan") != manifest.plan or data.get("checkpoint") != manifest.checkpoint:
        raise GateError(
            f"{path}: vouches for another plan or other files than {out} holds now; "
            f"run `convert validate --hf-path SRC --mlx-path {out}` again"
        )
    if data.get("verdict") == "unproven":
        if not allow_unproven:
            raise GateError(unproven_text(data, out))
    elif data.get("verdict") != "pass":
        failed = [c["name"] for c in data.get("checks", ()) if c.get("verdict") == "fail"]
        raise GateError(
            f"{out}: the parity report says fail ({', '.join(failed) or 'no checks'}), so it is "
            f"not published; see {out / 'parity.html'}"
        )
    return data


def unproven_text(report: Mapping[str, Any], out: Path) -> str:
    """Why an unproven output is not published, and what would change that."""
    reasons = (str(c.get("note")) for c in report["checks"] if c.get("name") == REFERENCE)
    return (
        f"{out}: {'; '.join(reasons)}. It is not published; --allow-unproven publishes it as "
        f"{NOT_COMPARED}"
    )


def _written_weights(
    out: Path, source: Path, plan: Plan | None, workers: int, arch: ArchMap | None
) -> AbstractContextManager[Path | None]:
    """A torch checkpoint of the weights as written, where they are not those of the release."""
    if as_released(out, plan, arch):
        return nullcontext()
    return written_weights(out, source, arch=arch, workers=workers)
