"""Geometry of the report's charts: positions in SVG units, drawn by the template."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

WIDTH: Final = 640.0
HEIGHT: Final = 220.0
LEFT: Final = 58.0
RIGHT: Final = 12.0
TOP: Final = 12.0
BOTTOM: Final = 34.0
BOX: Final = {"w": WIDTH, "h": HEIGHT, "l": LEFT, "r": RIGHT, "t": TOP, "b": BOTTOM}
"""The frame of every chart, for the templates."""
COLOURS: Final = (
    *("#0b68cb", "#c2500b", "#18794e", "#8e4ec6", "#b4232c", "#0d7c86", "#8a6d00", "#c2298a"),
)
"""Of the lines, on light paper."""
DARK_COLOURS: Final = (
    *("#70b8ff", "#ffa057", "#3dd68c", "#d19dff", "#ff9592", "#4ccce6", "#f5e147", "#ff8dcc"),
)
"""Of the same lines on dark paper."""
DASHES: Final[tuple[tuple[int, ...], ...]] = ((), (7, 4), (2, 3), (9, 3, 2, 3)) * 2
"""Lengths of strokes and gaps of each line, SVG units: colour is not all that tells them apart."""
_KL_DECADES: Final = 6
"""How far below the largest the axis of a distribution goes: less than that is nothing."""
_DEPTH: Final = {
    "error": "MLX against torch",
    "noise": "torch's own noise",
    "single tokens": "single-token steps",
}
"""What the lines of the errors along the depth are called."""


@dataclass(frozen=True)
class Tick:
    """A labelled grid line at ``at`` SVG units."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """One series: SVG polyline points, and the index of its colour."""

    name: str
    points: str
    colour: int


@dataclass(frozen=True)
class Chart:
    """A line chart with a logarithmic vertical axis."""

    title: str
    x_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    threshold: Tick | None


def position_chart(check: Mapping[str, Any]) -> Chart | None:
    """Relative error at every position of every prompt, with the gate as a line."""
    series = _series(check, "error")
    longest = max((len(values) for _, values in series), default=0)
    if not longest:
        return None
    threshold = check["threshold"]
    low, high = _decades([v for _, values in series for v in values], threshold)
    return Chart(
        title="error at each position / largest logit",
        x_label="position",
        x_ticks=_linear_ticks(longest),
        y_ticks=_log_ticks(low, high),
        lines=_lines(series, low, high, last=longest - 1),
        threshold=_gate(threshold, low, high),
    )


def kl_chart(checks: Sequence[Mapping[str, Any]]) -> Chart | None:
    """KL at all positions of each kind of input, in order of size."""
    return _distribution(
        [
            (check["modality"], [v for _, one in _series(check, "kl") for v in one])
            for check in checks
        ]
    )


def distribution_chart(check: Mapping[str, Any]) -> Chart | None:
    """KL of every prompt's positions, in order of size: the share of positions below a value."""
    return _distribution(_series(check, "kl"))


def _distribution(series: Sequence[tuple[str, Sequence[float]]]) -> Chart | None:
    ordered = [(name, sorted(values)) for name, values in series]
    if not any(values for _, values in ordered):
        return None
    low, high = _decades([v for _, values in ordered for v in values], None)
    low = max(low, high - _KL_DECADES)
    return Chart(
        title="KL from the original, positions in order of size",
        x_label="share of positions",
        x_ticks=tuple(Tick(_x(p, 100), f"{p} %") for p in (0, 25, 50, 75, 99)),
        y_ticks=_log_ticks(low, high),
        lines=_lines(ordered, low, high),
        threshold=None,
    )


@dataclass(frozen=True)
class Dot:
    """One point of a scatter chart, and the index of its colour."""

    name: str
    x: float
    y: float
    colour: int
    hollow: bool


@dataclass(frozen=True)
class Scatter:
    """Points over a linear horizontal and a logarithmic vertical axis, and a line through some."""

    title: str
    x_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    dots: tuple[Dot, ...]
    front: str
    """SVG polyline points of the Pareto front, steps included."""


