"""Memory that calibrating a plan takes, from its shapes: a block at a time, and its tables.

The terms follow what is held: a block's parameters in float32 with what they are made of, whole
moment matrices in lots, and hidden states of all sequences. ``benchmarks.calibration`` compares
the sum with what processes take.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from arch_maps.rules import Kind
from converter.plan.model import Output, Plan
from quant.calibrate.bounds import GRADIENT_BYTES, HESSIAN_BYTES, SPILL_BYTES, TABLE_BYTES
from quant.calibrate.text import Calibration
from quant.recipe import CALIBRATED, CODED, Method

PROCESS: Final = 1_200_000_000
"""The interpreter with torch, transformers and kernels."""
_FLOAT: Final = 4
_DOUBLE: Final = 8
_WIDTH: Final = 128
"""Columns of a block of moments, at most."""
_FISHER_TABLES: Final = 8
"""A head's weights in float32, and the logits of a sequence with their gradients."""
_TABLES: Final = frozenset({Kind.EMBEDDING, Kind.HEAD})


def calibration_bytes(plan: Plan) -> int:
    """Peak bytes of calibrating ``plan``, and of choosing its formats by activations; 0 for none.

    A draft whose formats are yet to be chosen counts choosing them; once they are chosen, only
    what the conversion itself calibrates is left.
    """
    options = plan.options
    if options.calibration is None or options.quant is None:
        return 0
    method = options.quant.method
    choosing = options.targeted and options.allocation is None
    if method not in CALIBRATED and not choosing:
        return 0
    served = [out for out in plan.outputs if out.rule.quantizable]
    if not served:
        return 0
    tables = [out for out in plan.outputs if out.rule.kind in _TABLES]
    loaded = max((out.elements for out in tables), default=0)
    multiplied = [out for out in tables if out.rule.tied or out.rule.kind is Kind.HEAD]
    table = max((out.elements for out in multiplied), default=0)
    hidden = max((int(out.expr.shape[-1]) for out in multiplied), default=0)
    blocks: dict[str, list[Output]] = {}
    for out in plan.outputs:
        blocks.setdefault(_block(out), []).append(out)
    inner = [blocks[name] for name in {_block(out) for out in served} - {""}]
    needed = [6 * loaded, *(_gathering(method, block, options.calibration) for block in inner)]
    if options.calibration.pictures:  # their towers are read whole before the first block
        towers = sum(out.elements for out in plan.outputs if out.rule.part != "text")
        needed.append(6 * loaded + _FLOAT * towers)
    if method in CODED:
        needed.append(16 * table)  # quantized a few rows at a time, but held in float32
    if choosing:
        needed.append(_FISHER_TABLES * table)
        needed += [_backward(block, options.calibration) for block in inner]
    tokens = options.calibration.sequences * options.calibration.length
    passes = 2 if method == "autoround" else 1
    return PROCESS + passes * min(SPILL_BYTES, _FLOAT * tokens * hidden) + max(needed)


def _gathering(method: Method, block: Sequence[Output], calibration: Calibration) -> int:
    """Bytes of a block with its moments or codes."""
    values = _values(block)
    mine = [out for out in block if out.rule.quantizable and out.rule.kind is not Kind.EMBEDDING]
    if method not in CODED:
        return 2 * values + sum(
            (_DOUBLE + _FLOAT) * int(out.expr.shape[-1]) * _WIDTH * _count(out) for out in mine
        )
    squares = [_DOUBLE * int(out.expr.shape[-1]) ** 2 for out in mine]
    whole = sum(size * _count(out) for size, out in zip(squares, mine, strict=True))
    widest = max(squares, default=0)
    lot = min(whole, max(HESSIAN_BYTES, widest))
    found = 3 * values + lot + 3 * widest  # ordered, as LAPACK takes it, and its factor
    if method == "autoround":  # values, places, and in setting up numbers of elements
        gradients = min(GRADIENT_BYTES, 2 * values)
        found = max(found, 4 * values + gradients + 2 * _answers(block, calibration))
    return found


def _backward(block: Sequence[Output], calibration: Calibration) -> int:
    return 2 * _values(block) + _answers(block, calibration)


def _values(block: Sequence[Output]) -> int:
    """Float32 bytes of a block's parameters, without those of large tables, read by rows."""
    tables = [out.elements for out in block if out.rule.kind is Kind.EMBEDDING]
    looked_up = sum(tables) if _FLOAT * sum(tables) > TABLE_BYTES else 0
    return _FLOAT * (sum(out.elements for out in block) - looked_up)


def _answers(block: Sequence[Output], calibration: Calibration) -> int:
    """What a sequence leaves for its gradients, of stacks by the experts that a token sees.

    Rows of an embedding are no outputs: a token takes one of them.
    """
    mine = [out for out in block if out.rule.kind is not Kind.EMBEDDING]
    wide = sum(int(out.expr.shape[-2]) for out in mine if len(out.expr.shape) > 1)
    return 3 * _FLOAT * calibration.length * wide


def _block(out: Output) -> str:
    """The path up to the first number, which is that of a block; empty outside of them."""
    found = re.match(r".*?\.\d+(?=\.)", out.rule.module)
    return found[0] if found else ""


def _count(out: Output) -> int:
    """Matrices in a stack, or 1."""
    return int(out.expr.shape[0]) if len(out.expr.shape) == 3 else 1
