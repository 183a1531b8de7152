"""The torch side of a finished output that an adapter was fused into."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from arch_maps.registry import ArchMap
from converter.adapter.fusing import fuse
from converter.adapter.read import read_adapter
from converter.adapter.torch_folder import fused_folder
from converter.errors import UsageError
from converter.execute.folder import MANIFEST
from converter.manifest import read_manifest
from converter.plan.match import find_map, match_release
from converter.release import Release


def reference_of_output(
    out: Path, release: Release, arch: ArchMap | None, path: Path | None
) -> AbstractContextManager[Path]:
    """The checkpoint that ``out`` must compute like: ``release``, with the adapter at ``path``.

    UsageError where the manifest of ``out`` names an adapter and ``path`` is another or none.
    """
    told = None
    if (out / MANIFEST).is_file():
        told = read_manifest(out).data["source"].get("adapter")
    if path is None:
        if told is not None:
            raise UsageError(
                f"{out}: the adapter {told['name']} is fused into it; give it as --adapter-path"
            )
        return nullcontext(release.local())
    adapter = read_adapter(path)
    if told is not None and told["files"] != adapter.record()["files"]:
        raise UsageError(
            f"--adapter-path {path}: is not the adapter {told['name']} that is fused into {out}"
        )
    match = match_release(release.source, arch or find_map(release.source.config))
    fusion = fuse(release.source, match, adapter, origin=release.origin, name=release.name)
    return fused_folder(release, fusion, beside=out)
