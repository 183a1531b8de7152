"""Idefics2's connector: a gated MLP, then a perceiver that makes a few tokens of any picture."""

from __future__ import annotations

from typing import Any, Final

from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount
from arch_maps.text.llama import gated_mlp

DEFAULTS: Final = {
    "num_key_value_heads": 4,
    "resampler_depth": 3,
    "resampler_head_dim": 96,
    "resampler_n_heads": 16,
    "resampler_n_latents": 64,
}
"""The reference's sizes."""


def connector(at: Mount, given: Facts, *, vision: int, hidden: int, intermediate: int) -> None:
    """Modality projection and resampler, below ``at``."""
    facts = given.filled(DEFAULTS)
    projection = at / "modality_projection"
    projection.linear("gate_proj", intermediate, vision)
    projection.linear("up_proj", intermediate, vision)
    projection.linear("down_proj", hidden, intermediate)
    resampler = at / "perceiver_resampler"
    resampler.tensor("latents", facts.size("resampler_n_latents"), hidden, kind=Kind.POSITION)
    heads, size = facts.size("resampler_n_heads"), facts.size("resampler_head_dim")
    shared = facts.size("num_key_value_heads")
    for _, layer in resampler.layers("layers", facts.count("resampler_depth")):
        layer.linear("self_attn.q_proj", heads * size, hidden)
        layer.linear("self_attn.k_proj", shared * size, hidden)
        layer.linear("self_attn.v_proj", shared * size, hidden)
        layer.linear("self_attn.o_proj", hidden, heads * size)
        gated_mlp(layer / "mlp", hidden, 4 * hidden)
        for name in ("input_latents_norm", "input_context_norm", "post_attention_layernorm"):
            layer.norm(name, hidden)
    resampler.norm("norm", hidden)


def spell_config(config: dict[str, Any], facts: Facts, text: Facts) -> None:
    """Write the resampler's facts as the runtime reads them, in place."""
    facts.expect("hidden_act", "silu", default="silu", why="the runtime computes SiLU")
    for name, value in DEFAULTS.items():
        config.setdefault(name, value)
    # The reference takes the text's epsilon where the widths as stated differ.
    width = int(facts.size("hidden_size", 4096))
    own = facts.number("rms_norm_eps", 1e-6)
    inherited = width != int(text.size("hidden_size"))
    config.update(
        model_type="idefics2_perceiver",
        hidden_size=int(text.size("hidden_size")),
        rms_norm_eps=text.number("rms_norm_eps", 1e-6) if inherited else own,
    )
