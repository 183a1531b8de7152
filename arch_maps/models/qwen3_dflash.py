"""DFlash drafters of Qwen3 and Qwen3.5: blocks of tokens at once, from the model's hidden states.

Their layers are Qwen3's. They have no embedding and no head, but read those of the model they
draft for, whose states at a few layers one projection brings together.
"""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama

_ATTENTION = ("full_attention", "sliding_attention")


def _sizes(facts: Facts) -> llama.Sizes:
    return llama.sizes(facts, kv_heads=32, head_dim=128, qk_norm=True)


def _read_layers(facts: Facts) -> list[int]:
    """Layers of the model whose states the drafter reads."""
    found = facts.section("dflash_config").data.get("target_layer_ids")
    if not isinstance(found, list) or not found or not all(type(n) is int for n in found):
        facts.problem("config.json: dflash_config.target_layer_ids must list layers of the model")
        return [0]
    return found


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    s, read = _sizes(facts), _read_layers(facts)
    facts.expect("attention_bias", False, default=False, why="the runtime has no such biases")
    root.linear("fc", s.hidden, len(read) * s.hidden)
    root.norm("hidden_norm", s.hidden)
    for _index, layer in root.layers("layers", s.layers):
        llama.attention(layer / "self_attn", s)
        llama.mlp(layer / "mlp", s)
        for name in s.norms:
            layer.norm(name, s.hidden)
    root.norm("norm", s.hidden)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    s, own, read = _sizes(facts), facts.section("dflash_config"), _read_layers(facts)
    llama.spell_config(out, facts, s, max_positions=32768)
    kinds = facts.data.get("layer_types") or [_ATTENTION[0]] * s.layers
    if len(kinds) != s.layers or not set(kinds) <= set(_ATTENTION):
        facts.problem(f"config.json: layer_types must list {s.layers} of {', '.join(_ATTENTION)}")
    if facts.flag("use_sliding_window", False) and "layer_types" not in facts.data:
        facts.problem("config.json: use_sliding_window needs layer_types to say in which layers")
    # The runtime reads the block's size at the top alone, and the rest in the section first.
    out.update(
        block_size=int(facts.size("block_size", own.data.get("block_size", 16))),
        layer_types=list(kinds),
        num_target_layers=int(facts.size("num_target_layers", max(read) + 1)),
        attention_bias=False,
    )
    out["dflash_config"]["mask_token_id"] = int(own.size("mask_token_id"))
    return out


MAP = ArchMap(
    model_type="qwen3_dflash",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm",),
    parts=("text.llama",),
    remarks=("A drafter: it runs beside the converted model only (--draft-model).",),
)
