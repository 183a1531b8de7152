"""Llama 4's text stack on its own, dense (MobileLLM-R1): all layers rotate, the head is tied."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama, llama4


def _facts(facts: Facts) -> Facts:
    return facts.filled(llama4.DEFAULTS)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    text = _facts(facts)
    text.expect("tie_word_embeddings", True, default=False, why="mlx-lm cannot load another head")
    s = llama.sizes(text)
    llama4.stack(root / "model", text, s)
    root.head("lm_head", s.vocab, s.hidden, tied_to="model.embed_tokens.weight")


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out, text = spell.start(config), _facts(facts)
    s = llama.sizes(text)
    if llama4.sparse_layers(text, s.layers):
        facts.problem("config.json: moe_layers: the runtime's stack of this type has no experts")
    if facts.data.get("no_rope_layers") != [1] * s.layers:
        facts.problem(
            "config.json: no_rope_layers: the runtime neither tunes nor leaves unnormed the "
            "attention of layers without positions"
        )
    llama.spell_config(
        out,
        text,
        s,
        max_positions=131072,
        eps=("rms_norm_eps", 1e-5),
        theta=500000.0,
        rope_types=("default",),
    )
    chunk, longest = text.data["attention_chunk_size"], out["max_position_embeddings"]
    if chunk and chunk < longest:
        facts.note(f"the runtime attends past chunks of {chunk} positions, the release does not")
    out.update(
        intermediate_size=int(s.intermediate),
        intermediate_size_mlp=int(text.size("intermediate_size_mlp")),
        no_rope_layers=[1] * s.layers,
        use_qk_norm=text.flag("use_qk_norm", True),
        moe_layers=[],
    )
    return out


MAP = ArchMap(
    model_type="llama4_text",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-lm",),
    parts=("text.llama4",),
    remarks=(
        "mlx-vlm 0.7.10 has a module of this name whose outputs its own generation cannot take.",
    ),
)
