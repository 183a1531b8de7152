"""Jina VLM's tower: SigLIP's blocks with one projection for q, k and v, and a pooling connector."""

from __future__ import annotations

from typing import Any

from arch_maps.facts import Dim, Facts
from arch_maps.rules import Kind, Mount


def _inner(facts: Facts) -> Dim:
    return facts.section("block_config").section("ffn_config").size("size")


def tower(at: Mount, facts: Facts) -> None:
    """Patches as a dense layer, positions, pre-norm layers and the last norm, below ``at``."""
    hidden, inner, patch = facts.size("hidden_size"), _inner(facts), facts.size("patch_size")
    height, width = facts.pair("input_size", (378, 378))
    channels = facts.size("n_channels", 3)
    at.linear("patch_embed.proj", hidden, channels * patch * patch, bias=True)
    positions = (height // int(patch)) * (width // int(patch))
    at.tensor("pos_embed", positions, hidden, kind=Kind.POSITION)
    for _, layer in at.layers("layers", facts.count("n_layers")):
        layer.norm("attn_norm", hidden, bias=True)
        layer.linear("attn.qkv", 3 * hidden, hidden, bias=True)
        layer.linear("attn.out", hidden, hidden, bias=True)
        layer.norm("ffn_norm", hidden, bias=True)
        layer.linear("ffn.up", inner, hidden, bias=True)
        layer.linear("ffn.down", hidden, inner, bias=True)
    at.norm("post_norm", hidden, bias=True)


def connector(at: Mount, facts: Facts, out: int) -> None:
    """What stands for padding, attention over neighbouring patches, and a gated projector."""
    read = facts.data.get("vit_layers")
    layers = len(read) if isinstance(read, list) else 2
    hidden = facts.size("hidden_size")
    pooled = hidden * layers
    inner = facts.section("vl_connector_config").section("mlp_projector_config").size("size")
    at.tensor("pad_embed", 2, pooled, kind=Kind.POSITION)
    at.linear("pooling.q", hidden, pooled, bias=True)
    at.linear("pooling.kv", 2 * hidden, pooled, bias=True)
    at.linear("pooling.out", hidden, hidden, bias=True)
    at.linear("projector.gate_up", 2 * inner, hidden)
    at.linear("projector.down", out, inner)


def spell_config(config: dict[str, Any], facts: Facts, text_hidden: int) -> None:
    """Write the tower's facts as the runtime reads them once more, flat, in place."""
    facts.expect("use_cls_token", False, default=False, why="the runtime has no class token")
    facts.expect("post_lnorm", True, default=True, why="the runtime norms the last layer's output")
    heads = facts.section("block_config").section("attn_config")
    heads.expect("q_bias", True, default=True, why="this map is checked with these biases")
    if int(heads.size("n_heads")) * int(heads.size("head_dim")) != int(facts.size("hidden_size")):
        facts.problem(f"config.json: {facts.path}hidden_size must be n_heads * head_dim")
    joint = facts.section("vl_connector_config")
    config.update(
        model_type="jina_vlm",
        num_hidden_layers=facts.count("n_layers"),
        num_attention_heads=int(heads.size("n_heads")),
        head_dim=int(heads.size("head_dim")),
        intermediate_size=int(_inner(facts)),
        image_size=facts.pair("input_size", (378, 378))[0],
        connector_hidden_size=int(joint.section("mlp_projector_config").size("size")),
        pooling_h=int(joint.size("pooling_h", 2)),
        pooling_w=int(joint.size("pooling_w", 2)),
        output_size=text_hidden,
    )
