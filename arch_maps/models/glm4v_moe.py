"""GLM-4.5V and 4.6V: GLM-4V's tower over GLM-4.5's experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import deepseek, glm_vl, llama, moe
from arch_maps.vision import glm_vit

_PLACES: Final = {"text": "model.language_model", "vision": "model.visual"}
_TEXT: Final = {
    "vocab_size": 151424,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 128,
    "first_k_dense_replace": 1,
}


def _text(facts: Facts) -> Facts:
    section = facts.section("text_config")
    counted = any(name in section.data for name in moe.COUNTS)
    missing = {name: size for name, size in _TEXT.items() if name not in moe.COUNTS or not counted}
    return section.filled(missing)


def _sizes(text: Facts) -> llama.Sizes:
    found = llama.sizes(text)
    biased = text.flag("attention_bias", True)
    return replace(found, qkv_bias=biased, attention_bias=False, mlp_bias=False)


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    text = _text(facts)
    text.expect("use_qk_norm", False, default=False, why="the runtime has no such norms")
    s, e = _sizes(text), deepseek.routed(text, fused=layout.fused_experts)
    sparse = moe.dense_prefix(text, s.layers)

    def feed_forward(index: int, layer: Mount) -> None:
        if sparse[index]:
            deepseek.experts(layer / "mlp", text, e)
        else:
            llama.gated_mlp(layer / "mlp", s.hidden, s.intermediate)

    moe.stack(root.at(source=layout["text"], target="language_model.model"), s, feed_forward)
    moe.untied(facts)
    root.at(source="", target="language_model").head("lm_head", s.vocab, s.hidden, tied_to=None)
    tower = root.at(source=layout["vision"], target="vision_tower", part="vision")
    glm_vit.glm4v_tower(tower, facts.section("vision_config"))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    text = _text(facts)
    s = _sizes(text)
    section = out["text_config"] = {**text.data}
    glm_vl.spell_config(section, text, s, partial=0.5, max_positions=65536)
    dense = int(text.data["first_k_dense_replace"])
    deepseek.spell_routing(section, text, dense=dense)
    deepseek.sigmoid_routing(section, text)
    section.update(model_type="glm4v_moe_text", use_qk_norm=False)
    glm_vit.spell_glm4v(
        out["vision_config"], facts.section("vision_config"), model_type="glm4v_moe_vision"
    )
    glm_vl.spell_tokens(out)
    out.update(tie_word_embeddings=False, vocab_size=int(s.vocab), hidden_size=int(s.hidden))
    return out


MAP = ArchMap(
    model_type="glm4v_moe",
    tensors=_tensors,
    config=_config,
    layouts=(
        Layout("published", _PLACES),
        Layout("fused experts", _PLACES, fused_experts=True),
    ),
    runtimes=("mlx-vlm",),
    parts=("text.llama", "text.deepseek", "text.moe", "text.glm_vl", "vision.glm_vit"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
    remarks=(
        "mlx-vlm 0.7.10 resamples the tower's positions linearly, not by cubics, and gives its "
        "blocks an epsilon of its own: pictures come out wrong.",
    ),
)