def pareto_chart(
    points: Sequence[tuple[str, float, float, bool]], *, title: str, x_label: str
) -> Scatter | None:
    """(name, x, y, hollow) points, less of both being better, and the front of the best.

    Colours go by place in ``points``. None without a point that has a positive y; a value of zero
    has no place on a logarithmic axis.
    """
    shown = [(i, *point) for i, point in enumerate(points) if 0 < point[2] < math.inf]
    if not shown:
        return None
    xs = [x for _, _, x, _, _ in shown]
    first, last = math.floor(min(xs)), math.ceil(max(xs))
    last = max(last, first + 1)
    low, high = _decades([y for _, _, _, y, _ in shown], None)

    def at(x: float) -> float:
        return _x(x - first, last - first)

    front: list[tuple[float, float]] = []
    for _, _, x, y, _ in sorted(shown, key=lambda point: point[2:4]):
        if not front or y < front[-1][1]:
            front += [(x, front[-1][1])] if front else []
            front.append((x, y))
    step = max(1, (last - first) // 8)
    return Scatter(
        title=title,
        x_label=x_label,
        x_ticks=tuple(Tick(at(x), str(x)) for x in range(first, last + 1, step)),
        y_ticks=_log_ticks(low, high),
        dots=tuple(
            Dot(name, at(x), _y(y, low, high), index % 8, hollow)
            for index, name, x, y, hollow in shown
        ),
        front=_points([at(x) for x, _ in front], [_y(y, low, high) for _, y in front]),
    )


def layer_chart(
    series: Sequence[tuple[str, Sequence[float]]], *, title: str, x_label: str
) -> Chart | None:
    """One line over layer numbers for each series; None without a positive value.

    Colours go by place in ``series``; an empty one has no line.
    """
    values = [value for _, line in series for value in line]
    if not any(0 < value < math.inf for value in values):
        return None
    low, high = _decades(values, None)
    longest = max(len(line) for _, line in series)
    return Chart(
        title=title,
        x_label=x_label,
        x_ticks=_linear_ticks(longest),
        y_ticks=_log_ticks(low, high),
        lines=_lines(series, low, high, last=longest - 1),
        threshold=None,
    )


def depth_chart(check: Mapping[str, Any]) -> Chart | None:
    """How the error grows from module to module, beside the reference's own noise."""
    case = check["cases"][0] if check["cases"] else None
    if case is None:
        return None
    shown = {"cases": [case]}
    series = [
        (_DEPTH.get(key, key), values)
        for key in case["series"]
        for _, values in _series(shown, key)
    ]
    labels = case.get("labels", [])
    last = max(1, len(labels) - 1)
    low, high = _decades([v for _, values in series for v in values], None)
    return Chart(
        title=f"error of each module's output / its largest value: {case['name']}",
        x_label="modules in the order of the reference",
        x_ticks=_block_ticks(labels, last),
        y_ticks=_log_ticks(low, high),
        lines=_lines(series, low, high, last=last),
        threshold=None,
    )


def _block_ticks(labels: Sequence[str], last: int) -> tuple[Tick, ...]:
    """Marks at some of the modules that are one of a list: ``layers.7``."""
    blocks = [
        (index, ".".join(label.split(".")[-2:]))
        for index, label in enumerate(labels)
        if label.rpartition(".")[2].isdigit()
    ]
    step = max(1, -(-len(blocks) // 5))
    return tuple(Tick(_x(index, last), name) for index, name in blocks[::step])


def _lines(
    series: Sequence[tuple[str, Sequence[float]]], low: int, high: int, *, last: int | None = None
) -> tuple[Line, ...]:
    """A line for each series that has values, coloured by its place.

    ``last`` is the index at the right edge; None: each line spans the whole width.
    """
    return tuple(
        Line(
            name,
            _points(
                [
                    _x(i, max(1, len(values) - 1 if last is None else last))
                    for i in range(len(values))
                ],
                [_y(value, low, high) for value in values],
            ),
            index % 8,
        )
        for index, (name, values) in enumerate(series)
        if values
    )


def gauge(value: Any, threshold: Any) -> float | None:
    """Width in 0..100 of a bar that is full at the threshold; logarithmic over six decades."""
    if not isinstance(value, int | float) or not isinstance(threshold, int | float):
        return None
    if threshold <= 0:
        return None
    if value <= 0:
        return 0.0
    return max(0.0, min(100.0, 100.0 * (1.0 + math.log10(value / threshold) / 6.0)))


def _series(check: Mapping[str, Any], key: str) -> list[tuple[str, list[float]]]:
    # What is not finite is text in the JSON; on a chart it sits on the upper edge.
    return [
        (
            case["name"],
            [v if isinstance(v, int | float) else math.inf for v in case["series"].get(key, [])],
        )
        for case in check["cases"]
    ]


def _decades(values: Sequence[float], threshold: float | None) -> tuple[int, int]:
    known = [v for v in [*values, threshold or 0.0] if 0.0 < v < math.inf]
    if not known:
        return -8, 0
    low = max(-16, math.floor(math.log10(min(known))))
    high = math.ceil(math.log10(max(known)))
    return min(low, high - 2), high


def _x(index: float, last: float) -> float:
    return round(LEFT + (WIDTH - LEFT - RIGHT) * index / last, 1)


def _y(value: float, low: int, high: int) -> float:
    level = min(max(math.log10(value), low), high) if 0.0 < value < math.inf else None
    if level is None:
        level = float(low) if value == 0.0 else float(high)
    return round(TOP + (HEIGHT - TOP - BOTTOM) * (high - level) / (high - low), 1)


def _points(xs: Sequence[float], ys: Sequence[float]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in zip(xs, ys, strict=True))


def _linear_ticks(count: int) -> tuple[Tick, ...]:
    step = next(s for s in (1, 5, 10, 20, 50, 100, 200, 500, 1 << 30) if count / s <= 8)
    return tuple(Tick(_x(i, max(1, count - 1)), str(i)) for i in range(0, count, step))


def _log_ticks(low: int, high: int) -> tuple[Tick, ...]:
    step = max(1, (high - low) // 5)
    return tuple(Tick(_y(10.0**p, low, high), f"1e{p}") for p in range(low, high + 1, step))


def _gate(threshold: Any, low: int, high: int) -> Tick | None:
    if not isinstance(threshold, int | float) or threshold <= 0:
        return None
    return Tick(_y(float(threshold), low, high), f"gate {threshold:g}")
