"""Safetensors headers, checked in full before anything trusts the file."""

import gc
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from arch_maps.dtypes import NUMPY_DTYPES, itemsize
from converter.errors import PlanError

MAX_HEADER_BYTES: Final = 100_000_000
FIRST_FETCH_BYTES: Final = 1 << 18
MAX_DIMENSIONS: Final = 32
MAX_BYTES: Final = 2**63 - 1
_ITEMSIZES: Final = {code: itemsize(code) for code in NUMPY_DTYPES}
_ZEROS_FOR_DIGITS: Final = bytes.maketrans(b"123456789", b"000000000")
_INTEGER: Final = frozenset({int})
_FIELDS: Final = frozenset({"dtype", "shape", "data_offsets"})


class TensorInfo(NamedTuple):
    """Where a tensor lies: ``start`` and ``stop`` are absolute byte offsets in ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """A valid header: the file's name and size, the sha256 of the header bytes, its tensors."""

    file: str
    size: int
    digest: str
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


class _Repeated(dict[str, object]):
    """A JSON object that held some key more than once."""

    def __init__(self, pairs: list[tuple[str, object]]) -> None:
        super().__init__(pairs)
        counts = Counter(name for name, _ in pairs)
        self.keys_repeated = sorted(name for name, count in counts.items() if count > 1)


def quote(name: str) -> str:
    """``name`` for an error message: bounded, and unable to forge lines or colours."""
    shown = name if len(name) <= 200 else f"{name[:200]}..."
    return shown if shown.isprintable() else ascii(shown)


@contextmanager
def paused_gc() -> Iterator[None]:
    """Hold the cycle collector, which otherwise takes half the time of a 100,000-tensor parse."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@paused_gc()
def parse_header(prefix: bytes, file_size: int, name: str) -> Header:
    """Check the header in ``prefix``, the first bytes of a ``file_size``-byte file ``name``.

    ``prefix`` holds at least ``header_stop(prefix, file_size, name)`` bytes. Raises PlanError
    with every problem of the file, each naming the file and the tensor.
    """
    stop = header_stop(prefix, file_size, name)
    if len(prefix) < stop:
        raise PlanError([f"{name}: short read: {len(prefix)} of {stop} header bytes"])
    digest = hashlib.sha256(memoryview(prefix)[:stop]).hexdigest()
    document = _parse_json(bytes(prefix[8:stop]), name)
    checker = _Checker(name, data_start=stop, file_size=file_size)
    metadata = checker.metadata(document.pop("__metadata__", {}))
    checker.entries(document)
    checker.layout()
    problems = _repeats(document, name) + checker.problems
    if problems:
        raise PlanError(problems)
    return Header(name, file_size, digest, checker.tensors, metadata)


def header_stop(prefix: bytes, file_size: int, name: str) -> int:
    """Offset at which the header ends, from the length in the file's first 8 bytes."""
    if file_size < 8:
        raise PlanError([f"{name}: truncated: {file_size} bytes cannot hold a safetensors header"])
    if len(prefix) < 8:
        raise PlanError([f"{name}: short read: {len(prefix)} of the first 8 bytes"])
    length = int.from_bytes(prefix[:8], "little")
    if length > MAX_HEADER_BYTES:
        # Every format below starts with bytes that read as a far longer header than is allowed.
        if foreign := describe_foreign(prefix):
            raise PlanError([f"{name}: {foreign}"])
        raise PlanError(
            [f"{name}: header of {length} bytes is over the {MAX_HEADER_BYTES} byte limit"]
        )
    if 8 + length > file_size:
        raise PlanError(
            [f"{name}: truncated: the header ends at byte {8 + length} of a {file_size} byte file"]
        )
    return 8 + length


def describe_foreign(prefix: bytes) -> str | None:
    """What a file that is not safetensors is instead, from its first bytes; None if unknown."""
    if prefix.startswith((b"PK\x03\x04", b"\x80")):
        return "a PyTorch pickle under a safetensors name; rename it to .bin to convert it"
    if prefix.startswith(b"GGUF"):
        return "a GGUF file under a safetensors name; rename it to .gguf to convert it"
    if prefix.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file itself; run `git lfs pull` in the folder"
    return None


def read_header(path: Path, name: str | None = None) -> Header:
    """The checked header of the file at ``path``; ``name`` is what tensors and errors call it."""
    label = name or path.name
    prefix, size = _prefix(path, label)
    return parse_header(prefix, size, label)


def header_digest(path: Path, name: str) -> str:
    """``Header.digest`` of the file at ``path``, whatever its header says."""
    return hashlib.sha256(_prefix(path, name)[0]).hexdigest()


