"""RWKV-7 (Goose) as flash-linear-attention publishes it."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import rwkv7


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    rwkv7.causal_lm(root, facts)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    why = "the runtimes compute it so whatever it says"
    facts.expect("hidden_act", "sqrelu", default="sqrelu", why=why)
    facts.expect("norm_first", True, default=True, why=why)
    facts.expect("norm_bias", True, default=True, why=why)
    facts.expect("attn", None, default=None, why="the runtimes have no attention layers here")
    out = spell.start(config)
    out.update(
        {rank: int(facts.size(rank)) for rank in rwkv7.RANKS.values()},
        head_dim=int(facts.size("head_dim", 64)),
        norm_eps=facts.number("norm_eps", 1e-5),
        tie_word_embeddings=facts.flag("tie_word_embeddings", False),
    )
    return out


MAP = ArchMap(
    model_type="rwkv7",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.rwkv7",),
)
