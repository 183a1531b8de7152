"""What a release takes of a machine: bytes of disk and memory, from its plans or its size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from converter.plan import Plan
from converter.source import Source
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
    plans: Sequence[Plan], *, proof: int, source_bytes: int, fused: bool, workers: int
) -> dict[str, int]:
    """From plans and the memory of a ``proof``; nothing where no plan is left.

    A reference lies on the disk for one output at a time, and the release itself once more where an
    adapter is ``fused`` into it.
    """
    if not plans:
        return {DISK: 0, MEMORY: 0, CONVERT: 0}
    reference = (1 + fused) * _REFERENCE_BYTES * max(plan.parameters for plan in plans)
    convert = max(memory_estimate(plan, workers) for plan in plans)
    return {
        DISK: source_bytes + sum(map(output_bytes, plans)) + reference,
        MEMORY: max(convert, proof),
        CONVERT: convert,
    }


def proof_bytes(source: Source) -> int:
    """Memory of a proof against a plain release, of which it holds one model at a time."""
    shapes = {name: info.shape for name, info in source.tensors.items()}
    return whole_run_bytes(shapes) + PROCESS_BYTES


def output_bytes(plan: Plan) -> int:
    """Bytes of an output's weight files; those of its target where formats are yet to be chosen."""
    options = plan.options
    if options.target_bytes is not None:
        return options.target_bytes
    if options.target_bits is not None:
        return int(options.target_bits * plan.parameters / 8)
    return plan.output_bytes


def guessed(weight_bytes: int, outputs: int) -> dict[str, int]:
    """The same before there are plans, for ``outputs`` variants of so many bytes of weights."""
    parameters = weight_bytes // _PARAMETER_BYTES
    return {
        DISK: (1 + outputs) * weight_bytes + _REFERENCE_BYTES * parameters,
        MEMORY: whole_run_bytes({"all": (parameters,)}) + PROCESS_BYTES,
    }
