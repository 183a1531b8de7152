"""A folder to the hub, as one commit that is complete or absent.

The loop reads the branch, works out what is missing from it, and commits just that on top of the
state it read. So a second run uploads only the rest, a commit whose answer was lost is recognised
as done, and success means that the hub holds every file with the hash it has here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from converter.errors import HubError, UsageError
from converter.hub.account import is_loopback, refuse_public
from converter.hub.api import (
    ATTEMPTS,
    TIMEOUT_S,
    Progress,
    client,
    patiently,
    pause,
    quiet_bars,
)
from converter.hub.errors import hub_errors, may_have_been_done
from converter.hub.fetch import git_blob_id_of, sha256_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

STALE_PATTERNS = ("*.safetensors", "*.safetensors.index.json")
"""Files at the top of a repository that an older conversion left: loaders would pick them up."""

_GROUP_BYTES = 1024**3


@dataclass(frozen=True, slots=True)
class _Local:
    path: str
    file: Path
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class _Branch:
    head: str
    files: "dict[str, RepoFile]"


def upload(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str,
    private: bool = False,
    paths: Sequence[str] | None = None,
    stale: Sequence[str] = STALE_PATTERNS,
    branch: str = "main",
    progress: Progress | None = None,
    endpoint: str | None = None,
    token: str | None = None,
) -> str:
    """Make a branch hold the folder's files, prove it by their hashes, and return the repo's URL.

    `paths` limits it to some files, relative to the folder; by default all but hidden ones go.
    Remote files that match `stale` and are not among them are deleted in the same commit.
    """
    local = _local_files(folder, paths)
    api = client(endpoint=endpoint, token=token)
    doing = f"Uploading to {repo_id}"
    with hub_errors(doing, repo_id=repo_id, endpoint=api.endpoint):
        _ensure_repo(api, repo_id, private=private)
        with _transfer_the_hub_offers(api, repo_id, branch), quiet_bars():
            _converge(
                api,
                repo_id,
                local,
                commit_message=commit_message,
                stale=stale,
                branch=branch,
                progress=progress,
            )
    return f"{api.endpoint}/{repo_id}"


def _local_files(folder: Path, paths: Sequence[str] | None) -> list[_Local]:
    if paths is None:
        found = sorted(path for path in folder.rglob("*") if path.is_file())
        relative = [path.relative_to(folder) for path in found]
        paths = [p.as_posix() for p in relative if not any(x.startswith(".") for x in p.parts)]
    if not paths:
        raise UsageError(f"There is nothing to upload in {folder}")
    root = folder.resolve()
    local = []
    for path in paths:
        file = folder / path
        if not file.is_file() or not file.resolve().is_relative_to(root):
            raise UsageError(f"{file} is not a file inside {folder}, so it is not uploaded")
        local.append(_Local(path, file, size=file.stat().st_size, sha256=sha256_of(file)))
    return local


def _ensure_repo(api: "HfApi", repo_id: str, *, private: bool) -> None:
    patiently(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    # Making a repository is a no-op for one that exists, whatever its visibility.
    if private:
        refuse_public(api, repo_id)


def _converge(
    api: "HfApi",
    repo_id: str,
    local: Sequence[_Local],
    *,
    commit_message: str,
    stale: Sequence[str],
    branch: str,
    progress: Progress | None,
) -> None:
    first_head: str | None = None
    failures = 0
    revision = branch
    while True:
        remote = patiently(partial(_read_branch, api, repo_id, revision))
        missing = [file for file in local if not _holds(remote, file)]
        doomed = _stale_paths(remote, local, stale)
        if not missing and not doomed:
            return
        if revision != branch:
            names = ", ".join([file.path for file in missing] + doomed)
            raise HubError(
                f"{repo_id} was committed to ({revision[:8]}), but what the hub holds is not what "
                f"was sent: {names}. Run the upload again; if this stays, the file changed while "
                "it was being uploaded, or the hub is at fault."
            )
        first_head = first_head or remote.head
        if remote.head != first_head:
            raise HubError(
                f"Somebody else committed to {repo_id} ({remote.head[:8]}) during the upload, so "
                "nothing was committed. Look at that commit, then run the upload again."
            )
        try:
            revision = _commit(
                api,
                repo_id,
                missing,
                doomed,
                message=commit_message,
                branch=branch,
                parent=remote.head,
                progress=progress,
                total=sum(file.size for file in local),
            )
        except Exception as error:
            if failures == ATTEMPTS - 1 or not may_have_been_done(error):
                raise
            pause(failures)
            failures += 1


def _read_branch(api: "HfApi", repo_id: str, revision: str) -> _Branch:
    from huggingface_hub.hf_api import RepoFile

    head = api.model_info(repo_id, revision=revision, timeout=TIMEOUT_S).sha
    assert head is not None, "the hub names no commit"
    tree = api.list_repo_tree(repo_id, recursive=True, revision=head)
    return _Branch(head, {item.path: item for item in tree if isinstance(item, RepoFile)})


def _holds(remote: _Branch, file: _Local) -> bool:
    there = remote.files.get(file.path)
    if there is None or there.size != file.size:
        return False
    if there.lfs is not None:
        return there.lfs.sha256 == file.sha256
    return there.blob_id == git_blob_id_of(file.file)


def _stale_paths(remote: _Branch, local: Sequence[_Local], patterns: Sequence[str]) -> list[str]:
    kept = {file.path for file in local}
    return [
        path
        for path in remote.files
        if path not in kept
        and "/" not in path
        and any(fnmatchcase(path, pattern) for pattern in patterns)
    ]


def _commit(
    api: "HfApi",
    repo_id: str,
    files: Sequence[_Local],
    doomed: Sequence[str],
    *,
    message: str,
    branch: str,
    parent: str,
    progress: Progress | None,
    total: int,
) -> str:
    """Send the files' content, then the one commit that makes it visible; its commit hash."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    done = total - sum(file.size for file in files)
    additions: list[CommitOperationAdd] = []
    for group in _groups(files):
        operations = [CommitOperationAdd(file.path, file.file) for file in group]
        for operation, file in zip(operations, group, strict=True):
            operation.upload_info.sha256 = bytes.fromhex(file.sha256)  # spares a second reading
        api.preupload_lfs_files(repo_id, additions=operations, revision=branch)
        additions += operations
        done += sum(file.size for file in group)
        if progress is not None:
            progress(done, total)
    deletions = [CommitOperationDelete(path, is_folder=False) for path in doomed]
    changes: list[CommitOperationAdd | CommitOperationDelete] = [*deletions, *additions]
    commit = api.create_commit(
        repo_id, changes, commit_message=message, revision=branch, parent_commit=parent
    )
    return str(commit.oid)


