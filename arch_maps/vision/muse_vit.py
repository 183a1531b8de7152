"""The Muse Glimmer vision tower: linear patches, a table of positions, rotary windows."""

from __future__ import annotations

from typing import Any, Final

from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount

_LAYER_EPS: Final = 1e-5
"""The reference's epsilon inside the layers, whatever the config says."""


def tower(at: Mount, facts: Facts) -> None:
    """Patch embedder, layers and the norms around them, below ``at``."""
    hidden, inner = facts.size("hidden_size", 1536), facts.size("intermediate_size", 8960)
    patch, frames = facts.size("patch_size", 14), facts.size("patch_temporal", 2)
    patches = at / "patch_embedder"
    patches.linear("patch_embedding", hidden, frames * 3 * patch * patch)
    table = facts.size("pos_emb_height", 32) * facts.size("pos_emb_width", 32)
    patches.embedding("position_embedding_table", table, hidden, kind=Kind.POSITION)
    at.norm("ln_pre", hidden, bias=True)
    for _, layer in at.layers("layers", facts.count("num_hidden_layers", 50)):
        for name in ("q_proj", "k_proj", "v_proj", "proj"):
            layer.linear(f"attn.{name}", hidden, hidden, bias=True)
        layer.linear("mlp.fc1", inner, hidden, bias=True)
        layer.linear("mlp.fc2", hidden, inner, bias=True)
        layer.norm("norm1", hidden, bias=True)
        layer.norm("norm2", hidden, bias=True)
    at.norm("ln_post", hidden, bias=True)


def spell_config(facts: Facts) -> dict[str, Any]:
    """The vision section as the runtime reads it."""
    facts.expect("hidden_act", "gelu", default="gelu", why="the runtime computes exact GELU")
    eps = facts.number("layer_norm_eps", _LAYER_EPS)
    if eps != _LAYER_EPS:
        facts.problem(
            f"config.json: {facts.path}layer_norm_eps is {eps}; the reference has {_LAYER_EPS} in "
            "its layers, the runtime this one"
        )
    side, width = facts.size("pos_emb_height", 32), facts.size("pos_emb_width", 32)
    if side != width:
        facts.problem(f"config.json: {facts.path}pos_emb_width: the runtime takes squares only")
    depth = facts.count("num_hidden_layers", 50)
    rope = facts.data.get("rope_parameters") or {}
    last = "full_attention"
    kinds = [
        last if (i + 1) % 4 == 0 or i == depth - 1 else "window_attention" for i in range(depth)
    ]
    return {
        **facts.data,
        "model_type": "muse_glimmer_vision",
        "patch_size": int(facts.size("patch_size", 14)),
        "patch_temporal": int(facts.size("patch_temporal", 2)),
        "merge_size": int(facts.size("merge_size", 2)),
        "pos_emb_height": int(side),
        "pos_emb_width": int(width),
        "hidden_size": int(facts.size("hidden_size", 1536)),
        "intermediate_size": int(facts.size("intermediate_size", 8960)),
        "num_attention_heads": int(facts.size("num_attention_heads", 16)),
        "num_hidden_layers": depth,
        "hidden_act": "gelu",
        "layer_norm_eps": eps,
        "max_position_embeddings": int(facts.size("max_position_embeddings", 1024)),
        "rope_parameters": {"rope_type": "axial", "rope_theta": rope.get("rope_theta", 10000.0)},
        "layer_types": facts.data.get("layer_types", kinds),
    }
