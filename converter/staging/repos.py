"""Repositories on disk: immutable commits, each a JSON manifest of files, and branches.

    repos/<owner>/<name>/repo.json            visibility, gating, creation date
    repos/<owner>/<name>/commits/<oid>.json   one commit: every path it holds, and what is behind it
    repos/<owner>/<name>/heads/<branch>       the oid of the branch's last commit

Every file appears whole by one rename, so that a crash leaves the last complete state, and paths
inside repositories never become paths on this disk.
"""

import hashlib
import json
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, unquote

from converter.atomic import write_atomic
from converter.staging.blobs import BlobStore, git_blob_id
from converter.staging.names import checked_branch, checked_path, checked_repo_id
from converter.staging.refusal import Refusal, entry_not_found, revision_not_found

Gated = Literal["auto", "manual", False]
DEFAULT_BRANCH = "main"
_GITATTRIBUTES = b"".join(
    b"*.%s filter=lfs diff=lfs merge=lfs -text\n" % suffix.encode()
    for suffix in ("bin", "gguf", "model", "npz", "onnx", "pt", "pth", "safetensors")
)


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file in a commit; `blob_id` is git's sha1 of the file, or of its pointer if it is LFS."""

    path: str
    size: int
    sha256: str
    blob_id: str
    lfs: bool
    last_commit: str | None = None
    """The commit that last changed the file; None in a manifest means that very commit."""


@dataclass(frozen=True, slots=True)
class Commit:
    """One state of a repository; `oid` is the sha1 of the manifest that holds the rest."""

    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: Mapping[str, FileEntry]


@dataclass(frozen=True, slots=True)
class RepoMeta:
    """What holds for a repository whatever its commits; `created_at` is ISO 8601 in UTC."""

    id: str
    private: bool
    gated: Gated
    created_at: str


@dataclass(frozen=True, slots=True)
class Put:
    """Add a file or replace it."""

    entry: FileEntry


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove a file, or with `folder` everything below a path."""

    path: str
    folder: bool


def now() -> str:
    """The present in UTC, as the hub writes it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@lru_cache(maxsize=256)
def _read_commit(path: Path) -> Commit:
    """A commit manifest; cached, since commits never change."""
    raw = json.loads(path.read_bytes())
    entries = (FileEntry(**file) for file in raw.pop("files"))
    oid = path.stem
    files = {e.path: replace(e, last_commit=e.last_commit or oid) for e in entries}
    return Commit(oid=oid, files=files, **raw)


