"""Opens a release folder: single file, shards with an index, or pickles."""

import os
import re
from pathlib import Path
from typing import Any

from converter.errors import PlanError
from converter.source.gguf_files import SUFFIX
from converter.source.header import Header, paused_gc, quote, read_header
from converter.source.index import (
    Selection,
    WeightIndex,
    case_collisions,
    parse_index,
    path_problem,
    select_weights,
    unlisted_problems,
)
from converter.source.model import QUANT_CONFIG, Source, build_source, with_quant_config
from converter.source.strict_json import MAX_JSON_BYTES, parse_object

_CACHE_REPO = re.compile(r"(models|datasets|spaces)--.+")


def folder_of(path: Path) -> Path:
    """The folder of a release that is given as that or as a GGUF file in it."""
    return path.parent if path.suffix == SUFFIX and path.is_file() else path


@paused_gc()
def open_folder(
    path: Path,
    *,
    allow_mlx: bool = False,
    scratch: Path | None = None,
    gguf: str | None = None,
) -> Source:
    """The release in folder ``path``, from its headers and config; raises PlanError.

    ``path`` may be a GGUF file of the folder, or ``gguf`` may name it there. ``scratch`` is where
    tensors that a pickle does not hold as plain bytes are unpacked (default: the system's temporary
    folder); the copies go when the source does.
    """
    if (folder := folder_of(path)) != path:
        path, gguf = folder, path.name
    names = list_folder(path)
    problems = case_collisions(names)
    selection = select_weights(names, str(path), gguf=gguf)
    if selection.kind == "gguf":
        return _open_gguf(path, selection, stated="config.json" in names, problems=problems)
    config: dict[str, Any] = {}
    try:
        config = read_json(path, "config.json")
        if QUANT_CONFIG in names:
            config = with_quant_config(config, read_json(path, QUANT_CONFIG))
    except PlanError as error:
        problems += error.problems
    index = None
    if selection.index is not None:
        index = parse_index(read_text(path, selection.index), selection.index)
        problems += unlisted_problems(index, names, selection.kind)
    files, broken = _weight_paths(path, selection, index, problems)
    if selection.kind == "pickle":
        from converter.source.pickles import open_pickles

        return open_pickles(
            where=str(path),
            root=path,
            config=config,
            files=files,
            index=index,
            notes=selection.notes,
            problems=problems,
            broken=broken,
            scratch=scratch,
        )
    headers: dict[str, Header] = {}
    for name, file in files.items():
        try:
            headers[name] = read_header(file, name)
        except PlanError as error:
            problems += error.problems
            broken.add(name)
    return build_source(
        where=str(path),
        config=config,
        headers=headers,
        index=index,
        root=path,
        paths=files,
        notes=selection.notes,
        problems=problems,
        broken=broken,
        allow_mlx=allow_mlx,
    )


def _open_gguf(path: Path, selection: Selection, *, stated: bool, problems: list[str]) -> Source:
    from converter.source.gguf import gguf_source, read_bytes, read_head

    files, _ = _weight_paths(path, selection, None, problems)
    if problems:
        raise PlanError(problems)
    return gguf_source(
        [read_head(file, name) for name, file in files.items()],
        where=str(path),
        stated=read_json(path, "config.json") if stated else None,
        read=lambda name, start, stop: read_bytes(files[name], start, stop),
        root=path,
        paths=files,
        notes=selection.notes,
    )


def list_folder(root: Path) -> tuple[str, ...]:
    """Names of the files directly in ``root``; raises PlanError when it is no readable folder."""
    try:
        return tuple(sorted(entry.name for entry in root.iterdir() if not entry.is_dir()))
    except FileNotFoundError:
        raise PlanError([f"{root}: no such folder"]) from None
    except NotADirectoryError:
        raise PlanError([f"{root}: not a folder; give the folder that holds the model"]) from None
    except OSError as error:
        raise PlanError([f"{root}: cannot be read: {error.strerror}"]) from error


def resolve_inside(root: Path, name: str, *, home: Path | None = None) -> Path:
    """``root/name`` after checking that it stays in the folder, links followed.

    The one exception is the Hugging Face cache, whose snapshots link into the repo's own
    ``blobs`` and from there into the cache's shared ``blobs``. ``home`` is ``root``, links
    followed, where that is known. Raises PlanError.
    """
    if problem := path_problem(name):
        raise PlanError([f"{quote(name)}: {problem}"])
    path = root / name
    try:
        target = path.resolve(strict=True)
    except FileNotFoundError:
        what = "is a broken link" if path.is_symlink() else "does not exist"
        raise PlanError([f"{root}: {quote(name)} {what}"]) from None
    except (OSError, RuntimeError) as error:
        raise PlanError([f"{root}: {quote(name)} cannot be followed: {error}"]) from error
    home = home or root.resolve()
    if not target.is_file():
        raise PlanError([f"{root}: {quote(name)} is not a file"])
    if target.is_relative_to(home) or _is_cache_blob(home, target):
        return path
    raise PlanError([f"{root}: {quote(name)} is a link that leaves the folder (to {target})"])


def read_text(root: Path, name: str) -> bytes:
    """The bytes of a small file of the release."""
    path = resolve_inside(root, name)
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise PlanError([f"{root}: {name} has {size} bytes, too large for what it is"])
        return path.read_bytes()
    except OSError as error:
        raise PlanError([f"{root}: {name} cannot be read: {error.strerror}"]) from error


def read_json(root: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of the release, read strictly."""
    return parse_object(read_text(root, name), name)


def _is_cache_blob(home: Path, target: Path) -> bool:
    repo = home.parent.parent
    if home.parent.name != "snapshots" or not _CACHE_REPO.fullmatch(repo.name):
        return False
    shared = repo.parent / "blobs"
    return target.parent == repo / "blobs" or target.parent.parent == shared


def _weight_paths(
    root: Path, selection: Selection, index: WeightIndex | None, problems: list[str]
) -> tuple[dict[str, Path], set[str]]:
    """Paths of the weight files that exist, and the names of those already among ``problems``."""
    paths: dict[str, Path] = {}
    broken: set[str] = set()
    home = root.resolve()
    for name in selection.files if index is None else index.shards:
        if not os.path.lexists(root / name):
            continue  # A shard that is missing is reported with its tensors, against the index.
        try:
            paths[name] = resolve_inside(root, name, home=home)
        except PlanError as error:
            problems += error.problems
            broken.add(name)
    return paths, broken
