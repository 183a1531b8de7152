"""GGUF files as sources: the release's own names and shapes, at the places of the file's bytes.

A child process reads the head (``gguf_child``); here what it says is held against the file and
against the architecture (``arch_maps.gguf``). Blocks stay bytes: ``converter.decode.gguf`` knows
what they mean.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from arch_maps.gguf import (
    ARCHITECTURES,
    LLAMA3_FACTORS,
    GgufArch,
    Keys,
    contradictions,
    llama3_scaling,
    read_config,
)
from arch_maps.rules import MAX_TENSORS
from converter.errors import PlanError
from converter.source import gguf_child
from converter.source.header import MAX_BYTES, Header, TensorInfo, quote
from converter.source.model import Source, Stored, build_source
from converter.source.pickles import unread
from quant.decode.ggml import TYPES, GgmlType
from validate.child import ChildError, ask

METHOD: Final = "gguf"
"""What ``quant_method`` says of such a release."""
MAX_HEAD_BYTES: Final = 256 << 20
TIMEOUT_SECONDS: Final = 60
_FIRST_READ: Final = 4 << 20
_MEMORY: Final = 4 << 30
_LONGEST_ANSWER: Final = 64 << 20
"""Bytes: some times what the largest release has to say of its tensors."""
_EXPERT: Final = "{}"
_CONFIG: Final = "config.json"
_FROM_FILE: Final = "made from the file"


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What a file says of itself; nothing in it has been held against anything yet."""

    file: str
    size: int
    digest: str
    end: int
    """Where the head ends."""
    metadata: dict[str, Any]
    tensors: list[dict[str, Any]]


