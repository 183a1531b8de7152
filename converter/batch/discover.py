"""Discovery: what the hub has that the ledger does not know of.

The hub's listing has no "since", so it is read by last change, newest first, down to a watermark
that is moved only after everything above it is in the ledger.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

from converter.batch.catalogue import Catalogue, Seen, Wanted
from converter.batch.failures import classify
from converter.batch.recipes import Asked, Policy, digest, policy_of, recipes_of
from converter.batch.watchlist import Filters, Watch, WatchList
from converter.errors import HubError
from converter.hub import HubSnapshot, hub_errors, resolve_revision
from converter.hub.api import client, patiently
from converter.hub.errors import is_unreached

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

OVERLAP_S: Final = 3600.0
"""Looked at again below the watermark: listings lag, and repos move while pages are read."""
_WEIGHTS: Final = (".safetensors", ".bin", ".pt", ".pth")
_PLAIN_FILES: Final = (".md", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".pdf", ".mp4")
_OTHER_RUNTIMES: Final = frozenset({"mlx", "gguf", "diffusers"})
_ASKED: Final = (
    *("author", "createdAt", "disabled", "downloads", "gated", "lastModified"),
    *("library_name", "pipeline_tag", "sha", "tags"),
)


@dataclass(slots=True)
class Found:
    """What one discovery came to."""

    seen: int = 0
    matched: int = 0
    added: int = 0
    problems: list[str] = field(default_factory=list)
    failed: bool = False
    """Whether a part of the hub could not be looked at now."""
    away: bool = False
    """Whether no hub answered at all, after long trying: then nothing else of it is asked."""


def discover(
    watchlist: WatchList,
    catalogue: Catalogue,
    *,
    say: Callable[[str], None],
    now: float,
    stopped: Callable[[], bool] = lambda: False,
) -> Found:
    """Bring the ledger up to what the hub has; failures are noted and left to the next run.

    So is what is left once ``stopped`` says so, or the hub cannot be reached.
    """
    found = Found()
    for entry in watchlist.watch:
        recipes = recipes_of(watchlist, entry)
        policy = policy_of(watchlist, entry)
        for model in entry.models:
            if found.away or stopped():
                return found
            repo, _, revision = model.partition("@")
            with _noting(found, say, f"models: {model}"):
                snapshot = resolve_revision(repo, revision=revision or None)
                found.seen += 1
                _enqueue(watchlist, catalogue, found, snapshot, recipes, policy)
        for organisation in entry.organisations:
            if found.away or stopped():
                return found
            _follow(
                watchlist, entry, catalogue, found, organisation, recipes, policy, say, now, stopped
            )
    return found


def _follow(
    watchlist: WatchList,
    entry: Watch,
    catalogue: Catalogue,
    found: Found,
    organisation: str,
    recipes: dict[str, Asked],
    policy: Policy,
    say: Callable[[str], None],
    now: float,
    stopped: Callable[[], bool],
) -> None:
    key = watermark_key(watchlist, entry, recipes)
    mark = catalogue.watermark(key, organisation)
    infos: list[ModelInfo] = []
    with _noting(found, say, f"organisations: {organisation}"):
        infos = list_changed(organisation, since=None if mark is None else mark - OVERLAP_S)
        if mark is None and not infos:
            say(f"organisations: {organisation}: the hub lists no model of it")
    reached = mark
    whole = True
    for info in reversed(infos):  # oldest first, so that the watermark can follow
        if found.away or stopped():
            break
        found.seen += 1
        if wanted(info, entry.filters, now=now):
            with _noting(found, say, info.id) as went_well:
                snapshot = resolve_revision(info.id, revision=info.sha)
                size = weight_bytes(snapshot)
                filters = entry.filters
                if (filters.min_size or 0) <= size <= (filters.max_size or size):
                    _enqueue(watchlist, catalogue, found, snapshot, recipes, policy)
            whole &= went_well()
        if whole:
            reached = max(reached or 0.0, _modified(info))
    if reached is not None and reached != mark:
        catalogue.set_watermark(key, organisation, reached)


def watermark_key(watchlist: WatchList, entry: Watch, recipes: Mapping[str, Asked]) -> str:
    """Names a watermark after all that decides what is made, so that a change looks at all anew."""
    asked = entry.model_dump(mode="json", exclude={"organisations", "models", "gates"})
    chosen = {
        name: watchlist.recipes[name].model_dump(mode="json", exclude_defaults=True)
        for name in entry.recipes
    }
    files = {
        name: (one.adapter, text.to_json() if text is not None else None)
        for name, one in recipes.items()
        if (text := one.options.calibration) is not None or one.adapter is not None
    }
    told = [watchlist.namespace, watchlist.names, asked, chosen]
    return digest([*told, files] if files else told)


def list_changed(organisation: str, *, since: float | None) -> list[ModelInfo]:
    """An organisation's models that changed after ``since``, newest first; raises HubError."""
    api = client()

    def read() -> list[ModelInfo]:
        listed: list[ModelInfo] = []
        for info in api.list_models(
            author=organisation,
            sort="last_modified",
            expand=list(_ASKED),
        ):
            if since is not None and _modified(info) <= since:
                break
            listed.append(info)
        return listed

    doing = f"Listing the models of {organisation}"
    with hub_errors(doing, repo_id=organisation, endpoint=api.endpoint):
        return patiently(read)


