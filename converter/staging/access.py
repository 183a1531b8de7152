"""Who is asking, what they may see, and the parts of a request that several routes read alike."""

import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import unquote

from fastapi import Depends, Request

from converter.staging.names import checked_repo_id
from converter.staging.refusal import Refusal, repo_not_found
from converter.staging.repos import Commit, RepoMeta, RepoStore

if TYPE_CHECKING:
    from converter.staging import StagingOptions

MAX_JSON_BYTES = 16 * 1024 * 1024


class Access:
    """The repositories, and the rules for who sees and changes them."""

    def __init__(self, store: RepoStore, options: "StagingOptions") -> None:
        self.store = store
        self.options = options

    def viewer(self, authorization: str | None) -> str | None:
        """The user behind an Authorization header, None if anonymous; 401 for a wrong token."""
        if not authorization:
            return None
        scheme, _, token = authorization.partition(" ")
        known = self.options.tokens
        if scheme.lower() != "bearer" or not token or (known is not None and token not in known):
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.options.user

    def require_writer(self, viewer: str | None) -> None:
        """A `Refusal` unless the viewer may change things."""
        if viewer is None and self.options.require_token:
            raise Refusal(401, "Invalid username or password.")

    def visible(self, meta: RepoMeta, viewer: str | None) -> bool:
        """Whether the viewer may know of the repository."""
        return viewer is not None or not meta.private

    def repo(self, owner: str, name: str, viewer: str | None) -> RepoMeta:
        """The repository, if it exists and the viewer may know of it."""
        try:
            meta = self.store.meta(checked_repo_id(owner, name))
        except Refusal:
            meta = None
        if meta is None or not self.visible(meta, viewer):
            raise repo_not_found(signed_in=viewer is not None)
        return meta

    def check_gate(self, meta: RepoMeta, viewer: str | None) -> None:
        """A `Refusal` if the files behind the repository's gate are not for this viewer."""
        if not meta.gated or viewer == meta.id.split("/")[0]:
            return
        if viewer is None:
            message = f"Access to model {meta.id} is restricted. You must be authenticated."
            raise Refusal(401, message, code="GatedRepo")
        if meta.gated == "manual":
            message = f"Access to model {meta.id} is restricted. You are not in the authorized list"
            raise Refusal(403, message, code="GatedRepo")


def _access(request: Request) -> Access:
    access = request.app.state.access
    assert isinstance(access, Access)
    return access


AccessDep = Annotated[Access, Depends(_access)]


def _viewer(request: Request, access: AccessDep) -> str | None:
    return access.viewer(request.headers.get("authorization"))


ViewerDep = Annotated[str | None, Depends(_viewer)]


def _writer(access: AccessDep, viewer: ViewerDep) -> str:
    access.require_writer(viewer)
    return viewer or access.options.user


WriterDep = Annotated[str, Depends(_writer)]


def _repo(owner: str, name: str, access: AccessDep, viewer: ViewerDep) -> RepoMeta:
    return access.repo(unquote(owner), unquote(name), viewer)


RepoDep = Annotated[RepoMeta, Depends(_repo)]


def _commit(revision: str, repo: RepoDep, access: AccessDep) -> Commit:
    return access.store.commit_at(repo.id, unquote(revision))


CommitDep = Annotated[Commit, Depends(_commit)]


async def body_within(request: Request, limit: int) -> bytes:
    """The request's body; a `Refusal` when it is longer than `limit` bytes."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise Refusal(413, f"The request is longer than {limit} bytes")
    return bytes(body)


def json_object(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`, or a `Refusal`."""
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise Refusal(400, "The request is not a JSON object")
    return parsed


async def _json_body(request: Request) -> dict[str, Any]:
    return json_object(await body_within(request, MAX_JSON_BYTES))


JsonDep = Annotated[dict[str, Any], Depends(_json_body)]


async def lines_within(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The lines of a request's body, never holding more than one line of at most `limit` bytes."""
    pending = bytearray()
    async for chunk in request.stream():
        head, *tail = chunk.split(b"\n")
        pending += head
        for piece in tail:
            yield bytes(pending)
            pending = bytearray(piece)
        if len(pending) > limit:
            raise Refusal(413, f"A line of the commit is longer than {limit} bytes")
    if pending:
        yield bytes(pending)


def base_url(request: Request) -> str:
    """The address the client reached this server by, without a trailing slash."""
    return str(request.base_url).rstrip("/")
