"""InternLM 3: Llama's stack with one switch for all attention biases and one for the MLP's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama


def _sizes(facts: Facts) -> llama.Sizes:
    found = llama.sizes(facts, kv_heads=2, head_dim=128)
    return replace(
        found,
        attention_bias=facts.flag("qkv_bias", found.attention_bias),
        mlp_bias=facts.flag("bias", found.mlp_bias),
    )


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    llama.causal_lm(root, _sizes(facts))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out, s = spell.start(config), _sizes(facts)
    if int(s.head_dim) * int(s.heads) != int(s.hidden):
        facts.problem("config.json: head_dim must be hidden_size / num_attention_heads here")
    longest = int(facts.size("max_position_embeddings", 32768))
    llama.spell_config(
        out,
        facts,
        s,
        max_positions=32768,
        eps=("rms_norm_eps", 1e-5),
        rope_types=("default", "linear", "dynamic"),
    )
    rope = out["rope_parameters"]
    if rope["rope_type"] == "dynamic":
        facts.note(
            f"positions past {longest} are not stretched, where the release does so (dynamic NTK)"
        )
    if rope["rope_type"] != "linear":
        # Without a linear scaling, mlx-vlm counts positions in steps of two.
        plain = {"type": "linear", "rope_type": "linear", "factor": 1.0}
        out["rope_scaling"] = plain
        out["rope_parameters"] = {**plain, "rope_theta": rope["rope_theta"]}
    out.update(
        attention_bias=s.attention_bias,
        qkv_bias=s.attention_bias,
        mlp_bias=s.mlp_bias,
        bias=s.mlp_bias,
        rope_traditional=False,
    )
    return out


MAP = ArchMap(
    model_type="internlm3",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama",),
    remarks=(
        "mlx-vlm counts positions in steps of two unless they are scaled linearly; config.json "
        "states a linear scaling by one.",
    ),
)
