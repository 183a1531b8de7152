"""LFM2 and LFM2.5 dense text models."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import lfm2


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    for name in ("tie_embedding", "tie_word_embeddings"):
        facts.expect(name, True, default=True, why="the runtimes reuse the input embedding")
    s = lfm2.sizes(facts)
    lfm2.stack(root / "model", s)
    root.head("lm_head", s.vocab, s.hidden, tied_to="model.embed_tokens.weight")


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    lfm2.spell_config(out, facts, lfm2.sizes(facts))
    return out


MAP = ArchMap(
    model_type="lfm2",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.lfm2",),
)
