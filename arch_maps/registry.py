"""The maps by model_type, found by their file names under ``arch_maps/models``."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from arch_maps.facts import Facts
from arch_maps.rules import Layout, Mount, Tensors

ConfigMap = Callable[[dict[str, Any], Facts], dict[str, Any]]
TensorMap = Callable[[Mount, Facts, Layout], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchMap:
    """A release type: its tensors, its config, and what runs the result."""

    model_type: str
    tensors: TensorMap
    """Adds every rule and drop of a release with these facts and this layout."""
    config: ConfigMap
    """Source config.json -> the config.json that the runtimes read, every spelling included."""
    layouts: tuple[Layout, ...]
    runtimes: tuple[str, ...]
    """Distributions whose stock loaders read the result, first choice first."""
    parts: tuple[str, ...]
    """Parts that are mounted, for tables."""
    modalities: tuple[str, ...] = ("text",)
    pipeline_tag: str = "text-generation"
    remarks: tuple[str, ...] = ()
    """Known deviations of a runtime or losses of the map, in one sentence each."""

    def expand(self, facts: Facts, layout: Layout) -> Tensors:
        """Rules and drops for a config; its problems are collected in ``facts``."""
        tensors = Tensors()
        self.tensors(Mount(tensors, leaves=layout.leaves), facts, layout)
        return tensors


_MODULES: Final = {"xlm-roberta": "xlm_roberta"}
"""Modules of the types whose names are no Python names."""


@cache
def model_types() -> tuple[str, ...]:
    """Every mapped model_type, sorted."""
    package = importlib.import_module("arch_maps.models")
    spelled = {module: model_type for model_type, module in _MODULES.items()}
    found = (module.name for module in pkgutil.iter_modules(package.__path__))
    return tuple(sorted(spelled.get(name, name) for name in found))


@cache
def find(model_type: str) -> ArchMap | None:
    """The map for ``model_type``, or None."""
    if model_type not in model_types():
        return None
    module = _MODULES.get(model_type, model_type)
    found = importlib.import_module(f"arch_maps.models.{module}").MAP
    assert isinstance(found, ArchMap)
    assert found.model_type == model_type
    return found
