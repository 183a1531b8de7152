"""StarCoder2: biased layer norms, biases everywhere, a plain MLP and one window."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama


def _sizes(facts: Facts) -> llama.Sizes:
    found = llama.sizes(facts, kv_heads=2, tied=True)
    mlp = ("c_fc", "c_proj")
    return replace(found, attention_bias=True, norm_bias=True, mlp_bias=True, plain_mlp=mlp)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    facts.expect("use_bias", True, default=True, why="the runtimes have biases everywhere")
    llama.causal_lm(root, _sizes(facts))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    tanh = "gelu_pytorch_tanh"
    facts.expect("hidden_act", "gelu", tanh, default=tanh, why="the runtimes compute exact GELU")
    out = spell.start(config)
    s = _sizes(facts)
    rope = spell.rope(facts)
    spell.require_rope_type(facts, rope, allowed=("default",))
    out.update(
        num_key_value_heads=int(s.kv_heads),
        norm_epsilon=facts.number("norm_epsilon", 1e-5),
        tie_word_embeddings=s.tied,
        **spell.spell_rope(rope),
    )
    if facts.data.get("sliding_window") is not None:
        facts.note(
            f"the release attends to the last {facts.size('sliding_window')} tokens; the "
            "runtimes attend to all of them, so results agree up to that length only"
        )
    return out


MAP = ArchMap(
    model_type="starcoder2",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama",),
    remarks=(
        "Both runtimes compute exact GELU where the releases mean its tanh form, and know no "
        "window.",
    ),
)
