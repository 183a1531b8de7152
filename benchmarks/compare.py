"""Compares the quantized tensors of two MLX checkpoints, bit for bit.

Run as a process of its own: ``python -m benchmarks.compare A B``; prints JSON.
"""

from __future__ import annotations

import json
import mmap
import sys
from pathlib import Path
from typing import Any

_PREFIX = "language_model."
"""What mlx-vlm puts before the names of a text-only model."""
Tensor = tuple[dict[str, Any], memoryview]


def compare(mine: Path, other: Path) -> dict[str, Any]:
    """Counts of the tensors of quantized modules and of those that differ, and a few of these."""
    a, b = (_quantized(folder) for folder in (mine, other))
    differing = sorted(a.keys() ^ b.keys())
    differing += sorted(name for name in a.keys() & b.keys() if not _equal(a[name], b[name]))
    return {"tensors": len(a), "differing": len(differing), "such_as": differing[:3]}


def _equal(a: Tensor, b: Tensor) -> bool:
    return a[0] == b[0] and a[1] == b[1]


def _quantized(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(bytes(data[8:start])).items():
            if name != "__metadata__":
                low, high = entry.pop("data_offsets")
                tensors[name.removeprefix(_PREFIX)] = entry, data[start + low : start + high]
    modules = {n.removesuffix(".scales") for n in tensors if n.endswith(".scales")}
    return {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] in modules}


if __name__ == "__main__":
    print(json.dumps(compare(Path(sys.argv[1]), Path(sys.argv[2]))))