class RepoStore:
    """Every repository below one folder."""

    def __init__(self, root: Path) -> None:
        self._root = root / "repos"
        self._trash = root / "incoming"
        self._root.mkdir(parents=True, exist_ok=True)
        self.blobs = BlobStore(root)
        self._lock = threading.Lock()

    def _folder(self, repo_id: str) -> Path:
        return self._root.joinpath(*checked_repo_id(*repo_id.split("/")).split("/"))

    def ids(self) -> Iterator[str]:
        """Every repository, sorted by id."""
        for path in sorted(self._root.glob("*/*/repo.json")):
            yield f"{path.parent.parent.name}/{path.parent.name}"

    def create(self, repo_id: str, *, private: bool, author: str) -> bool:
        """Make a repository with its first commit; False if there is one of that name already."""
        folder = self._folder(repo_id)
        with self._lock:
            if any(repo_id.lower() == other.lower() for other in self.ids()):
                return False
            first = FileEntry(
                path=".gitattributes",
                size=len(_GITATTRIBUTES),
                sha256=self.blobs.put(_GITATTRIBUTES),
                blob_id=git_blob_id(_GITATTRIBUTES),
                lfs=False,
            )
            for name in ("commits", "heads"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            oid = self._write_commit(
                repo_id,
                parent=None,
                title="initial commit",
                message="",
                author=author,
                files=[first],
            )
            write_atomic(folder / "heads" / DEFAULT_BRANCH, oid.encode())
            meta = RepoMeta(id=repo_id, private=private, gated=False, created_at=now())
            write_atomic(folder / "repo.json", json.dumps(asdict(meta)).encode())
            return True

    def delete(self, repo_id: str) -> None:
        """Remove a repository; blobs stay, for other repositories may hold the same files."""
        grave = self._trash / f"{repo_id.replace('/', '--')}-{now()}"
        with self._lock:
            self._folder(repo_id).rename(grave)
        shutil.rmtree(grave)

    def meta(self, repo_id: str) -> RepoMeta | None:
        """The repository's settings, or None if there is no such repository."""
        try:
            raw = json.loads((self._folder(repo_id) / "repo.json").read_bytes())
        except FileNotFoundError:
            return None
        return RepoMeta(**raw) if raw["id"] == repo_id else None

    def change(self, repo_id: str, *, private: bool | None, gated: Gated | None) -> None:
        """Change the settings that are not None."""
        with self._lock:
            meta = self.meta(repo_id)
            assert meta is not None
            changed = replace(
                meta,
                private=meta.private if private is None else private,
                gated=meta.gated if gated is None else gated,
            )
            write_atomic(self._folder(repo_id) / "repo.json", json.dumps(asdict(changed)).encode())

    def branches(self, repo_id: str) -> dict[str, str]:
        """Branch name -> oid of its last commit."""
        heads = (self._folder(repo_id) / "heads").iterdir()
        files = sorted(path for path in heads if not path.name.startswith("."))
        return {unquote(path.name): path.read_text() for path in files}

    def commit_at(self, repo_id: str, revision: str) -> Commit:
        """The commit of a branch or oid; a `Refusal` if there is none."""
        oid = self.branches(repo_id).get(revision.removeprefix("refs/heads/"), revision)
        if len(oid) != 40 or not oid.isalnum():
            raise revision_not_found(revision)
        try:
            return _read_commit(self._folder(repo_id) / "commits" / f"{oid}.json")
        except FileNotFoundError:
            raise revision_not_found(revision) from None

    def history(self, repo_id: str, revision: str) -> Iterator[Commit]:
        """The commit at `revision` and its ancestors, newest first."""
        commit = self.commit_at(repo_id, revision)
        yield commit
        while commit.parent is not None:
            commit = self.commit_at(repo_id, commit.parent)
            yield commit

    def create_branch(self, repo_id: str, branch: str, *, start: str) -> None:
        """Make a branch that starts at a revision; a `Refusal` if its name is taken."""
        name = checked_branch(branch)
        with self._lock:
            if name in self.branches(repo_id):
                raise Refusal(409, f"Reference refs/heads/{name} already exists")
            self._set_head(repo_id, name, self.commit_at(repo_id, start).oid)

    def commit(
        self,
        repo_id: str,
        branch: str,
        changes: Iterable[Put | Delete],
        *,
        title: str,
        message: str,
        author: str,
        parent: str | None,
    ) -> str:
        """Add a commit to a branch and return its oid; `parent`, if given, must be its head."""
        name = checked_branch(branch)
        with self._lock:
            head = self.branches(repo_id).get(name)
            if head is None:
                raise revision_not_found(branch)
            if parent is not None and not head.startswith(parent):
                raise Refusal(
                    412,
                    "A commit has happened since. Please refresh and try again.",
                )
            files = dict(self.commit_at(repo_id, head).files)
            for change in changes:
                _apply(files, change)
            _check_no_file_is_a_folder(files)
            oid = self._write_commit(
                repo_id,
                parent=head,
                title=title,
                message=message,
                author=author,
                files=files.values(),
            )
            self._set_head(repo_id, name, oid)
            return oid

    def _set_head(self, repo_id: str, branch: str, oid: str) -> None:
        write_atomic(self._folder(repo_id) / "heads" / quote(branch, safe=""), oid.encode())

    def _write_commit(
        self,
        repo_id: str,
        *,
        parent: str | None,
        title: str,
        message: str,
        author: str,
        files: Iterable[FileEntry],
    ) -> str:
        manifest: dict[str, Any] = {
            "parent": parent,
            "title": title,
            "message": message,
            "author": author,
            "date": now(),
            "files": [asdict(entry) for entry in sorted(files, key=lambda entry: entry.path)],
        }
        data = json.dumps(manifest, sort_keys=True).encode()
        oid = hashlib.sha1(data, usedforsecurity=False).hexdigest()
        write_atomic(self._folder(repo_id) / "commits" / f"{oid}.json", data)
        return oid


def _apply(files: dict[str, FileEntry], change: Put | Delete) -> None:
    if isinstance(change, Put):
        before = files.get(change.entry.path)
        same = before is not None and before.blob_id == change.entry.blob_id
        if not same:
            files[checked_path(change.entry.path)] = change.entry
        return
    doomed = (
        [path for path in files if path.startswith(change.path.rstrip("/") + "/")]
        if change.folder
        else [path for path in (change.path,) if path in files]
    )
    if not doomed:
        refusal = entry_not_found(change.path)
        refusal.message = f"A file with this name doesn't exist: {change.path}"
        raise refusal
    for path in doomed:
        del files[path]


def _check_no_file_is_a_folder(files: Mapping[str, FileEntry]) -> None:
    for path in files:
        parts = path.split("/")
        for length in range(1, len(parts)):
            if (folder := "/".join(parts[:length])) in files:
                raise Refusal(400, f"{folder!r} is a file, so {path!r} cannot be below it")
