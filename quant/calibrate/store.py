"""Statistics on disk: a folder for each release, text and setting, with a file for each block."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]
Say = Callable[[str], None]
_FORMAT = 3
_DONE = "done.json"
_BEGUN = "begun.json"
_STATES = "states.safetensors"


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
    """Statistics in the making: block after block, each whole or not at all.

    Whatever is written raises OSError where it cannot be.
    """

    def __init__(self, kind: str, key: Mapping[str, Any]) -> None:
        """The folder for statistics of a ``kind`` that follow from ``key``."""
        text = json.dumps({"format": _FORMAT, "kind": kind, **key}, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:32]
        self.folder = cache_folder() / f"{name}.{kind}"
        self._digests: dict[int, str] = {}

    def get(self, make: Callable[[], Statistics], say: Say) -> Statistics:
        """The statistics, which ``make`` makes where they are not there; one process at a time."""
        found = self.finished(say)
        if found is None:
            with self.held(say):
                found = self.finished(say)  # another process may just have made them
                if found is None:
                    return make()
        say(f"reusing {self.folder}")
        return found

    @contextmanager
    def held(self, say: Say) -> Iterator[None]:
        """Nobody else makes these statistics meanwhile; waits, and says so, for whoever does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as file:  # stays, so that all lock the same
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another process, which makes {self.folder}")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def finished(self, say: Say) -> Statistics | None:
        """The statistics, or None where they are not all there; damaged ones are told of."""
        if not (self.folder / _DONE).exists():
            return None
        try:
            found = json.loads((self.folder / _DONE).read_text(encoding="utf-8"))
            parts = [_sha256(self.folder / _part(part)) for part in range(found["parts"])]
            if _together(parts) == found["digest"]:
                return Statistics(self.folder, found["index"], found["digest"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        say(f"{self.folder} is damaged and made again")
        return None

    def begun(self) -> tuple[int, list[dict[str, Tensor]]]:
        """The next part to make and the states to begin it with; (0, []) at the start.

        Parts that are not as they were written are made again, and with them all after them.
        """
        from safetensors.torch import load_file

        try:
            begun = json.loads((self.folder / _BEGUN).read_text(encoding="utf-8"))
            parts = [_sha256(self.folder / _part(part)) for part in range(len(begun["parts"]))]
            if parts != begun["parts"] or _sha256(self.folder / _STATES) != begun["states"]:
                return 0, []
            states: list[dict[str, Tensor]] = [{} for _ in range(begun["rows"])]
        except (OSError, ValueError, KeyError, TypeError):
            return 0, []
        self._digests = dict(enumerate(parts))
        for label, tensor in load_file(self.folder / _STATES).items():
            row, _, name = label.partition(":")
            states[int(row)][name] = tensor
        return len(parts), states

    def put(
        self,
        part: int,
        arrays: Mapping[str, Array],
        states: Iterable[Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Keep a part; ``states`` are what rows go on with, if the pass can be taken up."""
        from safetensors.numpy import save_file
        from safetensors.torch import save_file as save_tensors

        self.folder.mkdir(parents=True, exist_ok=True)
        held = {n: np.ascontiguousarray(a) for n, a in sorted(arrays.items())}
        self._replace(_part(part), lambda path: save_file(held, path))
        self._digests[part] = _sha256(self.folder / _part(part))
        if states is None:
            return
        rows = list(states)
        tensors: dict[str, Tensor] = {}
        seen: set[int] = set()
        for row, state in enumerate(rows):
            for name, tensor in state.items():
                value = tensor.contiguous()
                if (start := value.untyped_storage().data_ptr()) in seen:  # keys that are values
                    value = value.clone()
                seen.add(start)
                tensors[f"{row:05d}:{name}"] = value
        self._replace(_STATES, lambda path: save_tensors(tensors, path))
        begun = {
            "parts": [self._digest(number) for number in range(part + 1)],
            "states": _sha256(self.folder / _STATES),
            "rows": len(rows),
        }
        self._write(_BEGUN, begun)

    def finish(self, parts: int) -> Statistics:
        """All parts are there: give the statistics."""
        from safetensors import safe_open

        index: dict[str, str] = {}
        for part in range(parts):
            with safe_open(self.folder / _part(part), framework="numpy") as tensors:
                index.update(dict.fromkeys(tensors.keys(), _part(part)))
        digest = _together(self._digest(part) for part in range(parts))
        self._write(_DONE, {"index": index, "digest": digest, "parts": parts})
        for name in (_BEGUN, _STATES):
            (self.folder / name).unlink(missing_ok=True)
        return Statistics(self.folder, index, digest)

    def _digest(self, part: int) -> str:
        if part not in self._digests:
            self._digests[part] = _sha256(self.folder / _part(part))
        return self._digests[part]

    def _write(self, name: str, data: Mapping[str, Any]) -> None:
        text = json.dumps(data)
        self._replace(name, lambda path: path.write_text(text, encoding="utf-8"))

    def _replace(self, name: str, write: Callable[[Path], Any]) -> None:
        """Write a file of the folder whole or not at all."""
        unfinished = self.folder / f".{name}"
        try:
            with _system_errors(unfinished):
                write(unfinished)
            os.replace(unfinished, self.folder / name)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise


@contextmanager
def _system_errors(path: Path) -> Iterator[None]:
    """safetensors tells what the system refused in words alone."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


def _together(digests: Iterable[str]) -> str:
    whole = hashlib.sha256()
    for digest in digests:
        whole.update(bytes.fromhex(digest))
    return whole.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _part(number: int) -> str:
    return f"part-{number:05d}.safetensors"
