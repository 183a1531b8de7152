"""Whether a folder in the cache of the hub's client is a release as the hub holds it.

A cache may hold a part of a repo, and only what is known to be all that a conversion takes of it
may go by the repo's name and commit: whoever converts that commit gets the same.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Final

from converter.errors import HubError, PlanError
from converter.sidecars import BESIDE_GGUF, choose_sidecars
from converter.source import select_weights
from converter.source.model import QUANT_CONFIG

if TYPE_CHECKING:
    from converter.hub import HubSnapshot

CARD: Final = "README.md"
_SHOWN: Final = 5


def needed_files(names: Collection[str], where: str, *, gguf: str | None = None) -> frozenset[str]:
    """What a conversion takes of a release with files of these ``names``, shards of an index aside.

    Those are missed by whoever reads the index. Raises PlanError where the choice of the weights
    would be a guess.
    """
    top = [name for name in names if "/" not in name]
    selection = select_weights(top, where, gguf=gguf)
    beside = BESIDE_GGUF.intersection(names) if selection.kind == "gguf" else names
    index = [selection.index] if selection.index else []
    told = {"config.json", QUANT_CONFIG, CARD}.intersection(names)
    return frozenset({*selection.files, *index, *choose_sidecars(beside), *told})


def known_snapshot(
    folder: Path, *, gguf: str | None = None, by_id: bool = False
) -> tuple[HubSnapshot | None, tuple[str, ...]]:
    """The commit that a folder of a cache holds, as far as it is needed, and notes.

    A folder that is not known to hold it whole goes by no commit, which a note says; one that was
    found ``by_id``, and lacks something, is no answer: HubError names what.
    """
    from converter.hub import cached_names, cached_repo, cached_snapshot

    repo = cached_repo(folder)
    if repo is None:
        return None, ()
    commit = folder.resolve().name
    snapshot = cached_snapshot(folder)
    names = None if snapshot is None else cached_names(snapshot, folder)
    if snapshot is None:
        why = "the folder holds other files than the client's links to its blobs"
    elif names is None:
        why = "the cache has no listing of it, so that files may be missing"
    else:
        try:
            needed = needed_files(names, repo, gguf=gguf)
        except PlanError:
            if by_id:
                raise
            needed = names
        lacking = sorted(needed - snapshot.by_path.keys())
        if not lacking:
            return snapshot, ()
        shown = ", ".join(lacking[:_SHOWN])
        shown += f" and {len(lacking) - _SHOWN} more" if len(lacking) > _SHOWN else ""
        if by_id:
            raise HubError(
                f"HF_HUB_OFFLINE is set, and the cache holds {repo} at {commit} without {shown}. "
                f"Unset it, or give {folder} instead to convert what is there."
            )
        why = f"the cache lacks {shown}"
    return None, (f"taken for a folder like others, not for {repo} at {commit}: {why}",)
