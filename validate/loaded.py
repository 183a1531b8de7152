"""Do the weights as a runtime loaded them equal the bytes in the files?

The stock loaders rename, transpose and rescale on every load, by rules that look at shapes. A
checkpoint is right only when none of that happens to it.
"""

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from arch_maps.dtypes import itemsize

_HEADER_LIMIT: Final = 100_000_000
_PIECE: Final = 1 << 24
"""Bytes of a file that are compared at once."""
_LANGUAGE: Final = "language_model."
_READ_BY_ALL: Final = (_LANGUAGE, f"model.{_LANGUAGE}", "lm_head.")
"""Starts of the names that a text-only runtime reads too."""
_CODES: Final = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool_": "BOOL",
    "bool": "BOOL",
}
# MLX has no 8-bit floats: the runtimes read their bytes as uint8.
_READ_AS: Final = {"F8_E8M0": "U8", "F8_E4M3": "U8", "F8_E5M2": "U8"}


class CheckpointError(ValueError):
    """The weight files of a folder cannot be read; the message names the file."""


@dataclass(frozen=True)
class Written:
    """One tensor in a file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def bits(self) -> NDArray[Any]:
        """The tensor's bytes as unsigned integers of its element size, in its shape."""
        kind = np.dtype(f"<u{itemsize(self.dtype)}")
        if 0 in self.shape:
            return np.zeros(self.shape, dtype=kind)
        return np.memmap(self.file, dtype=kind, mode="r", offset=self.offset, shape=self.shape)


@dataclass(frozen=True)
class LoadedWeights:
    """Result of comparing a loaded model with its files."""

    tensors: int
    bytes: int
    unused: tuple[str, ...]
    """Tensors that a text-only runtime rightly leaves alone (vision, audio, projector)."""
    problems: tuple[str, ...]
    """One line per tensor that is missing, surplus, or not what the file holds."""


@dataclass(frozen=True)
class Habit:
    """What a runtime's loader does to a type's weights on every load, as its code says."""

    computed: tuple[str, ...] = (" ",)
    """Ends of the names of parameters that it computes from the config."""
    parted: str = ""
    """In the names of tensors whose even rows it puts before the odd ones."""
    halved: bool = False
    """Whether it rounds float32 to float16."""
    joined: tuple[str, str, str] | None = None
    """The name of a module that it joins along axis 1, and those of the two in the file."""


_HABITS: Final = {
    "falcon_ocr": Habit(computed=(".cos_1d", ".sin_1d"), parted=".w13."),
    "molmo_point": Habit(halved=True),
    "laguna": Habit(joined=("gate_up_proj", "gate_proj", "up_proj")),
}


def written_tensors(folder: Path) -> dict[str, Written]:
    """Every tensor in the folder's safetensors files, by name."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no safetensors files")
    result: dict[str, Written] = {}
    for file in files:
        for name, tensor in _read_header(file).items():
            if name in result:
                raise CheckpointError(
                    f"{folder}: {name} is in both {result[name].file.name} and {file.name}"
                )
            result[name] = tensor
    return result


def weight_dtypes(folder: Path) -> dict[str, int]:
    """Bytes per dtype code over all tensors of a folder, largest first."""
    totals: dict[str, int] = {}
    for tensor in written_tensors(folder).values():
        size = itemsize(tensor.dtype) * int(np.prod(tensor.shape, dtype=np.int64))
        totals[tensor.dtype] = totals.get(tensor.dtype, 0) + size
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def compare_loaded(
    folder: Path, parameters: dict[str, Any], *, text_only: bool = False, drop: bool = False
) -> LoadedWeights:
    """Compare loaded MLX ``parameters`` with the files: names, dtypes, shapes and every bit.

    A runtime may keep the whole language model under ``language_model.``; that prefix is the only
    difference in names allowed. ``text_only``: tensors outside the language model may stay unread.
    ``drop`` takes each out of ``parameters`` before it is read, so that it is gone afterwards.
    """
    mx: Any = import_module("mlx.core")
    written = written_tensors(folder)
    translate = file_names(written, parameters)
    habit = _HABITS.get(_model_type(folder), Habit())
    problems: list[str] = []
    seen: set[str] = set()
    count = size = 0
    given = ((path, parameters.pop(path)) for path in list(parameters)) if drop else None
    for path, array in taken_apart(folder, given or parameters.items()):
        if drop:  # MLX keeps the memory of those that are gone, up to all there is
            mx.clear_cache()
        name = translate(path)
        source = written.get(name)
        if source is None and path.endswith(habit.computed):
            continue
        if source is None:
            problems.append(f"{path}: a parameter of the runtime, in no file")
            continue
        seen.add(name)
        count += 1
        size += int(array.nbytes)
        parted = bool(habit.parted) and habit.parted in path
        problem = _difference(source, array, parted=parted, halved=habit.halved)
        if problem:
            problems.append(f"{path}: {problem}")
    left = sorted(set(written) - seen)
    unused = tuple(n for n in left if text_only and not n.startswith(_READ_BY_ALL))
    ignored = set(unused)
    problems += [f"{name}: in a file, never loaded" for name in left if name not in ignored]
    return LoadedWeights(tensors=count, bytes=size, unused=unused, problems=tuple(problems))


def taken_apart(folder: Path, parameters: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The parameters by path, with what the loader of this type joins taken apart again."""
    mx: Any = import_module("mlx.core")
    whole, *parts = _HABITS.get(_model_type(folder), Habit()).joined or ("",)
    for path, array in parameters:
        if whole and f".{whole}." in path:
            for name, part in zip(parts, mx.split(array, 2, axis=1), strict=True):
                yield path.replace(f".{whole}.", f".{name}."), mx.contiguous(part)
        else:
            yield path, array