def _groups(files: Sequence[_Local]) -> Iterator[list[_Local]]:
    """The files in groups of about a gigabyte, so that progress can be told."""
    group: list[_Local] = []
    for file in files:
        group.append(file)
        if sum(member.size for member in group) >= _GROUP_BYTES:
            yield group
            group = []
    if group:
        yield group


@contextmanager
def _transfer_the_hub_offers(api: "HfApi", repo_id: str, branch: str) -> Iterator[None]:
    """Xet where the hub has it, plain LFS elsewhere: the client does not find out by itself."""
    from huggingface_hub import constants

    if constants.HF_HUB_DISABLE_XET:
        yield
        return
    if not is_loopback(api.endpoint) and _offers_xet(api, repo_id, branch):
        yield
        return
    constants.HF_HUB_DISABLE_XET = True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = False


def _offers_xet(api: "HfApi", repo_id: str, branch: str) -> bool:
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils._headers import build_hf_headers

    url = f"{api.endpoint}/api/models/{repo_id}/xet-write-token/{branch}"
    headers = build_hf_headers(token=api.token)
    answer = patiently(lambda: get_session().get(url, headers=headers, timeout=TIMEOUT_S))
    return constants.HUGGINGFACE_HEADER_X_XET_ENDPOINT in answer.headers
