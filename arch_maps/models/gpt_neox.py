"""GPT-NeoX, Pythia, Dolly 2 and RedPajama: fused heads, partial rotation, a head of its own."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import gpt_neox


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    gpt_neox.causal_lm(root, facts)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    tanh = ("gelu_fast", "gelu_new", "gelu_pytorch_tanh")
    why = "the runtimes compute the tanh form of GELU"
    facts.expect("hidden_act", "gelu", *tanh, default="gelu", why=why)
    out = spell.start(config)
    rope = spell.rope(facts, default_theta=facts.number("rotary_emb_base", 10000))
    rope.setdefault("partial_rotary_factor", facts.number("rotary_pct", 0.25))
    spell.require_rope_type(facts, rope, allowed=("default",))
    out.update(
        rotary_emb_base=rope["rope_theta"],
        rotary_pct=rope["partial_rotary_factor"],
        layer_norm_eps=facts.number("layer_norm_eps", 1e-5),
        max_position_embeddings=int(facts.size("max_position_embeddings", 2048)),
        use_parallel_residual=facts.flag("use_parallel_residual", True),
        tie_word_embeddings=False,
        **spell.spell_rope(rope),
    )
    return out


MAP = ArchMap(
    model_type="gpt_neox",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.gpt_neox",),
    remarks=(
        "Both runtimes compute the tanh form of GELU where most releases mean the exact one.",
    ),
)
