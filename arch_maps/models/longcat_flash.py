"""LongCat Flash: two attentions and two dense MLPs a layer, and experts, some of them idle."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import deepseek, llama, mla, moe

_SUBLAYERS = 2
_NORMS = ("input_layernorm", "post_attention_layernorm")
_IDLE = "experts that do nothing have no weights; transformers writes what it never reads"
_MTP = "multi-token-prediction layers are a drafter of their own, not part of this checkpoint"


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    hidden, vocab = facts.size("hidden_size"), facts.size("vocab_size")
    dense, latent = facts.size("ffn_hidden_size"), mla.sizes(facts)
    e = moe.Experts(
        count=facts.size("n_routed_experts"),
        hidden=hidden,
        intermediate=facts.size("expert_ffn_hidden_size"),
        fused=False,
    )
    idle = facts.size("zero_expert_num") if facts.data.get("zero_expert_num") else 0
    model = root / "model"
    model.embedding("embed_tokens", vocab, hidden)
    for _index, layer in model.layers("layers", facts.count("num_layers")):
        for index in range(_SUBLAYERS):
            mla.attention(layer / f"self_attn.{index}", latent)
            llama.gated_mlp(layer / f"mlps.{index}", hidden, dense)
            for name in _NORMS:
                layer.norm(f"{name}.{index}", hidden)
        block = layer / "mlp"
        block.linear("router.classifier", e.count + idle, hidden, kind=Kind.GATE)
        block.tensor("router.e_score_correction_bias", e.count + idle, kind=Kind.STATE)
        moe.experts(block, e)
        for expert in range(e.count, e.count + idle):
            for name in ("gate_proj", "up_proj"):
                width = (e.intermediate, hidden)
                block.drop(f"experts.{expert}.{name}.weight", _IDLE, *width)
    model.norm("norm", hidden)
    moe.untied(facts)
    root.head("lm_head", vocab, hidden, tied_to=None)
    _drop_mtp(model, facts, latent)


def _drop_mtp(model: Mount, facts: Facts, latent: mla.Sizes) -> None:
    hidden, vocab = facts.size("hidden_size"), facts.size("vocab_size")

    def block(at: Mount) -> None:
        at.embedding("embed_tokens", vocab, hidden)
        at.norm("norm", hidden)
        layer = at / "layers.0"
        layer.linear("eh_proj", hidden, 2 * hidden)
        mla.attention(layer / "self_attn", latent)
        llama.gated_mlp(layer / "transformer_layer.mlp", hidden, facts.size("ffn_hidden_size"))
        for name in ("enorm.m", "hnorm.m", *_NORMS):
            layer.norm(name, hidden)

    moe.drop_block(model, "model.mtp", block, _MTP)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    why = "the reference computes it so"
    facts.expect("attention_method", "MLA", default="MLA", why=why)
    facts.expect("zero_expert_type", "identity", default="identity", why=why)
    for name in ("mla_scale_q_lora", "mla_scale_kv_lora"):
        facts.expect(name, True, default=True, why=why)
    for name in ("norm_topk_prob", "router_bias"):
        facts.expect(name, False, None, default=False, why=why)
    out = spell.start(config)
    deepseek.spell_latent(out, facts, max_positions=131072, eps=1e-5)
    deepseek.spell_rope(out, facts, theta=1e7)
    out.update(
        attention_method="MLA",
        zero_expert_type="identity",
        zero_expert_num=int(facts.data.get("zero_expert_num") or 0),
        mla_scale_q_lora=True,
        mla_scale_kv_lora=True,
        norm_topk_prob=False,
        router_bias=False,
        moe_topk=int(facts.size("moe_topk", 12)),
        n_routed_experts=int(facts.size("n_routed_experts")),
        ffn_hidden_size=int(facts.size("ffn_hidden_size")),
        expert_ffn_hidden_size=int(facts.size("expert_ffn_hidden_size")),
        routed_scaling_factor=facts.number("routed_scaling_factor", 6.0),
        num_layers=facts.count("num_layers"),
    )
    return out


MAP = ArchMap(
    model_type="longcat_flash",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.deepseek", "text.mla", "text.moe"),
)
