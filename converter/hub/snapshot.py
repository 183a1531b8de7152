"""What a release on the hub holds at one commit, and parts of its files.

Headers are read by range requests, so that a conversion can be planned without fetching a tensor;
a server that does not honour a range is caught before its answer is believed.
"""

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from difflib import get_close_matches
from functools import cached_property, partial
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any, Final, TypeVar

from converter.errors import HubError
from converter.hub.api import LIBRARY, TIMEOUT_S, client, patiently
from converter.hub.errors import hub_errors

WINDOW_ATTEMPTS: Final = 8
"""The waits between them add up to two minutes, and to what a busy hub asks for."""
Body = TypeVar("Body", bytearray, mmap)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file in a repository; `sha256` is known for LFS files, `blob_id` is git's sha1."""

    path: str
    size: int
    sha256: str | None
    blob_id: str

    @property
    def hash(self) -> str:
        """The sha256 where it is known, else git's sha1."""
        return self.sha256 or self.blob_id

    @property
    def hash_kind(self) -> str:
        """What `hash` is."""
        return "sha256" if self.sha256 else "git sha1"


@dataclass(frozen=True)
class HubSnapshot:
    """A repository at one commit: what its files are called, how long they are, their hashes."""

    repo_id: str
    commit: str
    files: tuple[HubFile, ...]
    endpoint: str
    gated: bool
    private: bool
    license: str | None
    pipeline_tag: str | None
    library_name: str | None
    tags: tuple[str, ...]
    last_modified: datetime | None
    card: Mapping[str, Any] = field(compare=False, repr=False)
    """The model card's metadata, as written by the repository's owner."""

    @cached_property
    def by_path(self) -> Mapping[str, HubFile]:
        """Path -> file."""
        return MappingProxyType({file.path: file for file in self.files})

    def file(self, path: str) -> HubFile:
        """The file of this path; `HubError` with the nearest names if there is none."""
        try:
            return self.by_path[path]
        except KeyError:
            near = get_close_matches(path, self.by_path, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise HubError(f"{self.repo_id}@{self.commit[:8]} has no file {path}{hint}") from None


def resolve_revision(
    repo_id: str,
    *,
    revision: str | None = None,
    endpoint: str | None = None,
    token: str | None = None,
) -> HubSnapshot:
    """What a branch, tag or commit (by default the main branch) holds at this moment."""
    api = client(endpoint=endpoint, token=token)
    doing = f"Looking up {repo_id}" + (f" at {revision}" if revision else "")
    with hub_errors(doing, repo_id=repo_id, endpoint=api.endpoint):
        info = patiently(
            lambda: api.model_info(
                repo_id, revision=revision, files_metadata=True, timeout=TIMEOUT_S
            )
        )
        if info.sha is None or info.siblings is None:
            raise HubError(f"{doing}: {api.endpoint} does not say which commit or files it has.")
        card = _card_fields(info.card_data)
        return HubSnapshot(
            repo_id=repo_id,
            commit=info.sha,
            files=tuple(_hub_file(repo_id, sibling) for sibling in info.siblings),
            endpoint=api.endpoint,
            gated=bool(info.gated),
            private=bool(info.private),
            license=card.get("license"),
            pipeline_tag=info.pipeline_tag,
            library_name=info.library_name,
            tags=tuple(info.tags or ()),
            last_modified=info.last_modified,
            card=MappingProxyType(card),
        )


def _card_fields(card: Any) -> dict[str, Any]:
    fields: dict[str, Any] = card.to_dict() if card is not None else {}
    return fields


def _hub_file(repo_id: str, sibling: Any) -> HubFile:
    path = str(sibling.rfilename)
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or "\0" in path:
        raise HubError(f"{repo_id} holds a file named {path!r}, which would leave its folder.")
    if sibling.size is None or sibling.blob_id is None:
        raise HubError(f"{repo_id}: the hub does not say how long {path} is.")
    return HubFile(
        path=path,
        size=sibling.size,
        sha256=sibling.lfs.sha256 if sibling.lfs else None,
        blob_id=sibling.blob_id,
    )


def fetch_range(
    snapshot: HubSnapshot, path: str, start: int, stop: int, *, token: str | None = None
) -> bytes:
    """Bytes [start, stop) of a remote file; `HubError` if the server sends anything else."""
    file = snapshot.file(path)
    return bytes(_range(snapshot, file, start, stop, token, patiently, make=bytearray))


def fetch_window(
    snapshot: HubSnapshot,
    path: str,
    start: int,
    stop: int,
    *,
    token: str | None = None,
    stopped: threading.Event | None = None,
) -> mmap:
    """The same during a long conversion: a wrong answer is asked for again, too, and for longer.

    In pages of its own, which go back to the system with it: an allocator keeps what it once had
    for blocks as large as a window, for every thread. Once ``stopped`` is set it ends with the
    error that it was waiting after, or at the next piece.
    """
    again = partial(patiently, attempts=WINDOW_ATTEMPTS, also=(RangeError,), stopped=stopped)
    file = snapshot.file(path)
    return _range(snapshot, file, start, stop, token, again, make=_pages, stopped=stopped)


def _pages(size: int) -> mmap:
    return mmap(-1, size, flags=MAP_PRIVATE | MAP_ANONYMOUS)


class RangeError(HubError):
    """A server, or a proxy before it, answered a range request with something else."""


def _range(
    snapshot: HubSnapshot,
    file: HubFile,
    start: int,
    stop: int,
    token: str | None,
    tried: Callable[[Callable[[], None]], None],
    *,
    make: Callable[[int], Body],
    stopped: threading.Event | None = None,
) -> Body:
    assert 0 <= start <= stop, f"{file.path}: [{start}, {stop}) is not a range"
    if stop > file.size:
        raise HubError(
            f"{snapshot.repo_id}: bytes {start} to {stop} of {file.path} were asked for, but it "
            f"has only {file.size}: the file is truncated or its header is wrong."
        )
    body = make(stop - start)
    if start == stop:
        return body
    doing = f"Reading a part of {file.path} from {snapshot.repo_id}"
    with hub_errors(doing, repo_id=snapshot.repo_id, endpoint=snapshot.endpoint):
        tried(lambda: _fetch_range(snapshot, file, start, stop, token, stopped, body))
    return body


def _fetch_range(
    snapshot: HubSnapshot,
    file: HubFile,
    start: int,
    stop: int,
    token: str | None,
    stopped: threading.Event | None,
    body: bytearray | mmap,
) -> None:
    """Fill ``body`` in place: a window is large, and several are under way."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._http import hf_raise_for_status

    url = hf_hub_url(
        snapshot.repo_id, file.path, revision=snapshot.commit, endpoint=snapshot.endpoint
    )
    headers = build_hf_headers(token=token, library_name=LIBRARY)
    # A compressed answer has other offsets than the file.
    headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    count = 0
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT_S) as response:
        if response.status_code >= 400:
            response.read()
        hf_raise_for_status(response)
        said = response.headers.get("content-range", "")
        found = _CONTENT_RANGE.fullmatch(said)
        if response.status_code != 206 or found is None:
            raise RangeError(
                f"{url} ignored a Range request (HTTP {response.status_code}), so parts cannot "
                "be read without fetching whole files. Use another HF_ENDPOINT, or download the "
                "release first and give its folder."
            )
        if tuple(map(int, found.groups())) != (start, stop - 1, file.size):
            raise RangeError(
                f"{url} answered a request for bytes {start}-{stop - 1} with {said!r}."
            )
        for chunk in response.iter_bytes():
            if stopped is not None and stopped.is_set():
                raise HubError("the conversion was stopped.")
            if count + len(chunk) <= len(body):
                body[count : count + len(chunk)] = chunk
            count += len(chunk)
            if count > len(body):
                break
    if count != len(body):
        raise RangeError(f"{url} sent {count} bytes where {stop - start} were asked for.")
