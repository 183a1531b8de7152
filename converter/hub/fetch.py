"""Whole files from the hub, through the client's cache, pinned to a commit and checked by hash."""

import hashlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from converter.atomic import write_atomic
from converter.errors import HubError
from converter.hub.api import LIBRARY, Progress
from converter.hub.errors import hub_errors
from converter.hub.snapshot import HubFile, HubSnapshot

_HASH_BUFFER = 4 * 1024 * 1024


def download(
    snapshot: HubSnapshot,
    paths: Sequence[str],
    *,
    progress: Progress | None = None,
    token: str | None = None,
    cache_dir: Path | None = None,
    workers: int = 4,
) -> Path:
    """Bring files into the hub's cache, check their hashes, and return the snapshot's folder.

    What is cached already is only checked. A file with the wrong hash is removed from the cache,
    so that the next run fetches it again, unless the hub is not to be asked. A cache of one's own,
    in ``cache_dir``, remembers what was checked: such a file is read again only once its size or
    time of change is another.
    """
    files = [snapshot.file(path) for path in dict.fromkeys(paths)]
    assert files, "nothing to download"
    meter = _Meter(progress, total=sum(file.size for file in files))
    folders = set()
    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="download") as pool:
        tasks = [pool.submit(_download, snapshot, f, meter, token, cache_dir) for f in files]
        try:
            for task in as_completed(tasks):
                folders.add(task.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    assert len(folders) == 1, folders
    return folders.pop()


def _download(
    snapshot: HubSnapshot,
    file: HubFile,
    meter: "_Meter",
    token: str | None,
    cache_dir: Path | None,
) -> Path:
    from huggingface_hub import hf_hub_download

    doing = f"Downloading {file.path} from {snapshot.repo_id}"
    with hub_errors(doing, repo_id=snapshot.repo_id, endpoint=snapshot.endpoint):
        local = Path(
            hf_hub_download(
                snapshot.repo_id,
                file.path,
                revision=snapshot.commit,
                endpoint=snapshot.endpoint,
                token=token,
                cache_dir=cache_dir,
                library_name=LIBRARY,
                tqdm_class=meter.bar(file.path),
            )
        )
    meter.finish(file)
    if cache_dir is None:
        check_hash(snapshot, file, local)
    elif not _is_vouched_for(file, local, cache_dir):
        before = _identity(local)
        check_hash(snapshot, file, local)
        with suppress(OSError):  # without the record it is only hashed once more
            _vouch(file, local, cache_dir, before)
    return local.parents[len(PurePosixPath(file.path).parts) - 1]


def check_hash(snapshot: HubSnapshot, file: HubFile, local: Path) -> None:
    """`HubError` unless a downloaded file is what the hub announced; it leaves the cache then.

    It stays where HF_HUB_OFFLINE would keep it from being fetched anew.
    """
    from huggingface_hub import constants

    actual = hash_of(file, local)
    if actual == file.hash:
        return
    told = (
        f"{file.path} of {snapshot.repo_id} arrived damaged: its {file.hash_kind} is {actual}, "
        f"the hub announced {file.hash}."
    )
    if constants.HF_HUB_OFFLINE:
        raise HubError(f"{told} Unset HF_HUB_OFFLINE to fetch it anew.")
    try:
        _remove_from_cache(local)
    except OSError as error:
        raise HubError(
            f"{told} It cannot be removed from the cache ({error.strerror}): remove {local} and "
            "what it links to, then run the same command again."
        ) from error
    raise HubError(
        f"{told} The copy has been removed from the cache; run the same command again to fetch "
        "it anew."
    )


def hash_of(file: HubFile, local: Path) -> str:
    """The hash that a local file has, of the kind that the hub gives for it."""
    return sha256_of(local) if file.sha256 else git_blob_id_of(local)


def _is_vouched_for(file: HubFile, local: Path, cache_dir: Path) -> bool:
    """Whether a file is as it was when its hash was found right, by size and time of change."""
    try:
        return _record(file, cache_dir).read_bytes() == _entry(_identity(local), local)
    except OSError:
        return False


def _vouch(file: HubFile, local: Path, cache_dir: Path, before: str) -> None:
    """Write down that a file's hash is right, once it would outlive a power cut.

    Only if it is what it was ``before`` it was hashed. The record of a file that is gone vouches
    for nothing, and goes with the cache.
    """
    descriptor = os.open(local, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    record = _record(file, cache_dir)
    record.parent.mkdir(exist_ok=True)
    if _identity(local) == before:
        write_atomic(record, _entry(before, local))


def _entry(identity: str, local: Path) -> bytes:
    return f"{identity}\n".encode() + os.fsencode(local)


def _record(file: HubFile, cache_dir: Path) -> Path:
    named = f"{file.path}\0{file.hash}"  # which is the hub's word, and no name
    return cache_dir / ".verified" / hashlib.sha256(named.encode()).hexdigest()


def _identity(local: Path) -> str:
    found = local.stat()
    return f"{found.st_size} {found.st_mtime_ns}"


def sha256_of(path: Path) -> str:
    """The sha256 of a file, read in bounded memory."""
    return _digest(path, hashlib.sha256())


def git_blob_id_of(path: Path) -> str:
    """The sha1 that git gives the file."""
    head = b"blob %d\0" % path.stat().st_size
    return _digest(path, hashlib.sha1(head, usedforsecurity=False))


def _digest(path: Path, state: "hashlib._Hash") -> str:
    buffer = memoryview(bytearray(_HASH_BUFFER))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            state.update(buffer[:count])
    return state.hexdigest()


def _remove_from_cache(pointer: Path) -> None:
    """Remove a cached file with the links that lead to it (snapshot -> blob -> shared blob)."""
    current = pointer
    while True:
        target = current.parent / os.readlink(current) if current.is_symlink() else None
        current.unlink(missing_ok=True)
        if target is None:
            return
        current = target


class _Meter:
    """Adds up the bytes of several downloads, each reported by the client to its own bar."""

    def __init__(self, progress: Progress | None, *, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done: dict[str, int] = {}
        self._lock = threading.Lock()

    def _set(self, path: str, count: int) -> None:
        with self._lock:
            self._done[path] = count
            if self._progress is not None:
                self._progress(sum(self._done.values()), self._total)

    def finish(self, file: HubFile) -> None:
        """Count the whole file, which may have come from the cache."""
        self._set(file.path, file.size)

    def bar(self, path: str) -> Any:
        """A class with the part of tqdm's interface that the client uses for one file."""
        meter = self

        class Bar:
            total: int | None = None

            def __init__(self, *args: Any, **kwargs: Any) -> None:
                self.n = int(kwargs.get("initial") or 0)

            def __enter__(self) -> "Bar":
                return self

            def __exit__(self, *error: Any) -> None:
                pass

            def update(self, count: float | None = 1) -> None:
                self.n += int(count or 0)
                meter._set(path, self.n)

            def update_transfer(self, count: float | None = 1) -> None:
                """Bytes on the wire; only bytes of the file are counted here."""

            def set_postfix_str(self, *args: Any, **kwargs: Any) -> None:
                pass

            set_transfer_postfix_str = set_description_str = refresh = close = set_postfix_str

        return Bar
