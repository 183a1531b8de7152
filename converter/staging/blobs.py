"""Content-addressed files: every byte string is stored once, under its own sha256."""

import hashlib
import os
import re
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from converter.staging.refusal import Refusal

_SHA256 = re.compile(r"[0-9a-f]{64}")
_ABANDONED_AFTER_S = 24 * 3600


def git_blob_id(data: bytes) -> str:
    """The sha1 that git gives a file of these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    """The text git keeps in place of a large file (the git-lfs v1 pointer)."""
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (
        sha256.encode(),
        size,
    )


class BlobWriter:
    """One upload in progress; it becomes a blob only if size and hash are what was announced."""

    def __init__(self, store: "BlobStore", *, sha256: str, size: int) -> None:
        self._store = store
        self._expected = (sha256, size)
        self._hash = hashlib.sha256()
        self._size = 0
        handle, name = tempfile.mkstemp(dir=store.incoming)
        self._file = os.fdopen(handle, "wb")
        self._path = Path(name)

    def write(self, chunk: bytes) -> None:
        """Append; a `Refusal` as soon as more arrives than was announced."""
        self._size += len(chunk)
        if self._size > self._expected[1]:
            raise Refusal(400, f"More than the announced {self._expected[1]} bytes were sent")
        self._hash.update(chunk)
        self._file.write(chunk)

    def finish(self) -> None:
        """Make the upload durable and visible, or refuse it."""
        sha256, size = self._expected
        if self._size != size:
            raise Refusal(400, f"{self._size} bytes were sent where {size} were announced")
        if self._hash.hexdigest() != sha256:
            raise Refusal(400, f"The content does not have the announced sha256 {sha256}")
        self._file.flush()
        os.fsync(self._file.fileno())
        target = self._store.path(sha256)
        target.parent.mkdir(exist_ok=True)
        os.replace(self._path, target)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)


class BlobStore:
    """The blobs below one folder; concurrent writers are safe: equal names mean equal bytes."""

    def __init__(self, root: Path) -> None:
        self._blobs = root / "blobs"
        self.incoming = root / "incoming"
        self._blobs.mkdir(parents=True, exist_ok=True)
        self.incoming.mkdir(exist_ok=True)
        for leftover in self.incoming.iterdir():
            if time.time() - leftover.stat().st_mtime > _ABANDONED_AFTER_S:
                leftover.unlink(missing_ok=True)

    def path(self, sha256: str) -> Path:
        """Where the blob lies, whether or not it is there yet."""
        if not _SHA256.fullmatch(sha256):
            raise Refusal(400, f"Not a sha256: {sha256[:80]!r}")
        return self._blobs / sha256[:2] / sha256

    def size(self, sha256: str) -> int | None:
        """Bytes in the blob, or None if there is no such blob."""
        try:
            return self.path(sha256).stat().st_size
        except FileNotFoundError:
            return None

    def writer(self, *, sha256: str, size: int) -> BlobWriter:
        """Start an upload of exactly `size` bytes with this hash."""
        self.path(sha256)
        return BlobWriter(self, sha256=sha256, size=size)

    def put(self, data: bytes) -> str:
        """Store small content and return its sha256."""
        sha256 = hashlib.sha256(data).hexdigest()
        if self.size(sha256) is None:
            with self.writer(sha256=sha256, size=len(data)) as upload:
                upload.write(data)
                upload.finish()
        return sha256

    def read(self, sha256: str, *, limit: int) -> bytes:
        """The first `limit` bytes of a blob."""
        with self.path(sha256).open("rb") as file:
            return file.read(limit)