def file_names(
    written: Mapping[str, Written], parameters: Mapping[str, Any]
) -> Callable[[str], str]:
    """A runtime's path -> its name in the files: the one renaming under which most are there."""
    renamings: tuple[Callable[[str], str], ...] = (
        lambda path: path,
        lambda path: path.removeprefix(_LANGUAGE),
        lambda path: _LANGUAGE + path,
        # As releases of transformers name them, which mlx-vlm renames for a type or two.
        lambda path: "model." + path.replace("language_model.model.", _LANGUAGE, 1),
    )
    return max(renamings, key=lambda rename: sum(rename(path) in written for path in parameters))


def computed_on_load(folder: Path) -> tuple[str, ...]:
    """Ends of the names of parameters that a runtime makes from the config, in no file."""
    return _HABITS.get(_model_type(folder), Habit()).computed


def _model_type(folder: Path) -> str:
    path = folder / "config.json"
    return str(json.loads(path.read_text("utf-8")).get("model_type")) if path.exists() else ""


def _difference(source: Written, array: Any, *, parted: bool = False, halved: bool = False) -> str:
    mx: Any = import_module("mlx.core")

    code = _CODES.get(str(array.dtype).removeprefix("mlx.core."), str(array.dtype))
    rounded = halved and (source.dtype, code) == ("F32", "F16")
    if code != _READ_AS.get(source.dtype, source.dtype) and not rounded:
        return f"written as {source.dtype}, loaded as {code}"
    if tuple(array.shape) != source.shape:
        return f"written with shape {list(source.shape)}, loaded with {list(array.shape)}"
    words = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}[array.itemsize]
    loaded = np.asarray(array.view(words) if array.dtype != mx.bool_ else array.astype(mx.uint8))
    if rounded or parted:
        bits = source.bits()
        if rounded:
            bits = bits.view(np.float32).astype(np.float16).view(np.uint16)
        if parted:
            bits = np.concatenate([bits[0::2], bits[1::2]])
        different = int(np.count_nonzero(loaded != bits))
    else:
        different = _different(source, loaded.reshape(-1))
    return f"{different} of {loaded.size} values differ from the file" if different else ""


def _different(source: Written, loaded: NDArray[Any]) -> int:
    """How many values are not the file's, which is read in pieces and not mapped into memory."""
    size = loaded.itemsize
    step = _PIECE // size
    count = 0
    with source.file.open("rb") as file:
        file.seek(source.offset)
        for start in range(0, loaded.size, step):
            part = loaded[start : start + step]
            count += int(np.count_nonzero(np.fromfile(file, part.dtype, part.size) != part))
    return count


def _read_header(file: Path) -> dict[str, Written]:
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= _HEADER_LIMIT:
            raise CheckpointError(f"{file}: not a safetensors file (header length {length})")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise CheckpointError(f"{file}: the header is not JSON: {error}") from error
    result = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        shape = tuple(int(n) for n in entry["shape"])
        if end - begin != itemsize(entry["dtype"]) * int(np.prod(shape, dtype=np.int64)):
            raise CheckpointError(f"{file}: {name}: {end - begin} bytes do not fit {list(shape)}")
        result[name] = Written(file, entry["dtype"], shape, 8 + length + begin)
    return result
