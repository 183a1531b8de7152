"""Runs in a child process of its own: what tensors do PyTorch checkpoints hold, and where?

Only the standard library and torch are imported here, because ``validate.child`` runs this file by
its path, isolated from the caller's environment. Checkpoints are loaded with ``weights_only`` and
nothing else.
"""

import hashlib
import json
import os
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
MAX_UNWRAP = 4
UNPACK_SLACK = 64 << 20


class Refused(Exception):
    """A checkpoint that is not read; the message says why."""


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What is in each file, or why it is not read."""
    scratch = Path(request["scratch"])
    found: dict[str, Any] = {}
    for number, (name, path) in enumerate(request["files"].items()):
        try:
            found[name] = inspect(Path(path), scratch / f"{number}.safetensors")
        except Refused as error:
            found[name] = {"problem": str(error)}
        except MemoryError:
            found[name] = {"problem": "needs more memory than it may use to be read"}
        except Exception as error:  # whatever a hostile file provokes is that file's problem
            found[name] = {"problem": explain(error)}
    return found


def explain(error: Exception) -> str:
    """One line on why torch would not load a file."""
    text = str(error)
    if found := re.search(r"GLOBAL (\S+)", text):
        return f"asks to run {found[1]}, which is not part of a plain checkpoint"
    # torch advises to load without weights_only; that advice is not passed on.
    lines = [line.strip() for line in text.splitlines() if "weights_only" not in line]
    reason = next((line for line in lines if line), type(error).__name__)
    return f"torch cannot load it safely: {reason[:300]}"


def inspect(path: Path, scratch: Path) -> dict[str, Any]:
    """The tensors of one checkpoint, with absolute byte offsets or a place in ``scratch``."""
    import torch

    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # as torch.load decides it
    entries, compressed = stored_entries(path) if zipped else ({}, False)
    # Nothing is read for "meta", and each storage then knows its offset in the file.
    loaded = torch.load(path, map_location="meta" if zipped else "cpu", weights_only=True)
    tensors, notes = flatten(loaded)
    placed: list[dict[str, Any]] = []
    unpack: list[str] = []
    for name, tensor in tensors.items():
        dtype = check(name, tensor)
        entry: dict[str, Any] = {"name": name, "dtype": dtype, "shape": list(tensor.shape)}
        start = locate(tensor, entries) if zipped else None
        if start is None:
            unpack.append(name)
        else:
            entry |= {"start": start, "stop": start + tensor.nbytes}
            placed.append(entry)
    if unpack:
        allowed = 4 * path.stat().st_size + UNPACK_SLACK
        needed = sum(tensors[name].nbytes for name in unpack)
        if needed > allowed:
            raise Refused(f"unpacks to {needed} bytes, out of proportion to the file")
        if zipped:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=not compressed)
            tensors, _ = flatten(loaded)
        write(scratch, {name: tensors[name] for name in unpack})
        why = "not stored as plain rows" if zipped else "the file is in the format before zip"
        notes.append(f"{len(unpack)} tensors are read from an unpacked copy: {why}")
    digest = hashlib.sha256(json.dumps([placed, unpack]).encode())
    if not zipped:
        digest.update(str(path.stat().st_size).encode())
    return {
        "tensors": placed,
        "unpacked": str(scratch) if unpack else None,
        "notes": notes,
        "digest": digest.hexdigest(),
    }


def stored_entries(path: Path) -> tuple[dict[int, int], bool]:
    """Data offset -> size of the archive's plain entries, and whether there are any others."""
    entries: dict[int, int] = {}
    compressed = False
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for info in archive.infolist():
            if info.filename.endswith("/byteorder") and archive.read(info) != b"little":
                raise Refused(
                    "was saved on a big-endian machine; load and save it again with torch"
                )
            file.seek(info.header_offset)
            local = file.read(30)
            if len(local) < 30 or local[:4] != b"PK\x03\x04":
                raise Refused(f"damaged archive: no entry at {info.header_offset}")
            if info.compress_type == zipfile.ZIP_STORED and info.flag_bits & 1 == 0:
                name_size, extra_size = struct.unpack("<HH", local[26:30])
                entries[info.header_offset + 30 + name_size + extra_size] = info.file_size
            else:
                compressed = True
    return entries, compressed


def locate(tensor: "torch.Tensor", entries: dict[int, int]) -> int | None:
    """Absolute offset of a tensor whose bytes lie in the file in order, else None."""
    if tensor.numel() == 0:
        return 0
    if not tensor.is_contiguous():
        return None
    storage = tensor.untyped_storage()
    offset = getattr(storage, "_checkpoint_offset", None)
    first = tensor.storage_offset() * tensor.element_size()
    if offset not in entries or first + tensor.nbytes > entries[offset]:
        return None
    return int(offset) + int(first)


def check(name: str, tensor: "torch.Tensor") -> str:
    """The safetensors dtype of a plain tensor; raises Refused for any other kind."""
    import torch

    dtype = DTYPES.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None or tensor.layout is not torch.strided or tensor.is_quantized:
        raise Refused(f"{name!a}: a {tensor.layout} tensor of {tensor.dtype} is not supported")
    if tensor.is_neg() or tensor.is_conj():
        raise Refused(f"{name!a}: a lazily negated or conjugated tensor is not supported")
    return dtype


def flatten(loaded: object) -> tuple[dict[str, "torch.Tensor"], list[str]]:
    """The checkpoint's tensors by name, unwrapped from ``state_dict`` and the like, and notes."""
    import torch

    notes: list[str] = []
    for _ in range(MAX_UNWRAP):
        if not isinstance(loaded, Mapping):
            raise Refused(f"holds a {type(loaded).__name__}, not a dictionary of tensors")
        direct = {key: value for key, value in loaded.items() if isinstance(value, torch.Tensor)}
        nested = [key for key in loaded if key not in direct and any(walk(loaded[key]))]
        rest = [str(key) for key in loaded if key not in direct and key not in nested]
        if rest:
            shown = ", ".join(ascii(key)[1:-1][:60] for key in rest[:5])
            notes.append(f"{len(rest)} entries that hold no tensors are ignored: {shown}")
        if direct and not nested:
            if odd := [key for key in direct if not isinstance(key, str)]:
                raise Refused(f"tensor names that are not strings: {odd[0]!a}")
            return direct, notes
        if direct or len(nested) != 1:
            keys = ", ".join(ascii(key) for key in nested[:5]) or "none"
            raise Refused(
                f"cannot tell which entries are the model's; nested tensors under: {keys}"
            )
        notes.append(f"tensors are taken from the entry {nested[0]!a}")
        loaded = loaded[nested[0]]
    raise Refused("tensors are nested too deeply")


def walk(value: object) -> Iterator[bool]:
    """True for each tensor anywhere inside plain containers; cycles and depth are bounded."""
    import torch

    seen: set[int] = set()
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, torch.Tensor):
            yield True
        elif isinstance(item, Mapping | list | tuple | set) and id(item) not in seen:
            seen.add(id(item))
            pending.extend(item.values() if isinstance(item, Mapping) else item)


def write(path: Path, tensors: dict[str, "torch.Tensor"]) -> None:
    """Write tensors as safetensors, one in memory at a time."""
    import torch

    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        dtype = check(name, tensor)
        header[name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            if tensor.numel():
                plain = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
                file.write(plain.numpy().data)
