"""The staging hub's routes: the part of the hub's HTTP protocol that its client uses for models."""

import ipaddress
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from converter.staging import read_routes, write_routes
from converter.staging.access import Access, ViewerDep
from converter.staging.blobs import git_blob_id
from converter.staging.faults import AsgiApp, Faults, Receive, Scope, Send
from converter.staging.refusal import Refusal, repo_not_found
from converter.staging.repos import DEFAULT_BRANCH, FileEntry, Put, RepoStore, now

if TYPE_CHECKING:
    from converter.staging import StagingOptions

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class EncodedPaths:
    """Routes on the path as it was sent, so that `%2F` in a branch name is not a separator."""

    def __init__(self, app: AsgiApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its undecoded path."""
        if scope["type"] == "http":
            scope = {**scope, "path": scope["raw_path"].decode("ascii", "replace")}
        await self._app(scope, receive, send)


class FaultsInFront:
    """The faults a test asked for, as a middleware."""

    def __init__(self, app: AsgiApp, faults: Faults) -> None:
        self._app = faults.wrap(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or let it fail."""
        await self._app(scope, receive, send)


def _is_local(host: str | None) -> bool:
    name = urlsplit(f"//{host}").hostname if host else None
    try:
        return name == "localhost" or ipaddress.ip_address(name or "").is_loopback
    except ValueError:
        return False


class LocalOnly:
    """Keeps web pages in this machine's browser from reading or changing what is staged."""

    def __init__(self, app: AsgiApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse foreign host names (DNS rebinding) and changes that a page asks for (CSRF)."""
        if scope["type"] == "http":
            headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
            refusal = None
            if not _is_local(headers.get(b"host")):
                refusal = Refusal(400, "The staging hub answers only to loopback host names")
            elif scope["method"] not in _SAFE_METHODS and b"origin" in headers:
                refusal = Refusal(403, "The staging hub takes no changes from web pages")
            if refusal is not None:
                await _refused(refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _refused(refusal: Refusal) -> JSONResponse:
    return JSONResponse(
        {"error": refusal.message}, refusal.status, headers=refusal.response_headers()
    )


def _nothing_here(rest: str, viewer: ViewerDep) -> Response:
    if rest.startswith(("api/datasets", "api/spaces", "datasets/", "spaces/")):
        raise Refusal(404, "The staging hub holds model repositories only", code="RepoNotFound")
    raise repo_not_found(signed_in=viewer is not None)


def _commit_to(store: RepoStore, path: str) -> None:
    """Somebody's commit to the main branch of the repository that a request's path names."""
    found = re.match(r"/(?:api/models/)?([^/]+)/([^/]+?)(?:\.git)?(?:/|$)", path)
    if found is None:
        return
    repo_id = f"{found.group(1)}/{found.group(2)}"
    data = f"{now()}\n".encode()
    blob = store.blobs.put(data)
    entry = FileEntry(
        path="moved.txt", size=len(data), sha256=blob, blob_id=git_blob_id(data), lfs=False
    )
    store.commit(
        repo_id,
        DEFAULT_BRANCH,
        [Put(entry)],
        title="Move the branch",
        message="",
        author="somebody",
        parent=None,
    )


def build_app(root: Path, *, options: "StagingOptions", faults: Faults | None) -> FastAPI:
    """The application over the repositories below `root`."""
    root.mkdir(parents=True, exist_ok=True)
    app = FastAPI(title="Staging hub", docs_url=None, redoc_url=None, openapi_url=None)
    store = RepoStore(root)
    app.state.access = Access(store, options)

    async def on_refusal(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        return _refused(error)

    app.add_exception_handler(Refusal, on_refusal)
    app.include_router(write_routes.router)
    app.include_router(read_routes.router)
    methods = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]
    app.add_api_route("/{rest:path}", _nothing_here, methods=methods)
    app.add_middleware(LocalOnly)
    if faults is not None:
        faults.mover = partial(_commit_to, store)
        app.add_middleware(FaultsInFront, faults=faults)
    app.add_middleware(EncodedPaths)
    return app
