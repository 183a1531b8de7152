"""Idefics3 and SmolVLM: SigLIP patches shuffled into channels, and the Llama stack."""

from __future__ import annotations

from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama
from arch_maps.vision import siglip

LAYOUTS: Final = (Layout("transformers", {"text": "model.text_model"}),)
_VISION: Final = {
    **siglip.DEFAULTS,
    "hidden_size": 1152,
    "num_attention_heads": 16,
    "patch_size": 32,
}


def _text(facts: Facts) -> Facts:
    return facts.section("text_config").filled({**llama.DEFAULTS, "rms_norm_eps": 1e-5})


def tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    """Text stack, tower and connector."""
    text, vision = _text(facts), facts.section("vision_config").filled(_VISION)
    text.expect("attention_bias", False, default=False, why="the runtime has no such biases")
    text.expect("mlp_bias", False, default=False, why="the runtime has no such biases")
    s = llama.sizes(text)
    llama.stack(root.at(source=layout["text"], target="language_model"), s)
    head = root.at(source="", target="language_model")
    if facts.flag("tie_word_embeddings", False):
        table = f"{layout['text']}.embed_tokens.weight"
        head.copied_head("lm_head", s.vocab, s.hidden, tied_to=table)
    else:
        head.head("lm_head", s.vocab, s.hidden, tied_to=None)
    siglip.tower(root.at(source="model.vision_model", target="vision_model", part="vision"), vision)
    scale = facts.size("scale_factor", 2)
    connector = root.at(
        source="model.connector.modality_projection",
        target="connector.modality_projection",
        part="projector",
    )
    connector.linear("proj", s.hidden, vision.size("hidden_size") * scale * scale)


def spell_config(config: dict[str, Any], facts: Facts, *, vision_type: str) -> dict[str, Any]:
    """The config that the runtime reads."""
    out = spell.start(config)
    text = _text(facts)
    text.expect("model_type", "llama", default="llama", why="the runtime computes no other stack")
    s = llama.sizes(text)
    section = out["text_config"] = {**text.data}
    llama.spell_config(section, text, s, max_positions=2048)
    if section["rope_parameters"]["rope_type"] != "default":
        facts.problem("config.json: the runtime computes unscaled positions only")
    section.update(model_type="llama", rope_traditional=False, tie_word_embeddings=False)
    siglip.spell_config(
        out["vision_config"],
        facts.section("vision_config"),
        model_type=vision_type,
        defaults=_VISION,
    )
    image = int(facts.size("image_token_id", 128257))
    out.update(
        tie_word_embeddings=False,
        vocab_size=int(s.vocab),
        scale_factor=int(facts.size("scale_factor", 2)),
        image_token_id=image,
        image_token_index=image,
    )
    return out
