"""Everything that looks: model info, listings, trees, history, files, and pages for people."""

import logging
from typing import Annotated, Any
from urllib.parse import parse_qs, quote, unquote, urlencode

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response

from converter.staging import pages, views
from converter.staging.access import (
    AccessDep,
    CommitDep,
    RepoDep,
    ViewerDep,
    base_url,
    body_within,
    json_object,
)
from converter.staging.card import MAX_CARD_BYTES
from converter.staging.refusal import Refusal, entry_not_found
from converter.staging.repos import DEFAULT_BRANCH, Commit, RepoMeta

router = APIRouter()
_log = logging.getLogger(__name__)

_MAX_EXPANDED = 50
_MAX_FORM_BYTES = 8 * 1024 * 1024
_HISTORY_ON_PAGE = 20
_MODEL = "/api/models/{owner}/{name}"

Flag = Annotated[bool, Query()]
Text = Annotated[str | None, Query()]
Texts = Annotated[list[str], Query(default_factory=list)]


def _with_next(request: Request, page: views.Page) -> JSONResponse:
    if page.cursor is None:
        return JSONResponse(page.items)
    kept = [(k, v) for k, v in request.query_params.multi_items() if k != "cursor"]
    query = urlencode([*kept, ("cursor", page.cursor)])
    path = request.scope["path"]
    return JSONResponse(
        page.items, headers={"Link": f'<{base_url(request)}{path}?{query}>; rel="next"'}
    )


@router.get("/api/whoami-v2")
def whoami(viewer: ViewerDep) -> JSONResponse:
    """Who the token belongs to; 401 without one."""
    if viewer is None:
        raise Refusal(401, "Invalid credentials in Authorization header")
    return JSONResponse(
        {
            "type": "user",
            "id": viewer,
            "name": viewer,
            "fullname": viewer,
            "orgs": [],
            "auth": {
                "type": "access_token",
                "accessToken": {"displayName": "staging", "role": "write"},
            },
        }
    )


@router.get("/api/models")
def list_models(
    request: Request,
    access: AccessDep,
    viewer: ViewerDep,
    filter: Texts,
    expand: Texts,
    author: Text = None,
    search: Text = None,
    pipeline_tag: Text = None,
    gated: Annotated[bool | None, Query()] = None,
    sort: str = "lastModified",
    direction: int = -1,
    limit: Annotated[int, Query(ge=1)] = 1000,
    cursor: Text = None,
    full: Flag = False,
    cardData: Flag = False,
    config: Flag = False,
) -> Response:
    """The models the visitor may see, a page at a time."""
    infos = []
    for meta, commit in _visible_repos(access, viewer):
        info = views.model_info(meta, commit, access.store.blobs)
        if views.matches(
            info,
            filters=[tag for group in filter for tag in group.split(",")],
            author=author,
            search=search,
            pipeline_tag=pipeline_tag,
            gated=gated,
        ):
            infos.append(info)
    if sort not in ("lastModified", "createdAt", "id", "downloads", "likes", "trendingScore"):
        raise Refusal(400, f"Cannot sort by {sort!r}")
    page = views.paged(
        infos,
        key=lambda info: [str(info.get(sort, "")), info["id"]],
        cursor=cursor,
        size=min(limit, access.options.page_size),
        descending=direction == -1,
    )
    shown = [
        views.chosen(info, expand)
        if expand
        else views.listed(info, full=full, card=cardData, config=config)
        for info in page.items
    ]
    return _with_next(request, views.Page(items=shown, cursor=page.cursor))


def _visible_repos(access: AccessDep, viewer: str | None) -> list[tuple[RepoMeta, Commit]]:
    found = []
    for repo_id in access.store.ids():
        meta = access.store.meta(repo_id)
        if meta is not None and access.visible(meta, viewer):
            found.append((meta, access.store.commit_at(repo_id, DEFAULT_BRANCH)))
    return found


@router.get(_MODEL)
def model_info(
    access: AccessDep,
    repo: RepoDep,
    expand: Texts,
    blobs: Flag = False,
) -> JSONResponse:
    """A model at the head of its main branch."""
    return _info(access, repo, access.store.commit_at(repo.id, DEFAULT_BRANCH), blobs, expand)


@router.get(_MODEL + "/revision/{revision}")
def model_info_at(
    access: AccessDep,
    repo: RepoDep,
    commit: CommitDep,
    expand: Texts,
    blobs: Flag = False,
) -> JSONResponse:
    """A model at a branch or commit."""
    return _info(access, repo, commit, blobs, expand)


def _info(
    access: AccessDep, repo: RepoMeta, commit: Commit, blobs: bool, expand: list[str]
) -> JSONResponse:
    info = views.model_info(repo, commit, access.store.blobs, blobs=blobs)
    return JSONResponse(views.chosen(info, expand) if expand else info)


@router.get(_MODEL + "/tree/{revision}")
@router.get(_MODEL + "/tree/{revision}/{folder:path}")
def tree(
    request: Request,
    access: AccessDep,
    repo: RepoDep,
    commit: CommitDep,
    folder: str = "",
    recursive: Flag = False,
    expand: Flag = False,
    limit: Annotated[int, Query(ge=1)] = 1000,
    cursor: Text = None,
) -> Response:
    """The files and folders at a revision, a page at a time."""
    commits = _last_commits(access, repo, commit) if expand else None
    page = views.paged(
        views.tree(commit, unquote(folder).strip("/"), recursive=recursive, commits=commits),
        key=lambda item: [item["path"]],
        cursor=cursor,
        size=min(limit, access.options.page_size, _MAX_EXPANDED if expand else limit),
    )
    return _with_next(request, page)


