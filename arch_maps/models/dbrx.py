"""DBRX: clipped attention from one projection, softmax-routed experts stored as one tensor."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.ops import Permute, Slice
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import moe


def _experts(at: Mount, count: int, width: int, hidden: int) -> None:
    """``w2(silu(w1(x)) * v1(x))``: [experts * width, hidden] each, apart in the runtimes."""
    for name in ("w1", "v1", "w2"):
        stacked = at.input(f"mlp.{name}", count * width, hidden)
        for index in range(count):
            one = Slice(stacked, 0, index * int(width), (index + 1) * int(width))
            weight = Permute(one, (1, 0)) if name == "w2" else one
            at.rule(f"{index}.{name}.weight", weight, Kind.LINEAR)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    hidden, heads, vocab = facts.size("d_model"), facts.size("n_heads"), facts.size("vocab_size")
    attention, mixture = facts.section("attn_config"), facts.section("ffn_config")
    size = hidden // int(heads)
    count, width = mixture.size("moe_num_experts"), mixture.size("ffn_hidden_size")
    model = root / "transformer"
    model.embedding("wte", vocab, hidden)
    for _index, layer in model.layers("blocks", facts.count("n_layers")):
        block = layer / "norm_attn_norm"
        block.norm("norm_1", hidden)
        block.norm("norm_2", hidden)
        block.linear("attn.Wqkv", (heads + 2 * attention.size("kv_n_heads")) * size, hidden)
        block.linear("attn.out_proj", hidden, hidden)
        layer.linear("ffn.router.layer", count, hidden, kind=Kind.GATE)
        _experts(layer / "ffn.experts", count, width, hidden)
    model.norm("norm_f", hidden)
    moe.untied(facts)
    root.head("lm_head", vocab, hidden, tied_to=None)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    attention, mixture = facts.section("attn_config"), facts.section("ffn_config")
    settings = spell.rope(facts)
    settings["rope_theta"] = attention.number("rope_theta", settings["rope_theta"])
    spell.require_rope_type(facts, settings, allowed=("default",))
    activation = mixture.data.get("ffn_act_fn") or {"name": "silu"}
    if activation != {"name": "silu"}:
        facts.problem(f"config.json: ffn_config.ffn_act_fn is {activation}; the runtimes have SiLU")
    why = "the runtimes divide the chosen weights by their sum"
    mixture.expect("moe_normalize_expert_weights", 1, default=1, why=why)
    out["attn_config"] |= {
        "kv_n_heads": int(attention.size("kv_n_heads")),
        "clip_qkv": attention.number("clip_qkv"),
        "rope_theta": settings["rope_theta"],
    }
    out["ffn_config"] |= {
        "ffn_hidden_size": int(mixture.size("ffn_hidden_size")),
        "moe_num_experts": int(mixture.size("moe_num_experts")),
        "moe_top_k": int(mixture.size("moe_top_k")),
    }
    out.update(
        tie_word_embeddings=False,
        max_seq_len=int(facts.size("max_seq_len", 2048)),
        **spell.spell_rope(settings),
    )
    return out


MAP = ArchMap(
    model_type="dbrx",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.moe",),
)
