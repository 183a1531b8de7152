"""Dotted names of modules and tensors."""

from __future__ import annotations


def shared_end(a: str, b: str) -> int:
    """How many dotted words two names share at their ends."""
    count = 0
    for x, y in zip(reversed(a.split(".")), reversed(b.split(".")), strict=False):
        if x != y:
            break
        count += 1
    return count
