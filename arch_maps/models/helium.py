"""Helium 1: Llama's stack with neighbouring dimensions rotated together."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    facts.expect(
        "tie_word_embeddings", False, default=False, why="the runtimes have a head of its own"
    )
    for name in ("attention_bias", "mlp_bias"):
        facts.expect(name, False, default=False, why="the runtimes do not have all these biases")
    s = llama.sizes(facts, kv_heads=20, head_dim=128)
    if int(s.head_dim) * int(s.heads) != int(s.hidden):
        facts.problem("config.json: head_dim must be hidden_size / num_attention_heads here")
    llama.causal_lm(root, s)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    s = llama.sizes(facts, kv_heads=20, head_dim=128)
    llama.spell_config(
        out,
        facts,
        s,
        max_positions=4096,
        eps=("rms_norm_eps", 1e-8),
        theta=1e5,
        rope_types=("default",),
    )
    out.update(attention_bias=False, mlp_bias=False)
    return out


MAP = ArchMap(
    model_type="helium",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama",),
)