def _last_commits(access: AccessDep, repo: RepoMeta, commit: Commit) -> dict[str, Commit]:
    oids = {entry.last_commit or "" for entry in commit.files.values()}
    return {oid: access.store.commit_at(repo.id, oid) for oid in oids}


@router.post(_MODEL + "/paths-info/{revision}")
async def paths_info(
    request: Request, access: AccessDep, repo: RepoDep, commit: CommitDep
) -> JSONResponse:
    """What is known of some paths; the client sends them as a form."""
    body = await body_within(request, _MAX_FORM_BYTES)
    asked: dict[str, Any]
    if request.headers.get("content-type", "").startswith("application/json"):
        asked = json_object(body)
    else:
        form = parse_qs(body.decode("utf-8", "replace"))
        asked = {"paths": form.get("paths", []), "expand": form.get("expand", [""])[0] in _TRUE}
    commits = _last_commits(access, repo, commit) if asked.get("expand") else None
    paths = [path for path in asked.get("paths", []) if isinstance(path, str)]
    return JSONResponse(views.paths_info(commit, paths, commits=commits))


_TRUE = frozenset({"true", "True", "1"})


@router.get(_MODEL + "/refs")
def refs(access: AccessDep, repo: RepoDep) -> JSONResponse:
    """The branches; there are no tags and no pull requests here."""
    branches = [
        {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
        for name, oid in access.store.branches(repo.id).items()
    ]
    return JSONResponse({"branches": branches, "converts": [], "tags": [], "pullRequests": []})


@router.get(_MODEL + "/commits/{revision}")
def commits(access: AccessDep, repo: RepoDep, commit: CommitDep) -> JSONResponse:
    """The history of a revision, newest first."""
    history = access.store.history(repo.id, commit.oid)
    return JSONResponse([views.history_item(item) for item in history])


@router.get(_MODEL + "/auth-check")
def auth_check(access: AccessDep, repo: RepoDep, viewer: ViewerDep) -> Response:
    """Whether the visitor may download the files."""
    access.check_gate(repo, viewer)
    return JSONResponse({})


@router.get(_MODEL + "/xet-{kind}-token/{revision}")
def xet_token(kind: str, repo: RepoDep) -> Response:
    """There is no Xet storage here; the client hides the answer's text, so the log says it too."""
    message = (
        "This hub stores files over LFS, not Xet: "
        "set HF_HUB_DISABLE_XET=1 in the environment of the program that uploads to it"
    )
    _log.warning(message)
    raise Refusal(404, message)


@router.get("/{owner}/{name}/resolve/{revision}/{path:path}")
@router.head("/{owner}/{name}/resolve/{revision}/{path:path}")
def resolve(
    access: AccessDep, repo: RepoDep, viewer: ViewerDep, commit: CommitDep, path: str
) -> Response:
    """A file's bytes, whole or by `Range`, with the headers that pin it to a commit."""
    access.check_gate(repo, viewer)
    wanted = unquote(path)
    entry = commit.files.get(wanted)
    if entry is None:
        raise entry_not_found(wanted, commit=commit.oid)
    headers = {
        "X-Repo-Commit": commit.oid,
        "ETag": f'"{entry.sha256 if entry.lfs else entry.blob_id}"',
        "Accept-Ranges": "bytes",
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(wanted.rsplit('/')[-1])}",
        "Content-Security-Policy": "default-src 'none'; sandbox",
        "X-Content-Type-Options": "nosniff",
    }
    if entry.lfs:
        headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
    return FileResponse(
        access.store.blobs.path(entry.sha256),
        headers=headers,
        media_type="application/octet-stream",
    )


def _html(page: str) -> HTMLResponse:
    headers = {
        "Content-Security-Policy": pages.CONTENT_SECURITY_POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    return HTMLResponse(page, headers=headers)


@router.get("/")
def index(access: AccessDep, viewer: ViewerDep) -> Response:
    """Every repository, for people."""
    return _html(pages.index_page(_visible_repos(access, viewer)))


@router.get("/{owner}/{name}")
def repo_page(access: AccessDep, repo: RepoDep) -> Response:
    """One repository, for people."""
    return _repo_page(access, repo, access.store.commit_at(repo.id, DEFAULT_BRANCH))


@router.get("/{owner}/{name}/tree/{revision}")
@router.get("/{owner}/{name}/commit/{revision}")
def repo_page_at(access: AccessDep, repo: RepoDep, commit: CommitDep) -> Response:
    """One repository at a revision, for people."""
    return _repo_page(access, repo, commit)


@router.get("/{owner}/{name}/blob/{revision}/{path:path}")
def blob_page(repo: RepoDep, commit: CommitDep, path: str) -> Response:
    """A file's page on the public hub; here, the file."""
    return RedirectResponse(f"/{quote(repo.id)}/resolve/{commit.oid}/{quote(unquote(path))}")


def _repo_page(access: AccessDep, repo: RepoMeta, commit: Commit) -> Response:
    entry = commit.files.get("README.md")
    readme = None
    if entry is not None:
        raw = access.store.blobs.read(entry.sha256, limit=MAX_CARD_BYTES)
        readme = raw.decode("utf-8", "replace")
    latest = []
    for item in access.store.history(repo.id, commit.oid):
        latest.append(item)
        if len(latest) == _HISTORY_ON_PAGE:
            break
    return _html(pages.repo_page(repo, commit, readme=readme, history=latest))
