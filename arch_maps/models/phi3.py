"""Phi-3, Phi-3.5 and Phi-4 text models: Llama's stack with fused projections."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama, phi3


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    s = llama.sizes(facts)
    phi3.stack(root / "model", s)
    root.head("lm_head", s.vocab, s.hidden, tied_to="model.embed_tokens.weight" if s.tied else None)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    llama.expect_silu(facts)
    out = spell.start(config)
    s = llama.sizes(facts)
    if int(s.head_dim) * int(s.heads) != int(s.hidden):
        facts.problem("config.json: head_dim must be hidden_size / num_attention_heads here")
    rope = spell.rope(facts)
    rope.setdefault("partial_rotary_factor", 1.0)
    if rope["rope_type"] in ("su", "yarn"):  # earlier names, which the reference reads so too
        rope["rope_type"] = "longrope"
    spell.require_rope_type(facts, rope, allowed=("default", "longrope"))
    longest = int(facts.size("max_position_embeddings", 4096))
    trained = int(facts.size("original_max_position_embeddings", 4096))
    if rope["rope_type"] == "longrope":
        rope["original_max_position_embeddings"] = trained
        if rope.get("attention_factor") is not None:
            facts.problem("config.json: attention_factor is set; the runtimes compute their own")
    out.update(
        num_key_value_heads=int(s.kv_heads),
        tie_word_embeddings=s.tied,
        rms_norm_eps=facts.number("rms_norm_eps", 1e-5),
        max_position_embeddings=longest,
        original_max_position_embeddings=trained,
        rope_traditional=False,
        **spell.spell_rope(rope),
    )
    window = facts.data.get("sliding_window")
    if isinstance(window, int) and window < longest:
        facts.note(
            f"the release attends to the last {window} tokens; the runtimes attend to all of "
            "them, so results agree up to that length only"
        )
    return out


MAP = ArchMap(
    model_type="phi3",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama",),
    remarks=("mlx-lm applies LongRoPE's long factors at every length.",),
)
