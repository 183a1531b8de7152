"""What a streamed run reads: the tensors of a torch checkpoint, wherever their values come from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from arch_maps.ops import RowReader

_FLOATS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
COPIES = 1.25
"""Memory of a whole-model run, in units of its float32 weights: one side at a time, with room."""


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """A torch checkpoint whose values are read by rows."""

    folder: Path
    """Holds config.json, the tokenizer and the processor, and nothing else that is needed."""
    reader: RowReader
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    """safetensors dtype code by tensor name."""

    def all_in(self, code: str) -> bool:
        """Whether every float is stored as ``code``, so that rounding to it does nothing."""
        return all(dtype == code for dtype in self.dtypes.values() if dtype in _FLOATS)


@dataclass(frozen=True, kw_only=True)
class Streaming:
    """Both torch checkpoints of a streamed run, and why it is one."""

    source: Tensors
    """The release."""
    exact: Tensors | None
    """The weights that the output really holds, where they are not those of the release."""
    needed: int
    """Bytes that the whole-model run would need."""
    limit: int
    """Bytes that it may use."""


def whole_run_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of memory that a run needs which holds all weights in float32 at once."""
    return int(COPIES * 4 * sum(math.prod(shape) for shape in shapes.values()))
