"""OLMo Hybrid: gated delta nets with convolutions of their own, every fourth layer attention."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama, olmo_hybrid


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    olmo_hybrid.causal_lm(root, facts, layout)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    llama.expect_silu(facts)
    facts = olmo_hybrid.filled(facts)
    s = olmo_hybrid.sizes(facts)
    out = spell.start(config)
    names = (
        *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim"),
        *("linear_value_head_dim", "linear_conv_kernel_dim"),
    )
    out.update(
        {name: int(facts.size(name)) for name in names},
        num_key_value_heads=int(s.kv_heads),
        head_dim=int(s.head_dim),
        attention_bias=s.attention_bias,
        linear_allow_neg_eigval=facts.flag("linear_allow_neg_eigval", True),
        layer_types=olmo_hybrid.layer_types(facts, s.layers),
        layer_norm_epsilon=1e-5,
        rms_norm_eps=facts.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=s.tied,
        max_position_embeddings=int(facts.size("max_position_embeddings", 65536)),
        **_positions(facts),
    )
    return out


def _positions(facts: Facts) -> dict[str, Any]:
    """Released checkpoints rotate nothing: their rope_theta is null."""
    stated = facts.data.get("rope_parameters") or {}
    if stated.get("rope_theta") is None and facts.data.get("rope_theta") is None:
        return {"rope_theta": None, "rope_parameters": {"rope_theta": None}, "rope_scaling": None}
    rope = spell.rope(facts)
    spell.require_rope_type(facts, rope, allowed=("default",))
    return spell.spell_rope(rope)


_PUBLISHED = {
    "first norm": "attention_layer_norm",
    "second norm": "feedforward_layer_norm",
    "full norm": "post_attention_layernorm",
}
_RUNTIME = {
    "first norm": "input_layernorm",
    "second norm": "post_attention_layernorm",
    "full norm": "post_attention_layernorm",
}

MAP = ArchMap(
    model_type="olmo_hybrid",
    tensors=_tensors,
    config=_config,
    layouts=(
        Layout("published", _PUBLISHED),
        # Transformers 5.23.0 renames the norm after attention in either kind of layer.
        Layout("saved by transformers", {**_PUBLISHED, "full norm": "feedforward_layer_norm"}),
        Layout("transformers names", _RUNTIME),
        Layout("in memory", _RUNTIME),
    ),
    runtimes=("mlx-lm",),
    parts=("text.olmo_hybrid", "text.llama"),
    remarks=(
        "transformers 5.23.0 saves the joint convolution of queries, keys and values as three "
        "equal parts, which is wrong where values are wider; such a checkpoint is refused.",
    ),
)
