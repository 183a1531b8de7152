"""What each matrix loses in each format, measured on a sample of its rows.

Without calibration text that is the squared error relative to the matrix; with it, what the error
adds to the mean KL by ``quant.calibrate.fisher``. Of a stack a few matrices stand for all.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from arch_maps.facts import Facts
from arch_maps.ops import RowReader, evaluate, exact, streamable
from arch_maps.rules import Kind, Rule
from converter.errors import PlanError
from converter.plan.model import Output, Plan
from quant.allocate import candidates, prior
from quant.calibrate.fisher import COLUMNS, LOOKED_UP, MATRICES, ROWS, SAMPLED
from quant.errors import ElementError
from quant.recipe import Method, QuantSpec

SAMPLE: Final = 1 << 18
"""Elements of each output that are quantized in every format."""
REVISION: Final = 2
"""Raised when the same weights give other losses: those on disk are then not taken."""
_PIECES: Final = 32
_PROXY: Final[dict[Method, Method]] = {"mlx": "mlx", "rtn": "rtn", "search": "search"}
"""Method that is measured: the calibrated ones as the weighted search that gives their grid."""
_NUMBERED: Final = re.compile(r"\.\d+$")

Statistics = Any
Weights = tuple[np.ndarray, np.ndarray]
"""Of the rows and of the columns of a matrix: what a squared error there costs."""


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


def measurable(draft: Plan) -> tuple[Output, ...]:
    """The outputs whose format is chosen: all that the map lets be quantized."""
    return tuple(out for out in draft.outputs if out.rule.quantizable)


def tasks_of(draft: Plan) -> list[Any]:
    """What ``quant.calibrate.fisher`` is to watch: all matrices that the map only moves.

    A head that is a copy of the table is the table's own, in torch.
    """
    from quant.calibrate.links import Task

    assert draft.options.quant is not None
    copied = _copied(draft.outputs)
    return [
        Task(
            module=out.rule.module,
            expr=out.expr,
            dtype=out.dtype,
            spec=draft.options.quant,
            table=out.rule.tied,
        )
        for out in measurable(draft)
        if exact(out.expr) and len(out.expr.shape) in (2, 3) and out.rule.module not in copied
    ]


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
    copied = _copied(draft.outputs)
    method = _PROXY.get(options.quant.method, "search" if statistics is None else "imatrix")
    layers = _layer_count(config)
    given = {} if statistics is None else statistics

    def one(out: Output) -> np.ndarray:
        try:
            matrices = _matrices(out, given, copied.get(out.rule.module, out.rule.module))
            own = "search" if method == "imatrix" and not matrices[0].uses else method
            return _errors(out, reader, matrices, [replace(s, method=own) for s in specs])
        except ElementError as error:
            raise PlanError([f"not finite: {out.rule.target}: {error}"]) from error

    relative, found = np.empty((2, len(outputs), len(specs)))
    with ThreadPoolExecutor(workers) as pool:
        for row, errors in enumerate(pool.map(one, outputs)):
            relative[row], found[row] = errors
            if progress:
                progress(row + 1, len(outputs))
    shares = _shares(outputs)
    priors = np.array(
        [
            shares[row]
            * prior(
                head=out.rule.kind is Kind.HEAD or out.rule.tied,
                table=out.rule.kind is Kind.EMBEDDING,
                layer=_layer(out.rule),
                layers=layers,
            )
            for row, out in enumerate(outputs)
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


def covered(draft: Plan, statistics: Statistics) -> str:
    """How much of the weights the losses by activations are measured on, in one sentence."""
    outputs = measurable(draft)
    copied = _copied(draft.outputs)
    served, left, sampled = 0, [], 0
    for out in outputs:
        name = copied.get(out.rule.module, out.rule.module)
        if _uses(out, statistics, name):
            served += out.elements
            sampled += f"{MATRICES}{name}" in statistics
        else:
            left.append(out.rule.module)
    share = served / max(1, sum(out.elements for out in outputs))
    count = len(outputs) - len(left)
    told = f"activations tell of {count} of {len(outputs)} matrices, {share:.1%} of their weights"
    if sampled:
        told += f"; in {sampled} stacks up to {SAMPLED} matrices stand for all"
    return told + (f"; the others, such as {left[0]}, are estimated" if left else "")


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A matrix that is sampled, alone or of a stack, and what its errors cost in each use."""

    index: int
    uses: tuple[Weights, ...] = ()


