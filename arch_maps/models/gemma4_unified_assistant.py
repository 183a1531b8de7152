"""The drafter of Gemma 4 without encoders, beside the model it was trained with."""

from __future__ import annotations

from typing import Any

from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import gemma4_assistant


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    gemma4_assistant.tensors(root, facts)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return gemma4_assistant.spell_config(
        config, facts, model_type="gemma4_unified_assistant", text_type="gemma4_unified_text"
    )


MAP = ArchMap(
    model_type="gemma4_unified_assistant",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm",),
    parts=("text.gemma4", "text.gemma4_assistant"),
    remarks=("A drafter: it runs beside the converted model only (--draft-model).",),
)
