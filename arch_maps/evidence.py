"""What was measured of every mapped type: its fixtures, twins, way back and parity."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """The last parity matrix on one type, as ``make parity-matrix`` left it."""

    fixtures: tuple[str, ...] = ()
    """Releases whose headers the map is tested against."""
    twins: tuple[str, ...] = ()
    """Verdicts as "variant: published / transformers", the type's own first, with no name."""
    restored: str = "not measured"
    """Whether ``--to torch`` gives the twin's tensors back."""
    parity: str = "not measured"
    """pass, fail, or unproven where there is no torch class to compare with."""
    errors: tuple[str, ...] = ()
    """Worst relative error of each modality in any stock runtime."""


@cache
def evidence() -> dict[str, Evidence]:
    """Evidence by model_type; empty for types that were never measured."""
    path = files("arch_maps") / "evidence.json"
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: Evidence(
            fixtures=tuple(entry["fixtures"]),
            twins=tuple(entry["twins"]),
            restored=entry["restored"],
            parity=entry["parity"],
            errors=tuple(entry["errors"]),
        )
        for name, entry in data["types"].items()
    }