def read_head(path: Path, name: str) -> Head:
    """The head of the file at ``path``; raises PlanError naming ``name``.

    Arrays of more than a few thousand values come as their count.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise PlanError([f"{name}: cannot be read: {error.strerror}"]) from error
    return _grown(lambda count: (path, count), size, name)


def fetch_head(fetch: Callable[[int, int], bytes], size: int, name: str) -> Head:
    """The head of a remote file of which ``fetch(start, stop)`` gives bytes."""
    with tempfile.TemporaryDirectory(prefix="gguf-") as folder:
        copy = Path(folder) / "head"

        def at_hand(count: int) -> tuple[Path, int]:
            have = copy.stat().st_size if copy.exists() else 0
            with copy.open("ab") as file:
                file.write(fetch(have, count))
            return copy, count

        return _grown(at_hand, size, name)


def gguf_source(
    heads: Sequence[Head],
    *,
    where: str,
    stated: dict[str, Any] | None,
    read: Callable[[str, int, int], bytes],
    root: Path | None = None,
    paths: Mapping[str, Path] | None = None,
    notes: Sequence[str] = (),
    problems: Sequence[str] = (),
) -> Source:
    """The source that the parts ``heads`` of one model make.

    ``stated`` is the config.json beside them, None where there is none and the settings in the file
    have to do; ``read(file, start, stop)`` gives bytes of the few values that are settings too.
    Raises PlanError with every problem.
    """
    metadata = heads[0].metadata
    arch = _architecture(metadata, heads[0].file)
    found = [*problems]
    headers: dict[str, Header] = {}
    stored: dict[str, Stored] = {}
    shapes = {t["name"]: tuple(t["shape"]) for head in heads for t in head.tensors}
    keys = Keys(metadata, shapes)
    for head in heads:
        try:
            headers[head.file] = _header(head, arch, keys, stored)
        except PlanError as error:
            found += error.problems
    if len(heads) > 1:
        total = metadata.get("split.tensors.count")
        if total != len(shapes):
            found.append(f"{heads[0].file}: promises {total} tensors, its parts hold {len(shapes)}")
    types = Counter(TYPES[t["type"]].name for h in heads for t in h.tensors if t["type"] in TYPES)
    place = next(
        (h.tensors[LLAMA3_FACTORS] for h in headers.values() if LLAMA3_FACTORS in h.tensors), None
    )
    factors: list[float] = []
    if stated is None and place is not None and place.dtype == "F32" and place.nbytes <= 4096:
        factors = np.frombuffer(read(place.file, place.start, place.stop), "<f4").tolist()
    config = _config(arch, keys, stated, types, factors)
    found += [f"{heads[0].file}: {quote(problem)}" for problem in dict.fromkeys(keys.problems)]
    config["quantization_config"] = {
        "quant_method": METHOD,
        "architecture": keys.prefix,
        _CONFIG: "the release's" if stated is not None else _FROM_FILE,
        "types": dict(sorted(types.items())),
        "tokenizer": metadata.get("tokenizer.ggml.model"),
    }
    source = build_source(
        where=where,
        config=config,
        headers=headers,
        kind="gguf",
        root=root,
        paths=paths,
        notes=notes,
        problems=found,
    )
    drops = {name: why for name, why in arch.drops.items() if name in source.tensors}
    return replace(source, gguf=stored, gguf_drops=drops)


def misread(source: Source, files: Collection[str]) -> list[str]:
    """Those of the local ``files`` whose heads, or values that are settings, are not the source's.

    For a source that was made from what came without a hash.
    """
    found = []
    place = source.tensors.get(LLAMA3_FACTORS)
    made = source.config["quantization_config"][_CONFIG] == _FROM_FILE
    for name in files:
        path = source.files[name].path
        assert path is not None, f"{name} is not local"
        if read_head(path, name).digest != source.files[name].digest:
            found.append(name)
        elif made and place is not None and place.file == name:
            values = np.frombuffer(read_bytes(path, place.start, place.stop), "<f4").tolist()
            scaling = llama3_scaling(values, source.config["rope_theta"])
            if scaling != source.config["rope_scaling"]:
                found.append(name)
    return found


def read_bytes(path: Path, start: int, stop: int) -> bytes:
    """Bytes of a local file."""
    with path.open("rb") as file:
        file.seek(start)
        return file.read(stop - start)


def _config(
    arch: GgufArch,
    keys: Keys,
    stated: dict[str, Any] | None,
    types: Collection[str],
    factors: Sequence[float],
) -> dict[str, Any]:
    """The release's config.json held against the file's settings, or one made from these."""
    if stated is None:
        return read_config(arch, keys, types, factors)
    kind = stated.get("model_type")
    if kind not in arch.model_types:
        keys.problems.append(
            f"holds {keys.prefix} weights, but the config.json beside it is of {kind!r}, not of "
            f"{' or '.join(arch.model_types)}; give the config.json of the model in the file"
        )
        return dict(stated)
    silent = Keys(keys.metadata, keys.tensors)  # what the file leaves out, config.json has
    keys.problems += contradictions(stated, arch.config(silent))
    return dict(stated)


def _architecture(metadata: Mapping[str, Any], file: str) -> GgufArch:
    name = metadata.get("general.architecture")
    arch = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if arch is None:
        known = ", ".join(sorted(ARCHITECTURES))
        shown = quote(name) if isinstance(name, str) else repr(name)
        raise PlanError(
            [
                f"{file}: general.architecture is {shown}; of GGUF files only {known} are read: "
                "convert the release that the file was made from"
            ]
        )
    return arch


def _header(head: Head, arch: GgufArch, keys: Keys, stored: dict[str, Stored]) -> Header:
    """The tensors of one file under the release's names, every place held against the file."""
    problems: list[str] = []
    align = head.metadata.get("general.alignment", keys.metadata.get("general.alignment", 32))
    if type(align) is not int or not 8 <= align <= 1 << 20 or align & (align - 1):
        raise PlanError([f"{head.file}: general.alignment is {align!r}, not a power of two"])
    first = -(-head.end // align) * align
    spans: list[tuple[int, int, str]] = []
    tensors: dict[str, TensorInfo] = {}
    for entry in head.tensors:
        name, shape = entry["name"], tuple(entry["shape"])
        kind = TYPES.get(entry["type"])
        if kind is None:
            problems.append(f"{head.file}: {quote(name)}: unknown type {entry['type']}")
            continue
        nbytes, problem = _size(kind, shape)
        start = first + entry["offset"]
        if problem is None and entry["offset"] % align:
            problem = f"begins at {entry['offset']}, no multiple of the alignment {align}"
        if problem is None and start + nbytes > head.size:
            problem = f"truncated: its data ends at byte {start + nbytes} of {head.size}"
        if problem is not None:
            problems.append(f"{head.file}: {quote(name)}: {problem}")
            continue
        spans.append((start, start + nbytes, name))
        for own, info in _named(head.file, entry, kind, start, arch, keys, problems):
            if own.name in tensors:
                problems.append(f"{head.file}: {quote(own.name)}: there under two names")
            tensors[own.name] = own
            stored[own.name] = info
        if len(stored) > MAX_TENSORS:
            raise PlanError([f"{head.file}: stands for more than {MAX_TENSORS:,} tensors"])
    problems += _layout(spans, first, align, head)
    if problems:
        raise PlanError(problems)
    return Header(head.file, head.size, head.digest, tensors, {})


def _size(kind: GgmlType, shape: tuple[int, ...]) -> tuple[int, str | None]:
    """Bytes of a tensor, or why it can have none."""
    if math.prod(size or 1 for size in shape) > MAX_BYTES // 8 or 0 in shape:
        return 0, f"shape {list(shape)} is empty or too large"
    if shape[-1] % kind.block:
        return 0, f"rows of {shape[-1]} are no whole blocks of {kind.name}"
    return math.prod(shape) // kind.block * kind.nbytes, None


def _named(
    file: str,
    entry: Mapping[str, Any],
    kind: GgmlType,
    start: int,
    arch: GgufArch,
    keys: Keys,
    problems: list[str],
) -> list[tuple[TensorInfo, Stored]]:
    """One tensor of the file under the release's names: as many as it has experts, or one."""
    inside, shape = entry["name"], tuple(entry["shape"])
    known = arch.name(inside)
    stacked = known is not None and _EXPERT in known
    name = known or inside  # what has no name in a release is surplus to its map
    if inside.endswith("_shexp.weight") and len(shape) == 1:
        shape = (1, *shape)  # a gate of one row, which older files flatten
    count = 1
    if stacked:
        count = keys.size("expert_count")
        if len(shape) != 3 or shape[0] != count or count > MAX_TENSORS:
            problems.append(
                f"{file}: {quote(inside)}: {list(shape)} are no {count} stacked experts"
            )
            return []
        shape = shape[1:]
    size = math.prod(shape) // kind.block * kind.nbytes
    head_rows = 0
    if (setting := arch.heads_of(inside)) is not None:
        heads = keys.size(setting, keys.size("attention.head_count"))
        head_rows, rest = divmod(shape[0], heads)
        if rest or head_rows % 2:
            problems.append(f"{file}: {quote(inside)}: {shape[0]} rows are no {heads} heads")
            return []
    made = []
    for index in range(count):
        own = name.replace(_EXPERT, str(index)) if stacked else name
        at = start + index * size
        row = shape[-1] // kind.block * kind.nbytes
        code, dims = (kind.plain, shape) if kind.plain else ("U8", (*shape[:-1], row))
        made.append(
            (
                TensorInfo(own, code, dims, file, at, at + size),
                Stored(
                    kind=kind.name,
                    inside=inside,
                    shape=shape,
                    head_rows=head_rows,
                    offset=arch.offset_of(inside),
                ),
            )
        )
    return made


def _layout(spans: list[tuple[int, int, str]], first: int, align: int, head: Head) -> list[str]:
    """Where tensors overlap or leave more between them than the alignment asks for."""
    problems = []
    end, before = first, "the head"
    for start, stop, name in sorted(spans):
        if start < end:
            problems.append(f"{head.file}: {quote(name)}: overlaps {quote(before)}")
        elif start - end >= align:
            hole = start - end
            problems.append(f"{head.file}: {quote(name)}: {hole} bytes of no tensor before it")
        if stop >= end:
            end, before = stop, name
    if spans and len(spans) == len(head.tensors) and head.size - end >= align:
        problems.append(f"{head.file}: {head.size - end} bytes after {quote(before)}")
    return problems


def _grown(at_hand: Callable[[int], tuple[Path, int]], size: int, name: str) -> Head:
    """Read as much of a file as its head turns out to need."""
    count = min(size, _FIRST_READ)
    while True:
        path, count = at_hand(count)
        answer = _ask(path, count, size, name)
        if "problem" in answer:
            raise PlanError([f"{name}: {quote(str(answer['problem']))}"])
        if not answer.get("short"):
            break
        if count >= min(size, MAX_HEAD_BYTES):
            raise PlanError([f"{name}: its head goes beyond {MAX_HEAD_BYTES} bytes"])
        count = min(size, MAX_HEAD_BYTES, 4 * count)
    end = int(answer["end"])
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(end)).hexdigest()
    return Head(
        file=name,
        size=size,
        digest=digest,
        end=end,
        metadata=answer["metadata"],
        tensors=answer["tensors"],
    )


def _ask(path: Path, count: int, size: int, name: str) -> dict[str, Any]:
    """What the child says of the first ``count`` bytes of a file of ``size``."""
    request = {"path": str(path.resolve()), "bytes": count, "size": size}
    try:
        found: dict[str, Any] = ask(
            gguf_child.__file__,
            request,
            memory=_MEMORY,
            seconds=TIMEOUT_SECONDS,
            packages=False,
            longest=_LONGEST_ANSWER,
        )
    except ChildError as error:
        raise PlanError([f"{name}: {unread(error, TIMEOUT_SECONDS)}"]) from None
    return found