def _matrices(out: Output, statistics: Statistics, name: str) -> list[_Matrix]:
    """What is sampled of an output; of a stack what ``fisher`` chose, else some evenly spread."""
    uses = _uses(out, statistics, name)
    if len(out.expr.shape) != 3:
        pairs = tuple((statistics[rows], statistics[columns]) for rows, columns in uses)
        return [_Matrix(0, pairs)]
    if uses:
        ((over_rows, over_columns),) = uses
        numbers = statistics[f"{MATRICES}{name}"].tolist()
        each = zip(numbers, statistics[over_rows], statistics[over_columns], strict=True)
        return [_Matrix(number, ((rows, columns),)) for number, rows, columns in each]
    count = int(out.expr.shape[0])
    chosen = min(count, SAMPLED)
    return [_Matrix((2 * i + 1) * count // (2 * chosen)) for i in range(chosen)]


def _uses(out: Output, statistics: Container[str], name: str) -> list[tuple[str, str]]:
    """Names of the row and column weights of each use: the head's, then the table's."""
    uses = [""]
    if out.rule.kind is Kind.EMBEDDING:
        uses = ["", LOOKED_UP] if out.rule.tied else [LOOKED_UP]
    pairs = ((f"{use}{ROWS}{name}", f"{use}{COLUMNS}{name}") for use in uses)
    return [pair for pair in pairs if pair[0] in statistics]


def _sampled(
    out: Output, reader: RowReader, matrices: Sequence[_Matrix]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each matrix rows (n, columns) in its storage dtype, spread evenly, and their numbers."""
    from quant.floats import cast

    shape = tuple(map(int, out.expr.shape))
    columns, inner = shape[-1], int(np.prod(shape[1:-1]))
    wanted = max(1, SAMPLE // columns // len(matrices))
    whole = None if streamable(out.expr) else evaluate(out.expr, reader)

    def rows(start: int, stop: int) -> np.ndarray:
        part = evaluate(out.expr, reader, start, stop) if whole is None else whole[start:stop]
        return part.reshape(-1, columns)

    if len(shape) != 3:
        pieces = list(_spread(shape[0], max(1, wanted // inner)))
        numbers = np.concatenate([np.arange(low * inner, high * inner) for low, high in pieces])
        found = np.concatenate([rows(low, high) for low, high in pieces])
        yield cast(np.ascontiguousarray(found), out.dtype), numbers
        return
    for matrix in matrices:
        numbers = np.concatenate([np.arange(*piece) for piece in _spread(inner, wanted)])
        found = rows(matrix.index, matrix.index + 1)[numbers]
        yield cast(np.ascontiguousarray(found), out.dtype), numbers


def _spread(rows: int, wanted: int) -> Iterator[tuple[int, int]]:
    """Ranges of ``rows`` rows, ``wanted`` or fewer in all, spread evenly over them."""
    if rows <= wanted:
        yield 0, rows
        return
    each = max(1, wanted // _PIECES)
    pieces = min(wanted // each, rows // each)
    starts = sorted({i * (rows - each) // max(1, pieces - 1) for i in range(pieces)})
    stop = 0
    for start in starts:
        yield max(start, stop), start + each
        stop = start + each


def _errors(
    out: Output, reader: RowReader, matrices: Sequence[_Matrix], specs: Sequence[QuantSpec]
) -> np.ndarray:
    """(2, specs): squared error over energy, and loss by the statistics; NaN for none."""
    from quant.moments import of_columns
    from quant.weights import dequantize_rows, quantize_rows

    columns = int(out.expr.shape[-1])
    fits = np.array([columns % spec.group_size == 0 for spec in specs])
    result = np.where(fits, np.zeros((2, len(specs))), np.nan)
    energy = 0.0
    for matrix, (rows, numbers) in zip(matrices, _sampled(out, reader, matrices), strict=True):
        wide = rows.astype(np.float64)
        energy += float(np.square(wide).sum())
        for index, spec in enumerate(specs):
            if not fits[index]:
                continue
            moments = None
            if spec.method == "imatrix":
                moments = of_columns(matrix.uses[0][1], spec.group_size)
            parts = quantize_rows(rows, spec, moments=moments)
            if spec.mode == "affine":
                parts |= {role: parts[role].astype(np.float32) for role in ("scales", "biases")}
            squared = np.square(dequantize_rows(parts, spec, "F32") - wide)
            result[0, index] += squared.sum()
            result[1, index] += sum(_cost(squared, numbers, *use) for use in matrix.uses)
    result[0] /= energy or 1.0
    if not matrices[0].uses:
        result[1] = np.nan
    return result


def _cost(
    squared: np.ndarray, numbers: np.ndarray, over_rows: np.ndarray, over_columns: np.ndarray
) -> float:
    """What squared errors of the rows ``numbers`` tell of the loss of their whole matrix."""
    own = over_rows[numbers].astype(np.float64)
    sampled = 0.5 * float((own * (squared * over_columns).sum(axis=1)).sum())
    return sampled * float(over_rows.sum(dtype=np.float64)) / max(float(own.sum()), 1e-300)


def _copied(outputs: Sequence[Output]) -> dict[str, str]:
    """Heads that are stored copies of a table, by the table's module."""
    tables = {out.expr: out.rule.module for out in outputs if out.rule.kind is Kind.EMBEDDING}
    return {
        out.rule.module: tables[out.expr]
        for out in outputs
        if out.rule.kind is Kind.HEAD and out.expr in tables
    }


def _shares(outputs: Sequence[Output]) -> list[float]:
    """Which part of its table an embedding is: a shard is looked up the more rarely."""

    def table(out: Output) -> tuple[str, bool]:
        return _NUMBERED.sub("", out.rule.module), out.rule.kind is Kind.EMBEDDING

    sizes: Counter[tuple[str, bool]] = Counter()
    for out in outputs:
        sizes[table(out)] += out.elements
    return [
        out.elements / sizes[table(out)] if out.rule.kind is Kind.EMBEDDING else 1.0
        for out in outputs
    ]


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
