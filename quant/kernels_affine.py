"""Compiled search for the scale and bias of each affine group, many rows abreast.

It minimises ``sum v (w - value)**2`` over a group, ``v`` the weight of each input column and
``value`` what the stored scale, bias and code stand for. The same group of LANES rows is searched
at once, a row in each lane: sums then run down the columns in their order, without a sum across
lanes, so the same input gives the same bytes on every machine and beside any other rows.
"""

from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from quant.compiled import Kernel, jit
from quant.kernels import F32, _bits, _load, _round_to, _store

Array = npt.NDArray[Any]

LANES: Final = 64
"""Rows searched at once; their groups stay in the innermost cache."""
_ZERO: Final = np.float32(0)
_ONE: Final = np.float32(1)
_HALF: Final = np.float32(0.5)
_ULP_ONE: Final = np.float32(2.0**23)
_LEAST_SCALE: Final = np.float32(1e-7)
_INFINITE: Final = np.float32(np.inf)


@cache
def affine_search(kind: int, group: int) -> Kernel:
    """``(w, weights, levels, clips, neighbours, codes, scales, biases, edges) -> int`` over bits.

    ``weights`` (cols,) float32 weigh the columns. Starts from the scale and bias of "rtn" and
    from grids that leave out ``clips`` steps of the group's range; each is refined by the least
    squares fit to its codes (make_qkx2_quants of ggml) and rounded to ``kind`` before its error
    counts, and the best is kept: never worse than "rtn". ``neighbours`` tries the two stored scales
    next to the best as well. ``edges`` (rows, groups) become the biases of "rtn", the value of
    largest magnitude in each group. Rejects as the kernels of ``quant.kernels`` do.
    """
    magnitude = 0x7FFFFFFF if kind == F32 else 0x7FFF
    infinity = {0: 0x7F800000, 1: 0x7F80, 2: 0x7C00}[kind]
    # Where the lanes of each quantity start: extremes; the grid that is tried, and the inverse of
    # its scale; the best grid and its error; the sums of a fit; what it finds.
    HIGH, LOW, S, B, INVERSE, BEST_S, BEST_B, LEAST, E, Q, QQ, QE, FIT_S, FIT_B, MEAN = (
        LANES * number for number in range(15)
    )

    def run(
        w: Array,
        weights: Array,
        levels: np.float32,
        clips: Array,
        neighbours: bool,
        codes: Array,
        scales: Array,
        biases: Array,
        edges: Array,
    ) -> int:
        x, f = np.empty(group * LANES, np.float32), np.empty(15 * LANES, np.float32)
        given = (w, weights, levels, clips, neighbours)
        return int(kernel(*given, codes, scales, biases, edges, x, f))

    @jit
    def error(x: Array, f: Array, v: Array, n: np.float32) -> None:
        """E of S and B."""
        for lane in range(LANES):
            f[INVERSE + lane] = _ONE / f[S + lane]
            f[E + lane] = _ZERO
        for i in range(group):
            weight = v[i]
            for lane in range(LANES):
                y = x[i * LANES + lane]
                q = min(max((y - f[B + lane]) * f[INVERSE + lane], _ZERO), n)
                q = (q + _ULP_ONE) - _ULP_ONE
                e = y - (f[S + lane] * q + f[B + lane])
                f[E + lane] += weight * e * e

    @jit
    def fit(x: Array, f: Array, v: Array, n: np.float32) -> None:
        """Least squares FIT_S and FIT_B for the codes of S and B, and their weighted MEAN."""
        total = _ZERO
        for lane in range(LANES):
            f[INVERSE + lane] = _ONE / f[S + lane]
            f[Q + lane] = _ZERO
            f[QQ + lane] = _ZERO
            f[E + lane] = _ZERO
            f[QE + lane] = _ZERO
        for i in range(group):
            weight = v[i]
            total += weight
            for lane in range(LANES):
                y = (x[i * LANES + lane] - f[B + lane]) * f[INVERSE + lane]
                q = min(max(y, _ZERO), n)
                q = (q + _ULP_ONE) - _ULP_ONE
                e = weight * (y - q)
                f[Q + lane] += weight * q
                f[QQ + lane] += weight * q * q
                f[E + lane] += e
                f[QE + lane] += e * q
        for lane in range(LANES):
            s = f[S + lane]
            mean = f[Q + lane] / total
            spread = f[QQ + lane] - f[Q + lane] * mean
            slope = (f[QE + lane] - f[E + lane] * mean) / spread
            slope = slope if spread > np.float32(1e-6) * f[QQ + lane] else _ZERO
            f[FIT_S + lane] = s + s * slope
            f[FIT_B + lane] = f[B + lane] + s * (f[E + lane] / total - slope * mean)
            f[MEAN + lane] = mean

    @jit
    def plain(x: Array, f: Array, n: np.float32) -> None:
        """S and B of "rtn", and the extremes HIGH and LOW."""
        for lane in range(LANES):
            f[HIGH + lane] = x[lane]
            f[LOW + lane] = x[lane]
        for i in range(1, group):
            for lane in range(LANES):
                f[HIGH + lane] = max(f[HIGH + lane], x[i * LANES + lane])
                f[LOW + lane] = min(f[LOW + lane], x[i * LANES + lane])
        for lane in range(LANES):
            high = f[HIGH + lane]
            low = f[LOW + lane]
            s = max((high - low) / n, _LEAST_SCALE)
            negative = abs(low) > abs(high)
            s = s if negative else -s
            edge = low if negative else high
            steps = np.float32(np.rint(edge / s))
            s = s if steps == _ZERO else edge / steps
            f[S + lane] = _round_to(s, kind)
            f[B + lane] = _round_to(_ZERO if steps == _ZERO else edge, kind)

    @jit
    def candidate(x: Array, f: Array, v: Array, n: np.float32, clip: np.float32, step: int) -> None:
        """S and B fitted to a grid that leaves out ``clip`` steps, or to the best one so far.

        The latter where ``clip`` is negative; its stored scale is then moved by ``step``.
        """
        for lane in range(LANES):
            low = f[LOW + lane]
            high = f[HIGH + lane]
            s = max((high - low) / (n + clip), _LEAST_SCALE)
            s = s if abs(low) > abs(high) else -s
            middle = (low + high) * _HALF - s * (n * _HALF)
            f[S + lane] = f[BEST_S + lane] if clip < _ZERO else s
            f[B + lane] = f[BEST_B + lane] if clip < _ZERO else middle
        fit(x, f, v, n)
        for lane in range(LANES):
            moved = _load(np.uint32(_store(f[BEST_S + lane], kind) + np.uint32(step)), kind)
            s = _round_to(f[FIT_S + lane], kind)
            s = moved if step != 0 else s
            f[S + lane] = s
            b = f[FIT_B + lane] + (f[FIT_S + lane] - s) * f[MEAN + lane]
            f[B + lane] = _round_to(b, kind)

    @jit
    def keep(f: Array, first: bool) -> None:
        """Make S and B the best where they are."""
        for lane in range(LANES):
            better = (f[E + lane] < f[LEAST + lane]) & (abs(f[S + lane]) >= _LEAST_SCALE)
            better = better | first
            f[LEAST + lane] = f[E + lane] if better else f[LEAST + lane]
            f[BEST_S + lane] = f[S + lane] if better else f[BEST_S + lane]
            f[BEST_B + lane] = f[B + lane] if better else f[BEST_B + lane]

    @jit
    def kernel(
        w: Array,
        weights: Array,
        levels: np.float32,
        clips: Array,
        neighbours: bool,
        codes: Array,
        scales: Array,
        biases: Array,
        edges: Array,
        x: Array,
        f: Array,
    ) -> int:
        rows, columns = w.shape
        for first in range(0, rows, LANES):
            count = min(LANES, rows - first)
            rejected = rows * columns
            for i in range(group * LANES):  # lanes without a row are searched as well
                x[i] = _ZERO
            for g in range(columns // group):
                v = weights[g * group : (g + 1) * group]
                for lane in range(count):
                    bits = w[first + lane, g * group : (g + 1) * group]
                    most = np.uint32(0)
                    for i in range(group):
                        most = max(most, np.uint32(bits[i]) & np.uint32(magnitude))
                    if most >= np.uint32(infinity):
                        rejected = min(rejected, (first + lane) * columns + g * group)
                    for i in range(group):
                        x[i * LANES + lane] = _load(np.uint32(bits[i]), kind)
                plain(x, f, levels)
                for lane in range(count):
                    edges[first + lane, g] = _store(f[B + lane], kind)
                    if not abs(f[S + lane]) < _INFINITE:
                        rejected = min(rejected, (first + lane) * columns + g * group)
                error(x, f, v, levels)
                keep(f, True)
                for k in range(clips.shape[0] + (3 if neighbours else 1)):
                    past = k - clips.shape[0]
                    clip = clips[k] if past < 0 else -_ONE
                    step = 0
                    if past > 0:
                        step = -1 if past == 1 else 1
                    candidate(x, f, v, levels, clip, step)
                    error(x, f, v, levels)
                    keep(f, False)
                for lane in range(LANES):
                    f[INVERSE + lane] = _ONE / f[BEST_S + lane]
                for lane in range(count):
                    scales[first + lane, g] = _store(f[BEST_S + lane], kind)
                    biases[first + lane, g] = _store(f[BEST_B + lane], kind)
                    inverse = f[INVERSE + lane]
                    b = f[BEST_B + lane]
                    bits = w[first + lane, g * group : (g + 1) * group]
                    out = codes[first + lane, g * group : (g + 1) * group]
                    for i in range(group):
                        q = (_load(np.uint32(bits[i]), kind) - b) * inverse
                        q = min(max(q, _ZERO), levels)
                        out[i] = np.uint8(_bits(q + _ULP_ONE) & np.uint32(0xFF))
            if rejected < rows * columns:
                return int(rejected)
        return -1

    return run
