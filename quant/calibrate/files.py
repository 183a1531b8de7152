"""Small statistics on disk: one safetensors file for each release, text and setting."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quant.calibrate.store import cache_folder

Array = npt.NDArray[Any]
_FORMAT = 1


class Statistics:
    """Arrays by name: column weights by source tensor, or GPTQ's codes by stored tensor."""

    def __init__(self, arrays: Mapping[str, Array], *, digest: str) -> None:
        """``digest`` is the sha256 of the file that holds the arrays."""
        self._arrays = arrays
        self.digest = digest

    def __getitem__(self, name: str) -> Array:
        """The array ``name``; KeyError when the statistics do not cover it."""
        return self._arrays[name]

    def __contains__(self, name: str) -> bool:
        """Whether the statistics cover ``name``."""
        return name in self._arrays


def cache_file(kind: str, key: Mapping[str, Any]) -> Path:
    """The file for statistics that follow from ``key``."""
    text = json.dumps({"format": _FORMAT, "kind": kind, **key}, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:32]
    return cache_folder() / f"{name}.{kind}.safetensors"


def load(path: Path) -> Statistics | None:
    """The statistics in ``path``, or None where there are none yet."""
    from safetensors.numpy import load_file

    if not path.is_file():
        return None
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Statistics(load_file(path), digest=digest)


def save(path: Path, arrays: Mapping[str, Array]) -> Statistics:
    """Write the arrays whole or not at all, and give them back as statistics."""
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        unfinished = Path(folder) / path.name
        save_file({n: np.ascontiguousarray(a) for n, a in sorted(arrays.items())}, unfinished)
        os.replace(unfinished, path)
    found = load(path)
    assert found is not None
    return found
