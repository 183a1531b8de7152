"""The Gemma 3 text stack inside multimodal releases: windows with positions of their own."""

from __future__ import annotations

from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.text import gemma, llama
from arch_maps.text.windows import interval, layer_types, rope_by_kind

DEFAULTS: Final = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
}
"""The reference's values, which multimodal releases leave out."""


def sizes(facts: Facts) -> llama.Sizes:
    """Read the sizes."""
    return gemma.sizes(facts, kv_heads=4, sandwich=True, qk_norm=True)


def spell_config(facts: Facts) -> dict[str, Any]:
    """The text section that both runtimes read."""
    gemma.expect_tanh_gelu(facts)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        facts.expect(name, None, default=None, why="the runtimes do not cap these logits")
    facts.expect("attention_bias", False, default=False, why="the runtimes have no such biases")
    s = sizes(facts)
    out = dict(facts.data)
    full, sliding = rope_by_kind(facts, full_theta=1e6, sliding_theta=1e4)
    spell.require_rope_type(facts, full)
    spell.require_rope_type(facts, sliding, allowed=("default",))
    gemma.spell_config(out, facts, s, full)
    kinds = layer_types(facts, s.layers, pattern=int(facts.size("sliding_window_pattern", 6)))
    out.update(
        layer_types=kinds,
        sliding_window_pattern=interval(facts, kinds),
        rope_global_base_freq=full["rope_theta"],
        rope_local_base_freq=sliding["rope_theta"],
        rope_parameters={"full_attention": full, "sliding_attention": sliding},
    )
    return out
