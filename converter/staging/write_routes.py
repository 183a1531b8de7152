"""Everything that changes: repositories, branches, uploads and commits."""

import base64
import binascii
from collections.abc import Awaitable, Callable
from typing import Any, Literal
from urllib.parse import unquote

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response

from converter.staging.access import (
    AccessDep,
    CommitDep,
    JsonDep,
    RepoDep,
    ViewerDep,
    WriterDep,
    base_url,
    json_object,
    lines_within,
)
from converter.staging.blobs import BlobWriter, git_blob_id, lfs_pointer
from converter.staging.card import CardError, parse_front_matter
from converter.staging.names import checked_path, checked_repo_id
from converter.staging.refusal import Refusal, revision_not_found
from converter.staging.repos import Delete, FileEntry, Gated, Put, RepoStore

router = APIRouter()

MAX_REGULAR_BYTES = 10 * 1024 * 1024
_MAX_LINE_BYTES = MAX_REGULAR_BYTES * 4 // 3 + 64 * 1024
_WRITE_BYTES = 4 * 1024 * 1024
_MODEL = "/api/models/{owner}/{name}"
_LFS = "/{owner}/{name}.git/info/lfs"
_LFS_JSON = "application/vnd.git-lfs+json"
_BINARY_SUFFIXES = (
    ".bin",
    ".gguf",
    ".model",
    ".npz",
    ".onnx",
    ".pt",
    ".pth",
    ".safetensors",
)


@router.post("/api/repos/create")
def create_repo(
    request: Request, access: AccessDep, writer: WriterDep, viewer: ViewerDep, body: JsonDep
) -> JSONResponse:
    """Make a model repository; 409, with its address, if there is one already."""
    if body.get("type", "model") != "model":
        raise Refusal(400, "The staging hub holds model repositories only")
    private = body.get("visibility") == "private" or body.get("private") is True
    if private and viewer is None:
        raise Refusal(401, "A private repository needs a token: without one nobody could read it")
    repo_id = checked_repo_id(str(body.get("organization") or writer), str(body.get("name")))
    answer: dict[str, Any] = {"name": repo_id, "url": f"{base_url(request)}/{repo_id}"}
    if access.store.create(repo_id, private=private, author=writer):
        return JSONResponse({**answer, "id": repo_id, "private": private})
    message = "You already created this model repo"
    return JSONResponse({**answer, "error": message}, 409, headers={"X-Error-Message": message})


@router.delete("/api/repos/delete")
def delete_repo(
    access: AccessDep, writer: WriterDep, viewer: ViewerDep, body: JsonDep
) -> JSONResponse:
    """Remove a repository."""
    repo = access.repo(str(body.get("organization") or writer), str(body.get("name")), viewer)
    access.store.delete(repo.id)
    return JSONResponse({"ok": True})


@router.put(_MODEL + "/settings")
def change_settings(
    access: AccessDep, writer: WriterDep, repo: RepoDep, body: JsonDep
) -> JSONResponse:
    """Change visibility or gating."""
    private: bool | None = body.get("private")
    if "visibility" in body:
        private = body["visibility"] == "private"
    gates: dict[Any, Gated] = {"auto": "auto", "manual": "manual", False: False}
    gated = gates.get(body["gated"], False) if "gated" in body else None
    access.store.change(repo.id, private=private, gated=gated)
    return JSONResponse({"private": private, "gated": gated})


@router.post(_MODEL + "/branch/{branch:path}")
def create_branch(
    access: AccessDep, writer: WriterDep, repo: RepoDep, branch: str, body: JsonDep
) -> JSONResponse:
    """Make a branch from a revision."""
    start = str(body.get("startingPoint") or "main")
    access.store.create_branch(repo.id, unquote(branch), start=start)
    return JSONResponse({"ok": True})


