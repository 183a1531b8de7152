"""Snapshots that the hub's client keeps in its cache, for work without the hub.

A snapshot's files are links to blobs that are called by their hash, sha256 for LFS files and git's
sha1 for the rest, so that a cache tells all that the hub would.
"""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Final

from converter.errors import HubError
from converter.hub.api import Progress
from converter.hub.fetch import check_hash
from converter.hub.snapshot import HubFile, HubSnapshot

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_REPO: Final = re.compile(r"models--(?P<namespace>[\w.-]+?)--(?P<name>[\w.-]+)")


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE keeps the client from asking the hub."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def cached_folder(repo_id: str, *, revision: str | None, cache: Path | None) -> Path:
    """Where the cache has a repo's files, at a branch, tag or commit; HubError where it has none.

    ``cache`` takes the place of the client's own.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(repo_id, revision=revision, cache_dir=cache, local_files_only=True)
        )
    except LocalEntryNotFoundError as error:
        at = f" at {revision}" if revision else ""
        raise HubError(
            f"HF_HUB_OFFLINE is set, and {cache or constants.HF_HUB_CACHE} holds no {repo_id}{at}. "
            "Unset it, or give a local folder instead of a repository name."
        ) from error


def cached_repo(folder: Path) -> str | None:
    """The repo whose snapshot a folder of a cache is; None for any other folder."""
    place = folder.resolve()
    repo = _REPO.fullmatch(place.parent.parent.name)
    if repo is None or place.parent.name != "snapshots" or not _COMMIT.fullmatch(place.name):
        return None
    return f"{repo['namespace']}/{repo['name']}"


def cached_snapshot(folder: Path) -> HubSnapshot | None:
    """What the hub holds at the commit of a cached snapshot, as far as it is here.

    None where there is more than the client's links, so that it is not that commit's.
    """
    from huggingface_hub import constants

    repo_id, place = cached_repo(folder), folder.resolve()
    if repo_id is None:
        return None
    blobs = place.parent.parent / "blobs"
    files = []
    for path in sorted(place.rglob("*")):
        if path.is_dir():
            continue
        blob = path.parent / os.readlink(path) if path.is_symlink() else path
        if not path.is_file() or blob.parent.resolve() != blobs:
            return None
        sha256 = blob.name if _SHA256.fullmatch(blob.name) else None
        if sha256 is None and not _COMMIT.fullmatch(blob.name):
            return None
        name = path.relative_to(place).as_posix()
        files.append(HubFile(name, path.stat().st_size, sha256=sha256, blob_id=blob.name))
    return HubSnapshot(
        repo_id=repo_id,
        commit=place.name,
        files=tuple(files),
        endpoint=constants.ENDPOINT,
        gated=False,
        private=False,
        license=None,
        pipeline_tag=None,
        library_name=None,
        tags=(),
        last_modified=None,
        card=MappingProxyType({}),
    )


def check_cached(
    snapshot: HubSnapshot,
    folder: Path,
    paths: Sequence[str],
    *,
    progress: Progress | None = None,
    workers: int = 4,
) -> None:
    """Check files of a cached snapshot by their hashes.

    HubError for one that is damaged, which is removed from the cache.
    """
    files = [snapshot.file(path) for path in dict.fromkeys(paths)]
    done, total = 0, sum(file.size for file in files)
    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="check") as pool:
        checked = pool.map(lambda file: check_hash(snapshot, file, folder / file.path), files)
        for file, _ in zip(files, checked, strict=True):
            done += file.size
            if progress is not None:
                progress(done, total)
