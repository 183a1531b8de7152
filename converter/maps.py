"""Which map a conversion follows: the registry's, a runtime's loader, or the user's own file."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from arch_maps.facts import Facts
from arch_maps.registry import ArchMap, ConfigMap
from converter.config_errors import MAP_FILES
from converter.decode import decoded
from converter.errors import PlanError, UsageError
from converter.execute.folder import MANIFEST
from converter.manifest import read_manifest
from converter.plan.match import find_map
from converter.runtime_map import runtime_map
from converter.source import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class MapChoice:
    """What the command line says about the map; the default takes the registry's."""

    runtime: bool = False
    """Whether a stock runtime's loader takes the place of a map."""
    file: Path | None = None
    """Python file that defines MAP; it is executed."""
    model_file: Path | None = None
    """MLX model code that the output brings along; runtimes execute it."""

    def __post_init__(self) -> None:
        if self.runtime and self.file is not None:
            raise UsageError("--map runtime and --map-file are two maps; give one of them")
        for flag, path in (("--map-file", self.file), ("--model-file", self.model_file)):
            if path is not None and not path.is_file():
                raise UsageError(f"{flag} {path}: no such file")

    @property
    def written(self) -> bool:
        """Whether the map is the registry's own and the model the runtime's own."""
        return not (self.runtime or self.file or self.model_file)


WRITTEN: Final = MapChoice()
"""The registry's map and the runtime's own model."""


def choose_map(source: Source, choice: MapChoice) -> ArchMap:
    """The map to convert ``source`` with; PlanError where there is none that fits its type."""
    if choice.runtime:
        arch = runtime_map(source, model_file=choice.model_file)
    elif choice.file is not None:
        arch = load_map(choice.file, source.config)
    else:
        arch = find_map(source.config)
    return arch if choice.model_file is None else with_model_file(arch, choice.model_file)


def map_of_output(
    out: Path, source: Source, file: Path | None, *, trust_remote_code: bool
) -> ArchMap | None:
    """The map that the finished output ``out`` was made with; None for the registry's.

    A runtime's loader is run again on the release; the user's own map is asked for.
    """
    told: dict[str, Any] = {}
    if (out / MANIFEST).is_file():
        told = read_manifest(out).data.get("map") or {}
    if told.get("by") == "runtime":
        own = out / told["model_file"] if "model_file" in told else None
        if own is not None and not trust_remote_code:
            raise UsageError(
                f"{out}: brings its own model code ({own.name}), which runs only with "
                "--trust-remote-code"
            )
        return runtime_map(decoded(source).source, model_file=own)
    if file is not None:
        return load_map(file, source.config)
    if told.get("by") == "file":
        raise UsageError(
            f"{out}: was made with a map of the user's own ({told['file']}); give it as --map-file"
        )
    return None


def load_map(path: Path, config: Mapping[str, Any]) -> ArchMap:
    """Execute ``path`` and take its MAP; PlanError when it has none or one of another type."""
    spec = importlib.util.spec_from_file_location(f"{MAP_FILES}.{path.stem}", path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's code raises is the user's to read
        raise PlanError([f"--map-file {path}: {type(error).__name__}: {error}"]) from error
    arch = getattr(module, "MAP", None)
    if not isinstance(arch, ArchMap):
        raise PlanError([f"--map-file {path}: defines no MAP of the type ArchMap"])
    if arch.model_type != config.get("model_type"):
        raise PlanError(
            [
                f"--map-file {path}: is for model_type {arch.model_type!r}, the release is "
                f"{config.get('model_type')!r}"
            ]
        )
    origin = {"by": "file", "file": path.name, "sha256": _sha256(path)}
    text = f"made with a map of its author's own, {path.name}, that is not one of this program's"
    return replace(arch, config=_noting(arch.config, text), origin=origin)


def with_model_file(arch: ArchMap, path: Path) -> ArchMap:
    """The same map for a checkpoint that brings its own model code; the user trusts that code."""
    from validate.model_file import ModelFileError, runtimes_of, trust

    try:
        runtimes = runtimes_of(path)
    except ModelFileError as error:
        raise UsageError(f"--model-file {error}") from error
    trust(path)

    text = (
        f"the checkpoint brings its own model code, {path.name}: runtimes execute it, mlx-lm only "
        "with trust_remote_code"
    )

    def config(given: dict[str, Any], facts: Facts) -> dict[str, Any]:
        return {**_noting(arch.config, text)(given, facts), "model_file": path.name}

    origin = {**(arch.origin or {"by": "registry"}), "model_file": path.name}
    return replace(
        arch,
        config=config,
        runtimes=tuple(name.replace("_", "-") for name in runtimes),
        origin={**origin, "model_file_sha256": _sha256(path)},
    )


def _noting(spelled: ConfigMap, text: str) -> ConfigMap:
    """The same config map, which also makes the plan, the report and the card say ``text``."""

    def config(given: dict[str, Any], facts: Facts) -> dict[str, Any]:
        facts.note(text)
        return spelled(given, facts)

    return config


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
