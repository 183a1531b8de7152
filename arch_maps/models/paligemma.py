"""PaliGemma 1 and 2: a SigLIP tower, one dense layer, and a Gemma stack that reads both ways."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.projectors import llava as parts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import gemma, llama
from arch_maps.text.windows import layer_types
from arch_maps.vision import siglip


def _second(facts: Facts) -> bool:
    return facts.section("text_config").data.get("model_type") == "gemma2"


def _sizes(facts: Facts) -> llama.Sizes:
    text, second = facts.section("text_config"), _second(facts)
    return gemma.sizes(text, kv_heads=4 if second else 16, sandwich=second)


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    text = facts.section("text_config")
    text.expect("attention_bias", False, default=False, why="this map has no such biases")
    why = "the runtime computes no other stack"
    text.expect("model_type", "gemma", "gemma2", default="gemma", why=why)
    s = _sizes(facts)
    llama.stack(parts.text(root, layout), s)
    parts.head(root, layout, s.vocab, s.hidden, tied=True)
    vision = facts.section("vision_config").filled(siglip.DEFAULTS)
    siglip.tower(parts.vision(root, layout), vision)
    projector = parts.projector(root, layout)
    projector.linear("linear", s.hidden, vision.size("hidden_size"), bias=True)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    text, s = facts.section("text_config"), _sizes(facts)
    facts.expect("tie_word_embeddings", True, default=True, why="the runtime reuses the embedding")
    second = _second(facts)
    if not second and s.heads * s.head_dim != s.hidden:
        facts.problem(
            f"config.json: {text.path}head_dim is {int(s.head_dim)}; the runtime computes with "
            "hidden_size / num_attention_heads"
        )
    tanh = "gelu_pytorch_tanh"
    for name in ("hidden_act", "hidden_activation"):
        text.expect(name, tanh, None, default=tanh, why="this map is checked with tanh GELU")
    rope = spell.rope(text)
    spell.require_rope_type(text, rope, allowed=("default",))
    section = out["text_config"]
    section.update(
        model_type="gemma2" if second else "gemma",
        head_dim=int(s.head_dim),
        num_key_value_heads=int(s.kv_heads),
        hidden_act=tanh,
        hidden_activation=tanh,
        attention_bias=False,
        use_bidirectional_attention=text.flag("use_bidirectional_attention", True),
        rms_norm_eps=text.number("rms_norm_eps", 1e-6),
        max_position_embeddings=int(text.size("max_position_embeddings", 8192)),
        rope_traditional=False,
        tie_word_embeddings=True,
        **spell.spell_rope(rope),
    )
    if second:
        section.update(
            attn_logit_softcapping=text.number("attn_logit_softcapping", 50.0),
            final_logit_softcapping=text.number("final_logit_softcapping", 30.0),
            query_pre_attn_scalar=text.number("query_pre_attn_scalar", 256),
            sliding_window=int(text.size("sliding_window", 4096)),
            layer_types=layer_types(text, s.layers, pattern=2),
        )
        facts.note(
            f"every other layer attends to the last {section['sliding_window']} tokens; the "
            "runtime attends to all of them, so results agree up to that length only"
        )
    vision = out["vision_config"]
    siglip.spell_config(vision, facts.section("vision_config"))
    vision["projection_dim"] = int(s.hidden)
    out.update(
        projection_dim=int(s.hidden),
        hidden_size=int(s.hidden),
        vocab_size=int(s.vocab),
        image_token_index=int(facts.size("image_token_index", 256000)),
        pad_token_id=facts.data.get("pad_token_id", 0),
        tie_word_embeddings=True,
    )
    return out


MAP = ArchMap(
    model_type="paligemma",
    tensors=_tensors,
    config=_config,
    layouts=parts.LAYOUTS,
    runtimes=("mlx-vlm",),
    parts=("text.gemma", "vision.siglip", "projectors.llava"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
)