@router.post("/api/validate-yaml")
def validate_yaml(body: JsonDep) -> JSONResponse:
    """Judge a model card's front matter before it is uploaded."""
    try:
        card = parse_front_matter(str(body.get("content", "")))
    except CardError as error:
        return JSONResponse({"errors": [{"message": str(error)}], "warnings": []}, 400)
    missing = {"message": "empty or missing yaml metadata in repo card"}
    return JSONResponse({"errors": [], "warnings": [] if card else [missing]})


def upload_mode(path: str, size: int, sample: bytes) -> Literal["lfs", "regular"]:
    """How a file travels: by LFS if it is large or binary, else inside the commit."""
    if size == 0:
        return "regular"
    text = b"\0" not in sample
    small = size <= MAX_REGULAR_BYTES
    return "regular" if text and small and not path.endswith(_BINARY_SUFFIXES) else "lfs"


@router.post(_MODEL + "/preupload/{revision}")
def preupload(
    request: Request, writer: WriterDep, commit: CommitDep, body: JsonDep
) -> JSONResponse:
    """Tell how each file will travel, and which of them the branch holds already."""
    if request.query_params.get("create_pr"):
        raise Refusal(400, "The staging hub has no pull requests")
    answers = []
    for file in _objects(body.get("files")):
        path, size = checked_path(str(file.get("path"))), _size(file)
        mode = upload_mode(path, size, _decoded(file.get("sample", "")))
        answer: dict[str, Any] = {"path": path, "uploadMode": mode, "shouldIgnore": False}
        if (entry := commit.files.get(path)) is not None and entry.lfs == (mode == "lfs"):
            answer["oid"] = entry.sha256 if entry.lfs else entry.blob_id
        answers.append(answer)
    return JSONResponse({"files": answers})


@router.post(_LFS + "/objects/batch")
def lfs_batch(
    request: Request, access: AccessDep, writer: WriterDep, repo: RepoDep, body: JsonDep
) -> JSONResponse:
    """Where to put each object; objects that are here already need no upload."""
    if body.get("operation") != "upload":
        raise Refusal(422, "Only the upload operation is served; download through /resolve/")
    base = f"{base_url(request)}/{repo.id}.git/info/lfs"
    objects = []
    for item in _objects(body.get("objects")):
        sha256, size = str(item.get("oid")), _size(item)
        answer: dict[str, Any] = {"oid": sha256, "size": size, "authenticated": True}
        if access.store.blobs.size(sha256) != size:
            answer["actions"] = {
                "upload": {"href": f"{base}/objects/{sha256}?size={size}", "header": {}},
                "verify": {"href": f"{base}/verify", "header": {}},
            }
        objects.append(answer)
    return JSONResponse({"transfer": "basic", "objects": objects}, media_type=_LFS_JSON)


@router.put(_LFS + "/objects/{sha256}")
async def lfs_upload(request: Request, access: AccessDep, sha256: str, size: int) -> Response:
    """Receive an object in bounded memory; it counts only with the announced size and hash.

    The client treats the address as pre-signed and sends no token with it.
    """
    with access.store.blobs.writer(sha256=sha256, size=size) as upload:
        await _receive(request, upload)
        await run_in_threadpool(upload.finish)
    return Response(headers={"ETag": f'"{sha256}"'})


async def _receive(request: Request, upload: BlobWriter) -> None:
    # Hashing releases the event loop in a thread, so chunks are gathered to make that worth it.
    gathered = bytearray()
    async for chunk in request.stream():
        gathered += chunk
        if len(gathered) >= _WRITE_BYTES:
            await run_in_threadpool(upload.write, bytes(gathered))
            gathered.clear()
    await run_in_threadpool(upload.write, bytes(gathered))


@router.post(_LFS + "/verify")
def lfs_verify(access: AccessDep, repo: RepoDep, body: JsonDep) -> JSONResponse:
    """Confirm that an object has arrived."""
    if access.store.blobs.size(str(body.get("oid"))) != _size(body):
        raise Refusal(404, "The object has not been uploaded, or has another size")
    return JSONResponse({})


