"""PyTorch pickle checkpoints: tensors located by a child process, read straight from the file."""

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from converter.errors import PlanError
from converter.source import pickle_child
from converter.source.header import Header, TensorInfo, quote, read_header, shape_problem
from converter.source.index import WeightIndex
from converter.source.model import Source, SourceFile, build_source
from validate.child import ChildError, ask

BASE_MEMORY: Final = 8 << 30
TIMEOUT_SECONDS: Final = 900


def open_pickles(
    *,
    where: str,
    root: Path,
    config: dict[str, Any],
    files: Mapping[str, Path],
    index: WeightIndex | None,
    notes: Iterable[str] = (),
    problems: Iterable[str] = (),
    broken: Iterable[str] = (),
    scratch: Path | None = None,
    timeout: float = TIMEOUT_SECONDS,
) -> Source:
    """The source whose weights are the checkpoints ``files``; raises PlanError.

    Nothing in a checkpoint is run: a child process loads it with ``weights_only``. Tensors that
    lie in the file in order are read from it in place, the others from a private copy in
    ``scratch`` that lasts as long as the source.
    """
    problems, broken, notes = list(problems), set(broken), list(notes)
    readable: dict[str, Path] = {}
    for name, path in files.items():
        if problem := _foreign(path):
            problems.append(f"{name}: {problem}")
            broken.add(name)
        else:
            readable[name] = path
    with ExitStack() as cleanup:
        folder = _Scratch(scratch)
        cleanup.callback(folder.remove)
        answers = _ask(readable, folder.path, timeout) if readable else {}
        headers: dict[str, Header] = {}
        copies: dict[str, SourceFile] = {}
        for name, path in readable.items():
            try:
                headers[name] = _header(name, path, answers.get(name), copies)
            except PlanError as error:
                problems += error.problems
                broken.add(name)
            else:
                notes += [f"{name}: {note}" for note in answers[name]["notes"]]
        source = build_source(
            where=where,
            config=config,
            headers=headers,
            index=index,
            kind="pickle",
            root=root,
            paths=files,
            notes=notes,
            problems=problems,
            broken=broken,
        )
        if not copies:
            return source
        cleanup.pop_all()
    return replace(source, files={**source.files, **copies}, scratch=folder)


class _Scratch:
    """A private folder that goes when the last source or reader that refers to it does."""

    def __init__(self, parent: Path | None) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="unpacked-", dir=parent))
        self.remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _foreign(path: Path) -> str | None:
    """What a file is when it is no PyTorch checkpoint, from its first bytes."""
    try:
        with path.open("rb") as file:
            prefix = file.read(64)
            size = file.seek(0, os.SEEK_END)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if prefix.startswith((b"PK\x03\x04", b"\x80")):
        return None
    if prefix[8:9] == b"{" and int.from_bytes(prefix[:8], "little") < size:
        return "a safetensors file under a pickle's name; rename it to .safetensors"
    if prefix.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file itself; run `git lfs pull` in the folder"
    return "not a PyTorch checkpoint"


def _ask(files: Mapping[str, Path], scratch: Path, timeout: float) -> dict[str, Any]:
    """What the child says about each file; its word is checked by ``_header``."""
    largest = max(path.stat().st_size for path in files.values())
    request = {
        "files": {name: str(path.resolve()) for name, path in files.items()},
        "scratch": str(scratch),
    }
    shown = ", ".join(files)
    try:
        found: dict[str, Any] = ask(
            pickle_child.__file__,
            request,
            memory=BASE_MEMORY + 4 * largest,
            seconds=timeout,
            folder=scratch,
        )
    except ChildError as error:
        raise PlanError([f"{shown}: {unread(error, timeout)}"]) from None
    return found


def unread(error: ChildError, seconds: float) -> str:
    """Why a child that had so many seconds did not read a file, for after its name."""
    if error.kind == "time":
        return f"not read within {seconds} seconds"
    if error.kind == "signal":
        return f"reading was stopped by signal {error}"
    return f"cannot be read: {quote(str(error))}"


def _header(
    name: str, path: Path, answer: dict[str, Any] | None, copies: dict[str, SourceFile]
) -> Header:
    """The answer about one file as a header, every place in it checked against the file."""
    if answer is None or "problem" in answer:
        raise PlanError([f"{name}: {quote((answer or {}).get('problem', 'no answer'))}"])
    size = path.stat().st_size
    tensors: dict[str, TensorInfo] = {}
    problems: list[str] = []
    for entry in answer["tensors"]:
        tensor, dtype, shape = entry["name"], entry["dtype"], entry["shape"]
        start, stop = entry["start"], entry["stop"]
        problem = shape_problem(dtype, shape, stop - start)
        if problem is None and not 0 <= start <= stop <= size:
            problem = f"bytes {start}:{stop} of a {size} byte file"
        if problem:
            problems.append(f"{name}: {quote(tensor)}: {problem}")
        else:
            tensors[tensor] = TensorInfo(tensor, dtype, tuple(shape), name, start, stop)
    if problems:
        raise PlanError(problems)
    if answer["unpacked"]:
        copy = Path(answer["unpacked"])
        unpacked = read_header(copy, f"{name} (unpacked)")
        tensors |= unpacked.tensors
        copies[unpacked.file] = SourceFile(path=copy, size=unpacked.size, digest=unpacked.digest)
    return Header(name, size, str(answer["digest"]), tensors, {})
