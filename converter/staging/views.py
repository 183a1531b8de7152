"""The JSON shapes the hub's client expects: repositories, trees and commits."""

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converter.staging.blobs import BlobStore, lfs_pointer
from converter.staging.card import MAX_CARD_BYTES, CardError, card_tags, parse_front_matter
from converter.staging.names import checked_path
from converter.staging.refusal import Refusal, entry_not_found
from converter.staging.repos import Commit, FileEntry, RepoMeta

_MAX_CONFIG_BYTES = 4 * 1024 * 1024
# What `list_models` gives without asking for more.
_LISTED = frozenset(
    {"_id", "id", "modelId", "author", "sha", "lastModified", "createdAt", "private", "gated"}
    | {"disabled", "downloads", "likes", "tags", "pipeline_tag", "library_name"}
)


@dataclass(frozen=True)
class Page:
    """One page of a listing, and the cursor of the next one if there is more."""

    items: list[dict[str, Any]]
    cursor: str | None


def paged(
    items: Sequence[dict[str, Any]],
    *,
    key: Callable[[dict[str, Any]], list[str]],
    cursor: str | None,
    size: int,
    descending: bool = False,
) -> Page:
    """The page after `cursor` of items sorted by a unique `key`; stable when items come and go."""
    ordered = sorted(items, key=key, reverse=descending)
    if cursor is not None:
        after = _decoded_cursor(cursor)
        ordered = [i for i in ordered if (key(i) < after if descending else key(i) > after)]
    more = len(ordered) > size
    page = list(ordered[:size])
    return Page(items=page, cursor=_encoded_cursor(key(page[-1])) if more else None)


def _encoded_cursor(key: list[str]) -> str:
    return base64.urlsafe_b64encode(json.dumps(key).encode()).decode()


def _decoded_cursor(cursor: str) -> list[str]:
    try:
        key = json.loads(base64.urlsafe_b64decode(cursor))
    except (binascii.Error, ValueError):
        key = None
    if not isinstance(key, list) or not all(isinstance(part, str) for part in key):
        raise Refusal(400, "Invalid cursor")
    return key


def read_card(commit: Commit, blobs: BlobStore) -> dict[str, Any] | None:
    """The model card's metadata at a commit; None without a card that can be read."""
    entry = commit.files.get("README.md")
    if entry is None:
        return None
    text = blobs.read(entry.sha256, limit=MAX_CARD_BYTES).decode("utf-8", "replace")
    try:
        return parse_front_matter(text)
    except CardError:
        return None


def _read_config(commit: Commit, blobs: BlobStore) -> dict[str, Any]:
    entry = commit.files.get("config.json")
    if entry is None or entry.size > _MAX_CONFIG_BYTES:
        return {}
    try:
        config = json.loads(blobs.read(entry.sha256, limit=_MAX_CONFIG_BYTES))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(config, dict):
        return {}
    return {key: config[key] for key in ("architectures", "model_type") if key in config}


def _lfs(entry: FileEntry, *, hash_key: str) -> dict[str, Any]:
    pointer_size = len(lfs_pointer(entry.sha256, entry.size))
    return {hash_key: entry.sha256, "size": entry.size, "pointerSize": pointer_size}


