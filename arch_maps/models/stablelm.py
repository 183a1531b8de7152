"""StableLM 2 and StableLM 3B: biased layer norms, partially rotated heads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama


def _sizes(facts: Facts) -> llama.Sizes:
    found = llama.sizes(facts)
    norms = ("input_layernorm", "post_attention_layernorm")
    return replace(
        found,
        qkv_bias=facts.flag("use_qkv_bias", False),
        attention_bias=False,
        mlp_bias=False,
        norm_bias=True,
        norms=norms[:1] if facts.flag("use_parallel_residual", False) else norms,
    )


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    facts.expect(
        "tie_word_embeddings", False, default=False, why="the runtimes have a head of its own"
    )
    s = _sizes(facts)
    llama.causal_lm(root, s)
    if facts.flag("qk_layernorm", False):
        for _index, layer in (root / "model").layers("layers", s.layers):
            for name, heads in (("q_layernorm", s.heads), ("k_layernorm", s.kv_heads)):
                for head in range(heads):
                    layer.norm(f"self_attn.{name}.norms.{head}", s.head_dim)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    s = _sizes(facts)
    llama.spell_config(
        out,
        facts,
        s,
        max_positions=4096,
        eps=("layer_norm_eps", 1e-5),
        partial=0.25,
        rope_types=("default",),
    )
    out.update(
        use_qkv_bias=s.qkv_bias,
        use_parallel_residual=facts.flag("use_parallel_residual", False),
        qk_layernorm=facts.flag("qk_layernorm", False),
    )
    return out


MAP = ArchMap(
    model_type="stablelm",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama",),
)
