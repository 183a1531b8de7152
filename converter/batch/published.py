"""Whether the hub holds a plan's output already: its manifest, and every file by hash."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.batch.orders import Order, Part
from converter.errors import ConvertError, HubError
from converter.execute.folder import MANIFEST
from converter.hub import HubSnapshot, download, resolve_revision, sha256_of
from converter.hub.errors import status_of
from converter.manifest import read_manifest
from converter.sidecars import REPORTS

PARITY = "parity.json"
_EXACT = ("logits", "decode", "hidden")


@dataclass(frozen=True, slots=True)
class Published:
    """An output on the hub: its address, and what the ledger keeps of it."""

    url: str
    facts: dict[str, Any]


def find_published(
    target: str, plan: str, folder: Path, *, endpoint: str | None = None
) -> Published | None:
    """The published output of exactly this plan, None when the repo holds anything else.

    The draft of a plan with a target size stands for it: that may have been measured elsewhere.
    ``folder`` takes the small files that are looked at, and is removed. Raises HubError when the
    hub does not answer.
    """
    snapshot = snapshot_of(target, endpoint=endpoint)
    if snapshot is None or not {MANIFEST, PARITY} <= set(snapshot.by_path):
        return None
    try:
        return _same(snapshot, plan, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def published_of(order: Order, part: Part) -> dict[str, Published | None]:
    """What the hub holds of all that a job makes, by repo, its output first; None for nothing."""
    folder = order.folder / "remote" / str(part.job)  # several outputs may be at this stage
    return {
        made.target: None if made.plan is None else find_published(made.target, made.plan, folder)
        for made in order.made(part)
    }


def snapshot_of(target: str, *, endpoint: str | None = None) -> HubSnapshot | None:
    """What a repo holds now, None when there is no such repo."""
    try:
        return resolve_revision(target, endpoint=endpoint)
    except HubError as error:
        if status_of(error) in (401, 404):  # the hub does not tell a missing repo from a hidden one
            return None
        raise


def _same(snapshot: HubSnapshot, plan: str, folder: Path) -> Published | None:
    root = download(snapshot, [MANIFEST, PARITY], cache_dir=folder)
    try:
        manifest = read_manifest(root)
    except ConvertError:
        return None
    if not manifest.answers(plan) or not set(manifest.files) <= set(snapshot.by_path):
        return None
    plain = []
    for name, entry in manifest.files.items():
        there = snapshot.file(name)
        if there.size != entry["bytes"] or there.sha256 not in (None, entry["sha256"]):
            return None
        if there.sha256 is None:  # git tells another hash of it
            plain.append(name)
    if plain:
        download(snapshot, plain, cache_dir=folder)
    if any(sha256_of(root / name) != manifest.files[name]["sha256"] for name in plain):
        return None
    extra = [n for n in snapshot.by_path if n.endswith(".safetensors") and "/" not in n]
    if not set(extra) <= {*manifest.files, *REPORTS}:
        return None
    report = json.loads((root / PARITY).read_text(encoding="utf-8"))
    facts = {"plan": manifest.plan, "checkpoint": manifest.checkpoint, **facts_of(report)}
    address = f"{snapshot.endpoint}/{snapshot.repo_id}"
    return Published(address, {**facts, "address": address, "published_commit": snapshot.commit})


def facts_of(report: dict[str, Any]) -> dict[str, Any]:
    """The part of a parity report that the ledger keeps: worst error, worst KL, failed checks."""
    checks = [check for check in report["checks"] if isinstance(check.get("value"), int | float)]
    named = [(str(check["name"]).rpartition("/")[2], float(check["value"])) for check in checks]
    failed = [str(check["name"]) for check in report["checks"] if check["verdict"] == "fail"]
    return {
        "parity": {
            "verdict": report["verdict"],
            "error": max(
                (v for n, v in named if n in ("logits", "decode", "hidden")), default=None
            ),
            "kl": max((v for n, v in named if n == "loss"), default=None),
            "failed": failed,
        }
    }
