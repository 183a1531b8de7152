"""Outputs that an earlier run has finished, which this one goes on with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from converter.errors import ConvertError
from converter.execute.folder import MANIFEST, BusyError
from converter.kv import KEY
from converter.manifest import Manifest, file_sha256, read_manifest, verify
from converter.plan import Plan
from converter.release import Release
from converter.renewal import complete
from converter.source.folder import folder_of


def earlier_outputs(
    plans: Sequence[Plan],
    folders: Sequence[Path],
    *,
    release: Release,
    overwrite: bool,
    keep_judged: bool,
    studied: bool,
) -> list[Manifest | None]:
    """Manifests of the outputs that need not be made again, by folder; None for the others.

    Such an output is of that very plan and of the weights and further files of ``release``, its
    files are as its manifest says, and it has KV settings only where they are ``studied`` now. An
    earlier run that has judged all outputs was not interrupted, so that without ``keep_judged``
    there is nothing to go on with. BusyError while another process writes KV settings into one.
    """
    if overwrite:
        return [None] * len(folders)
    content = release.content()
    found = [
        _finished(plan, out, content, release=release, studied=studied)
        for plan, out in zip(plans, folders, strict=True)
    ]
    if None in found:
        return found
    from converter.proof import own_report

    judged = all(own_report(out) is not None for out in folders)
    return [None] * len(folders) if judged and not keep_judged else found


def _finished(
    plan: Plan, out: Path, content: str, *, release: Release, studied: bool
) -> Manifest | None:
    if not (out / MANIFEST).is_file():
        return None
    try:
        complete(out)  # settings that an earlier study had ready
        manifest = read_manifest(out)
        if manifest.plan != plan.hash or manifest.data.get("content") != content:
            return None
        verify(out)
    except BusyError:
        raise
    except ConvertError:
        return None
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    if KEY in config and not studied:
        return None
    return manifest if _same_sidecars(release, manifest) else None


def _same_sidecars(release: Release, manifest: Manifest) -> bool:
    """Whether the files that go along byte for byte are all there, and still the release's."""
    if not manifest.files.keys() >= set(release.sidecars):
        return False
    if release.root is None:
        return True  # files of the hub belong to its commit
    root = folder_of(release.root)
    return all(
        manifest.files[name]["sha256"] == file_sha256(root / name)
        for name in release.sidecars
        if (root / name).is_file()
    )