def wanted(info: ModelInfo, filters: Filters, *, now: float) -> bool:
    """Whether a listed model passes every filter that needs no further request."""
    tags = set(info.tags or ())
    name = info.id.rpartition("/")[2]
    licences = {tag.removeprefix("license:") for tag in tags if tag.startswith("license:")}
    if info.disabled or info.library_name in _OTHER_RUNTIMES or "mlx" in tags:
        return False
    if not any(fnmatchcase(name, pattern) for pattern in filters.include):
        return False
    if any(fnmatchcase(name, pattern) for pattern in filters.exclude):
        return False
    if filters.pipeline_tags is not None and info.pipeline_tag not in filters.pipeline_tags:
        return False
    if filters.licences is not None and not licences & set(filters.licences):
        return False
    if filters.max_age is not None:
        made = info.created_at or info.last_modified
        if made is None or now - made.timestamp() > filters.max_age:
            return False
    return (info.downloads or 0) >= filters.min_downloads


def weight_bytes(snapshot: HubSnapshot) -> int:
    """Bytes of the weight files at the top of a release, one format only."""
    tops = [file for file in snapshot.files if "/" not in file.path]
    safe = [file.size for file in tops if file.path.endswith(".safetensors")]
    return sum(safe or [file.size for file in tops if file.path.endswith(_WEIGHTS)])


def content_of(snapshot: HubSnapshot) -> str:
    """A hash of everything that a conversion is made of, which the card and pictures are not."""
    state = hashlib.sha256()
    for file in sorted(snapshot.files, key=lambda file: file.path):
        name = file.path.lower()
        if not name.endswith(_PLAIN_FILES) and not name.startswith(".git"):
            state.update(f"{file.path}\0{file.sha256 or file.blob_id}\n".encode())
    return state.hexdigest()


def _enqueue(
    watchlist: WatchList,
    catalogue: Catalogue,
    found: Found,
    snapshot: HubSnapshot,
    recipes: dict[str, Asked],
    policy: Policy,
) -> None:
    found.matched += 1
    modified = snapshot.last_modified
    found.added += catalogue.enqueue(
        Seen(
            repo=snapshot.repo_id,
            commit=snapshot.commit,
            content=content_of(snapshot),
            weight_bytes=weight_bytes(snapshot),
            modified=modified.timestamp() if modified else time.time(),
        ),
        [
            Wanted(
                variant=name,
                asked=asked,
                target=watchlist.target(snapshot.repo_id, name),
                policy=policy,
            )
            for name, asked in recipes.items()
        ],
    )


@contextmanager
def _noting(found: Found, say: Callable[[str], None], where: str) -> Iterator[Callable[[], bool]]:
    """Turn a failure at the hub into a line of the run's problems; yields whether all went well."""
    went_well = True
    try:
        yield lambda: went_well
    except HubError as error:
        went_well = False
        failure = classify(error)
        found.failed |= failure.kind in ("hub", "disk")
        found.away |= is_unreached(error)
        found.problems.append(f"{where}: {failure.text}")
        say(found.problems[-1])
        if found.away:
            say("what else is watched is left to the next run")


def _modified(info: ModelInfo) -> float:
    return info.last_modified.timestamp() if info.last_modified else 0.0
