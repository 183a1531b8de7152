"""The Gemma 4 vision tower: patches of any aspect ratio, positions by row and by column."""

from __future__ import annotations

from typing import Any, Final

from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount
from arch_maps.text.gemma import SANDWICH, expect_tanh_gelu

DEFAULTS: Final = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131072,
    "pooling_kernel_size": 3,
    "patch_size": 16,
    "position_embedding_size": 10240,
    "use_clipped_linears": False,
    "standardize": False,
}
"""The reference's values."""

BOUNDS: Final = ("input_min", "input_max", "output_min", "output_max")


def tower(at: Mount, facts: Facts) -> None:
    """Patch embedder, encoder and the standardisation of its output, below ``at``."""
    hidden, patch = facts.size("hidden_size"), facts.size("patch_size")
    clipped = facts.flag("use_clipped_linears", False)
    embedder = at / "patch_embedder"
    embedder.linear("input_proj", hidden, 3 * patch * patch)
    positions = facts.size("position_embedding_size")
    embedder.tensor("position_embedding_table", 2, positions, hidden, kind=Kind.POSITION)
    inner, head = facts.size("intermediate_size"), facts.size("head_dim")
    heads = facts.size("num_attention_heads") * head
    keys = facts.size("num_key_value_heads") * head
    for _, layer in at.layers("encoder.layers", facts.count("num_hidden_layers")):
        attention, mlp = layer / "self_attn", layer / "mlp"
        clippable(attention / "q_proj", heads, hidden, clipped=clipped)
        clippable(attention / "k_proj", keys, hidden, clipped=clipped)
        clippable(attention / "v_proj", keys, hidden, clipped=clipped)
        clippable(attention / "o_proj", hidden, heads, clipped=clipped)
        attention.norm("q_norm", head)
        attention.norm("k_norm", head)
        clippable(mlp / "gate_proj", inner, hidden, clipped=clipped)
        clippable(mlp / "up_proj", inner, hidden, clipped=clipped)
        clippable(mlp / "down_proj", hidden, inner, clipped=clipped)
        for name in SANDWICH:
            layer.norm(name, hidden)
    if facts.flag("standardize", False):
        at.tensor("std_bias", hidden, kind=Kind.BIAS)
        at.tensor("std_scale", hidden, kind=Kind.NORM)


def clippable(at: Mount, out: int, inp: int, *, clipped: bool) -> None:
    """A dense layer without bias, between learned bounds of its input and its output."""
    at.linear("linear", out, inp)
    if clipped:
        for name in BOUNDS:
            at.tensor(name, kind=Kind.BIAS)


def spell_config(facts: Facts, *, output_length: int) -> dict[str, Any]:
    """The vision section as mlx-vlm reads it, from facts that are filled with the defaults."""
    expect_tanh_gelu(facts)
    facts.expect(
        "rms_norm_eps", 1e-6, default=1e-6, why="the runtime norms queries and keys with 1e-6"
    )
    stated = facts.data.get("rope_parameters")
    theta = stated.get("rope_theta") if isinstance(stated, dict) else None
    return {
        **facts.data,
        "model_type": "gemma4_vision",
        "rope_parameters": {"rope_type": "axial", "rope_theta": theta or 100.0},
        "default_output_length": output_length,
    }
