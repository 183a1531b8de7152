"""Gemma 2: soft-capped logits, windows at every other layer."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import gemma, llama
from arch_maps.text.windows import SLIDING, layer_types


def _sizes(facts: Facts) -> llama.Sizes:
    return gemma.sizes(facts, kv_heads=4, sandwich=True)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    gemma.causal_lm(root, facts, _sizes(facts))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    gemma.expect_tanh_gelu(facts)
    out = spell.start(config)
    s = _sizes(facts)
    rope = spell.rope(facts)
    spell.require_rope_type(facts, rope, allowed=("default",))
    gemma.spell_config(out, facts, s, rope)
    out.update(
        attn_logit_softcapping=_cap(facts, "attn_logit_softcapping", 50.0),
        final_logit_softcapping=_cap(facts, "final_logit_softcapping", 30.0),
        query_pre_attn_scalar=facts.number("query_pre_attn_scalar", 256),
        sliding_window=int(facts.size("sliding_window", 4096)),
        layer_types=layer_types(facts, s.layers, pattern=2),
    )
    if SLIDING in out["layer_types"]:
        facts.note(
            f"every other layer attends to the last {out['sliding_window']} tokens; the runtimes "
            "attend to all of them, so results agree up to that length only"
        )
    return out


def _cap(facts: Facts, name: str, default: float) -> float:
    value = facts.number(name, default)
    if name in facts.data and facts.data[name] is None:
        facts.problem(f"config.json: {name} is null; the runtimes always cap these logits")
    return value


MAP = ArchMap(
    model_type="gemma2",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.gemma",),
    remarks=("Neither runtime has the windows of every other layer.",),
)
