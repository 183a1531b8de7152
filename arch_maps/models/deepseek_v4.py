"""DeepSeek V4: compressed attention, hyper-connections, experts chosen by score or by token."""

from __future__ import annotations

from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.ops import Reshape
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import hyper, llama, moe

_RATIOS: Final = {
    "sliding_attention": 0,
    "compressed_sparse_attention": 4,
    "heavily_compressed_attention": 128,
}
"""Tokens to a compressed one, by transformers' name of the kind of layer."""
_CHOSEN = 4
"""The ratio of layers that choose among their compressed tokens, which overlap there."""
_EXPERT = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def _ratios(facts: Facts) -> list[int]:
    layers, listed = facts.count("num_hidden_layers"), facts.data.get("compress_ratios")
    kinds = facts.data.get("layer_types")
    if kinds is not None and len(kinds) == layers and set(kinds) <= set(_RATIOS):
        return [_RATIOS[kind] for kind in kinds]
    if listed is not None and len(listed) >= layers and set(listed) <= set(_RATIOS.values()):
        return list(listed[:layers])
    if kinds is not None or listed is not None:
        facts.problem(f"config.json: {facts.path}compress_ratios must list {layers} of 0, 4, 128")
    return [128] * min(layers, 2) + [4 if index % 2 else 128 for index in range(layers - 2)]


def _by_token(facts: Facts) -> int:
    """First layers whose experts follow from the token itself."""
    kinds = facts.data.get("mlp_layer_types")
    if kinds is None:
        return int(facts.data.get("num_hash_layers", 3) or 0)
    first = int(kinds.count("hash_moe"))
    if kinds != ["hash_moe"] * first + ["moe"] * (len(kinds) - first):
        facts.problem(f"config.json: {facts.path}mlp_layer_types must name hash_moe layers first")
    return first


def _rotated(facts: Facts) -> int:
    """Rotated dimensions of a head."""
    if facts.data.get("qk_rope_head_dim") is not None:
        return int(facts.size("qk_rope_head_dim"))
    return int(int(facts.size("head_dim", 512)) * facts.number("partial_rotary_factor", 64 / 512))


def _compressor(at: Mount, hidden: int, head: int, ratio: int) -> None:
    rows = head * 2 if ratio == _CHOSEN else head
    at.linear("wkv", rows, hidden)
    at.linear("wgate", rows, hidden, kind=Kind.GATE)
    at.tensor("ape", ratio, rows, kind=Kind.STATE)
    at.norm("norm", head)


def _attention(at: Mount, facts: Facts, ratio: int) -> None:
    hidden, heads = facts.size("hidden_size"), facts.size("num_attention_heads")
    head, rank = facts.size("head_dim", 512), facts.size("q_lora_rank", 1024)
    groups, low = facts.size("o_groups", 8), facts.size("o_lora_rank", 1024)
    at.linear("wq_a", rank, hidden)
    at.norm("q_norm", rank)
    at.linear("wq_b", heads * head, rank)
    at.linear("wkv", head, hidden)
    at.norm("kv_norm", head)
    narrow = heads * head // int(groups)
    inner = at.input("wo_a.weight", groups * low, narrow)
    at.rule("wo_a.weight", Reshape(inner, (groups, low, narrow)), Kind.LINEAR)
    at.linear("wo_b", hidden, groups * low)
    at.tensor("attn_sink", heads, kind=Kind.STATE)
    if ratio:
        _compressor(at / "compressor", hidden, head, ratio)
    if ratio == _CHOSEN:
        indexer, small = at / "indexer", facts.size("index_head_dim", 128)
        count = facts.size("index_n_heads", 64)
        indexer.linear("wq_b", count * small, rank)
        indexer.linear("weights_proj", count, hidden, kind=Kind.GATE)
        _compressor(indexer / "compressor", hidden, small, ratio)


def _experts(at: Mount, facts: Facts, *, by_token: bool) -> None:
    hidden, width = facts.size("hidden_size"), facts.size("moe_intermediate_size", 2048)
    e = moe.Experts(
        count=facts.size("n_routed_experts", 256),
        hidden=hidden,
        intermediate=width,
        fused=False,
        names=("w1", "w3", "w2"),
    )
    at.linear("gate", e.count, hidden, kind=Kind.GATE)
    if by_token:
        table = (facts.size("vocab_size"), facts.size("num_experts_per_tok", 6))
        at.tensor("gate.tid2eid", *table, kind=Kind.INDEX)
    else:
        at.rule("gate.e_score_correction_bias", at.input("gate.bias", e.count), Kind.STATE)
    moe.experts(at, e)
    for name, ours in _EXPERT.items():
        shape = (hidden, width) if name == "down_proj" else (width, hidden)
        weight = at.input(f"shared_experts.{ours}.weight", *shape)
        at.rule(f"shared_experts.{name}.weight", weight, Kind.LINEAR)


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    hidden, vocab = facts.size("hidden_size"), facts.size("vocab_size")
    ratios, by_token = _ratios(facts), _by_token(facts)
    model = root.at(source=layout["stack"], target="model")
    table = model.input(f"{layout['embed']}.weight", vocab, hidden)
    model.rule("embed_tokens.weight", table, Kind.EMBEDDING)
    for index, layer in model.layers("layers", len(ratios)):
        _attention(layer / "attn", facts, ratios[index])
        _experts(layer / "ffn", facts, by_token=index < by_token)
        hyper.connections(layer, facts)
        layer.norm("attn_norm", hidden)
        layer.norm("ffn_norm", hidden)
    streams = facts.size("hc_mult", 4)
    for name, shape in (("fn", (streams, streams * hidden)), ("base", (streams,)), ("scale", (1,))):
        found = model.input(f"{layout['head']}{name}", *shape)
        model.rule(f"hc_head.{name}", found, Kind.STATE)
    model.norm("norm", hidden)
    moe.untied(facts)
    root.rule("lm_head.weight", root.input("head.weight", vocab, hidden), Kind.HEAD)


