"""PaliGemma: a SigLIP tower, one dense layer and the Gemma stack, which reads prompts both ways."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.projectors import llava as parts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import gemma, llama
from arch_maps.vision import siglip


def _sizes(facts: Facts) -> llama.Sizes:
    return gemma.sizes(facts.section("text_config"), kv_heads=16, sandwich=False)


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    text = facts.section("text_config")
    text.expect("attention_bias", False, default=False, why="this map has no such biases")
    text.expect("model_type", "gemma", default="gemma", why="this map has no other stack")
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
    if s.heads * s.head_dim != s.hidden:
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
        model_type="gemma",
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
