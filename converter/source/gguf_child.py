"""Runs in a child process of its own: what does the head of a GGUF file say?

Only the standard library is imported here, because ``validate.child`` runs this file by its path,
isolated from the caller's environment. Counts and lengths are never trusted: each is held against
the bytes that are left before anything is read by it.

Layout (docs/gguf.md of ggml): magic, version, number of tensors, number of entries; entries of key,
type and value; tensors of name, sizes (fastest first), type and offset; data from the next
multiple of the alignment on. Numbers are little-endian.
"""

import struct
from pathlib import Path
from typing import Any

SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<B",
    10: "<Q",
    11: "<q",
    12: "<d",
}
BOOL, STRING, ARRAY = 7, 8, 9
MAX_TENSORS = 1 << 17
MAX_ENTRIES = 1 << 16
MAX_NAME = 1024
"""Bytes of a key or a tensor's name; ggml itself reads names of 64."""
LONGEST_ARRAY = 4096
"""Numbers of an array that is answered as it is; of longer ones and of texts the count is."""
LONGEST_TEXT = 4096
"""Characters of a text that is answered as it is; of longer ones (templates) the count is."""
ANSWERED = 1 << 20
"""Numbers and characters that are answered together; of what comes then the count is."""


class Refused(Exception):
    """A file that is not read; the message says why."""


class Short(Exception):
    """The head goes on behind the bytes that are here."""


class Cursor:
    """A place in the head of a file of ``size`` bytes, of which ``data`` are here."""

    def __init__(self, data: bytes, size: int) -> None:
        """Start at the first byte."""
        self.data = data
        self.size = size
        self.at = 0
        self.left = ANSWERED

    def need(self, count: int, what: str) -> None:
        """Require ``count`` more bytes in the file, then here."""
        if self.at + count > self.size:
            raise Refused(
                f"truncated: {what} at byte {self.at} needs {count} bytes of {self.size - self.at}"
            )
        if self.at + count > len(self.data):
            raise Short

    def number(self, format: str, what: str) -> Any:
        """A number."""
        width = struct.calcsize(format)
        self.need(width, what)
        [value] = struct.unpack_from(format, self.data, self.at)
        self.at += width
        return value

    def text(self, what: str, longest: int = 1 << 31) -> str:
        """A string, its length before it."""
        length = self.number("<Q", f"the length of {what}")
        if length > longest:
            raise Refused(f"{what} at byte {self.at} has {length} bytes")
        self.need(length, what)
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Refused(f"{what} at byte {self.at - length} is not UTF-8: {error}") from error

    def answers(self, count: int, longest: int) -> bool:
        """Whether so many numbers or characters are answered as they are, which is then noted."""
        if count > min(longest, self.left):
            return False
        self.left -= count
        return True

    def value(self, kind: int, key: str) -> Any:
        """The value of an entry; long texts and arrays come as a count: the answer is bounded."""
        if kind in SCALARS:
            found = self.number(SCALARS[kind], key)
            if kind == BOOL and found > 1:
                raise Refused(f"{key} is neither true nor false")
            return bool(found) if kind == BOOL else found
        if kind == STRING:
            text = self.text(key)
            return text if self.answers(len(text), LONGEST_TEXT) else {"count": len(text)}
        if kind != ARRAY:
            raise Refused(f"{key} has the unknown type {kind}")
        inner = self.number("<I", f"the type of {key}")
        count = self.number("<Q", f"the length of {key}")
        if inner not in SCALARS and inner != STRING:
            raise Refused(f"{key} is an array of the unknown type {inner}")
        least = struct.calcsize(SCALARS[inner]) if inner in SCALARS else 8
        if count > self.size // least:
            raise Refused(f"{key} claims {count} values in a file of {self.size} bytes")
        if inner == STRING:
            for _ in range(count):
                self.text(key)
            return {"count": count}
        self.need(count * least, key)
        start, self.at = self.at, self.at + count * least
        if not self.answers(count, LONGEST_ARRAY):
            return {"count": count}
        found = struct.unpack_from(f"<{count}{SCALARS[inner][1]}", self.data, start)
        return [bool(one) for one in found] if inner == BOOL else list(found)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What the first bytes of a file say, or why they are not read."""
    try:
        with Path(request["path"]).open("rb") as file:
            data = file.read(request["bytes"])
        return inspect(Cursor(data, request["size"]))
    except Refused as error:
        return {"problem": str(error)}
    except Short:
        return {"short": True}
    except MemoryError:
        return {"problem": "needs more memory than it may use to be read"}


def inspect(cursor: Cursor) -> dict[str, Any]:
    """Entries and tensors, and the byte at which the head ends."""
    cursor.need(24, "the head")
    magic, version = cursor.number("4s", "magic"), cursor.number("<I", "version")
    if magic != b"GGUF":
        raise Refused("does not begin with GGUF")
    if version in (2 << 24, 3 << 24):
        raise Refused("was written for big-endian machines")
    if version not in (2, 3):
        raise Refused(f"is version {version} of the format; versions 2 and 3 are read")
    tensors, entries = cursor.number("<Q", "tensors"), cursor.number("<Q", "entries")
    # A tensor takes 28 bytes at least, an entry 13.
    for what, count, least, most in (
        ("tensors", tensors, 28, MAX_TENSORS),
        ("entries", entries, 13, MAX_ENTRIES),
    ):
        if count > cursor.size // least:
            raise Refused(f"truncated: claims {count} {what} in {cursor.size} bytes")
        if count > most:
            raise Refused(f"has {count} {what}; no more than {most} are read")
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        key = cursor.text("a key", MAX_NAME)
        if key in metadata:
            raise Refused(f"the key {key!a} appears more than once")
        kind = cursor.number("<I", f"the type of {key!a}")
        metadata[key] = cursor.value(kind, key)
    placed = []
    seen: set[str] = set()
    for _ in range(tensors):
        name = cursor.text("the name of a tensor", MAX_NAME)
        if name in seen:
            raise Refused(f"the tensor {name!a} appears more than once")
        seen.add(name)
        count = cursor.number("<I", name)
        if not 0 < count <= 4:
            raise Refused(f"the tensor {name!a} has {count} dimensions")
        shape = [cursor.number("<Q", name) for _ in range(count)]
        kind, offset = cursor.number("<I", name), cursor.number("<Q", name)
        placed.append({"name": name, "shape": shape[::-1], "type": kind, "offset": offset})
    return {"metadata": metadata, "tensors": placed, "end": cursor.at}
