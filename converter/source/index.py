"""Shard indexes (``*.index.json``) and the choice of weight files from a release's file names."""

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final, Literal

from converter.errors import PlanError
from converter.source.gguf_files import choose_gguf
from converter.source.header import quote
from converter.source.strict_json import parse_object

Kind = Literal["safetensors", "pickle", "gguf"]

SAFETENSORS_INDEX: Final = "model.safetensors.index.json"
PICKLE_INDEX: Final = "pytorch_model.bin.index.json"
PICKLE_SUFFIXES: Final = (".bin", ".pt", ".pth")
_SUFFIXES: Final[dict[Kind, tuple[str, ...]]] = {
    "safetensors": (".safetensors",),
    "pickle": PICKLE_SUFFIXES,
}
_INDEXES: Final[dict[Kind, str]] = {"safetensors": SAFETENSORS_INDEX, "pickle": PICKLE_INDEX}
_WHOLE: Final[dict[Kind, str]] = {"safetensors": "model.safetensors", "pickle": "pytorch_model.bin"}
# Files that look like weights and are not the model's: what they are is said in a note.
_OTHER_FILES: Final[dict[str, str]] = {
    "consolidated*": "the same weights in another layout",
    "adapter_model*": "an adapter; --adapter-path merges one",
    "training_args.bin": "training state",
    "optimizer*": "training state",
    "scheduler*": "training state",
    "scaler*": "training state",
    "rng_state*": "training state",
    "openvino*": "weights of another runtime",
}


@dataclass(frozen=True, slots=True)
class WeightIndex:
    """A parsed shard index: its file name, and the shard that holds each tensor."""

    file: str
    weight_map: dict[str, str]

    @property
    def shards(self) -> tuple[str, ...]:
        """The shard files it lists, sorted."""
        return tuple(sorted(set(self.weight_map.values())))


@dataclass(frozen=True, slots=True)
class Selection:
    """Which files of a release hold the weights; ``files`` is empty when ``index`` lists them."""

    kind: Kind
    index: str | None
    files: tuple[str, ...]
    notes: tuple[str, ...]


def path_problem(name: str) -> str | None:
    """Why ``name`` is no path inside a release folder, or None when it is one."""
    if not name or "\0" in name:
        return "is not a file name"
    if name.startswith("/") or "\\" in name or re.match(r"[A-Za-z]:", name):
        return "is not a relative path"
    if any(part in ("", ".", "..") for part in name.split("/")):
        return "leaves the folder"
    return None


def parse_index(text: bytes, file: str) -> WeightIndex:
    """The index in ``text``; every shard is a relative path of a weight file in the folder."""
    document = parse_object(text, file)
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise PlanError([f"{file}: weight_map is missing, empty or not an object"])
    wrong = [name for name, shard in weight_map.items() if not isinstance(shard, str)]
    if wrong:
        raise PlanError(f"{file}: {quote(name)}: its shard is not a file name" for name in wrong)
    suffixes = PICKLE_SUFFIXES if file == PICKLE_INDEX else _SUFFIXES["safetensors"]
    problems = []
    for shard in sorted(set(weight_map.values())):
        problem = path_problem(shard)
        if problem is None and PurePosixPath(shard).suffix not in suffixes:
            problem = f"does not end in {' or '.join(suffixes)}"
        if problem:
            problems.append(f"{file}: shard {quote(shard) or ascii(shard)} {problem}")
    if problems:
        raise PlanError(problems)
    return WeightIndex(file, weight_map)


def case_collisions(names: Iterable[str]) -> list[str]:
    """Problems with names that are one file on a disk that ignores case (as on macOS)."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(name.casefold(), []).append(name)
    return [
        f"{' and '.join(map(quote, group))}: names that differ only in case; rename one"
        for group in groups.values()
        if len(group) > 1
    ]


def select_weights(names: Iterable[str], where: str, *, gguf: str | None = None) -> Selection:
    """Choose the weight files among the top-level ``names`` of the release ``where``.

    Safetensors win over pickles, and these over GGUF files unless one is named (``gguf``). Raises
    PlanError when the choice would be a guess.
    """
    names = list(names)
    if gguf is not None:
        return Selection("gguf", None, choose_gguf(names, gguf, where), ())
    top = sorted(name for name in names if "/" not in name and not name.startswith("."))
    present = set(top)
    weights = {kind: _weights(top, kind) for kind in _SUFFIXES}
    notes = [
        f"{name} is ignored: {what}"
        for kind in _SUFFIXES
        for name in top
        if name.endswith(_SUFFIXES[kind]) and (what := _other(name))
    ]
    for kind in _SUFFIXES:
        index = _INDEXES[kind] if _INDEXES[kind] in present else None
        if index is None and not weights[kind]:
            continue
        if kind == "safetensors" and weights["pickle"]:
            notes.append(f"{', '.join(weights['pickle'])} ignored: the safetensors are used")
        if index is not None:
            return Selection(kind, index, (), tuple(notes))
        chosen, ignored = _single(weights[kind], kind, where)
        notes += [f"{name} is ignored: {chosen} is the model" for name in ignored]
        return Selection(kind, None, (chosen,), tuple(notes))
    if files := choose_gguf(top, None, where):
        return Selection("gguf", None, files, tuple(notes))
    raise PlanError([_nothing(top, where)])


def unlisted_problems(index: WeightIndex, names: Iterable[str], kind: Kind) -> list[str]:
    """Problems with weight files beside the shards that ``index`` does not list."""
    shards = set(index.shards)
    stem = _WHOLE[kind].split(".")[0]
    return [
        f"{quote(name)}: not listed in {index.file}; remove the file or repair the index"
        for name in _weights(sorted(n for n in names if "/" not in n), kind)
        if name.startswith(stem) and name not in shards
    ]


def _other(name: str) -> str | None:
    return next((what for p, what in _OTHER_FILES.items() if fnmatch.fnmatchcase(name, p)), None)


def _weights(names: Iterable[str], kind: Kind) -> list[str]:
    return [name for name in names if name.endswith(_SUFFIXES[kind]) and _other(name) is None]


def _single(files: list[str], kind: Kind, where: str) -> tuple[str, list[str]]:
    """The one weight file of an unsharded release, and files beside it that are not the model."""
    if len(files) == 1:
        return files[0], []
    whole = _WHOLE[kind]
    rest = [name for name in files if name != whole]
    if len(rest) < len(files) and not any(n.startswith(whole.split(".")[0]) for n in rest):
        return whole, rest
    shown = ", ".join(files[:4]) + (f" and {len(files) - 4} more" if len(files) > 4 else "")
    raise PlanError([f"{where}: {len(files)} weight files ({shown}) but no {_INDEXES[kind]}"])


def _nothing(names: list[str], where: str) -> str:
    adapters = [n for n in names if fnmatch.fnmatchcase(n, "adapter_model.*")]
    if adapters:
        return (
            f"{where}: holds only an adapter ({adapters[0]}); convert its base model with "
            "--adapter-path pointing here"
        )
    foreign = [n for n in names if n.endswith((".onnx", ".h5", ".msgpack"))]
    other = [n for n in names if fnmatch.fnmatchcase(n, "consolidated*")]
    found = foreign or other
    hint = f"; {found[0]} is not a layout this can read" if found else ""
    looked = "*.safetensors, *.bin, *.pt, *.pth, *.gguf"
    return f"{where}: no weights found (looked for {looked}){hint}"
