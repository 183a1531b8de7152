"""Falcon-H1: attention and a Mamba-2 mixer side by side, with multipliers on every projection."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import falcon_h1, llama

_UNBOUNDED = [0.0, float("inf")]


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    falcon_h1.causal_lm(root, facts)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    limits = facts.data.get("time_step_limit")
    if limits is not None and [float(v) for v in spell.start({"l": limits})["l"]] != _UNBOUNDED:
        facts.problem("config.json: time_step_limit must be [0, Infinity]: the runtimes fix it")
    s, m = llama.sizes(facts, kv_heads=8), falcon_h1.mamba(facts)
    out = spell.start(config)
    llama.spell_config(out, facts, s, max_positions=8192, eps=("rms_norm_eps", 1e-5))
    numbers = (
        *("attention_in_multiplier", "attention_out_multiplier", "key_multiplier"),
        *("embedding_multiplier", "lm_head_multiplier", "ssm_in_multiplier", "ssm_out_multiplier"),
    )
    out.update(
        {name: facts.number(name, 1.0) for name in numbers},
        mlp_multipliers=falcon_h1.multipliers(facts, "mlp_multipliers", 2),
        ssm_multipliers=falcon_h1.multipliers(facts, "ssm_multipliers", 5),
        mamba_d_ssm=int(m.heads) * int(m.head_dim),
        mamba_n_heads=int(m.heads),
        mamba_d_head=int(m.head_dim),
        mamba_n_groups=int(m.groups),
        mamba_d_state=int(m.state),
        mamba_d_conv=int(m.kernel),
        mamba_conv_bias=m.conv_bias,
        mamba_proj_bias=m.proj_bias,
        mamba_rms_norm=facts.flag("mamba_rms_norm", False),
        mamba_norm_before_gate=facts.flag("mamba_norm_before_gate", True),
        projectors_bias=facts.flag("projectors_bias", False),
        attention_bias=s.attention_bias,
        mlp_bias=s.mlp_bias,
        rope_traditional=False,
    )
    return out


MAP = ArchMap(
    model_type="falcon_h1",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.falcon_h1", "text.llama"),
    remarks=(
        "The multipliers are folded into the weights, as the runtimes expect, which rounds once.",
    ),
)
