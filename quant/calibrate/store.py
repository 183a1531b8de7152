"""Statistics on disk: a folder for each release, text and setting, with a file for each block."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]
_FORMAT = 2
_DONE = "done.json"
_HIDDEN = "hidden.safetensors"


class Statistics:
    """Arrays by name, read from their files when they are asked for."""

    def __init__(self, folder: Path, index: Mapping[str, str], digest: str) -> None:
        """``index`` maps names to files of ``folder``; ``digest`` is that of all the files."""
        self._folder = folder
        self._index = index
        self.digest = digest

    @property
    def names(self) -> tuple[str, ...]:
        """Every name, in order."""
        return tuple(self._index)

    def __getitem__(self, name: str) -> Array:
        """The array ``name``; KeyError when the statistics do not cover it."""
        from safetensors import safe_open

        with safe_open(self._folder / self._index[name], framework="numpy") as file:
            found: Array = file.get_tensor(name)
        return found

    def __contains__(self, name: str) -> bool:
        """Whether the statistics cover ``name``."""
        return name in self._index

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows ``[start, stop)`` of the array ``name``."""
        from safetensors import safe_open

        with safe_open(self._folder / self._index[name], framework="numpy") as file:
            found: Array = file.get_slice(name)[start:stop]
        return found


def cache_folder() -> Path:
    """Where statistics are kept: ``mlx-dayzero/calibration`` below the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "mlx-dayzero" / "calibration"


class Store:
    """Statistics in the making: block after block, each whole or not at all."""

    def __init__(self, kind: str, key: Mapping[str, Any]) -> None:
        """The folder for statistics of a ``kind`` that follow from ``key``."""
        text = json.dumps({"format": _FORMAT, "kind": kind, **key}, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:32]
        self.folder = cache_folder() / f"{name}.{kind}"

    def finished(self) -> Statistics | None:
        """The statistics, or None where they are not all there."""
        path = self.folder / _DONE
        if not path.is_file():
            return None
        found = json.loads(path.read_text())
        return Statistics(self.folder, found["index"], found["digest"])

    def begun(self) -> tuple[int, list[Tensor]]:
        """The next part to make and the hidden states to begin it with; (0, []) at the start."""
        from safetensors import safe_open

        path = self.folder / _HIDDEN
        if not path.is_file():
            return 0, []
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            hidden = [file.get_tensor(str(i)) for i in range(int(metadata["rows"]))]
        return int(metadata["next"]), hidden

    def put(
        self, part: int, arrays: Mapping[str, Array], hidden: Iterable[Tensor] | None = None
    ) -> None:
        """Keep a part; ``hidden`` are the states to go on with, if the pass can be taken up."""
        from safetensors.numpy import save_file
        from safetensors.torch import save_file as save_tensors

        self.folder.mkdir(parents=True, exist_ok=True)
        held = {n: np.ascontiguousarray(a) for n, a in sorted(arrays.items())}
        self._replace(_part(part), lambda path: save_file(held, path))
        if hidden is not None:
            states = {str(i): state.contiguous() for i, state in enumerate(hidden)}
            metadata = {"next": str(part + 1), "rows": str(len(states))}
            self._replace(_HIDDEN, lambda path: save_tensors(states, path, metadata))

    def finish(self, parts: int) -> Statistics:
        """All parts are there: give the statistics."""
        from safetensors import safe_open

        index: dict[str, str] = {}
        digest = hashlib.sha256()
        for part in range(parts):
            path = self.folder / _part(part)
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
            with safe_open(path, framework="numpy") as tensors:
                index.update(dict.fromkeys(tensors.keys(), path.name))
        text = json.dumps({"index": index, "digest": digest.hexdigest()})
        self._replace(_DONE, lambda path: path.write_text(text))
        (self.folder / _HIDDEN).unlink(missing_ok=True)
        found = self.finished()
        assert found is not None
        return found

    def clear(self) -> None:
        """Forget what was begun."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _replace(self, name: str, write: Callable[[Path], Any]) -> None:
        unfinished = self.folder / f".{name}.{os.getpid()}"
        write(unfinished)
        os.replace(unfinished, self.folder / name)


def _part(number: int) -> str:
    return f"part-{number:05d}.safetensors"
