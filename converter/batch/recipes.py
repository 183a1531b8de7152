"""Recipes of a watch list as the options of plans, and as the ledger stores them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from converter.errors import UsageError
from converter.plan import Options
from converter.variants import named_variant
from quant.calibrate.text import (
    DEFAULT_LENGTH,
    DEFAULT_SEQUENCES,
    Calibration,
    CalibrationError,
    calibration_of,
)
from quant.recipe import CALIBRATED, QuantSpec

if TYPE_CHECKING:
    from converter.batch.watchlist import Watch, WatchList


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What holds for a job beside the bytes it makes; may change while it waits."""

    private: bool = False
    kl_threshold: float | None = None
    allow_unproven: bool = False
    allow_gated: bool = False
    twin: bool = True
    calibration_data: str | None = None
    accept: str | None = None
    """Tag of the workers that drive the output through the stock runtimes before it goes."""

    def to_json(self) -> dict[str, Any]:
        """As the ledger stores it."""
        return asdict(self)


def recipes_of(watchlist: WatchList, entry: Watch) -> dict[str, Options]:
    """The options of every variant and recipe of an entry, by name; UsageError naming both."""
    made: dict[str, Options] = {}
    for name in entry.variants:
        dtype, quant = named_variant(name)
        made[name] = Options(dtype=dtype, quant=quant)
    for name in entry.recipes:
        recipe = watchlist.recipes[name]
        quant = recipe.quant()
        try:
            made[name] = Options(
                dtype=recipe.dtype,
                quant=quant,
                predicate=recipe.quant_predicate,
                calibration=_calibration(entry, quant),
            )
        except (ValueError, CalibrationError) as error:
            raise UsageError(f"recipes.{name}: {error}") from error
    return made


def policy_of(watchlist: WatchList, entry: Watch) -> Policy:
    """The policy of an entry's jobs."""
    data = entry.calibration_data
    return Policy(
        private=watchlist.private,
        kl_threshold=entry.gates.kl_threshold,
        allow_unproven=entry.gates.allow_unproven,
        allow_gated=entry.gates.allow_gated,
        twin=entry.gates.twin,
        calibration_data=None if data is None else str(data.expanduser().resolve()),
        accept=entry.gates.accept,
    )


def recipe_hash(options: Options) -> str:
    """Tells recipes apart by what they make, whatever they are called."""
    return digest(options.to_json())


def digest(data: Any) -> str:
    """sha256 of canonical JSON."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def options_from(recipe: Mapping[str, Any]) -> Options:
    """The options that ``Options.to_json`` gave."""
    quant, calibration = recipe["quantization"], recipe.get("calibration")
    return Options(
        dtype=recipe["dtype"],
        quant=None
        if quant is None
        else QuantSpec.make(quant["mode"], quant["bits"], quant["group_size"], quant["method"]),
        predicate=recipe["predicate"],
        target=recipe["target"],
        calibration=None
        if calibration is None
        else Calibration(
            sha256=calibration["text"],
            sequences=calibration["sequences"],
            length=calibration["length"],
            pictures=calibration.get("pictures", ""),
        ),
    )


def _calibration(entry: Watch, quant: QuantSpec | None) -> Calibration | None:
    if quant is None or quant.method not in CALIBRATED:
        return None
    return calibration_of(
        entry.calibration_data, sequences=DEFAULT_SEQUENCES, length=DEFAULT_LENGTH
    )