@router.post(_MODEL + "/commit/{revision}")
async def commit_changes(
    request: Request,
    access: AccessDep,
    writer: WriterDep,
    repo: RepoDep,
    base: CommitDep,
    revision: str,
) -> JSONResponse:
    """Apply a newline-delimited list of changes to a branch, all or none."""
    branch = unquote(revision)
    if branch.removeprefix("refs/heads/") not in access.store.branches(repo.id):
        raise revision_not_found(branch)
    if request.query_params.get("create_pr"):
        raise Refusal(400, "The staging hub has no pull requests")
    header: dict[str, Any] = {}
    changes: list[Put | Delete] = []
    async for line in lines_within(request, _MAX_LINE_BYTES):
        if not line.strip():
            continue
        item = json_object(line)
        value = item.get("value")
        if not isinstance(value, dict):
            raise Refusal(400, "A line of the commit has no value")
        if item.get("key") == "header":
            header = value
        else:
            changes.append(await _staged(access.store, str(item.get("key")), value))
    if not header.get("summary"):
        raise Refusal(400, "The commit has no summary")
    oid = await run_in_threadpool(
        access.store.commit,
        repo.id,
        branch,
        changes,
        title=str(header["summary"]),
        message=str(header.get("description", "")),
        author=writer,
        parent=header.get("parentCommit"),
    )
    url = f"{base_url(request)}/{repo.id}/commit/{oid}"
    return JSONResponse({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})


async def _staged(store: RepoStore, key: str, value: dict[str, Any]) -> Put | Delete:
    stage = _STAGES.get(key)
    if stage is None:
        raise Refusal(400, f"Unknown kind of change: {key!r}")
    return await stage(store, checked_path(str(value.get("path")).rstrip("/")), value)


async def _stage_regular(store: RepoStore, path: str, value: dict[str, Any]) -> Put:
    content = value.get("content", "")
    data = _decoded(content) if value.get("encoding") == "base64" else str(content).encode()
    if len(data) > MAX_REGULAR_BYTES:
        raise Refusal(413, f"{path!r} is too large for a commit; upload it through LFS")
    sha256 = await run_in_threadpool(store.blobs.put, data)
    blob_id = git_blob_id(data)
    return Put(FileEntry(path=path, size=len(data), sha256=sha256, blob_id=blob_id, lfs=False))


async def _stage_lfs(store: RepoStore, path: str, value: dict[str, Any]) -> Put:
    sha256 = str(value.get("oid"))
    size = store.blobs.size(sha256)
    if value.get("algo") != "sha256" or size is None or value.get("size", size) != size:
        raise Refusal(400, f"The content of {path!r} has not been uploaded")
    blob_id = git_blob_id(lfs_pointer(sha256, size))
    return Put(FileEntry(path=path, size=size, sha256=sha256, blob_id=blob_id, lfs=True))


async def _stage_delete(store: RepoStore, path: str, value: dict[str, Any]) -> Delete:
    return Delete(path=path, folder=False)


async def _stage_delete_folder(store: RepoStore, path: str, value: dict[str, Any]) -> Delete:
    return Delete(path=path, folder=True)


_STAGES: dict[str, Callable[[RepoStore, str, dict[str, Any]], Awaitable[Put | Delete]]] = {
    "file": _stage_regular,
    "lfsFile": _stage_lfs,
    "deletedFile": _stage_delete,
    "deletedFolder": _stage_delete_folder,
}


def _objects(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise Refusal(400, "A list of objects is missing from the request")
    return value


def _size(item: dict[str, Any]) -> int:
    size = item.get("size")
    if not isinstance(size, int) or size < 0:
        raise Refusal(400, "A size is missing or not a number of bytes")
    return size


def _decoded(content: Any) -> bytes:
    try:
        return base64.b64decode(str(content), validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(400, "Content that should be base64 is not") from None
