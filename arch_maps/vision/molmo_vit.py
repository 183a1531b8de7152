"""Molmo's picture side: a CLIP-like tower of whole patches, pooled by attention, with padding."""

from __future__ import annotations

from typing import Any, Final

from arch_maps.facts import Dim, Facts
from arch_maps.rules import Kind, Mount

DEFAULTS: Final = {
    "image_default_input_size": [336, 336],
    "image_patch_size": 14,
    "image_emb_dim": 1024,
    "image_num_heads": 16,
    "image_num_key_value_heads": 16,
    "image_num_layers": 23,
    "image_head_dim": 64,
    "image_mlp_dim": 4096,
    "image_norm_eps": 1e-5,
}
"""The released tower: the release's own code has these sizes and its config none."""
READ: Final = (-2, -9)
"""Layers whose outputs are pooled."""


def facts_of(root: Facts) -> Facts:
    """The tower's facts, which releases leave out."""
    return root.filled({"vision_config": {}}).section("vision_config").filled(DEFAULTS)


def tower(at: Mount, facts: Facts) -> None:
    """Class and patch embeddings, positions and layers, below ``at``."""
    hidden, inner = facts.size("image_emb_dim"), facts.size("image_mlp_dim")
    patch = facts.size("image_patch_size")
    at.tensor("class_embedding", hidden, kind=Kind.POSITION)
    at.tensor("positional_embedding", _positions(facts), hidden, kind=Kind.POSITION)
    at.linear("patch_embedding", hidden, patch * patch * 3)
    at.norm("pre_ln", hidden, bias=True)
    for _, layer in at.layers("transformer.resblocks", facts.count("image_num_layers")):
        _attention(layer / "attention", facts, hidden)
        layer.linear("feed_forward.w1", inner, hidden, bias=True)
        layer.linear("feed_forward.w2", hidden, inner, bias=True)
        layer.norm("attention_norm", hidden, bias=True)
        layer.norm("ffn_norm", hidden, bias=True)


def adapter(at: Mount, facts: Facts, inner: Dim, text_hidden: Dim) -> None:
    """The pool over neighbouring patches, the gated projector and what stands for padding."""
    pooled = facts.size("image_emb_dim") * len(READ)
    _attention(at / "image_pooling_2d", facts, pooled)
    at.linear("image_projector.w1", inner, facts.size("image_emb_dim"))
    at.linear("image_projector.w2", text_hidden, inner)
    at.linear("image_projector.w3", inner, facts.size("image_emb_dim"))
    at.tensor("pad_embed", 2, pooled, kind=Kind.POSITION)


def _attention(at: Mount, facts: Facts, inp: Dim) -> None:
    dim = facts.size("image_head_dim")
    heads, kv_heads = facts.size("image_num_heads"), facts.size("image_num_key_value_heads")
    at.linear("wq", heads * dim, inp, bias=True)
    at.linear("wk", kv_heads * dim, inp, bias=True)
    at.linear("wv", kv_heads * dim, inp, bias=True)
    at.linear("wo", facts.size("image_emb_dim"), heads * dim, bias=True)


def _positions(facts: Facts) -> Dim:
    height, width = facts.pair("image_default_input_size", (336, 336))
    patch = int(facts.size("image_patch_size"))
    return Dim((height // patch) * (width // patch) + 1, "image_num_pos")


def spell_config(facts: Facts, inner: int, text_hidden: int) -> dict[str, Any]:
    """The tower's facts as the runtime reads them."""
    sizes = {name: int(facts.size(name)) for name in DEFAULTS if name.endswith(("dim", "heads"))}
    return sizes | {
        "model_type": "molmo",
        "image_default_input_size": list(facts.pair("image_default_input_size", (336, 336))),
        "image_patch_size": int(facts.size("image_patch_size")),
        "image_pos_patch_size": int(facts.size("image_patch_size")),
        "image_num_layers": facts.count("image_num_layers"),
        "image_num_pos": int(_positions(facts)),
        "image_norm_eps": facts.number("image_norm_eps"),
        "hidden_size": inner,
        "d_model": text_hidden,
        "vit_layers": list(READ),
    }
