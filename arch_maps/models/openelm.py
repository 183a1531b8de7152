"""OpenELM, whose releases bring their own model code."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import openelm


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    openelm.causal_lm(root, facts)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    why = "the runtimes compute it so whatever it says"
    facts.expect("ffn_with_glu", True, default=True, why=why)
    facts.expect("activation_fn_name", "swish", "silu", default="swish", why=why)
    facts.expect("normalization_layer_name", "rms_norm", default="rms_norm", why=why)
    out = spell.start(config)
    out.update(
        ffn_dim_divisor=int(facts.size("ffn_dim_divisor", 256)),
        ffn_with_glu=True,
        normalize_qk_projections=facts.flag("normalize_qk_projections", False),
        share_input_output_layers=facts.flag("share_input_output_layers", False),
        rms_norm_eps=1e-6,
        rope_freq_constant=facts.number("rope_freq_constant", 10000),
    )
    return out


MAP = ArchMap(
    model_type="openelm",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.openelm",),
)
