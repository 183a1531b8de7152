"""Outputs that an earlier run has finished, which this one goes on with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from converter.errors import ConvertError
from converter.execute.folder import MANIFEST
from converter.manifest import Manifest, read_manifest, verify
from converter.plan import Plan
from converter.release import Release


def earlier_outputs(
    plans: Sequence[Plan],
    folders: Sequence[Path],
    *,
    release: Release,
    overwrite: bool,
    keep_judged: bool,
) -> list[Manifest | None]:
    """Manifests of the outputs that need not be made again, by folder; None for the others.

    Such an output is of that very plan and of the weights of ``release``, and its files are as
    its manifest says. An earlier run that has judged all outputs was not interrupted, so that
    without ``keep_judged`` there is nothing to go on with.
    """
    if overwrite:
        return [None] * len(folders)
    from converter.proof import own_report

    content = release.content()
    found = [_finished(plan, out, content) for plan, out in zip(plans, folders, strict=True)]
    judged = all(
        before is not None and own_report(out) is not None
        for before, out in zip(found, folders, strict=True)
    )
    return [None] * len(folders) if judged and not keep_judged else found


def _finished(plan: Plan, out: Path, content: str) -> Manifest | None:
    if not (out / MANIFEST).is_file():
        return None
    manifest = read_manifest(out)
    if manifest.plan != plan.hash or manifest.data.get("content") != content:
        return None
    try:
        verify(out)
    except ConvertError:
        return None
    return manifest