def _sibling(entry: FileEntry, *, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": entry.path}
    sibling = {"rfilename": entry.path, "size": entry.size, "blobId": entry.blob_id}
    return {**sibling, "lfs": _lfs(entry, hash_key="sha256")} if entry.lfs else sibling


def model_info(
    meta: RepoMeta, commit: Commit, store: BlobStore, *, blobs: bool = False
) -> dict[str, Any]:
    """Everything the hub says about a model at one commit; with `blobs`, sizes and hashes too."""
    card = read_card(commit, store)
    config = _read_config(commit, store)
    tags = card_tags(card)
    if any(path.endswith(".safetensors") for path in commit.files):
        tags.append("safetensors")
    if isinstance(model_type := config.get("model_type"), str):
        tags.append(model_type)
    known = {key: (card or {}).get(key) for key in ("pipeline_tag", "library_name")}
    return {
        "_id": hashlib.sha1(meta.id.encode(), usedforsecurity=False).hexdigest()[:24],
        "id": meta.id,
        "modelId": meta.id,
        "author": meta.id.split("/")[0],
        "sha": commit.oid,
        "lastModified": commit.date,
        "createdAt": meta.created_at,
        "private": meta.private,
        "gated": meta.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": list(dict.fromkeys(tags)),
        **{key: value for key, value in known.items() if isinstance(value, str)},
        "cardData": card,
        "config": config,
        "siblings": [_sibling(entry, blobs=blobs) for entry in commit.files.values()],
        "usedStorage": sum({e.sha256: e.size for e in commit.files.values()}.values()),
    }


def chosen(info: Mapping[str, Any], expand: Sequence[str]) -> dict[str, Any]:
    """The properties asked for by name, and the id."""
    return {k: v for k, v in info.items() if k in {"_id", "id", *expand}}


def listed(info: Mapping[str, Any], *, full: bool, card: bool, config: bool) -> dict[str, Any]:
    """What a listing shows of a model unless it names properties."""
    extra = {"siblings", "cardData"} if full else set()
    extra |= {"cardData"} if card else set()
    extra |= {"config"} if config else set()
    return {k: v for k, v in info.items() if k in _LISTED or k in extra}


def matches(
    info: Mapping[str, Any],
    *,
    filters: Iterable[str],
    author: str | None,
    search: str | None,
    pipeline_tag: str | None,
    gated: bool | None,
) -> bool:
    """Whether a model belongs in a listing."""
    tags = set(info["tags"])
    return (
        all(wanted in tags for wanted in filters)
        and (author is None or info["author"].lower() == author.lower())
        and (search is None or search.lower() in info["id"].lower())
        and (pipeline_tag is None or info.get("pipeline_tag") == pipeline_tag)
        and (gated is None or bool(info["gated"]) == gated)
    )


def tree(
    commit: Commit, folder: str, *, recursive: bool, commits: Mapping[str, Commit] | None
) -> list[dict[str, Any]]:
    """The files and folders below `folder`, each with its last commit if `commits` is given."""
    prefix = checked_path(folder) + "/" if folder else ""
    inside = [entry for path, entry in commit.files.items() if path.startswith(prefix)]
    if not inside and prefix:
        raise entry_not_found(folder, commit=commit.oid)
    items: list[dict[str, Any]] = []
    folders: dict[str, list[FileEntry]] = {}
    for entry in inside:
        parts = entry.path.removeprefix(prefix).split("/")
        depth = len(parts) if recursive else min(len(parts), 2)
        for length in range(1, depth):
            folders.setdefault(prefix + "/".join(parts[:length]), []).append(entry)
        if recursive or len(parts) == 1:
            items.append(_tree_file(entry, commits))
    items += [_tree_folder(path, below, commits) for path, below in folders.items()]
    return items


def paths_info(
    commit: Commit, paths: Iterable[str], *, commits: Mapping[str, Commit] | None
) -> list[dict[str, Any]]:
    """The tree entries of the given paths; those that do not exist are left out."""
    found = []
    for path in paths:
        if (entry := commit.files.get(path)) is not None:
            found.append(_tree_file(entry, commits))
        elif below := [e for p, e in commit.files.items() if p.startswith(path.rstrip("/") + "/")]:
            found.append(_tree_folder(path.rstrip("/"), below, commits))
    return found


def _tree_file(entry: FileEntry, commits: Mapping[str, Commit] | None) -> dict[str, Any]:
    item: dict[str, Any] = {
        "type": "file",
        "oid": entry.blob_id,
        "size": entry.size,
        "path": entry.path,
    }
    if entry.lfs:
        item["lfs"] = _lfs(entry, hash_key="oid")
    return {**item, **_last_commit([entry], commits)}


def _tree_folder(
    path: str, below: Sequence[FileEntry], commits: Mapping[str, Commit] | None
) -> dict[str, Any]:
    content = "\n".join(f"{entry.path} {entry.blob_id}" for entry in below)
    oid = hashlib.sha1(content.encode(), usedforsecurity=False).hexdigest()
    return {
        "type": "directory",
        "oid": oid,
        "size": 0,
        "path": path,
        **_last_commit(below, commits),
    }


def _last_commit(
    entries: Sequence[FileEntry], commits: Mapping[str, Commit] | None
) -> dict[str, Any]:
    if commits is None:
        return {}
    newest = max((commits[entry.last_commit or ""] for entry in entries), key=lambda c: c.date)
    return {"lastCommit": {"id": newest.oid, "title": newest.title, "date": newest.date}}


def history_item(commit: Commit) -> dict[str, Any]:
    """One line of a repository's history."""
    return {
        "id": commit.oid,
        "title": commit.title,
        "message": commit.message,
        "authors": [{"user": commit.author, "avatar": ""}],
        "date": commit.date,
    }
