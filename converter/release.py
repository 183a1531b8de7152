"""A release as the user names it: a folder or a hub id, its source, sidecars and identity."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from converter.cached_release import CARD, known_snapshot
from converter.errors import HubError, PlanError
from converter.gguf_tokenizer import with_tokenizer
from converter.sidecars import BESIDE_GGUF, choose_sidecars, list_sidecars
from converter.source import (
    Selection,
    Source,
    build_source,
    fetch_header,
    folder_of,
    header_digest,
    open_folder,
    parse_index,
    select_weights,
)
from converter.source.gguf_files import FLAG, SUFFIX
from converter.source.index import PICKLE_INDEX, SAFETENSORS_INDEX
from converter.source.model import QUANT_CONFIG, with_quant_config
from converter.source.strict_json import MAX_JSON_BYTES, parse_object

if TYPE_CHECKING:
    from converter.hub import HubSnapshot, Progress

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PAGE = re.compile(
    rf"(?:https?://[^/]+/|(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)"
    rf"(?!datasets/|spaces/)(?P<id>{_REPO_ID.pattern})"
    r"(?:/(?:tree|blob|resolve)/(?P<revision>[^/?#]+))?"
)
_NO_CONFIG = "has no config.json; it is not a transformers release"
_GGUF_REPO = re.compile(r"[-_.]gguf$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Release:
    """What is being converted; ``root`` is None until a hub release has been downloaded."""

    name: str
    source: Source
    sidecars: tuple[str, ...]
    root: Path | None
    """Its folder, or the GGUF file in it that is converted."""
    snapshot: HubSnapshot | None = None
    cache: Path | None = None
    """Where files from the hub go; None for the client's own cache."""
    unchecked: bool = False
    """Whether ``root`` lies in a cache, and its files are yet to be held against their hashes."""

    @property
    def origin(self) -> dict[str, Any]:
        """Identity beyond the headers: hub id and commit."""
        if self.snapshot is None:
            return {}
        known: dict[str, Any] = {"repo": self.snapshot.repo_id, "commit": self.snapshot.commit}
        return {**known, "gated": True} if self.snapshot.gated else known

    @property
    def streamed(self) -> bool:
        """Whether the weights are read from the hub while converting, and never lie here."""
        return self.source.remote is not None

    def stamp(self) -> dict[str, Any]:
        """What must not change between a run and its resumption: the content of the weights."""
        if self.snapshot is not None:
            files = self.snapshot.by_path
            return {n: files[n].sha256 or files[n].blob_id for n in self.source.weight_files}
        stats = {
            name: file.path.stat()
            for name, file in self.source.files.items()
            if file.path is not None
        }
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}

    def content(self) -> str:
        """The stamp as one hash."""
        return hashlib.sha256(json.dumps(self.stamp(), sort_keys=True).encode()).hexdigest()

    def card(self) -> str | None:
        """The release's own README.md, if it was fetched."""
        if self.root is None or not (folder_of(self.root) / CARD).is_file():
            return None
        return (folder_of(self.root) / CARD).read_text(encoding="utf-8", errors="replace")

    def local(self) -> Path:
        """The folder with the release's files, or its GGUF file."""
        assert self.root is not None, "the release has not been downloaded"
        return self.root


