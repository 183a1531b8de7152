"""GLM-OCR: a small GLM tower and the GLM-4 text stack, with its drafting layer left out."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama, moe
from arch_maps.vision import glm_vit

_NORMS: Final = (
    "input_layernorm",
    "post_attention_layernorm",
    "post_self_attn_layernorm",
    "post_mlp_layernorm",
)
_LAYERS: Final = 16
_TEXT: Final = (
    *("model_type", "vocab_size", "hidden_size", "eos_token_id", "intermediate_size"),
    *("max_position_embeddings", "num_attention_heads", "num_hidden_layers"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "attention_bias"),
    *("attention_dropout", "hidden_act", "initializer_range", "rope_parameters", "pad_token_id"),
    *("use_cache", "tie_word_embeddings", "num_nextn_predict_layers"),
)
_VISION: Final = (
    *("model_type", "depth", "hidden_size", "intermediate_size", "num_heads", "patch_size"),
    *("image_size", "in_channels", "rms_norm_eps", "attention_bias", "attention_dropout"),
    *("hidden_act", "hidden_dropout_prob", "initializer_range", "out_hidden_size"),
    *("spatial_merge_size", "temporal_patch_size"),
)


def _sizes(text: Facts) -> llama.Sizes:
    return replace(llama.sizes(text, kv_heads=8, head_dim=128), fused_mlp=True, norms=_NORMS)


def _layer(s: llama.Sizes, at: Mount) -> None:
    llama.attention(at / "self_attn", s)
    llama.mlp(at / "mlp", s)
    for name in s.norms:
        at.norm(name, s.hidden)


def _drop_drafter(at: Mount, text: Facts, s: llama.Sizes) -> None:
    why = "multi-token-prediction layers are a drafter of their own, not part of this checkpoint"
    for index in range(s.layers, s.layers + text.count("num_nextn_predict_layers")):
        layer = at / f"layers.{index}"
        moe.drop_block(layer, layer.source, partial(_layer, s), why)
        layer.drop("embed_tokens.weight", why, s.vocab, s.hidden)
        layer.drop("shared_head.head.weight", why, s.vocab, s.hidden)
        layer.drop("eh_proj.weight", why, s.hidden, 2 * s.hidden)
        for name in ("enorm", "hnorm", "shared_head.norm"):
            layer.drop(f"{name}.weight", why, s.hidden)
        layer.bind_drops("eh_proj.weight")


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    text = facts.section("text_config")
    s = _sizes(text)
    stack = root.at(source=layout["text"], target="language_model.model")
    llama.stack(stack, s)
    if text.data.get("num_nextn_predict_layers"):
        _drop_drafter(stack, text, s)
    moe.untied(facts)
    root.at(source="", target="language_model").head("lm_head", s.vocab, s.hidden, tied_to=None)
    tower = root.at(source=layout["vision"], target="vision_tower", part="vision")
    glm_vit.tower(tower, facts.section("vision_config"))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    text = facts.section("text_config")
    s = _sizes(text)
    if s.layers > _LAYERS:
        facts.problem(f"config.json: {text.path}num_hidden_layers: the runtime has {_LAYERS} only")
    text.expect("attention_bias", False, default=False, why="this map has no such biases")
    text.expect("hidden_act", "silu", default="silu", why="the runtime computes SiLU")
    settings = spell.rope(text)
    settings.setdefault("partial_rotary_factor", 1.0)
    settings.setdefault("mrope_section", [16, 24, 24])
    spell.require_rope_type(text, settings, allowed=("default",))
    section = out["text_config"]
    section.update(
        model_type="glm_ocr_text",
        attention_bias=False,
        head_dim=int(s.head_dim),
        num_key_value_heads=int(s.kv_heads),
        rms_norm_eps=text.number("rms_norm_eps", 1e-5),
        max_position_embeddings=int(text.size("max_position_embeddings", 131072)),
        tie_word_embeddings=False,
        rope_parameters=settings,
    )
    glm_vit.spell_config(out["vision_config"], facts.section("vision_config"))
    # The runtime rejects sections with keys that it does not know.
    out["text_config"] = {key: section[key] for key in _TEXT if key in section}
    out["vision_config"] = {
        key: value for key, value in out["vision_config"].items() if key in _VISION
    }
    tokens = {"image": 59280, "video": 59281, "image_start": 59256, "image_end": 59257}
    for name, default in {**tokens, "video_start": 59258, "video_end": 59259}.items():
        out.setdefault(f"{name}_token_id", default)
    out.update(tie_word_embeddings=False, vocab_size=int(s.vocab), hidden_size=int(s.hidden))
    return out


MAP = ArchMap(
    model_type="glm_ocr",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {"text": "model.language_model", "vision": "model.visual"}),),
    runtimes=("mlx-vlm",),
    parts=("text.llama", "vision.glm_vit"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
)
