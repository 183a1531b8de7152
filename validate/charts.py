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
        lines=tuple(
            Line(
                name,
                _points(
                    [_x(i, max(1, longest - 1)) for i in range(len(values))],
                    [_y(value, low, high) for value in values],
                ),
                index % 8,
            )
            for index, (name, values) in enumerate(series)
        ),
        threshold=_gate(threshold, low, high),
    )


def distribution_chart(check: Mapping[str, Any]) -> Chart | None:
    """KL of every prompt's positions, sorted: the share of positions below a value."""
    series = [(name, sorted(values)) for name, values in _series(check, "kl")]
    if not any(values for _, values in series):
        return None
    low, high = _decades([v for _, values in series for v in values], None)
    return Chart(
        title="KL from the original, positions in order of size",
        x_label="share of positions",
        x_ticks=tuple(Tick(_x(p, 100), f"{p} %") for p in (0, 25, 50, 75, 99)),
        y_ticks=_log_ticks(low, high),
        lines=tuple(
            Line(
                name,
                _points(
                    [_x(i, max(1, len(values) - 1)) for i in range(len(values))],
                    [_y(value, low, high) for value in values],
                ),
                index % 8,
            )
            for index, (name, values) in enumerate(series)
        ),
        threshold=None,
    )


def depth_chart(check: Mapping[str, Any]) -> Chart | None:
    """How the error grows from module to module, beside the reference's own noise."""
    case = check["cases"][0] if check["cases"] else None
    if case is None:
        return None
    shown = {"cases": [case]}
    series = [(key, values) for key in case["series"] for _, values in _series(shown, key)]
    labels = case.get("labels", [])
    last = max(1, len(labels) - 1)
    low, high = _decades([v for _, values in series for v in values], None)
    return Chart(
        title=f"error of each module's output / its largest value: {case['name']}",
        x_label="modules in the order of the reference",
        x_ticks=_block_ticks(labels, last),
        y_ticks=_log_ticks(low, high),
        lines=tuple(
            Line(
                name,
                _points(
                    [_x(i, last) for i in range(len(values))],
                    [_y(value, low, high) for value in values],
                ),
                index,
            )
            for index, (name, values) in enumerate(series)
        ),
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
