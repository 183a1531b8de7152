"""The tokenizer that a GGUF file holds, for releases that have none beside it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from converter.errors import ConvertError, PlanError
from converter.sidecars import TOKENIZER_FILES
from converter.source import Source

_MODELS: Final = ("gpt2", "llama")
"""Kinds of vocabulary (``tokenizer.ggml.model``) that transformers builds a tokenizer from."""


def with_tokenizer(source: Source, sidecars: Collection[str]) -> Source:
    """A GGUF source that says where its tokenizer comes from; PlanError where it has none."""
    if any(name in TOKENIZER_FILES for name in sidecars):
        return source
    kind = source.config["quantization_config"]["tokenizer"]
    if kind not in _MODELS:
        raise PlanError(
            [
                f"{source.weight_files[0]}: holds no tokenizer that can be read "
                f"(tokenizer.ggml.model is {kind!r}); put the release's tokenizer.json and "
                "tokenizer_config.json beside it"
            ]
        )
    note = f"the tokenizer is made of the GGUF file's vocabulary by transformers {_version()}"
    return replace(source, notes=(*source.notes, note))


def write_tokenizer(file: Path, out: Path) -> tuple[str, ...]:
    """Write the tokenizer of a GGUF file into ``out``; the names of its files there."""
    transformers: Any = import_module("transformers")
    reading: Any = import_module("transformers.integrations.gguf")
    try:
        architecture, vocabulary, settings = reading.get_gguf_tokenizer(str(file))
        backend, more = reading.convert_gguf_tokenizer(architecture, vocabulary)
        made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **settings, **more)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ConvertError(
            f"{file.name}: its tokenizer cannot be built ({error}); put the release's "
            "tokenizer.json and tokenizer_config.json beside it"
        ) from error
    return tuple(Path(path).name for path in made.save_pretrained(out) if Path(path).exists())


def _version() -> str:
    return version("transformers")
