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

from converter.errors import HubError, PlanError
from converter.hub.api import Progress
from converter.hub.errors import hub_errors
from converter.hub.fetch import hash_of
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

    It need not have them all. ``cache`` takes the place of the client's own.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    with hub_errors(f"Looking up {repo_id}", repo_id=repo_id, endpoint=constants.ENDPOINT):
        try:
            found = snapshot_download(
                repo_id, revision=revision, cache_dir=cache, local_files_only=True
            )
        except IncompleteSnapshotError as error:
            found = error.snapshot_path
        except LocalEntryNotFoundError as error:
            at = f" at {revision}" if revision else ""
            raise HubError(
                f"HF_HUB_OFFLINE is set, and {cache or constants.HF_HUB_CACHE} holds no "
                f"{repo_id}{at}. Unset it, or give a local folder instead of a repository name."
            ) from error
    return Path(found)


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


def cached_names(snapshot: HubSnapshot, folder: Path) -> frozenset[str] | None:
    """The files that the repo has at the commit of a cached snapshot, here or not.

    None where the client has not kept their listing, as it does for downloads of whole repos.
    """
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, HFValidationError

    cache = folder.resolve().parents[2]
    try:
        listed = get_cached_repo_tree(snapshot.repo_id, revision=snapshot.commit, cache_dir=cache)
    except (CachedRepoTreeNotFoundError, HFValidationError):
        return None
    return frozenset(file.path for file in listed)


def check_cached(
    snapshot: HubSnapshot,
    folder: Path,
    paths: Sequence[str],
    *,
    progress: Progress | None = None,
    workers: int = 4,
) -> None:
    """Hold files of a cached snapshot against their hashes, and leave them as they are.

    PlanError names each that differs: a snapshot's files are links, so that whoever edits one
    there edits the cache.
    """
    problems = []
    files = [snapshot.file(path) for path in dict.fromkeys(paths)]
    done, total = 0, sum(file.size for file in files)
    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="check") as pool:
        hashes = pool.map(lambda file: hash_of(file, folder / file.path), files)
        for file, found in zip(files, hashes, strict=True):
            if found != file.hash:
                problems.append(
                    f"{folder / file.path}: is not what the cache calls it: its {file.hash_kind} "
                    f"is {found}, not {file.hash}. Undo the edit, or copy the folder (`cp -RL`) "
                    "and convert the copy; if nobody edited it, it is damaged, and `hf download "
                    f"{snapshot.repo_id} {file.path} --force-download` fetches it anew"
                )
            done += file.size
            if progress is not None:
                progress(done, total)
    if problems:
        raise PlanError(problems)
