"""Sizes, rates, durations, folders and secrets as a watch list spells them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from string import Template
from typing import Any

_SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(value: Any) -> Any:
    """Bytes from ``"80GB"`` (decimal), ``"24GiB"`` (binary) or a number."""
    if not isinstance(value, str):
        return value
    found = _QUANTITY.fullmatch(value)
    unit = found.group(2).upper() if found else None
    if found is None or unit not in _SIZES:
        raise ValueError(f"{value!r} is not a size such as 80GB or 24GiB")
    try:
        return int(float(found.group(1)) * _SIZES[unit])
    except OverflowError as error:
        raise ValueError("is larger than any disk") from error


def parse_rate(value: Any) -> Any:
    """Bytes per second from ``"50MB/s"`` or a number."""
    return parse_size(value.removesuffix("/s")) if isinstance(value, str) else value


def parse_duration(value: Any) -> Any:
    """Seconds from ``"90s"``, ``"30m"``, ``"12h"``, ``"14d"``, ``"2w"`` or a number."""
    if not isinstance(value, str):
        return value
    found = _QUANTITY.fullmatch(value)
    if found is None or found.group(2) not in _SECONDS:
        raise ValueError(f"{value!r} is not a duration such as 30m, 12h or 14d")
    return float(found.group(1)) * _SECONDS[found.group(2)]


def whole_path(path: Path) -> Path:
    """The path from the root, its ``~`` resolved; ValueError for a user that is unknown here."""
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"{path}: this machine has no such user") from error


def expanded(value: str) -> str:
    """The text with ``${NAME}`` taken from the environment, so that no secret is in the file."""
    try:
        return Template(value).substitute(os.environ)
    except KeyError as error:
        raise ValueError(f"the environment has no {error.args[0]}") from error
    except ValueError as error:
        raise ValueError("a $ that is meant is written $$") from error
