"""The measuring pass of ``--q-target-bpw``: what each matrix loses in each format, and the choice.

All else is planned from headers; this reads the weights once, a sample of rows of each matrix, and
with calibration text runs the reference forwards and backwards once. What it found is cached, and
the allocation is part of the plan from then on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from arch_maps.facts import Facts
from arch_maps.ops import RowReader, evaluate, streamable
from arch_maps.ops import Source as Leaf
from arch_maps.rules import Kind, Rule
from converter.errors import PlanError, UsageError
from converter.plan.build import pending_tensors
from converter.plan.model import Output, Plan
from converter.plan.options import Options
from quant.allocate import FLOOR_BITS, Allocation, Choice, candidates, most_common, prior, solve
from quant.errors import ElementError
from quant.recipe import Method, QuantSpec

SAMPLE: Final = 1 << 18
"""Elements of each matrix that are quantized in every format."""
_PIECES: Final = 32
_TOLERANCE: Final = 0.01
"""How far below its target an allocation may end."""
_PROXY: Final[dict[Method, Method]] = {"mlx": "mlx", "rtn": "rtn", "search": "search"}
"""Method that is measured: the calibrated ones as the weighted search that gives their grid."""

Statistics = Any
Measure = Callable[[Plan], Statistics]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Losses of every candidate of every matrix, in the order of ``specs``."""

    outputs: tuple[Output, ...]
    specs: tuple[QuantSpec, ...]
    losses: np.ndarray
    """[matrices, specs] float64, rounded to six digits; NaN where a spec does not fit."""
    basis: str

    @property
    def digest(self) -> str:
        """sha256 of the losses."""
        text = json.dumps([[_digits(v) for v in row] for row in self.losses.tolist()])
        return hashlib.sha256(text.encode()).hexdigest()


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


