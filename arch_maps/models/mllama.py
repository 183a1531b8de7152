"""Llama 3.2 Vision: Llama's stack, some of whose layers attend to a picture instead of the text."""

from __future__ import annotations

from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama
from arch_maps.vision import mllama_vit

_TEXT: Final = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
}
_EXTRA: Final = 8
"""Rows of the embedding after the vocabulary, for the picture token."""


def _text(facts: Facts) -> Facts:
    return facts.section("text_config").filled(_TEXT)


def _crossing(text: Facts, layers: int) -> list[int]:
    found = text.data["cross_attention_layers"]
    if not isinstance(found, list) or not all(type(i) is int and 0 <= i < layers for i in found):
        text.problem(f"config.json: {text.path}cross_attention_layers must list layers")
        return []
    return found


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    text = _text(facts)
    s = llama.sizes(text)
    stack = root.at(source=layout["text"], target="language_model.model")
    stack.embedding("embed_tokens", s.vocab + _EXTRA, s.hidden)
    crossing = _crossing(text, s.layers)
    for index, layer in stack.layers("layers", s.layers):
        if index in crossing:
            llama.attention(layer / "cross_attn", s)
            layer.norm("cross_attn.q_norm", s.head_dim)
            layer.norm("cross_attn.k_norm", s.head_dim)
            layer.tensor("cross_attn_attn_gate", 1, kind=Kind.GATE)
            layer.tensor("cross_attn_mlp_gate", 1, kind=Kind.GATE)
        else:
            llama.attention(layer / "self_attn", s)
            layer.drop(
                "self_attn.rotary_emb.inv_freq", "position frequencies follow from the config"
            )
        llama.mlp(layer / "mlp", s)
        for name in s.norms:
            layer.norm(name, s.hidden)
    stack.norm("norm", s.hidden)
    facts.section("text_config").expect(
        "tie_word_embeddings", False, default=False, why="the runtime has a head of its own"
    )
    head = root.at(source=layout["head"], target="language_model")
    head.head("lm_head", s.vocab, s.hidden, tied_to=None)
    vision = facts.section("vision_config")
    tower = root.at(source=layout["vision"], target="vision_tower", part="vision")
    mllama_vit.tower(tower, vision)
    width = vision.filled(mllama_vit.DEFAULTS).size("vision_output_dim")
    bridge = root.at(source=layout["root"], target="", part="projector")
    bridge.linear("multi_modal_projector", s.hidden, width, bias=True)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    text = _text(facts)
    s = llama.sizes(text)
    if int(s.head_dim) * int(s.heads) != int(s.hidden):
        facts.problem("config.json: head_dim must be hidden_size / num_attention_heads here")
    section = out["text_config"] = {**text.data}
    llama.spell_config(
        section, text, s, max_positions=131072, eps=("rms_norm_eps", 1e-5), theta=500000.0
    )
    section.update(
        model_type="mllama_text_model",
        cross_attention_layers=_crossing(text, s.layers),
        rope_traditional=False,
        tie_word_embeddings=False,
    )
    mllama_vit.spell_config(out["vision_config"], facts.section("vision_config"))
    image = facts.data.get("image_token_index", facts.data.get("image_token_id", 128256))
    out.update(image_token_index=image, vocab_size=int(s.vocab), tie_word_embeddings=False)
    return out


MAP = ArchMap(
    model_type="mllama",
    tensors=_tensors,
    config=_config,
    layouts=(
        Layout(
            "published",
            {
                "text": "language_model.model",
                "head": "language_model",
                "vision": "vision_model",
                "root": "",
            },
        ),
        Layout(
            "transformers",
            {
                "text": "model.language_model",
                "head": "",
                "vision": "model.vision_model",
                "root": "model",
            },
        ),
    ),
    runtimes=("mlx-vlm",),
    parts=("text.llama", "vision.mllama_vit"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
    remarks=(
        "mlx-vlm 0.7.10 runs the cross-attention layers where there is no picture, so that text "
        "alone comes out wrong, and forgets after the prompt which tiles are padding.",
    ),
)
