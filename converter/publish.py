"""The card and the upload: only for an output with a passing report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arch_maps.registry import ArchMap, find
from converter.acceptance import REPORT as ACCEPTANCE
from converter.acceptance import acceptance_report
from converter.atomic import write_atomic
from converter.errors import GateError, UsageError
from converter.execute.folder import explain
from converter.manifest import Manifest, installed_versions, note_card, read_manifest, verify
from converter.measured import FILE as QUALITY
from converter.measured import quality_report
from converter.plan.match import find_map
from converter.proof import kv_report, require_proof
from converter.sidecars import REPORTS, is_sidecar
from converter.ui import Console, quantization_text, recipe_facts

_CARD = "README.md"
_VERSIONS = ("mlx-dayzero", "mlx", "mlx-vlm", "mlx-lm", "torch", "transformers")


def write_card(
    out: Path,
    *,
    repo_id: str | None = None,
    source_card: str | None = None,
    template: Path | None = None,
) -> Path:
    """Write README.md for a finished output.

    ``source_card`` is the release's own README.md; None for what the manifest keeps of it.
    """
    from model_cards.card import CardFacts, render_card
    from validate.report import IMAGES

    manifest = read_manifest(out)
    data = manifest.data
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    told = data.get("map") or _told(find(data["model_type"]) or find_map(config))
    report = out / "parity.json"
    pictures = [(f"{name}.png", title) for name, title in IMAGES.items()]
    facts = CardFacts(
        repo_id=repo_id,
        base_model=data["source"].get("repo"),
        base_revision=data["source"].get("commit"),
        source_card=manifest.source_card if source_card is None else source_card,
        source_files=tuple(name for name in manifest.files if is_sidecar(name)),
        modalities=tuple(told["modalities"]),
        pipeline_tag=told["pipeline_tag"],
        runtimes=tuple(told["runtimes"]),
        quantization=quantization_text(data),
        recipe=recipe_facts(data),
        dtype=str(config.get("dtype") or config.get("torch_dtype")),
        size_bytes=sum(e["bytes"] for n, e in manifest.files.items() if n.endswith(".safetensors")),
        parameters=data["parameters"],
        bits_per_weight=data["bits_per_weight"],
        drops=tuple((d["name"], d["reason"]) for d in data["drops"]),
        notes=(*data["notes"], *told["remarks"]),
        command=data["command"],
        versions=installed_versions(_VERSIONS),
        plan_hash=manifest.plan,
        parity=json.loads(report.read_text(encoding="utf-8")) if report.is_file() else None,
        charts=tuple((file, title) for file, title in pictures if (out / file).is_file()),
        kv_cache=kv_report(out),
        acceptance=acceptance_report(out),
        sentence_embedding=told["pipeline_tag"] == "sentence-similarity",
    )
    try:
        text = render_card(facts, template=template)
    except ValueError as error:
        raise UsageError(str(error)) from error
    path = out / _CARD
    with explain(out, "folder"):
        write_atomic(path, text)
        note_card(out, repo_id)
    return path


def check_template(path: Path) -> None:
    """UsageError for a card template that does not parse."""
    from model_cards.card import load_template
    from model_cards.view import CardError

    try:
        load_template(path)
    except CardError as error:
        raise UsageError(str(error)) from error


def _address_card(out: Path, repo_id: str, console: Console) -> None:
    """Make the card of an output name the repo it goes to; all else that is in it stays.

    Manifests of earlier versions do not record which repo a card names; one that names neither
    this nor none is left as it is, and that is said.
    """
    from model_cards.card import names, readdressed

    manifest, path = read_manifest(out), out / _CARD
    if not path.is_file():
        write_card(out, repo_id=repo_id)
    elif manifest.card_of != repo_id:
        base = manifest.data["source"].get("repo")
        before = path.read_text(encoding="utf-8")
        text = readdressed(before, old=manifest.card_of, new=repo_id, base_model=base)
        recorded = "card_of" in manifest.data
        if names(text, repo_id) or (recorded and text != before):
            with explain(out, "folder"):
                write_atomic(path, text)
                note_card(out, repo_id)
        elif not recorded:
            console.say(
                f"{path}: does not name {repo_id}; to have it rendered anew, run "
                f"convert card {out} --upload-repo {repo_id}, and upload again"
            )


def upload_output(
    out: Path,
    repo_id: str,
    *,
    console: Console,
    private: bool = False,
    allow_gated: bool = False,
    allow_unproven: bool = False,
) -> str:
    """Publish a finished output and return its address; GateError without a passing report."""
    require_proof(out, allow_unproven=allow_unproven)
    verify(out)
    manifest = read_manifest(out)
    require_other(repo_id, manifest.data["source"].get("repo"))
    require_allowed(manifest.data["source"], private=private, allow_gated=allow_gated)
    _address_card(out, repo_id, console)
    manifest = read_manifest(out)
    from converter.hub import upload

    with console.progress("upload", unit="bytes") as tick:
        return upload(
            out,
            repo_id,
            paths=published_files(out, manifest),
            commit_message=_message(manifest),
            private=private,
            progress=tick,
        )


def require_allowed(origin: Mapping[str, Any], *, private: bool, allow_gated: bool) -> None:
    """GateError where ``origin``, a source's identity, is gated and its copy would not be."""
    if origin.get("gated") and not (private or allow_gated):
        raise GateError(
            f"{origin.get('repo')}: is gated; publishing a conversion of it needs "
            "--allow-gated (its licence permits that) or --private"
        )


def require_other(repo_id: str, base: str | None) -> None:
    """UsageError where an output would be published in place of the release it was made from."""
    if base is not None and repo_id.casefold() == base.casefold():
        raise UsageError(
            f"--upload-repo {repo_id}: is the release itself, whose weights an upload would "
            "replace; name another repo"
        )


def published_files(out: Path, manifest: Manifest) -> list[str]:
    """What of a folder is uploaded: its recorded files and the reports that are of these files."""
    tied = {ACCEPTANCE: acceptance_report, QUALITY: quality_report}
    stale = {name for name, report in tied.items() if report(out) is None}
    return sorted({*manifest.files, *(n for n in REPORTS - stale if (out / n).is_file())})


def _told(arch: ArchMap) -> dict[str, Any]:
    """What a manifest says of a map that is none of the registry's, of one that is."""
    return {
        "modalities": arch.modalities,
        "pipeline_tag": arch.pipeline_tag,
        "runtimes": arch.runtimes,
        "remarks": arch.remarks,
    }


def _message(manifest: Manifest) -> str:
    data = manifest.data
    base = data["source"].get("repo") or data["model_type"]
    what = quantization_text(data) or "unquantized"
    return f"Convert {base} to MLX ({what}), plan {manifest.plan[:12]}"
