"""The maps by model_type, found by their file names under ``arch_maps/models``."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final

from arch_maps.facts import Facts
from arch_maps.ops import sources
from arch_maps.rules import Kind, Layout, Mount, Rule, Tensors

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
    origin: Mapping[str, Any] | None = None
    """How the map was come by, where it is none of the registry's; plans and manifests say it."""

    def record(self) -> dict[str, Any] | None:
        """What plans and manifests say of a map that is none of the registry's, else None."""
        if self.origin is None:
            return None
        told = {"runtimes": self.runtimes, "modalities": self.modalities, "remarks": self.remarks}
        return {
            **self.origin,
            **{name: list(value) for name, value in told.items()},
            "pipeline_tag": self.pipeline_tag,
        }

    def expand(self, facts: Facts, layout: Layout) -> Tensors:
        """Rules and drops for a config; its problems are collected in ``facts``."""
        tensors = Tensors()
        self.tensors(Mount(tensors, leaves=layout.leaves), facts, layout)
        if tensors.tied and not any(rule.kind is Kind.HEAD for rule in tensors.rules):
            tensors.rules[:] = [
                replace(rule, tied=True) if _is_tied(rule, tensors.tied) else rule
                for rule in tensors.rules
            ]
        return tensors


def _is_tied(rule: Rule, tied: set[str]) -> bool:
    return rule.kind is Kind.EMBEDDING and any(leaf.name in tied for leaf in sources(rule.expr))


_OTHER_NAMES: Final = {
    ("llava", "vision_config", "pixtral"): "pixtral",
    ("llava_next", "text_config", "granite"): "granite_vision",
}
"""Releases whose runtime goes by another name than their model_type, told by a part of them."""

_BY_ARCHITECTURE: Final = {
    ("GOT", "GOTQwenForCausalLM"): "got",
    ("deepseek_vl_v2", "DeepseekOCRForCausalLM"): "deepseekocr",
    ("deepseek_vl_v2", "DeepseekOCR2ForCausalLM"): "deepseekocr_2",
    ("hunyuan", "HunYuanMoEV1ForCausalLM"): "hunyuan_v1_moe",
    ("qwen3", "DFlashDraftModel"): "qwen3_dflash",
}
"""Releases of one model_type that are told apart by the class they name."""


_SPELLINGS: Final = {
    "NemotronH_Nano_Omni_Reasoning_V3": "nemotron_h_omni",
    "cohere2moe": "cohere2_moe",
    "granite-vision": "granite_vision",
    "granite4-vision": "granite4_vision",
    "lfm2-vl": "lfm2_vl",
    "nemotronh_nano_omni_reasoning_v3": "nemotron_h_omni",
    "unlimited-ocr": "unlimited_ocr",
}
"""Other spellings of a model_type, which the runtimes take as well."""


def map_name(config: Mapping[str, Any]) -> Any:
    """What the map of a release's config.json is called: its model_type, but for a few."""
    named = config.get("model_type")
    if isinstance(named, str) and named in _SPELLINGS:
        return _SPELLINGS[named]
    for (outer, section, inner), other in _OTHER_NAMES.items():
        part = config.get(section)
        if named == outer and isinstance(part, Mapping) and part.get("model_type") == inner:
            return other
    architectures = config.get("architectures")
    if isinstance(architectures, list) and isinstance(named, str):
        for name in architectures:
            if isinstance(name, str) and (named, name) in _BY_ARCHITECTURE:
                return _BY_ARCHITECTURE[named, name]
    return named


_MODULES: Final = {
    "lille-130m": "lille_130m",
    "llava-qwen2": "llava_bunny",
    "nemotron-nas": "nemotron_nas",
    "phi4-siglip": "phi4_siglip",
    "xlm-roberta": "xlm_roberta",
}
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
