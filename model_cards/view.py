"""Figures in the words a card uses."""

import json
import math
from collections.abc import Mapping

_SHOWN_RECIPE_CHARS = 300


class CardError(ValueError):
    """A card cannot be written: the message names the template and line, or the report."""


def pairs(mapping: object) -> str:
    """``key value, key value`` of the scalar entries of a mapping; anything else is left out."""
    if not isinstance(mapping, Mapping):
        return str(mapping)
    return ", ".join(
        f"{str(key).replace('_', ' ')} {number(value)}"
        for key, value in mapping.items()
        if isinstance(value, str | int | float)
    )


def number(value: object) -> str:
    """Floats at three significant digits, integers with separators, booleans as yes or no."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3g}" if math.isfinite(value) else "not finite"
    return str(value)


def human_bytes(size: int) -> str:
    """``size`` in decimal units, with the exact count when the unit hides it."""
    if size < 1000:
        return f"{size} bytes"
    exponent = min(int(math.log10(size) / 3), 4)
    unit = ("", "kB", "MB", "GB", "TB")[exponent]
    return f"{size / 1000**exponent:.2f} {unit} ({size:,} bytes)"


def recipe_text(recipe: Mapping[str, object]) -> str | None:
    """The recipe as JSON; None when empty or too long for a line (the manifest holds it whole)."""
    text = json.dumps(recipe, default=str, ensure_ascii=False)
    return text if recipe and len(text) <= _SHOWN_RECIPE_CHARS else None