def measure(
    draft: Plan,
    reader: RowReader,
    *,
    statistics: Statistics | None,
    workers: int,
    config: dict[str, Any],
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """The loss of every candidate format of every matrix of ``draft``, from a sample of its rows.

    ``statistics`` are those of ``quant.calibrate.fisher``, None to judge by the weights alone;
    ``config`` is the release's, for its number of layers. Raises PlanError for damaged weights.
    """
    options = draft.options
    assert options.quant is not None
    specs = candidates(options.quant.method, group_size=options.target_group_size)
    outputs = measurable(draft)
    method = _PROXY.get(options.quant.method, "search" if statistics is None else "imatrix")
    layers = _layer_count(config)
    headless = all(out.rule.kind is not Kind.HEAD for out in draft.outputs)

    def one(out: Output) -> np.ndarray:
        try:
            rows, numbers = _sampled(out, reader)
            pairs = _weights(out, statistics, headless=headless)
            own = "search" if method == "imatrix" and not pairs else method
            return _errors(rows, numbers, [replace(s, method=own) for s in specs], pairs)
        except ElementError as error:
            raise PlanError([f"not finite: {out.rule.target}: {error}"]) from error

    relative, found = np.empty((2, len(outputs), len(specs)))
    with ThreadPoolExecutor(workers) as pool:
        for row, errors in enumerate(pool.map(one, outputs)):
            relative[row], found[row] = errors
            if progress:
                progress(row + 1, len(outputs))
    priors = np.array(
        [
            prior(
                head=_is_head(out, headless),
                table=out.rule.kind is Kind.EMBEDDING,
                layer=_layer(out.rule),
                layers=layers,
            )
            for out in outputs
        ]
    )
    losses = priors[:, None] * relative
    known = np.array([not np.isnan(row).all() for row in found])
    if known.any():  # what no text reached is brought to the scale of what it did
        scale = float(np.median(np.nanmax(found[known] / losses[known], axis=1)))
        losses = np.where(known[:, None], found, scale * losses)
    rounded = np.array([[_digits(value) for value in row] for row in losses.tolist()], np.float64)
    return Measured(
        outputs=outputs,
        specs=specs,
        losses=rounded,
        basis="weights" if statistics is None else "activations",
    )


def measurable(draft: Plan) -> tuple[Output, ...]:
    """The outputs whose format is chosen: all that the map lets be quantized."""
    return tuple(out for out in draft.outputs if out.rule.quantizable)


def tasks_of(draft: Plan) -> list[Any]:
    """What ``quant.calibrate.fisher`` is to watch: dense layers, head and embedding.

    A head that is a copy of the table is the table's own, in torch.
    """
    from quant.calibrate.links import Task

    assert draft.options.quant is not None
    tables = {out.expr for out in draft.outputs if out.rule.kind is Kind.EMBEDDING}
    return [
        Task(
            module=out.rule.module,
            expr=out.expr,
            dtype=out.dtype,
            spec=draft.options.quant,
            table=out.rule.kind is Kind.EMBEDDING,
        )
        for out in measurable(draft)
        if isinstance(out.expr, Leaf)
        and len(out.expr.shape) == 2
        and not (out.rule.kind is Kind.HEAD and out.expr in tables)
    ]


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


def _sampled(out: Output, reader: RowReader) -> tuple[np.ndarray, np.ndarray]:
    """Rows (n, columns) spread evenly over a matrix in its storage dtype, with their numbers."""
    from quant.floats import cast

    shape = tuple(map(int, out.expr.shape))
    inner, columns = math.prod(shape[1:-1]), shape[-1]
    wanted = max(1, SAMPLE // columns)
    if streamable(out.expr):
        each = max(1, wanted // (_PIECES * inner))
        pieces = max(1, min(wanted // (each * inner), shape[0] // each))
        if shape[0] * inner <= wanted:
            each, pieces = shape[0], 1
        starts = [i * (shape[0] - each) // max(1, pieces - 1) for i in range(pieces)]
    else:
        each, starts = shape[0], [0]
    rows, numbers = [], []
    step = max(1, len(starts) * each * inner // wanted)
    for start in sorted(set(starts)):
        block = evaluate(out.expr, reader, start, start + each).reshape(-1, columns)[::step]
        rows.append(cast(np.ascontiguousarray(block), out.dtype))
        numbers.append(np.arange(start * inner, (start + each) * inner)[::step])
    return np.concatenate(rows), np.concatenate(numbers)


def _errors(
    rows: np.ndarray,
    numbers: np.ndarray,
    specs: Sequence[QuantSpec],
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
) -> np.ndarray:
    """(2, specs): squared error over energy, and loss by the statistics; NaN for none."""
    from quant.moments import of_columns
    from quant.weights import dequantize_rows, quantize_rows

    columns = None if not pairs else pairs[0][1]
    wide = rows.astype(np.float64)
    energy = float(np.square(wide).sum()) or 1.0
    result = np.full((2, len(specs)), np.nan)
    for index, spec in enumerate(specs):
        if rows.shape[1] % spec.group_size:
            continue
        moments = None
        if spec.method == "imatrix" and columns is not None:
            moments = of_columns(columns, spec.group_size)
        parts = quantize_rows(rows, spec, moments=moments)
        if spec.mode == "affine":
            parts |= {role: parts[role].astype(np.float32) for role in ("scales", "biases")}
        squared = np.square(dequantize_rows(parts, spec, "F32") - wide)
        result[0, index] = squared.sum() / energy
        if pairs:
            result[1, index] = sum(
                0.5
                * float((over_rows[numbers] * (squared * over_columns).sum(axis=1)).sum())
                * float(over_rows.sum(dtype=np.float64))
                / max(float(over_rows[numbers].sum(dtype=np.float64)), 1e-300)
                for over_rows, over_columns in pairs
            )
    return result


def _weights(
    out: Output, statistics: Statistics | None, *, headless: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The (row, column) weights of a matrix, for each of its uses: the head's, then the table's."""
    from quant.calibrate.fisher import COLUMNS, LOOKED_UP, ROWS

    if statistics is None or not isinstance(out.expr, Leaf):
        return []
    uses = [""]
    if out.rule.kind is Kind.EMBEDDING:
        uses = ["", LOOKED_UP] if headless else [LOOKED_UP]
    name = out.rule.module
    return [
        (statistics[f"{use}{ROWS}{name}"], statistics[f"{use}{COLUMNS}{name}"])
        for use in uses
        if f"{use}{ROWS}{name}" in statistics
    ]


def _is_head(out: Output, headless: bool) -> bool:
    return out.rule.kind is Kind.HEAD or (headless and out.rule.kind is Kind.EMBEDDING)


def _layer(rule: Rule) -> int | None:
    numbers = [int(word) for word in rule.module.split(".") if word.isdigit()]
    return numbers[0] if numbers else None


def _layer_count(config: dict[str, Any]) -> int:
    nested = config.get("text_config")
    facts = Facts(nested if isinstance(nested, dict) else config)
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        if facts.data.get(name) is not None:
            return int(facts.data[name])
    return 1


def _digits(value: float) -> float:
    """Six significant digits: what no order of summing changes."""
    return float(f"{value:.6g}")


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
        "sample": SAMPLE,
    }
    store = Store("losses", key)

    def made() -> Statistics:
        store.put(0, {"losses": make().losses})
        return store.finish(1)

    found = store.get(made, say)
    return Measured(outputs=outputs, specs=specs, losses=found["losses"], basis=basis)