def _ropes(facts: Facts) -> tuple[dict[str, Any], dict[str, Any]]:
    """Position settings of plain layers, and of those that compress."""
    given = facts.data.get("rope_parameters")
    if isinstance(given, dict) and isinstance(given.get("compress"), dict):
        plain, compressed = (
            spell.rope(Facts({"rope_parameters": given.get(name)}, parent=facts))
            for name in ("main", "compress")
        )
    else:
        scaling = facts.data.get("rope_scaling") or given
        theta = facts.number("compress_rope_theta", 160000.0)
        plain = {"rope_type": "default", "rope_theta": facts.number("rope_theta", 10000.0)}
        compressed = spell.rope(Facts({"rope_scaling": scaling}, parent=facts))
        compressed["rope_theta"] = theta
    spell.require_rope_type(facts, plain, allowed=("default",))
    spell.require_rope_type(facts, compressed, allowed=("default", "yarn"))
    if compressed.get("attention_factor") not in (None, 1, 1.0):
        facts.problem("config.json: rope_parameters.compress.attention_factor must be 1")
    return plain, compressed


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    llama.expect_silu(facts)
    for name in ("attention_bias", "mlp_bias"):
        facts.expect(name, False, default=False, why="no release has such biases")
    out = spell.start(config)
    ratios, (plain, compressed) = _ratios(facts), _ropes(facts)
    head, rotated = int(facts.size("head_dim", 512)), _rotated(facts)
    part = {"partial_rotary_factor": rotated / head}
    out.pop("rope_scaling", None)
    if compressed["rope_type"] != "default":
        kept = {k: v for k, v in compressed.items() if k != "rope_theta"}
        out["rope_scaling"] = kept | {"type": compressed["rope_type"]}
    kinds = {ratio: kind for kind, ratio in _RATIOS.items()}
    by_token = _by_token(facts)
    hashed = ["hash_moe"] * by_token + ["moe"] * (len(ratios) - by_token)
    numbers = {"routed_scaling_factor": 1.5, "swiglu_limit": 10.0}
    sizes = {
        **{"num_experts_per_tok": 6, "n_routed_experts": 256, "moe_intermediate_size": 2048},
        **{"q_lora_rank": 1024, "o_groups": 8, "o_lora_rank": 1024, "sliding_window": 128},
        **{"index_n_heads": 64, "index_head_dim": 128, "index_topk": 512, "n_shared_experts": 1},
        "max_position_embeddings": 1048576,
    }
    out.update(
        {name: facts.number(name, default) for name, default in numbers.items()},
        **{name: int(facts.size(name, default)) for name, default in sizes.items()},
        head_dim=head,
        qk_rope_head_dim=rotated,
        num_key_value_heads=1,
        partial_rotary_factor=rotated / head,
        compress_ratios=ratios,
        layer_types=[kinds[ratio] for ratio in ratios],
        num_hash_layers=by_token,
        mlp_layer_types=hashed,
        rope_theta=plain["rope_theta"],
        compress_rope_theta=compressed["rope_theta"],
        rope_parameters={"main": plain | part, "compress": compressed | part},
        scoring_func=facts.data.get("scoring_func") or "sqrtsoftplus",
        norm_topk_prob=facts.flag("norm_topk_prob", True),
        rms_norm_eps=facts.number("rms_norm_eps", 1e-6),
        vision_n_layers=0,
        tie_word_embeddings=False,
    )
    hyper.spell_config(out, facts)
    return out


MAP = ArchMap(
    model_type="deepseek_v4",
    tensors=_tensors,
    config=_config,
    layouts=(
        Layout("published", {"stack": "", "embed": "embed", "head": "hc_head_"}),
        Layout(
            "transformers 5",
            {"stack": "model", "embed": "embed_tokens", "head": "hc_head.hc_"},
            {"attn.kv_norm.weight": "attn.norm.weight"},
        ),
    ),
    runtimes=("mlx-vlm",),
    parts=("text.llama", "text.moe", "text.hyper"),
)
