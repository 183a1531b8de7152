"""Hy 4: gated latent attention over chosen tokens, hyper-connections, sigmoid-routed experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.ops import Concat, Expr, Reshape, Slice, Source
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import deepseek, dsa, llama, mla

_PARTS = ("fn", "base", "scale")
_SAVED = {
    **{f"hc_head.hc_head_{part}": f"hc_pre.hc_head.hc_head_{part}" for part in _PARTS},
    **{
        f"{layer}.hc_pre.hc_{part}": f"hc_pre.{layer}.hc_{part}"
        for layer in ("hc_attn_layer", "hc_mlp_layer")
        for part in _PARTS
    },
    "mlp.gate_proj.weight": "mlp.linear_gate.weight",
    "shared_experts.gate_proj.weight": "shared_experts.linear_gate.weight",
}
"""Names as transformers 5 writes them, which undoes its renaming of others too."""
_NORMS = ("input_layernorm", "post_attention_layernorm")


def _last_rotated(x: Source, heads: int, size: int, rope: int) -> Expr:
    """Rows of each head with the rotated ones first, as neighbours; the release has them last."""
    rest = x.shape[1:]
    by_head = Reshape(x, (heads, size, *rest))
    kept = Slice(by_head, 1, 0, size - rope)
    turned = Reshape(Slice(by_head, 1, size - rope, size), (heads * rope, *rest))
    turned = Reshape(mla.neighbours(turned, heads), (heads, rope, *rest))
    return Reshape(Concat((turned, kept), 1), x.shape)


def _indexer(at: Mount, facts: Facts) -> None:
    heads, size = int(facts.size("index_n_heads")), int(facts.size("index_head_dim"))
    hidden, rope = facts.size("hidden_size"), int(facts.size("qk_rope_head_dim"))
    queries = at.input("wq_b.weight", heads * size, facts.size("q_lora_rank", 1536))
    at.rule("wq_b.weight", _last_rotated(queries, heads, size, rope), Kind.LINEAR)
    keys = at.input("wk.weight", size, hidden)
    at.rule("wk.weight", _last_rotated(keys, 1, size, rope), Kind.LINEAR)
    for name, kind in (("weight", Kind.NORM), ("bias", Kind.BIAS)):
        part = at.input(f"k_norm.{name}", size)
        at.rule(f"k_norm.{name}", _last_rotated(part, 1, size, rope), kind)
    at.linear("weights_proj", heads, hidden, kind=Kind.GATE)


def _hyper(at: Mount, name: str, rows: int, scales: int, width: int) -> None:
    """How the streams of the residual are read and written."""
    at.tensor(f"{name}fn", rows, width, kind=Kind.STATE)
    at.tensor(f"{name}base", rows, kind=Kind.STATE)
    at.tensor(f"{name}scale", scales, kind=Kind.STATE)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    facts.expect("attention_bias", False, default=False, why="no release has such biases")
    s = llama.sizes(facts)
    latent = replace(mla.sizes(facts), q_rank=facts.size("q_lora_rank", 1536))
    e = deepseek.routed(facts, fused=True)
    dense, kinds, streams = deepseek.dense_first(facts, 1), _kinds(facts), facts.size("hc_mult", 4)
    width = streams * s.hidden
    if int(latent.rope) % 2 or int(latent.rope) > facts.size("index_head_dim"):
        facts.problem(f"config.json: {facts.path}qk_rope_head_dim must be even and fit the indexer")
    if facts.problems:  # no rows can be reordered without their sizes
        return
    model = root / "model"
    model.embedding("embed_tokens", s.vocab, s.hidden)
    for index, layer in model.layers("layers", s.layers):
        at = layer / "self_attn"
        mla.attention(at, latent, halves=True)
        at.linear("linear_gate", latent.heads * latent.value, s.hidden)
        at.tensor("learnable_sink_param", latent.heads, kind=Kind.STATE)
        if kinds[index] == "full":
            _indexer(at / "indexer", facts)
        for name in ("hc_attn_layer", "hc_mlp_layer"):
            _hyper(layer / name, "hc_pre.hc_", 2 * streams, 2, width)
        block = layer / "mlp"
        if index < dense:
            llama.gated_mlp(block, s.hidden, s.intermediate)
        else:
            block.linear("gate", e.count, s.hidden, kind=Kind.GATE)
            block.tensor("gate.e_score_correction_bias", e.count, kind=Kind.STATE)
            both = block.input("experts.gate_up_proj", e.count, 2 * e.intermediate, s.hidden)
            block.rule("switch_mlp.gate_up_proj.weight", both, Kind.LINEAR)
            down = block.input("experts.down_proj", e.count, s.hidden, e.intermediate)
            block.rule("switch_mlp.down_proj.weight", down, Kind.LINEAR)
            shared = facts.size("n_shared_experts", 1) * e.intermediate
            llama.gated_mlp(block / "shared_experts", s.hidden, shared)
        for name in _NORMS:
            layer.norm(name, s.hidden)
    _hyper(model / "hc_head", "hc_head_", streams, 1, width)
    model.norm("norm", s.hidden)
    root.head("lm_head", s.vocab, s.hidden, tied_to=None)


def _kinds(facts: Facts) -> list[str]:
    layers = facts.count("num_hidden_layers")
    default = ["full" if i == 0 or (i - 1) % 4 == 0 else "shared" for i in range(layers)]
    kinds = facts.data.get("indexer_types") or default
    if len(kinds) != layers or set(kinds) - {"full", "shared"} or kinds[0] != "full":
        facts.problem(f"config.json: {facts.path}indexer_types must list {layers} layers")
        return default
    return list(kinds)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    deepseek.spell_latent(out, facts, max_positions=262144, eps=1e-5)
    deepseek.spell_rope(out, facts)
    deepseek.spell_routing(out, facts, dense=deepseek.dense_first(facts, 1))
    deepseek.sigmoid_routing(out, facts)
    dsa.spell_config(out, facts, interleaved=True)
    facts.note(
        f"the release clamps the experts' inputs at {facts.number('swiglu_limit', 10.0):g}; "
        "the runtime does not"
    )
    out.update(
        indexer_types=_kinds(facts),
        routed_scaling_factor=facts.number("routed_scaling_factor", 2.827),
        hc_mult=int(facts.size("hc_mult", 4)),
        hc_eps=facts.number("hc_eps", 1e-6),
        hc_magnitude=facts.number("hc_magnitude", 2.0),
    )
    return out


MAP = ArchMap(
    model_type="hy_v4",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}), Layout("transformers 5", {}, _SAVED)),
    runtimes=("mlx-vlm",),
    parts=("text.deepseek", "text.mla", "text.dsa", "text.moe"),
    remarks=("mlx-vlm rotates neighbouring dimensions, so the rows that rotate are reordered.",),
)
