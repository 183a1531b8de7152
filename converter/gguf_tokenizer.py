"""The tokenizer that a GGUF file holds, for releases that have none beside it."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Final

from converter import gguf_tokenizer_child
from converter.errors import PlanError
from converter.sidecars import TOKENIZER_FILES
from converter.source import Source
from converter.source.header import quote
from converter.source.pickles import BASE_MEMORY, unread
from validate.child import ChildError, ask

TIMEOUT_SECONDS: Final = 120
MAX_FILE_BYTES: Final = 256 << 20
_MODELS: Final = ("gpt2", "llama")
"""Kinds of vocabulary (``tokenizer.ggml.model``) that transformers builds a tokenizer from."""
_INSTEAD: Final = "put the release's tokenizer.json and tokenizer_config.json beside it"


def with_tokenizer(source: Source, sidecars: Collection[str]) -> Source:
    """A GGUF source that says where its tokenizer comes from; PlanError where it has none."""
    if any(name in TOKENIZER_FILES for name in sidecars):
        return source
    kind = source.config["quantization_config"]["tokenizer"]
    if kind not in _MODELS:
        raise PlanError(
            [
                f"{source.weight_files[0]}: holds no tokenizer that can be read "
                f"(tokenizer.ggml.model is {kind!r}); {_INSTEAD}"
            ]
        )
    note = f"the tokenizer is made of the GGUF file's vocabulary by transformers {_version()}"
    return replace(source, notes=(*source.notes, note))


def tokenizer_files(file: Path) -> Mapping[str, bytes]:
    """The tokenizer of a GGUF file as files by name; PlanError where it cannot be built.

    It takes some seconds, the next time none.
    """
    stat = file.stat()
    return _built(file, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1)
def _built(file: Path, size: int, modified: int) -> Mapping[str, bytes]:
    del modified  # it and the size tell this file from one that was in its place
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as folder:
        request = {"path": str(file.resolve()), "out": folder}
        try:
            found = ask(
                gguf_tokenizer_child.__file__,
                request,
                memory=BASE_MEMORY + size,  # the whole file is mapped to read its head
                seconds=TIMEOUT_SECONDS,
                patience=TIMEOUT_SECONDS,
                file_bytes=MAX_FILE_BYTES,
            )
        except ChildError as error:
            found = {"problem": unread(error, TIMEOUT_SECONDS)}
        if "problem" in found:
            problem = quote(str(found["problem"]))
            raise PlanError([f"{file.name}: its tokenizer cannot be built ({problem}); {_INSTEAD}"])
        return {name: (Path(folder) / name).read_bytes() for name in found["files"]}


def _version() -> str:
    return version("transformers")
