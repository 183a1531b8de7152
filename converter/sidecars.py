"""Everything of a release that is not weights: which files go along, byte for byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from converter.errors import PlanError
from converter.source.folder import folder_of, resolve_inside
from converter.source.index import case_collisions, path_problem

_WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".nemo"),
    *(".h5", ".msgpack", ".npz", ".onnx", ".onnx_data", ".tflite", ".ot", ".pb", ".xml", ".engine"),
    *(".gguf", ".ggml", ".mlmodel", ".mlpackage", ".zip", ".tar", ".gz"),
    *(".safetensors.index.json", ".bin.index.json"),
)
_OTHER_FORMATS = frozenset(
    {"onnx", "openvino", "coreml", "tflite", "tensorrt", "gguf", "ggml", "flax", "tf", "mlx"}
    | {"original"}
)
REPORTS = frozenset(
    {"README.md", "conversion.json", "acceptance.json", "quality.json"}
    | {"parity.json", "parity.html"}
    | {f"parity-{chart}.{kind}" for chart in ("layers", "kl") for kind in ("svg", "png")}
)
"""Files of an output that are made after its manifest, or are it."""
_REWRITTEN = frozenset({"config.json"} | {name.lower() for name in REPORTS})
_STALE = frozenset(
    {"hf_quant_config.json", "quantize_config.json", "quant_config.json", "kv_cache.json"}
)
TOKENIZER_FILES = frozenset(
    {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model"}
)
BESIDE_GGUF = TOKENIZER_FILES | {
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json", "generation_config.json", "LICENSE"),
}
"""What is taken along with a GGUF file."""


def is_sidecar(name: str) -> bool:
    """Whether a file of a release is copied into its conversion.

    Not weights in any format or what belongs to them, not hidden files, not what the converter
    writes itself, and not settings of a quantization that the output does not have.
    """
    path = PurePosixPath(name)
    if any(part.startswith(".") for part in path.parts):
        return False
    if any(part.lower() in _OTHER_FORMATS for part in path.parts[:-1]):
        return False
    if any(part.startswith("checkpoint-") for part in path.parts[:-1]):
        return False
    lower = path.name.lower()
    if lower.endswith(_WEIGHT_SUFFIXES):
        return False
    return lower not in _STALE and not (len(path.parts) == 1 and lower in _REWRITTEN)


def list_sidecars(root: Path) -> tuple[str, ...]:
    """The sidecars of a folder as relative names, links checked; raises PlanError.

    Of the folder that a GGUF file lies in, which may be anybody's, only ``BESIDE_GGUF``.
    """
    folder = folder_of(root)
    if folder != root:
        names = sorted(name for name in BESIDE_GGUF if (folder / name).is_file())
    else:
        names = sorted(_walk(root, PurePosixPath()))
    root = folder
    chosen = tuple(name for name in names if is_sidecar(name))
    problems = case_collisions(chosen)
    for name in chosen:
        try:
            resolve_inside(root, name)
        except PlanError as error:
            problems += error.problems
    if problems:
        raise PlanError(problems)
    return chosen


def choose_sidecars(names: Iterable[str]) -> tuple[str, ...]:
    """The sidecars among a repo's file names; raises PlanError on an unsafe name."""
    chosen = tuple(sorted(name for name in names if is_sidecar(name)))
    problems = [f"{name}: {why}" for name in chosen if (why := path_problem(name))]
    problems += case_collisions(chosen)
    if problems:
        raise PlanError(problems)
    return chosen


def copy_sidecars(root: Path, names: Iterable[str], out: Path) -> tuple[str, ...]:
    """Copy files byte for byte, links replaced by what they point to; the names in ``out``.

    A GGUF file without a tokenizer beside it holds one, which is written out.
    """
    names = tuple(names)
    folder = folder_of(root)
    for name in names:
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, target)
    made = made_files(root, names)
    for name, data in made.items():
        (out / name).write_bytes(data)
    return (*names, *made)


def made_files(root: Path, names: Iterable[str]) -> Mapping[str, bytes]:
    """The tokenizer's files by name, of a GGUF file that has none beside it; else nothing.

    Raises PlanError where the file holds none that can be built.
    """
    if folder_of(root) == root or any(name in TOKENIZER_FILES for name in names):
        return {}
    from converter.gguf_tokenizer import tokenizer_files

    return tokenizer_files(root)


def _walk(root: Path, below: PurePosixPath) -> Iterable[str]:
    for entry in sorted((root / below).iterdir()):
        name = below / entry.name
        if entry.is_dir() and not entry.is_symlink():
            if not entry.name.startswith("."):
                yield from _walk(root, name)
        else:
            yield str(name)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON as the hub's tools do: two spaces, sorted nowhere, UTF-8."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
