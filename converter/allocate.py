"""The choice of ``--q-target-bpw``: which format each matrix gets, by what was measured.

All else is planned from headers; this rests on a pass over the weights (``converter.losses``),
whose losses are cached, and the allocation is part of the plan from then on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from arch_maps.rules import Kind
from converter.errors import UsageError
from converter.losses import REVISION, SAMPLE, Measured, measurable
from converter.plan.build import pending_tensors
from converter.plan.model import Output, Plan
from converter.plan.options import Options
from quant.allocate import FLOOR_BITS, Allocation, Choice, candidates, most_common, solve
from quant.calibrate.fisher import SAMPLED
from quant.recipe import QuantSpec

_TOLERANCE: Final = 0.01
"""How far below its target an allocation may end."""


def allocate(draft: Plan, measured: Measured) -> Options:
    """The options of ``draft`` with the allocation that meets its target; UsageError where none.

    ``draft`` is the plan with one spec for all. Bytes are those of the stored tensors, and for a
    size in bytes also of the headers.
    """
    options = draft.options
    choices = _choices(draft, measured)
    fixed, total = _budget(draft)
    picked = solve(choices, total - fixed)
    reached = fixed + sum(c.bytes[i] for c, i in zip(choices, picked, strict=True))
    if reached < (1 - _TOLERANCE) * total:
        bits = 8 * reached / draft.parameters
        raise UsageError(
            f"{options.target_text}: no choice of formats comes within 1 % of it; the nearest "
            f"below is {bits:.3f} bits per weight, {reached} bytes"
        )
    try:
        base = most_common(choices, picked)
    except ValueError as error:
        raise UsageError(f"{options.target_text}: {error}; leave -q out") from error
    allocation = Allocation(
        specs={c.name: c.specs[i] for c, i in zip(choices, picked, strict=True)},
        base=base,
        basis=measured.basis,
        losses=measured.digest,
        expected=sum(c.losses[i] for c, i in zip(choices, picked, strict=True)),
    )
    return replace(options, quant=base, allocation=allocation)


def require_reachable(draft: Plan) -> None:
    """UsageError where no choice of formats has the target size of ``draft``, by its headers."""
    options = draft.options
    assert options.quant is not None
    specs = candidates(options.quant.method, group_size=options.target_group_size)
    offers = _offers(draft, measurable(draft), specs)
    fixed, total = _budget(draft)
    least, most = (fixed + sum(pick(o.bytes) for o in offers) for pick in (min, max))
    if not least <= total <= most:
        raise UsageError(_unreachable(options, draft, least, most))


def _budget(draft: Plan) -> tuple[int, int]:
    """Bytes of what stays as it is, and of all that the target has room for."""
    options = draft.options
    chosen = {out.rule.target for out in measurable(draft)}  # a module may also have a bias
    fixed = sum(
        tensor.nbytes
        for out in draft.outputs
        if out.rule.target not in chosen
        for tensor in out.stored.values()
    )
    if options.target_bytes is None:
        assert options.target_bits is not None
        return fixed, math.floor(options.target_bits * draft.parameters / 8)
    tensors = [t for out in draft.outputs for t in out.stored.values()]
    headers = draft.output_bytes - sum(t.nbytes for t in tensors)
    return fixed, options.target_bytes - headers - 16 * len(tensors)  # numbers there may grow


@dataclass(frozen=True, slots=True, kw_only=True)
class _Offer:
    """What a matrix may be stored as: numbers of specs, None for as it is, and their bytes."""

    numbers: tuple[int | None, ...]
    bytes: tuple[int, ...]


def _offers(draft: Plan, outputs: Sequence[Output], specs: Sequence[QuantSpec]) -> list[_Offer]:
    recurrent = _recurrent(draft)
    offers = []
    for out in outputs:
        shape = tuple(map(int, out.expr.shape))
        kind = out.rule.kind
        guarded = kind in (Kind.HEAD, Kind.EMBEDDING) or out.rule.module in recurrent
        floor = FLOOR_BITS if guarded else 0
        numbers: list[int | None] = [
            number
            for number, spec in enumerate(specs)
            if shape[-1] % spec.group_size == 0 and spec.bits >= floor
        ]
        numbers.append(None)
        sizes = (
            sum(
                tensor.nbytes
                for tensor in pending_tensors(
                    out.rule.target, shape, out.dtype, None if n is None else specs[n]
                ).values()
            )
            for n in numbers
        )
        offers.append(_Offer(numbers=tuple(numbers), bytes=tuple(sizes)))
    return offers


def _choices(draft: Plan, measured: Measured) -> list[Choice]:
    offers = _offers(draft, measured.outputs, measured.specs)
    return [
        Choice(
            name=out.rule.module,
            elements=out.elements,
            specs=tuple(None if n is None else measured.specs[n] for n in offer.numbers),
            bytes=offer.bytes,
            losses=tuple(0.0 if n is None else float(losses[n]) for n in offer.numbers),
        )
        for out, losses, offer in zip(measured.outputs, measured.losses, offers, strict=True)
    ]


def _recurrent(draft: Plan) -> frozenset[str]:
    """Modules beside the parameters of a recurrence: their errors pile up in its state."""
    mixers = {out.rule.module for out in draft.outputs if out.rule.kind is Kind.STATE}
    return frozenset(
        out.rule.module
        for out in draft.outputs
        if out.rule.quantizable and out.rule.module.rpartition(".")[0] in mixers
    )


def _unreachable(options: Options, draft: Plan, least: int, most: int) -> str:
    low, high = (8 * size / draft.parameters for size in (least, most))
    return (
        f"{options.target_text}: cannot be reached; this release can have {low:.3f} to {high:.3f} "
        f"bits per weight ({least} to {most} bytes)"
    )


def cached(
    draft: Plan,
    content: str,
    make: Callable[[], Measured],
    *,
    say: Callable[[str], None],
) -> Measured:
    """The losses from the cache, or by ``make``; ``content`` tells the weights from any others."""
    from quant.calibrate.store import Store

    options = draft.options
    assert options.quant is not None
    specs = candidates(options.quant.method, group_size=options.target_group_size)
    outputs = measurable(draft)
    basis = "weights" if options.calibration is None else "activations"
    key = {
        "source": draft.source,
        "content": content,
        "method": options.quant.method,
        "specs": [spec.to_config() for spec in specs],
        "outputs": [[out.rule.target, out.dtype] for out in outputs],
        "calibration": options.calibration and options.calibration.to_json(),
        "sample": [SAMPLE, SAMPLED, REVISION],
    }
    store = Store("losses", key)

    def made() -> Any:
        store.put(0, {"losses": make().losses})
        return store.finish(1)

    found = store.get(made, say)
    return Measured(outputs=outputs, specs=specs, losses=found["losses"], basis=basis)
