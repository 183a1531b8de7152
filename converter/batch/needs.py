"""What a release takes of a machine: bytes of disk and memory, from its plans or its size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from converter.plan import Plan
from converter.ui import memory_estimate
from validate.streamed.tensors import whole_run_bytes

DISK: Final = "disk"
MEMORY: Final = "memory"
CONVERT: Final = "convert"
"""Memory of the conversion alone, which is all that a piece of one needs."""
PROCESS_BYTES: Final = 1_000_000_000
"""Interpreter and libraries of a proof."""
_REFERENCE_BYTES: Final = 4
"""Of each parameter: what an output computes is compared with a float32 checkpoint of it."""
_PARAMETER_BYTES: Final = 2
"""As releases mostly store them."""


def needs_of(
    plans: Sequence[Plan],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    source_bytes: int,
    workers: int,
) -> dict[str, int]:
    """From plans and the shapes of the plain release; nothing of memory where no plan is left.

    The reference lies on the disk for one output at a time; a proof holds one model at a time.
    """
    if not plans:
        return {DISK: 0, MEMORY: 0, CONVERT: 0}
    reference = _REFERENCE_BYTES * max(plan.parameters for plan in plans)
    convert = max(memory_estimate(plan, workers) for plan in plans)
    return {
        DISK: source_bytes + sum(plan.output_bytes for plan in plans) + reference,
        MEMORY: max(convert, whole_run_bytes(shapes) + PROCESS_BYTES),
        CONVERT: convert,
    }


def guessed(weight_bytes: int, outputs: int) -> dict[str, int]:
    """The same before there are plans, for ``outputs`` variants of so many bytes of weights."""
    parameters = weight_bytes // _PARAMETER_BYTES
    return {
        DISK: (1 + outputs) * weight_bytes + _REFERENCE_BYTES * parameters,
        MEMORY: whole_run_bytes({"all": (parameters,)}) + PROCESS_BYTES,
    }