def _prefix(path: Path, label: str) -> tuple[bytes, int]:
    try:
        with path.open("rb", buffering=0) as file:
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            # One read returns at most 2 GiB on Linux; the header limit is far below that.
            return prefix + file.read(header_stop(prefix, size, label) - 8), size
    except OSError as error:
        raise PlanError([f"{label}: cannot be read: {error.strerror}"]) from error


def fetch_header(fetch: Callable[[int, int], bytes], file_size: int, name: str) -> Header:
    """The checked header of a remote file; ``fetch(start, stop)`` returns that byte range."""
    prefix = fetch(0, min(FIRST_FETCH_BYTES, file_size))
    stop = header_stop(prefix, file_size, name)
    if stop > len(prefix):
        prefix += fetch(len(prefix), stop)
    return parse_header(prefix, file_size, name)


@lru_cache(maxsize=4096)  # layers repeat each other
def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of such a tensor; -1 where there is none."""
    if len(shape) > MAX_DIMENSIONS:
        return -1
    size = _ITEMSIZES.get(dtype, 0) * math.prod(shape)
    return size if shape_problem(dtype, shape, size) is None else -1


def shape_problem(dtype: object, shape: object, nbytes: int) -> str | None:
    """Why ``dtype`` and ``shape`` cannot describe ``nbytes`` bytes, or None when they do."""
    size = _ITEMSIZES.get(dtype) if isinstance(dtype, str) else None
    if size is None:
        return f"unknown dtype {_show(dtype)}"
    if type(shape) is not list and type(shape) is not tuple:
        return f"shape {_show(shape)} is not a list of integers"
    # Zeros are left out of the bound so that 0 x 2**63 x 2**63 cannot overflow whoever
    # multiplies in order.
    expected = bound = size
    for length in shape:
        if type(length) is not int:
            return f"shape {_show(shape)} is not a list of integers"
        if length < 0:
            return f"negative size in shape {_show(shape)}"
        expected *= length
        bound *= length or 1
    if len(shape) > MAX_DIMENSIONS:
        return f"{len(shape)} dimensions, more than {MAX_DIMENSIONS}"
    if bound > MAX_BYTES:
        return f"shape {_show(shape)} is too large"
    if expected != nbytes:
        return f"shape {_show(shape)} of {dtype} needs {expected} bytes, the file gives {nbytes}"
    return None


class _Checker:
    """Collects the tensors and the problems of one header."""

    def __init__(self, file: str, *, data_start: int, file_size: int) -> None:
        self.file = file
        self.data_start = data_start
        self.data_size = file_size - data_start
        self.tensors: dict[str, TensorInfo] = {}
        self.problems: list[str] = []
        self._spans: list[tuple[int, int, str]] = []
        self._spans_known = True

    def metadata(self, entry: object) -> dict[str, str]:
        """The ``__metadata__`` object, which maps strings to strings."""
        if not isinstance(entry, dict):
            self.problems.append(f"{self.file}: __metadata__ is not an object")
            return {}
        if isinstance(entry, _Repeated):
            keys = ", ".join(map(quote, entry.keys_repeated))
            self.problems.append(f"{self.file}: __metadata__ repeats {keys}")
        bad = [key for key, value in entry.items() if not isinstance(value, str)]
        if bad:
            keys = ", ".join(map(quote, bad))
            self.problems.append(f"{self.file}: __metadata__ values that are not strings: {keys}")
        return {key: value for key, value in entry.items() if isinstance(value, str)}

    def entries(self, document: dict[str, Any]) -> None:
        """Check every entry by itself; nothing is wrong with most, which is soon found."""
        spans, tensors, file = self._spans, self.tensors, self.file
        data_start, data_size = self.data_start, self.data_size
        for name, entry in document.items():
            try:
                dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
                start, stop = offsets
                sound = (
                    type(entry) is dict
                    and len(entry) == len(_FIELDS)
                    and type(shape) is type(offsets) is list
                    and _INTEGER.issuperset(map(type, shape))  # and not, say, True
                    and type(start) is type(stop) is int
                    and 0 <= start <= stop <= data_size
                    and _nbytes(dtype, dims := tuple(shape)) == stop - start
                )
            except (TypeError, ValueError, KeyError):
                sound = False
            if sound:
                spans.append((start, stop, name))
                tensors[name] = TensorInfo(
                    name, dtype, dims, file, data_start + start, data_start + stop
                )
            else:
                self.tensor(name, entry)

    def tensor(self, name: str, entry: object) -> None:
        """Check one entry by itself; its place among the others is checked by ``layout``."""
        problem = self._entry_problem(entry)
        if problem is None:
            assert isinstance(entry, dict)
            start, stop = entry["data_offsets"]
            self._spans.append((start, stop, name))
            problem = shape_problem(entry["dtype"], entry["shape"], stop - start)
            if problem is None:
                self.tensors[name] = TensorInfo(
                    name,
                    entry["dtype"],
                    tuple(entry["shape"]),
                    self.file,
                    self.data_start + start,
                    self.data_start + stop,
                )
        else:
            self._spans_known = False
        if problem is not None:
            self.problems.append(f"{self.file}: {quote(name)}: {problem}")

    def _entry_problem(self, entry: object) -> str | None:
        if type(entry) is not dict:
            if isinstance(entry, _Repeated):
                return f"its entry repeats {', '.join(map(quote, entry.keys_repeated))}"
            return "its entry is not an object"
        if entry.keys() != _FIELDS:
            missing = ", ".join(sorted(_FIELDS - entry.keys()))
            surplus = ", ".join(map(quote, sorted(entry.keys() - _FIELDS)))
            words = [f"lacks {missing}"] if missing else []
            words += [f"has unknown fields {surplus}"] if surplus else []
            return f"its entry {' and '.join(words)}"
        offsets = entry["data_offsets"]
        if type(offsets) is not list or len(offsets) != 2:
            return f"data_offsets {_show(offsets)} are not two integers"
        start, stop = offsets
        if type(start) is not int or type(stop) is not int:
            return f"data_offsets {_show(offsets)} are not two integers"
        if start < 0 or start > stop:
            return f"data_offsets {_show(offsets)} do not run forward from 0"
        if stop > self.data_size:
            return f"truncated: its data ends at byte {_show(stop)} of {self.data_size}"
        return None

    def layout(self) -> None:
        """Check that the tensors cover the data without overlap, hole or trailing bytes."""
        if not self._spans_known:
            return  # The rest would only echo the entries already reported.
        end, before = 0, "the header"
        for start, stop, name in sorted(self._spans):
            if start < end:
                self.problems.append(
                    f"{self.file}: {quote(name)}: overlaps {quote(before)} "
                    f"(starts at {start}, {end - start} bytes before its end)"
                )
            elif start > end:
                self.problems.append(
                    f"{self.file}: {quote(name)}: hole of {start - end} bytes after {quote(before)}"
                )
            if stop >= end:
                end, before = stop, name
        if end < self.data_size:
            self.problems.append(
                f"{self.file}: {self.data_size - end} trailing bytes after {quote(before)}"
            )


def _parse_json(text: bytes, file: str) -> dict[str, object]:
    """The header's JSON object, read no more leniently than the format's own reader does."""
    if not text.startswith(b"{"):
        raise PlanError([f"{file}: not a safetensors file: its header does not start with '{{'"])
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PlanError([f"{file}: header is not UTF-8 at byte {8 + error.start}"]) from error
    read = partial(
        json.loads,
        decoded,
        parse_int=_integer if _odd_numbers(text) else None,
        parse_constant=_reject_constant,
    )
    try:
        document = read()
        if decoded.count(":") != _members(document):  # in a name, or some key is there twice
            document = read(object_pairs_hook=_pairs)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise PlanError([f"{file}: header is not JSON: {reason}"]) from error
    assert isinstance(document, dict)
    if "\\u" in decoded and (bad := _surrogates(document)):
        raise PlanError(f"{file}: {quote(key)}: lone surrogate in the header" for key in bad)
    return document


def _members(document: dict[str, object]) -> int:
    """Keys of an object and of those in it: each has had a colon in the text, repeats as well."""
    return len(document) + sum(len(entry) for entry in document.values() if type(entry) is dict)


def _pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique = dict(pairs)
    return unique if len(unique) == len(pairs) else _Repeated(pairs)


def _odd_numbers(text: bytes) -> bool:
    """Whether some number may need the slower reading; in a name, these do no harm."""
    return b"-" in text or b"0" * 19 in text.translate(_ZEROS_FOR_DIGITS)


def _integer(text: str) -> int:
    """An integer as strict JSON readers take it: -0 is no size, and no number is unbounded."""
    if text[0] == "-":
        return -1
    return int(text) if len(text) < 20 else MAX_BYTES + 1


def _reject_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _surrogates(document: dict[str, object]) -> list[str]:
    """Top-level keys under which some string cannot be encoded as UTF-8."""
    bad = []
    for key, value in document.items():
        try:
            json.dumps([key, value], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            bad.append(key)
    return bad


def _repeats(document: dict[str, object], file: str) -> list[str]:
    if not isinstance(document, _Repeated):
        return []
    return [f"{file}: {quote(key)}: appears more than once" for key in document.keys_repeated]


def _show(value: object) -> str:
    """A value of any kind for an error message, at most 80 characters."""
    text = ascii(list(value)) if isinstance(value, tuple) else ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