def open_release(
    hf_path: str,
    *,
    revision: str | None = None,
    allow_mlx: bool = False,
    cache: Path | None = None,
    gguf: str | None = None,
) -> Release:
    """Read what is needed to plan: headers and small files, never tensor bytes.

    ``gguf`` names the GGUF file to convert where there are several, or other weights beside it.
    ``cache`` takes the place of the client's own cache. Raises PlanError for a faulty release and
    HubError when the hub cannot be read.
    """
    folder = _as_path(hf_path)
    by_id = not folder.exists() and _REPO_ID.fullmatch(hf_path) is not None
    if by_id:
        from converter.hub import cached_folder, is_offline

        if not is_offline():
            return _open_hub(hf_path, revision, allow_mlx=allow_mlx, cache=cache, gguf=gguf)
        folder, revision = cached_folder(hf_path, revision=revision, cache=cache), None
    file = folder_of(folder) != folder
    if folder.is_dir() or file:
        from converter.hub import cached_repo

        if revision is not None:
            raise PlanError([f"--revision {revision}: {hf_path} is a folder, not a hub id"])
        if file and gguf is not None:
            raise PlanError([f"{FLAG} {gguf}: {hf_path} is a GGUF file itself"])
        named = folder.name if file else gguf
        snapshot, notes = known_snapshot(folder_of(folder), gguf=named, by_id=by_id)
        source = open_folder(folder, allow_mlx=allow_mlx, gguf=gguf)
        source = replace(source, notes=(*source.notes, *notes))
        root = folder
        if source.kind == "gguf":
            root = folder_of(folder) / source.weight_files[0]
        sidecars = list_sidecars(root)
        repo, name = cached_repo(folder_of(folder)), folder.resolve().name
        if repo is not None:
            name = repo.rpartition("/")[2]
        if source.kind == "gguf":
            source = with_tokenizer(source, sidecars)
            name = folder.stem if file else _GGUF_REPO.sub("", name)
        return Release(
            name=name,
            source=source,
            sidecars=sidecars,
            root=root,
            snapshot=snapshot,
            unchecked=snapshot is not None,
        )
    if folder.exists():
        raise PlanError(
            [f"{hf_path}: is a file and no .gguf; give the folder that holds the release"]
        )
    raise PlanError([f"{hf_path}: no such folder, and not a hub id such as Qwen/Qwen3-0.6B"])


def _as_path(hf_path: str) -> Path:
    """The path that ``hf_path`` is; PlanError for a web address and an unknown user's home."""
    if (page := _PAGE.match(hf_path)) and not Path(hf_path).exists():
        at = unquote(page["revision"] or "")
        revision = f" with --revision {at}" if at else ""
        raise PlanError([f"{hf_path}: is a web address; give the hub id {page['id']}{revision}"])
    try:
        return Path(hf_path).expanduser()
    except RuntimeError:
        raise PlanError(
            [f"{hf_path}: this machine has no such user; give the whole path"]
        ) from None


def fetch(
    release: Release,
    *,
    weights: Collection[str] | None = None,
    stream: bool = False,
    progress: Progress | None = None,
) -> Release:
    """The release with its files on this machine, hashes checked; raises HubError.

    ``weights`` names the weight files that will be read, None for all. With ``stream`` the source
    reads them from the hub instead. A cache that was given as the source is only compared, and
    PlanError raised where it differs.
    """
    from converter.hub import check_cached, download, open_stream

    snapshot, root = release.snapshot, release.root
    files = release.source.weight_files if weights is None else sorted(weights)
    if snapshot is None or root is not None:
        if snapshot is not None and root is not None and release.unchecked:
            known = [*files, *release.sidecars, "config.json", QUANT_CONFIG, CARD]
            known += [SAFETENSORS_INDEX, PICKLE_INDEX]
            known = [name for name in known if name in snapshot.by_path]
            check_cached(snapshot, folder_of(root), known, progress=progress)
        return replace(release, unchecked=False)
    wanted = [*([] if stream else files), *release.sidecars]
    wanted += [n for n in ("config.json", QUANT_CONFIG, CARD) if n in snapshot.by_path]
    root = download(snapshot, wanted, progress=progress, cache_dir=release.cache)
    planned = {name: file.digest for name, file in release.source.files.items()}
    if stream:
        remote = partial(open_stream, snapshot, headers=planned)
        return replace(release, source=replace(release.source, root=root, remote=remote), root=root)
    source = release.source.located(root)
    if source.kind == "safetensors":
        damaged = [name for name in files if header_digest(root / name, name) != planned[name]]
    elif source.kind == "gguf":
        from converter.source.gguf import misread

        damaged = misread(source, files)
        root /= source.weight_files[0]
    else:
        damaged = []
    if damaged:
        raise HubError(
            f"{damaged[0]} of {snapshot.repo_id}: its header arrived damaged when the conversion "
            "was planned; run the same command again"
        )
    return replace(release, source=source, root=root)


