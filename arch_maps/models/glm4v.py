"""GLM-4.1V and GLM-4.6V-Flash: a gated tower with resampled positions, and GLM-4's stack."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import glm_vl, llama, moe
from arch_maps.vision import glm_vit

_TEXT: Final = {
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
}
_NORMS: Final = (
    "input_layernorm",
    "post_attention_layernorm",
    "post_self_attn_layernorm",
    "post_mlp_layernorm",
)


def _text(facts: Facts) -> Facts:
    return facts.section("text_config").filled(_TEXT)


def _sizes(text: Facts) -> llama.Sizes:
    # The reference has these biases whatever the config says.
    found = replace(llama.sizes(text), qkv_bias=True, attention_bias=False, mlp_bias=False)
    return replace(found, fused_mlp=True, norms=_NORMS)


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    s = _sizes(_text(facts))
    llama.stack(root.at(source=layout["text"], target="language_model.model"), s)
    moe.untied(facts)
    root.at(source="", target="language_model").head("lm_head", s.vocab, s.hidden, tied_to=None)
    tower = root.at(source=layout["vision"], target="vision_tower", part="vision")
    glm_vit.glm4v_tower(tower, facts.section("vision_config"))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    text = _text(facts)
    s = _sizes(text)
    if int(s.head_dim) * int(s.heads) != int(s.hidden):
        facts.problem("config.json: head_dim must be hidden_size / num_attention_heads here")
    section = out["text_config"] = {**text.data}
    glm_vl.spell_config(section, text, s, partial=1.0, max_positions=32768)
    section["model_type"] = "glm4v_text"
    glm_vit.spell_glm4v(
        out["vision_config"], facts.section("vision_config"), model_type="glm4v_vision"
    )
    glm_vl.spell_tokens(out)
    out.update(tie_word_embeddings=False, vocab_size=int(s.vocab), hidden_size=int(s.hidden))
    return out


MAP = ArchMap(
    model_type="glm4v",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {"text": "model.language_model", "vision": "model.visual"}),),
    runtimes=("mlx-vlm",),
    parts=("text.llama", "text.glm_vl", "vision.glm_vit"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
    remarks=(
        "mlx-vlm 0.7.10 resamples the tower's positions linearly, not by cubics, and gives its "
        "blocks an epsilon of its own: pictures come out wrong.",
    ),
)
