"""Qwen3 dense text, embedding and reranking models: Llama's stack with per-head norms."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama


def _sizes(facts: Facts) -> llama.Sizes:
    return llama.sizes(facts, kv_heads=32, head_dim=128, qk_norm=True)


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    facts.expect("attention_bias", False, default=False, why="the runtimes have no such biases")
    s = _sizes(facts)
    llama.stack(root.at(source=layout["stack"], target="model"), s)
    if "Qwen3Model" in (facts.data.get("architectures") or ()):
        return  # sentence embeddings have no head
    table = f"{layout['stack']}.embed_tokens.weight".lstrip(".")
    root.head("lm_head", s.vocab, s.hidden, tied_to=table if s.tied else None)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    facts.expect(
        "use_sliding_window", False, default=False, why="the runtimes attend to everything"
    )
    out = spell.start(config)
    llama.spell_config(out, facts, _sizes(facts), max_positions=32768)
    return out


MAP = ArchMap(
    model_type="qwen3",
    tensors=_tensors,
    config=_config,
    layouts=(
        Layout("transformers", {"stack": "model"}),
        Layout("sentence embeddings", {"stack": ""}),
    ),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama",),
)
