"""MiniCPM3: latent attention with values as wide as a head, scaled embeddings and residuals."""

from __future__ import annotations

import math
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.ops import Affine
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama, mla

_DEFAULTS = {
    **{"q_lora_rank": 768, "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32},
    **{"max_position_embeddings": 32768, "dim_model_base": 256, "tie_word_embeddings": True},
}


def _filled(facts: Facts) -> Facts:
    """The config with the reference's defaults, the width of a value among them."""
    filled = facts.filled(_DEFAULTS)
    hidden, heads = filled.size("hidden_size"), filled.size("num_attention_heads")
    return filled.filled({"v_head_dim": int(hidden) // int(heads)})


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    facts = _filled(facts)
    hidden, vocab = facts.size("hidden_size"), facts.size("vocab_size")
    m, inner = mla.sizes(facts), facts.size("intermediate_size")
    model = root / "model"
    model.embedding("embed_tokens", vocab, hidden)
    for _index, layer in model.layers("layers", facts.count("num_hidden_layers")):
        mla.attention(layer / "self_attn", m, absorbed=False)
        llama.gated_mlp(layer / "mlp", hidden, inner)
        layer.norm("input_layernorm", hidden)
        layer.norm("post_attention_layernorm", hidden)
    tied = facts.flag("tie_word_embeddings", True)
    if tied:
        # The runtimes divide the logits by hidden_size / dim_model_base only before an own head.
        last = model.input("norm.weight", hidden)
        scale = int(facts.size("dim_model_base")) / int(hidden)
        model.rule("norm.weight", Affine(last, scale), Kind.NORM)
    else:
        model.norm("norm", hidden)
    root.head("lm_head", vocab, hidden, tied_to="model.embed_tokens.weight" if tied else None)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    facts = _filled(facts)
    llama.expect_silu(facts)
    facts.expect("mlp_bias", False, default=False, why="the runtimes have no such biases")
    m, hidden = mla.sizes(facts), int(facts.size("hidden_size"))
    layers, heads = facts.count("num_hidden_layers"), int(facts.size("num_attention_heads"))
    facts.expect("num_key_value_heads", heads, None, default=heads, why="every head has its keys")
    if m.q_rank is None or int(m.value) * heads != hidden:
        facts.problem("config.json: the runtimes need q_lora_rank, and values as wide as a head")
    # mlx-vlm scales the embedding of a prompt but not of the tokens after it. Every reader of the
    # residual stream is a norm, so the stream may as well be held divided by that scale.
    scale = facts.number("scale_emb", 12)
    if scale <= 0:
        facts.problem("config.json: scale_emb must be positive")
        scale = 1.0
    out = spell.start(config)
    mla.spell_config(out, m)
    out.update(
        num_key_value_heads=heads,
        dim_model_base=int(facts.size("dim_model_base")),
        scale_emb=1.0,
        scale_depth=_depth(facts, layers) / scale,
        rms_norm_eps=facts.number("rms_norm_eps", 1e-5) / scale**2,
        max_position_embeddings=int(facts.size("max_position_embeddings")),
        tie_word_embeddings=facts.flag("tie_word_embeddings", True),
        rope_traditional=False,
        **_positions(facts, int(m.rope) // 2),
    )
    return out


def _depth(facts: Facts, layers: int) -> float:
    if "scale_depth" in facts.data and facts.data["scale_depth"] is None:
        return math.sqrt(layers)
    return facts.number("scale_depth", 1.4)


def _positions(facts: Facts, pairs: int) -> dict[str, Any]:
    """Position settings, which the runtimes read as LongRoPE's whatever they are."""
    rope = spell.rope(facts)
    spell.require_rope_type(facts, rope, allowed=("default", "longrope"))
    if rope["rope_type"] == "default":
        rope.update(rope_type="longrope", short_factor=[1.0] * pairs, long_factor=[1.0] * pairs)
    longest = int(facts.size("max_position_embeddings"))
    rope.setdefault("original_max_position_embeddings", longest)
    if rope["original_max_position_embeddings"] != longest or rope.get("attention_factor"):
        facts.problem(
            "config.json: original_max_position_embeddings must equal max_position_embeddings "
            "and attention_factor be unset: the runtimes compute an attention factor of their own"
        )
    if rope.get("short_factor") != rope.get("long_factor"):
        facts.problem("config.json: short_factor differs from long_factor; mlx-lm has one for both")
    return spell.spell_rope(rope)


MAP = ArchMap(
    model_type="minicpm3",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.mla", "text.llama"),
    remarks=(
        "mlx-vlm drops scale_emb in single-token steps; config.json states the same model with a "
        "scale of one.",
        "The runtimes do not scale the logits of a tied head; the last norm holds that scale.",
    ),
)
