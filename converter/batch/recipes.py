"""Recipes of a watch list as the options of plans, and as the ledger stores them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from converter.adapter import read_adapter
from converter.batch.failures import AdapterError
from converter.errors import PlanError, UsageError
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
from quant.tune import DEFAULT_ITERATIONS

FORMAT: Final = 3
"""Of stored recipes, to be raised with every key that is new in one.

Versions of the program with different formats share no jobs: one would not see the other's keys.
"""
_BESIDE: Final = ("adapter", "adapter_path", "mtp")
"""Keys of stored recipes that are no plan's options."""

if TYPE_CHECKING:
    from converter.batch.watchlist import Recipe, Watch, WatchList


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is made of a release: a plan's options, what is fused in before, a drafter beside it."""

    options: Options
    adapter: Mapping[str, Any] | None = None
    """What the adapter is, by the sha256 of its files (`converter.adapter.read`)."""
    adapter_path: str | None = None
    """Where it lies, which tells nothing about what is made."""
    mtp: bool = False
    """Whether the release's further-token layers become a drafter, in a repo of its own."""

    @property
    def hash(self) -> str:
        """Tells recipes apart by what they make, whatever they are called."""
        made = self.to_json()
        made.pop("adapter_path", None)
        return digest(made)

    def to_json(self) -> dict[str, Any]:
        """As the ledger stores it."""
        data = self.options.to_json()
        if self.adapter is not None:
            data |= {"adapter": dict(self.adapter), "adapter_path": self.adapter_path}
        return data | ({"mtp": True} if self.mtp else {})

    @classmethod
    def from_json(cls, recipe: Mapping[str, Any]) -> Asked:
        """What ``to_json`` gave."""
        return cls(
            options=_options_from(recipe),
            adapter=recipe.get("adapter"),
            adapter_path=recipe.get("adapter_path"),
            mtp=recipe.get("mtp", False),
        )

    def checked_adapter(self) -> Path | None:
        """The adapter's folder; AdapterError where another adapter lies there now, or none."""
        if self.adapter_path is None:
            return None
        path = Path(self.adapter_path)
        try:
            found = read_adapter(path).record()
        except (OSError, PlanError, UsageError) as error:
            raise AdapterError(
                f"adapter_path {path}: the adapter cannot be read on this machine: {error}"
            ) from error
        if found != self.adapter:
            raise AdapterError(
                f"adapter_path {path}: has changed since the watch list was read; run it again"
            )
        return path

    def check_calibration(self, data: str | None) -> None:
        """AdapterError where another text than the recipe's lies at ``data`` now, or none."""
        asked = self.options.calibration
        if asked is None or data is None:
            return
        where = f"calibration_data {data}"
        try:
            found = calibration_of(Path(data), sequences=asked.sequences, length=asked.length)
        except CalibrationError as error:
            told = str(error).removeprefix(f"--calibration-data {data}: ")
            raise AdapterError(f"{where}: cannot be read on this machine: {told}") from error
        if found != asked:
            raise AdapterError(f"{where}: is not what the watch list was read with; run it again")


def recipes_of(watchlist: WatchList, entry: Watch) -> dict[str, Asked]:
    """What every variant and recipe of an entry asks for, by name; UsageError naming both."""
    made: dict[str, Asked] = {}
    for name in entry.variants:
        dtype, quant = named_variant(name)
        # A plain variant is plain whatever the release is, as that of the command line is.
        made[name] = Asked(options=Options(dtype=dtype, quant=quant, dequantize=quant is None))
    for name in entry.recipes:
        try:
            made[name] = _asked(watchlist.recipes[name], entry)
        except (ValueError, CalibrationError) as error:
            raise UsageError(f"recipes.{name}: {error}") from error
    return made


def _asked(recipe: Recipe, entry: Watch) -> Asked:
    quant = recipe.quant()
    options = Options(
        dtype=recipe.dtype,
        quant=quant,
        predicate=recipe.quant_predicate,
        dequantize=recipe.dequantize,
        calibration=_calibration(entry, recipe, quant),
        target_bits=recipe.q_target_bpw,
        target_bytes=recipe.q_target_size,
        target_group_size=recipe.q_group_size if recipe.targeted else None,
        iterations=recipe.tuning_iterations,
        rotate_values=recipe.kv_rotate_values,
    )
    asked = Asked(options=options, mtp=recipe.mtp)
    if recipe.adapter_path is None:
        return asked
    record = read_adapter(recipe.adapter_path).record()
    return replace(asked, adapter=record, adapter_path=str(recipe.adapter_path))


def policy_of(watchlist: WatchList, entry: Watch) -> Policy:
    """The policy of an entry's jobs."""
    data = entry.calibration_data
    return Policy(
        private=watchlist.private,
        kl_threshold=entry.gates.kl_threshold,
        allow_unproven=entry.gates.allow_unproven,
        allow_gated=entry.gates.allow_gated,
        twin=entry.gates.twin,
        calibration_data=None if data is None else str(data.resolve()),
        accept=entry.gates.accept,
    )


def digest(data: Any) -> str:
    """sha256 of canonical JSON."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _options_from(recipe: Mapping[str, Any]) -> Options:
    """The options that ``Options.to_json`` gave; UsageError for what this version knows not."""
    size, tuning = recipe.get("target_size", {}), recipe.get("tuning", {})
    steps = tuning.get("iterations")
    quant, calibration = recipe["quantization"], recipe.get("calibration")
    options = Options(
        dtype=recipe["dtype"],
        quant=None
        if quant is None
        else QuantSpec.make(quant["mode"], quant["bits"], quant["group_size"], quant["method"]),
        predicate=recipe["predicate"],
        target=recipe["target"],
        dequantize=recipe.get("dequantize", False),
        rotate_values=recipe.get("rotate_values", False),
        target_bits=size.get("bits"),
        target_bytes=size.get("bytes"),
        target_group_size=size.get("group_size"),
        iterations=None if steps == DEFAULT_ITERATIONS else steps,
        calibration=None
        if calibration is None
        else Calibration(
            sha256=calibration["text"],
            sequences=calibration["sequences"],
            length=calibration["length"],
            pictures=calibration.get("pictures", ""),
        ),
    )
    made, asked = options.to_json(), {k: v for k, v in recipe.items() if k not in _BESIDE}
    if unknown := sorted(k for k in {*made, *asked} if made.get(k) != asked.get(k)):
        raise UsageError(
            f"a recipe in the ledger has {', '.join(unknown)} as this version of the program does "
            "not know it: use the version that wrote it"
        )
    return options


def _calibration(entry: Watch, recipe: Recipe, quant: QuantSpec | None) -> Calibration | None:
    """Which text calibrates; a target takes some for its own sake, where any is asked for."""
    stated = (entry.calibration_data, recipe.calibration_sequences, recipe.calibration_length)
    asked = recipe.targeted and any(one is not None for one in stated)
    if quant is None or (quant.method not in CALIBRATED and not asked):
        return None
    return calibration_of(
        entry.calibration_data,
        sequences=recipe.calibration_sequences or DEFAULT_SEQUENCES,
        length=recipe.calibration_length or DEFAULT_LENGTH,
    )
