"""MiniMax M3: block-sparse attention, sigmoid-routed experts and a shared one, a ViT beside."""

from __future__ import annotations

from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama, moe
from arch_maps.vision import minimax_vit

_INDEX: Final = {
    "index_n_heads": ("sparse_num_index_heads", 4),
    "index_head_dim": ("sparse_index_dim", 128),
    "index_block_size": ("sparse_block_size", 128),
    "index_topk_blocks": ("sparse_topk_blocks", 16),
    "index_local_blocks": ("sparse_local_block", 1),
}
"""The indexer's settings: transformers 5's names, the release's, and the reference's defaults."""
_SPARSE = "minimax_m3_sparse"


def _indexer(text: Facts) -> dict[str, int]:
    nested = text.data.get("sparse_attention_config") or {}
    stated = {ours: nested.get(theirs, text.data.get(ours)) for ours, (theirs, _) in _INDEX.items()}
    facts = Facts(stated, path=text.path, parent=text)
    return {name: int(facts.size(name, default)) for name, (_, default) in _INDEX.items()}


def _layers(text: Facts, listed: str, flags: Any, named: str, *, default: bool) -> list[bool]:
    """Which layers are ``named``, as words by transformers' key or flags by the release's."""
    count, words = text.count("num_hidden_layers"), text.data.get(listed)
    if isinstance(words, list) and len(words) == count:
        return [word == named for word in words]
    if isinstance(flags, list) and len(flags) == count:
        return [bool(flag) for flag in flags]
    if words is not None or flags is not None:
        text.problem(f"config.json: {text.path}{listed} must list {count} layers")
    return [default] * count


def _chosen(text: Facts) -> list[bool]:
    """Which layers attend to chosen blocks only."""
    flags = (text.data.get("sparse_attention_config") or {}).get("sparse_attention_freq")
    return _layers(text, "layer_types", flags, _SPARSE, default=False)


def _routed(text: Facts) -> list[bool]:
    flags = text.data.get("moe_layer_freq")
    return _layers(text, "mlp_layer_types", flags, "sparse", default=True)


def _sizes(text: Facts) -> llama.Sizes:
    return llama.sizes(text, kv_heads=4, head_dim=128, qk_norm=True)


def _text(root: Mount, text: Facts) -> None:
    s, index, chosen, routed = _sizes(text), _indexer(text), _chosen(text), _routed(text)
    e = moe.Experts(
        count=moe.expert_count(text, 128),
        hidden=s.hidden,
        intermediate=s.intermediate,
        fused=False,
        names=("w1", "w3", "w2"),
    )
    model = root / "model"
    model.embedding("embed_tokens", s.vocab, s.hidden)
    for number, layer in model.layers("layers", s.layers):
        at = layer / "self_attn"
        llama.attention(at, s)
        if chosen[number]:
            at.linear("index_q_proj", index["index_n_heads"] * index["index_head_dim"], s.hidden)
            at.linear("index_k_proj", index["index_head_dim"], s.hidden)
            at.norm("index_q_norm", index["index_head_dim"])
            at.norm("index_k_norm", index["index_head_dim"])
        if routed[number]:
            block = layer / "block_sparse_moe"
            block.linear("gate", e.count, s.hidden, kind=Kind.GATE)
            block.tensor("e_score_correction_bias", e.count, kind=Kind.STATE)
            moe.experts(block, e)
            width = text.size("shared_intermediate_size", 3072)
            llama.gated_mlp(block / "shared_experts", s.hidden, width)
        else:
            dense = text.size("dense_intermediate_size", 12288)
            llama.gated_mlp(layer / "mlp", s.hidden, dense)
        layer.norm("input_layernorm", s.hidden)
        layer.norm("post_attention_layernorm", s.hidden)
    model.norm("norm", s.hidden)
    moe.untied(text)
    root.head("lm_head", s.vocab, s.hidden, tied_to=None)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    text, vision = facts.section("text_config"), facts.section("vision_config")
    _text(root / "language_model", text)
    minimax_vit.tower(
        root.at(source="vision_tower", target="vision_tower", part="vision") / "vision_model",
        vision,
    )
    hidden, middle = text.size("hidden_size"), facts.size("projector_hidden_size", 6144)
    if middle != hidden:
        facts.problem("config.json: projector_hidden_size must be the text's hidden_size here")
    merged = hidden * int(vision.size("spatial_merge_size", 2)) ** 2
    between = root.at(source="", target="", part="projector")
    between.linear(
        "multi_modal_projector.linear_1", middle, vision.size("hidden_size", 1280), bias=True
    )
    between.linear("multi_modal_projector.linear_2", hidden, middle, bias=True)
    between.linear("patch_merge_mlp.linear_1", hidden, merged, bias=True)
    between.linear("patch_merge_mlp.linear_2", hidden, hidden, bias=True)


def _spell_text(text: Facts) -> dict[str, Any]:
    why = "the reference computes it so"
    for name in ("use_qk_norm", "use_gemma_norm", "use_routing_bias"):
        text.expect(name, True, default=True, why=why)
    text.expect("scoring_func", "sigmoid", default="sigmoid", why=why)
    text.expect("attention_output_gate", False, default=False, why=why)
    out, s, index = spell.start(text.data), _sizes(text), _indexer(text)
    chosen, routed = _chosen(text), _routed(text)
    rope = spell.rope(text, default_theta=5e6)
    spell.require_rope_type(text, rope, allowed=("default",))
    rotated = int(text.size("rotary_dim", 64))
    rope["partial_rotary_factor"] = rotated / int(s.head_dim)
    nested = {theirs: index[ours] for ours, (theirs, _) in _INDEX.items()}
    moe.spell_expert_count(out, moe.expert_count(text, 128))
    out.update(
        spell.spell_rope(rope),
        head_dim=int(s.head_dim),
        num_key_value_heads=int(s.kv_heads),
        rotary_dim=rotated,
        rms_norm_eps=text.number("rms_norm_eps", 1e-6),
        max_position_embeddings=int(text.size("max_position_embeddings", 524288)),
        tie_word_embeddings=False,
        num_experts_per_tok=int(text.size("num_experts_per_tok", 4)),
        n_shared_experts=1,
        dense_intermediate_size=int(text.size("dense_intermediate_size", 12288)),
        shared_intermediate_size=int(text.size("shared_intermediate_size", 3072)),
        routed_scaling_factor=text.number("routed_scaling_factor", 2.0),
        swiglu_alpha=text.number("swiglu_alpha", 1.702),
        swiglu_limit=text.number("swiglu_limit", 7.0),
        layer_types=[_SPARSE if one else "full_attention" for one in chosen],
        mlp_layer_types=["sparse" if one else "dense" for one in routed],
        moe_layer_freq=[int(one) for one in routed],
        sparse_attention_config={**nested, "sparse_attention_freq": [int(one) for one in chosen]},
        use_qk_norm=True,
        use_gemma_norm=True,
        use_routing_bias=True,
        scoring_func="sigmoid",
        attention_output_gate=False,
        # Else mlx-vlm joins the shared expert to the others, and mlx-lm does not.
        pack_shared_expert=False,
        **index,
    )
    return out


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    out["text_config"] = _spell_text(facts.section("text_config"))
    out.update(
        projector_hidden_size=int(facts.size("projector_hidden_size", 6144)),
        multimodal_projector_bias=True,
        patch_merge_bias=True,
        tie_word_embeddings=False,
    )
    return out


MAP = ArchMap(
    model_type="minimax_m3_vl",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama", "text.moe", "vision.minimax_vit"),
    remarks=("Pictures are converted as they are, but compared with the reference by no test.",),
)
