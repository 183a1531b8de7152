"""Reading an adapter folder: its config, its header, and the sha256 of both files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from converter.errors import PlanError, UsageError
from converter.source import Header, Reader, read_header
from converter.source.folder import list_folder, read_json, resolve_inside

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = {"adapter_model.safetensors": "peft", "adapters.safetensors": "mlx-lm"}
"""The weight file of each layout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter folder; ``layout`` is "peft" or "mlx-lm"."""

    root: Path
    layout: str
    config: Mapping[str, Any]
    header: Header
    digests: Mapping[str, str]
    """sha256 of the config and the weights, by file name."""

    @property
    def name(self) -> str:
        """What the folder is called."""
        return self.root.resolve().name

    @property
    def base(self) -> str | None:
        """The model that the adapter says it was trained on."""
        key = "base_model_name_or_path" if self.layout == "peft" else "model"
        found = self.config.get(key)
        return found if isinstance(found, str) and found else None

    def record(self) -> dict[str, Any]:
        """What plans and manifests say of the adapter: all that decides the fused weights."""
        base = None if self.base is None else Path(self.base).name  # of a path, not the folders
        return {
            "name": self.name,
            "layout": self.layout,
            "base_model": self.base if self.base and not Path(self.base).is_absolute() else base,
            "files": dict(self.digests),
        }

    def open(self) -> Reader:
        """A reader of the adapter's tensors."""
        file = self.header.file
        return Reader(self.header.tensors, {file: (self.root / file, self.header.size)})


def read_adapter(root: Path) -> Adapter:
    """The adapter in folder ``root``; UsageError without one, PlanError for a faulty one."""
    if not root.is_dir():
        raise UsageError(f"--adapter-path {root}: no such folder")
    names = list_folder(root)
    found = [file for file in WEIGHTS if file in names]
    if CONFIG not in names or len(found) != 1:
        pickled = " (adapter_model.bin: save it as safetensors with PEFT first)"
        raise UsageError(
            f"--adapter-path {root}: holds no adapter; there must be {CONFIG} and one of "
            f"{' and '.join(WEIGHTS)}{pickled if 'adapter_model.bin' in names else ''}"
        )
    (file,) = found
    path = resolve_inside(root, file)
    header = read_header(path, file)
    if not header.tensors:
        raise PlanError([f"{path}: holds no tensors"])
    digests = {}
    for name in (CONFIG, file):
        with resolve_inside(root, name).open("rb") as opened:
            digests[name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return Adapter(
        root=root,
        layout=WEIGHTS[file],
        config=read_json(root, CONFIG),
        header=header,
        digests=digests,
    )
