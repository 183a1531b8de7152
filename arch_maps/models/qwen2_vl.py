"""Qwen2-VL: Qwen2's text stack and the first Qwen vision tower."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama, qwen_vl
from arch_maps.vision import qwen2_vit


def _sizes(text: Facts) -> llama.Sizes:
    return llama.sizes(text, kv_heads=8, qkv_bias=True)


def release(
    model_type: str,
    tower: Callable[[Mount, Facts], None],
    spell_tower: Callable[[dict[str, Any], Facts], None],
) -> ArchMap:
    """Qwen2's stack under ``tower``, whose facts ``spell_tower`` writes in place."""

    def tensors(root: Mount, facts: Facts, layout: Layout) -> None:
        s = _sizes(facts.nested("text_config"))
        llama.stack(root.at(source=layout["text"], target="language_model.model"), s)
        tied = f"{layout['text']}.embed_tokens.weight" if qwen_vl.tied(facts) else None
        head = root.at(source="", target="language_model")
        head.head("lm_head", s.vocab, s.hidden, tied_to=tied)
        at = root.at(source=layout["vision"], target="vision_tower", part="vision")
        tower(at, facts.section("vision_config"))

    def config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
        out = spell.start(config)
        text = facts.nested("text_config")
        spelled = qwen_vl.spell_config(
            text,
            _sizes(text),
            theta=1e6,
            eps=1e-5,
            max_positions=32768,
            is_tied=qwen_vl.tied(facts),
        )
        # One runtime reads the text stack's facts at the top, the other in their own section.
        out.update(spelled)
        own = {"model_type": f"{model_type}_text"}
        out["text_config"] = {**out.get("text_config", {}), **spelled, **own}
        qwen_vl.spell_tokens(out)
        spell_tower(out["vision_config"], facts.section("vision_config"))
        return out

    return ArchMap(
        model_type=model_type,
        tensors=tensors,
        config=config,
        layouts=(
            Layout("published", {"text": "model", "vision": "visual"}),
            Layout("transformers", {"text": "model.language_model", "vision": "model.visual"}),
        ),
        runtimes=("mlx-vlm", "mlx-lm"),
        parts=("text.llama", "text.qwen_vl", "vision.qwen2_vit"),
        modalities=("text", "image"),
        pipeline_tag="image-text-to-text",
    )


MAP = release("qwen2_vl", qwen2_vit.qwen2_tower, qwen2_vit.spell_qwen2)
