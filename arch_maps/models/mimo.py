"""MiMo 7B: Qwen2's stack, published with a drafter's layer that the runtimes do not run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama, moe

_MTP = "multi-token-prediction layers are a drafter of their own, not part of this checkpoint"


def _sizes(facts: Facts) -> llama.Sizes:
    return replace(llama.sizes(facts, qkv_bias=True), attention_bias=False, mlp_bias=False)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    s = _sizes(facts)
    llama.causal_lm(root, s)

    def drafter(at: Mount) -> None:
        llama.attention(at / "self_attn", s)
        llama.gated_mlp(at / "mlp", s.hidden, s.intermediate)
        at.linear("input_proj", s.hidden, 2 * s.hidden)
        for name in (*s.norms, "token_layernorm", "hidden_layernorm", "final_layernorm"):
            at.norm(name, s.hidden)

    for index in range(int(facts.data.get("num_nextn_predict_layers") or 0)):
        moe.drop_block(root, f"model.mtp_layers.{index}", drafter, _MTP)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    facts.expect("attention_bias", True, default=True, why="the runtimes have these biases")
    out, s = spell.start(config), _sizes(facts)
    if int(s.head_dim) * int(s.heads) != int(s.hidden):
        facts.problem("config.json: head_dim must be hidden_size / num_attention_heads here")
    llama.spell_config(out, facts, s, max_positions=32768)
    out.update(attention_bias=True, rope_traditional=False, num_nextn_predict_layers=0)
    return out


MAP = ArchMap(
    model_type="mimo",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama",),
)
