"""conversion.json: what a finished output is, where it came from, and the hash of every file."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from converter.atomic import write_atomic
from converter.errors import ConvertError, PlanError, UsageError
from converter.execute.folder import MANIFEST
from converter.plan.model import Plan
from converter.renewal import is_unfinished
from converter.sidecars import REPORTS
from converter.source.strict_json import parse_object

_RECORDED = ("mlx-dayzero", "numpy", "ml-dtypes", "numba", "safetensors", "huggingface-hub")


@dataclass(frozen=True, slots=True)
class Manifest:
    """The parsed conversion.json."""

    data: dict[str, Any]

    @property
    def plan(self) -> str:
        """Hash of the plan that was executed."""
        return str(self.data["plan"])

    def answers(self, plan: str) -> bool:
        """Whether a hash is that of the plan, or of its draft before formats were chosen for it."""
        return plan in (self.plan, self.data.get("draft"))

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """sha256 and size of each file by relative name."""
        return dict(self.data["files"])

    @property
    def rotated(self) -> bool:
        """Whether the values of the weights are rotated."""
        return bool((self.data.get("recipe") or {}).get("rotate_values"))

    @property
    def source_card(self) -> str | None:
        """What the release's own card stated that cards of the output repeat."""
        found = self.data.get("source_card")
        return found if isinstance(found, str) else None

    @property
    def card_of(self) -> str | None:
        """The repo that the output's card names; None where it names none, or is not there."""
        found = self.data.get("card_of")
        return found if isinstance(found, str) else None

    @property
    def checkpoint(self) -> str:
        """One hash over all files: what a report vouches for."""
        text = json.dumps({n: f["sha256"] for n, f in self.files.items()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def write_manifest(
    folder: Path,
    plan: Plan,
    *,
    command: str,
    source_config: Mapping[str, Any],
    source_card: str | None,
    content: str,
    digests: Mapping[str, str],
    names: Sequence[str],
) -> Manifest:
    """Write the manifest of ``folder``, as its last file.

    ``source_card`` is what cards of the output repeat of the release's own,
    ``content`` tells one set of source weights from another under the same headers; ``digests``
    holds the sha256 of the weight files, ``names`` lists the files to hash now.
    """
    from quant.microscaling import ROUNDING_RULES

    known = {**digests, **{name: file_sha256(folder / name) for name in names}}
    data = {
        "format": 1,
        "plan": plan.hash,
        **({"draft": plan.draft} if plan.draft else {}),
        "program": {"name": "mlx-dayzero", "version": plan.version},
        "command": command,
        "model_type": plan.model_type,
        **({"map": plan.map} if plan.map else {}),
        **({"decoding": {**plan.decoding, "became": plan.origins()}} if plan.decoding else {}),
        "layout": plan.layout,
        "recipe": plan.options.to_json(),
        "rounding": dict(ROUNDING_RULES),
        "source": plan.source,
        "content": content,
        "source_config": dict(source_config),
        **({"source_card": source_card} if source_card else {}),
        "parameters": plan.parameters,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "drops": [{"name": d.name, "reason": d.reason, "same_as": d.same_as} for d in plan.drops],
        "notes": list(plan.notes),
        "versions": installed_versions(_RECORDED),
        "files": {
            name: {"sha256": digest, "bytes": (folder / name).stat().st_size}
            for name, digest in sorted(known.items())
        },
    }
    _write(folder, data)
    return Manifest(data)


def note_comparison(folder: Path, text: str | None) -> None:
    """Record under ``reference`` how the output was not compared; None takes such a note away."""
    data = {key: value for key, value in read_manifest(folder).data.items() if key != "reference"}
    if text is not None:
        data["reference"] = text
    elif data == read_manifest(folder).data:
        return
    _write(folder, data)


def note_card(folder: Path, repo_id: str | None) -> None:
    """Record under ``card_of`` which repo the output's card names, None where it names none."""
    data = read_manifest(folder).data
    if "card_of" not in data or data["card_of"] != repo_id:
        _write(folder, {**data, "card_of": repo_id})


def refresh(folder: Path, digests: Mapping[str, str]) -> None:
    """Record files of a finished output that were written again or added."""
    sizes = {name: (folder / name).stat().st_size for name in digests}
    entries = {name: {"sha256": digests[name], "bytes": sizes[name]} for name in digests}
    _write(folder, _renewed(folder, entries))


def renewed(folder: Path, files: Mapping[str, bytes | None]) -> bytes:
    """The content of the manifest once ``files`` are written; those that are None are gone."""
    entries = {
        name: None
        if content is None
        else {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        for name, content in files.items()
    }
    return _text(_renewed(folder, entries)).encode()


def _renewed(folder: Path, entries: Mapping[str, Any]) -> dict[str, Any]:
    data = dict(read_manifest(folder).data)
    files = {**data["files"], **entries}
    data["files"] = {name: files[name] for name in sorted(files) if files[name] is not None}
    return data


def _write(folder: Path, data: Mapping[str, Any]) -> None:
    write_atomic(folder / MANIFEST, _text(data))


def _text(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def is_rotated(out: Path) -> bool:
    """Whether an output's manifest says that the values of its weights are rotated."""
    return (out / MANIFEST).is_file() and read_manifest(out).rotated


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished output; raises UsageError when there is none."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UsageError(
            f"{folder}: has no {MANIFEST}; it is not a finished conversion made by this program"
        )
    try:
        data = parse_object(path.read_bytes(), MANIFEST)
    except PlanError as error:
        raise ConvertError(f"{path}: is damaged: {error}") from error
    if data.get("format") != 1 or not _lists_files(data.get("files")):
        raise ConvertError(f"{path}: is not a manifest that this version reads")
    return Manifest(data)


def _lists_files(files: object) -> bool:
    return isinstance(files, dict) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("sha256"), str)
        and isinstance(entry.get("bytes"), int)
        for entry in files.values()
    )


def verify(folder: Path) -> tuple[int, int]:
    """Check every file against the manifest, offline; returns (files, bytes).

    Raises ConvertError naming every missing, changed or unlisted file, and how to go on where a
    KV study was killed while it wrote them.
    """
    manifest = read_manifest(folder)
    problems: list[str] = []
    total = 0
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: is missing")
        elif path.stat().st_size != entry["bytes"]:
            problems.append(f"{name}: has {path.stat().st_size} bytes, not {entry['bytes']}")
        elif file_sha256(path) != entry["sha256"]:
            problems.append(f"{name}: its content has changed (sha256 differs)")
        total += entry["bytes"]
    listed = set(manifest.files) | REPORTS
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in listed and path.suffix == ".safetensors":
            problems.append(f"{name}: is not in the manifest, and a loader would read it")
    if problems:
        if is_unfinished(folder):
            problems.append(
                "new settings for its KV cache were being written when that was interrupted; "
                f"`convert kv {shlex.quote(str(folder))}` writes the rest, and studies it again"
            )
        raise ConvertError(f"{folder}: does not match its manifest:\n" + "\n".join(problems))
    return len(manifest.files), total


def file_sha256(path: Path) -> str:
    """sha256 of a file in hex, read in bounded memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def installed_versions(names: Sequence[str]) -> dict[str, str]:
    """Versions of the installed distributions among ``names``."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
