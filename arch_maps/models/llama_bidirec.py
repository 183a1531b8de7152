"""Llama Nemotron Embed: Llama's stack that attends both ways, for sentence embeddings."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    llama.stack(root.at(source=layout["stack"], target="model"), llama.sizes(facts))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    why = "the runtime takes the mean of the tokens"
    facts.expect("pooling", "avg", None, default="avg", why=why)
    out, s = spell.start(config), llama.sizes(facts)
    llama.spell_config(out, facts, s, max_positions=2048)
    out.update(attention_bias=s.attention_bias, mlp_bias=s.mlp_bias, rope_traditional=False)
    out["layer_types"] = ["full_attention"] * s.layers
    out["sliding_window"] = None
    return out


MAP = ArchMap(
    model_type="llama_bidirec",
    tensors=_tensors,
    config=_config,
    layouts=(
        Layout("published", {"stack": ""}),
        Layout("with a prefix", {"stack": "model"}),
    ),
    runtimes=("mlx-vlm",),
    parts=("text.llama",),
    pipeline_tag="sentence-similarity",
    remarks=(
        "transformers 5.23.0 cannot read the config of this type where positions are scaled, so "
        "that no tokenizer loads beside it.",
    ),
)