def _open_hub(
    repo_id: str,
    revision: str | None,
    *,
    allow_mlx: bool,
    cache: Path | None,
    gguf: str | None,
) -> Release:
    from converter.hub import download, fetch_range, resolve_revision

    snapshot = resolve_revision(repo_id, revision=revision)
    names = [file.path for file in snapshot.files]
    top = [name for name in names if "/" not in name]
    stated = "config.json" in names
    if not stated and gguf is None and not any(name.endswith(SUFFIX) for name in top):
        raise PlanError([f"{repo_id}: {_NO_CONFIG}"])
    selection = select_weights(top, repo_id, gguf=gguf)
    if selection.kind == "gguf":
        return _open_hub_gguf(snapshot, selection, stated=stated, cache=cache)
    if not stated:
        raise PlanError([f"{repo_id}: {_NO_CONFIG}; name its GGUF file with {FLAG} to convert it"])
    sidecars = choose_sidecars(names)
    name = repo_id.rpartition("/")[2]
    if selection.kind == "pickle":  # their tensors are known only once the file is here
        weights = [n for n in top if n.endswith((".bin", ".pt", ".pth", ".bin.index.json"))]
        cards = [CARD] if CARD in names else []
        root = download(snapshot, ["config.json", *weights, *sidecars, *cards], cache_dir=cache)
        source = open_folder(root, allow_mlx=allow_mlx)
        return Release(name=name, source=source, sidecars=sidecars, root=root, snapshot=snapshot)
    beside = [QUANT_CONFIG] if QUANT_CONFIG in top else []
    small = ["config.json", *beside] + ([selection.index] if selection.index else [])
    texts = _small_files(snapshot, small, cache=cache)
    config = parse_object(texts["config.json"], "config.json")
    if beside:
        config = with_quant_config(config, parse_object(texts[QUANT_CONFIG], QUANT_CONFIG))
    index = None
    files: tuple[str, ...] = selection.files
    problems: list[str] = []
    if selection.index:
        index = parse_index(texts[selection.index], selection.index)
        files = tuple(shard for shard in index.shards if shard in snapshot.by_path)
    headers = {}
    for file in files:
        size = snapshot.by_path[file].size
        try:
            headers[file] = fetch_header(partial(fetch_range, snapshot, file), size, file)
        except PlanError as error:
            problems += error.problems
    if problems:
        raise PlanError(problems)
    source = build_source(
        where=repo_id,
        config=config,
        headers=headers,
        index=index,
        notes=selection.notes,
        allow_mlx=allow_mlx,
    )
    return Release(
        name=name, source=source, sidecars=sidecars, root=None, snapshot=snapshot, cache=cache
    )


def _small_files(
    snapshot: HubSnapshot, names: Sequence[str], *, cache: Path | None
) -> dict[str, bytes]:
    """Files of JSON by name; PlanError for those that are too large to be read as that."""
    from converter.hub import download

    sizes = {name: snapshot.by_path[name].size for name in names}
    if huge := [name for name, size in sizes.items() if size > MAX_JSON_BYTES]:
        raise PlanError(f"{n}: has {sizes[n]} bytes, too large for what it is" for n in huge)
    folder = download(snapshot, names, cache_dir=cache)
    return {name: (folder / name).read_bytes() for name in names}


def _open_hub_gguf(
    snapshot: HubSnapshot, selection: Selection, *, stated: bool, cache: Path | None
) -> Release:
    """A GGUF file of a repo, from the heads of its parts."""
    from converter.hub import fetch_range
    from converter.source.gguf import fetch_head, gguf_source

    repo_id = snapshot.repo_id
    config = None
    if stated:
        texts = _small_files(snapshot, ["config.json"], cache=cache)
        config = parse_object(texts["config.json"], "config.json")
    heads = [
        fetch_head(partial(fetch_range, snapshot, file), snapshot.by_path[file].size, file)
        for file in selection.files
    ]
    sidecars = choose_sidecars(name for name in snapshot.by_path if name in BESIDE_GGUF)
    read = partial(fetch_range, snapshot)
    notes = selection.notes
    source = gguf_source(heads, where=repo_id, stated=config, read=read, notes=notes)
    return Release(
        name=_GGUF_REPO.sub("", repo_id.rpartition("/")[2]),
        source=with_tokenizer(source, sidecars),
        sidecars=sidecars,
        root=None,
        snapshot=snapshot,
        cache=cache,
    )
