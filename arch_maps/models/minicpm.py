"""MiniCPM 1, 2 and 4: Llama's stack with scaled embeddings, residuals and logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama


def _sizes(facts: Facts) -> llama.Sizes:
    return replace(llama.sizes(facts, tied=True), attention_bias=False, mlp_bias=False)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    facts.expect("num_experts", 0, None, default=0, why="the runtimes have no experts here")
    facts.expect("attention_bias", False, default=False, why="the runtimes have no such biases")
    s = _sizes(facts)
    llama.stack(root / "model", s)
    if s.tied:
        root.copied_head("lm_head", s.vocab, s.hidden, tied_to="model.embed_tokens.weight")
    else:
        root.head("lm_head", s.vocab, s.hidden, tied_to=None)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out, s = spell.start(config), _sizes(facts)
    if int(s.head_dim) * int(s.heads) != int(s.hidden):
        facts.problem("config.json: head_dim must be hidden_size / num_attention_heads here")
    types = (*spell.NATIVE_ROPE_TYPES, "longrope")
    llama.spell_config(out, facts, s, max_positions=2048, rope_types=types)
    _require_one_length(out, facts)
    # mlx-vlm scales the embedding of a prompt but not of the tokens after it. Every reader of the
    # residual stream is a norm, so the stream may as well be held divided by that scale.
    scale = facts.number("scale_emb", 1)
    if scale <= 0:
        facts.problem("config.json: scale_emb must be positive")
        scale = 1.0
    out.update(
        scale_emb=1.0,
        scale_depth=facts.number("scale_depth", 1) / scale,
        rms_norm_eps=facts.number("rms_norm_eps", 1e-6) / scale**2,
        dim_model_base=int(facts.size("dim_model_base", 1)),
        rope_traditional=False,
        tie_word_embeddings=False,
    )
    return out


def _require_one_length(config: dict[str, Any], facts: Facts) -> None:
    rope = config["rope_parameters"]
    if rope["rope_type"] != "longrope":
        return
    trained = rope.get("original_max_position_embeddings")
    if rope.get("short_factor") != rope.get("long_factor"):
        facts.problem("config.json: short_factor differs from long_factor; mlx-lm has one for both")
    if trained != config["max_position_embeddings"]:
        facts.problem(
            "config.json: rope_scaling.original_max_position_embeddings must equal "
            "max_position_embeddings: the runtimes compute an attention factor of their own"
        )


MAP = ArchMap(
    model_type="minicpm",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama",),
    remarks=(
        "mlx-vlm drops scale_emb in single-token steps; config.json states the same model with a "
        "scale of one.",
        "The runtimes neither scale the logits of a tied head nor load one; the checkpoint stores "
        "the head apart.",
    ),
)
