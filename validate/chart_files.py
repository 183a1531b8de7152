"""A line chart as a file of its own, for pages that show pictures alone: SVG, and PNG.

Both are the same bytes wherever they are made. The PNG is drawn without antialiasing at three times
its size, then reduced by whole-number averages, and its letters are of the font that Pillow brings.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final

from validate.charts import BOTTOM, COLOURS, DASHES, HEIGHT, LEFT, RIGHT, WIDTH, Chart, Line

HEAD: Final = 36
"""Room for the title above the frame of the chart, SVG units."""
_ROW: Final = 22
_KEY: Final = 28
_LETTER: Final = 7.2
"""Width that a letter of a legend is given, SVG units."""
_SCALE: Final = 2
"""Pixels of the PNG to one SVG unit."""
_FINE: Final = 3
_SHADES: Final = 96
"""Colours of the PNG: edges are blended, and there are few lines."""
_PAPER, _INK, _SOFT, _GRID = "#ffffff", "#1c2024", "#60646c", "#dfe1e6"
Point = tuple[float, float]


def chart_svg(title: str, chart: Chart) -> str:
    """The chart as an SVG file that follows the reader's light or dark scheme."""
    from validate.report import page

    keys, height = _legend(chart)
    return page(
        "chart.svg.j2", title=title, chart=chart, keys=keys, height=height, head=HEAD, key=_KEY
    )


def chart_png(title: str, chart: Chart) -> bytes:
    """The chart as a PNG file on white, two pixels to an SVG unit."""
    from PIL import Image, ImageDraw, ImageFont

    keys, height = _legend(chart)
    fine = _SCALE * _FINE
    drawn = Image.new("RGB", (int(WIDTH) * fine, height * fine), _PAPER)
    pen = ImageDraw.Draw(drawn)
    foot = HEAD + HEIGHT - BOTTOM
    for tick in chart.y_ticks:
        at = HEAD + tick.at
        _stroke(pen, [(LEFT, at), (WIDTH - RIGHT, at)], _GRID)
    for tick in chart.x_ticks:
        _stroke(pen, [(tick.at, foot), (tick.at, foot + 4)], _SOFT)
    for line in chart.lines:
        points = [(x, HEAD + y) for x, y in _points_of(line)]
        _stroke(pen, points, COLOURS[line.colour], DASHES[line.colour], width=1.8)
    for line, x, y in keys:
        ends = [(x, float(y)), (x + _KEY, float(y))]
        _stroke(pen, ends, COLOURS[line.colour], DASHES[line.colour], width=1.8)
    image = drawn.reduce(_FINE)
    pen = ImageDraw.Draw(image)
    small, large = (ImageFont.load_default(size * _SCALE) for size in (12.5, 15.0))

    def write(at: Point, text: str, anchor: str, colour: str = _SOFT, font: Any = small) -> None:
        pen.text((at[0] * _SCALE, at[1] * _SCALE), text, fill=colour, font=font, anchor=anchor)

    write((12, 10), title, "la", _INK, large)
    for tick in chart.y_ticks:
        write((LEFT - 8, HEAD + tick.at), tick.label, "rm")
    for tick in chart.x_ticks:
        write((tick.at, foot + 7), tick.label, "ma")
    write((WIDTH - RIGHT, foot + 26), chart.x_label, "ra")
    for line, x, y in keys:
        write((x + _KEY + 6, y), line.name, "lm")
    file = io.BytesIO()
    image.quantize(_SHADES).save(file, "PNG", compress_level=9)
    return file.getvalue()


def _legend(chart: Chart) -> tuple[list[tuple[Line, float, int]], int]:
    """(line, left, middle) of each entry below the frame, wrapped; and the height of the whole."""
    x, y = LEFT, int(HEAD + HEIGHT + 26)
    found = []
    for line in chart.lines:
        width = _KEY + 6 + _LETTER * len(line.name) + 18
        if x > LEFT and x + width > WIDTH:
            x, y = LEFT, y + _ROW
        found.append((line, round(x, 1), y))
        x += width
    return found, y + 18


def _points_of(line: Line) -> list[Point]:
    pairs = (pair.split(",") for pair in line.points.split())
    return [(float(x), float(y)) for x, y in pairs]


def _stroke(
    pen: Any, points: Sequence[Point], colour: str, dashes: Sequence[int] = (), width: float = 1.0
) -> None:
    """A line through points in SVG units, on the fine canvas; ``dashes`` as in SVG."""
    scale = _SCALE * _FINE
    for part in _dashed(points, dashes) if dashes else [points]:
        fine = [(round(x * scale), round(y * scale)) for x, y in part]
        pen.line(fine, fill=colour, width=round(width * scale), joint="curve")


def _dashed(points: Sequence[Point], dashes: Sequence[int]) -> list[list[Point]]:
    """The strokes of a dashed line."""
    parts: list[list[Point]] = []
    part = [points[0]]
    place, left = 0, float(dashes[0])
    for (x0, y0), (x1, y1) in pairwise(points):
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        done = 0.0
        while length - done > left:
            done += left
            at = (x0 + (x1 - x0) * done / length, y0 + (y1 - y0) * done / length)
            if place % 2 == 0:
                parts.append([*part, at])
            part = [at]
            place += 1
            left = float(dashes[place % len(dashes)])
        left -= length - done
        part.append((x1, y1))
    return [*parts, part] if place % 2 == 0 and len(part) > 1 else parts
