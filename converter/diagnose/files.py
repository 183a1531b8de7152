"""Files that a checkpoint needs beside its weights, and whether they agree with each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from converter.errors import PlanError
from converter.source.folder import read_json
from converter.source.header import read_header
from converter.source.index import SAFETENSORS_INDEX

_TOKENIZERS: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "tiktoken.model",
)
_PROCESSORS: Final = ("preprocessor_config.json", "processor_config.json")
_TEMPLATES: Final = ("chat_template.jinja", "chat_template.json")
_HOLDERS: Final = ("tokenizer_config.json", "processor_config.json")
"""Files with a ``chat_template`` key."""
_SHOWN: Final = 4


def index_problems(out: Path) -> list[str]:
    """Where the index, the shards and the tensors in them disagree."""
    files = sorted(path.name for path in out.glob("*.safetensors"))
    if not (out / SAFETENSORS_INDEX).is_file():
        return [] if len(files) < 2 else [f"{len(files)} weight files and no {SAFETENSORS_INDEX}"]
    index = read_json(out, SAFETENSORS_INDEX)
    listed: dict[str, str] = index.get("weight_map") or {}
    held: dict[str, str] = {}
    problems: list[str] = []
    total = 0
    for file in files:
        try:
            header = read_header(out / file)
        except PlanError as error:
            problems += error.problems
            continue
        total += sum(info.nbytes for info in header.tensors.values())
        held.update(dict.fromkeys(header.tensors, file))
    absent = sorted(set(listed.values()) - set(files))
    if absent:
        problems.append(f"the index names {_some(absent)}, which the folder does not hold")
    stale = sorted(name for name in listed if name not in held and listed[name] not in absent)
    if stale:
        problems.append(f"the index is stale: it lists {_some(stale)}, in none of the files")
    stray = sorted(set(held.values()) - set(listed.values()))
    if stray:
        problems.append(
            f"{_some(stray)} is not in the index, and mlx-lm loads every model*.safetensors: its "
            "tensors take the place of those listed"
        )
    unlisted = sorted(n for n, file in held.items() if n not in listed and file not in stray)
    if unlisted:
        problems.append(f"the index is stale: it lacks {_some(unlisted)}")
    moved = sorted(n for n, file in listed.items() if n in held and held[n] != file)
    if moved and not stray:
        problems.append(f"the index is stale: {_some(moved)} is in {held[moved[0]]}, not there")
    size = (index.get("metadata") or {}).get("total_size")
    if not problems and isinstance(size, int) and size != total:
        problems.append(f"the index is stale: total_size says {size} bytes, and it is {total}")
    return problems


def sidecar_problems(out: Path, source: Path) -> list[str]:
    """What of the release's tokenizer, template, stop tokens and processor is lost."""
    problems = []
    if _any(source, _TOKENIZERS) and not _any(out, _TOKENIZERS):
        problems.append(f"the tokenizer is missing: none of {', '.join(_TOKENIZERS)}")
    for name in ("tokenizer_config.json", "generation_config.json"):
        if (source / name).is_file() and not (out / name).is_file():
            problems.append(f"{name} is missing: {_LOSES[name]}")
    problems += _lost_tokens(_read(out / "tokenizer.json"), _read(source / "tokenizer.json"))
    if _template(source) and not _template(out):
        problems.append("the chat template is missing: prompts are sent without turns or roles")
    if _any(source, _PROCESSORS) and not _any(out, _PROCESSORS):
        problems.append(
            f"the processor's settings are missing: none of {', '.join(_PROCESSORS)}, so pictures "
            "and sounds are prepared by defaults of the runtime"
        )
    return problems


_LOSES: Final = {
    "tokenizer_config.json": "the tokenizer's class and special tokens are lost",
    "generation_config.json": "the tokens at which to stop are lost where config.json has fewer",
}


def _lost_tokens(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Tokens of the release that the checkpoint's tokenizer has not, or under other ids."""
    if not mine or not theirs:
        return []
    have, want = _vocabulary(mine), _vocabulary(theirs)
    lost = [token for token in want if token not in have]
    moved = [token for token, number in want.items() if have.get(token, number) != number]
    problems = []
    if lost:
        problems.append(f"tokenizer.json lacks {len(lost)} tokens of the release: {_some(lost)}")
    if moved:
        problems.append(
            f"tokenizer.json gives {len(moved)} tokens other ids than the release: {_some(moved)}"
        )
    return problems


def _vocabulary(tokenizer: dict[str, Any]) -> dict[str, int]:
    vocab = (tokenizer.get("model") or {}).get("vocab") or {}
    pairs = vocab.items() if isinstance(vocab, dict) else ((v[0], i) for i, v in enumerate(vocab))
    added = ((str(token["content"]), token["id"]) for token in tokenizer.get("added_tokens") or ())
    return {**dict(pairs), **dict(added)}


def _template(folder: Path) -> bool:
    return _any(folder, _TEMPLATES) or any(_read(folder / n).get("chat_template") for n in _HOLDERS)


def _any(folder: Path, names: tuple[str, ...]) -> bool:
    return any((folder / name).is_file() for name in names)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))
    return data if isinstance(data, dict) else {}


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
