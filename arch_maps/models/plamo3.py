"""PLaMo 3: fused projections, a norm around each half of a layer, and windows in most layers.

Its norms multiply by their weight and a constant of their place, which the runtime adds itself.
"""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama

_NORMS = ("pre_mixer_norm", "post_mixer_norm", "pre_mlp_norm", "post_mlp_norm")


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    s = llama.sizes(facts, kv_heads=4, head_dim=128, tied=True)
    body = root / "model"
    body.embedding("embed_tokens", s.vocab, s.hidden)
    for _index, layer in (body / "layers").layers("layers", s.layers):
        mixer = layer / "mixer"
        mixer.linear("qkv_proj", (s.heads + 2 * s.kv_heads) * s.head_dim, s.hidden)
        mixer.linear("o_proj", s.hidden, s.heads * s.head_dim)
        mixer.norm("q_norm", s.head_dim)
        mixer.norm("k_norm", s.head_dim)
        layer.linear("mlp.gate_up_proj", 2 * s.intermediate, s.hidden)
        layer.linear("mlp.down_proj", s.hidden, s.intermediate)
        for name in _NORMS:
            layer.norm(name, s.hidden)
    body.norm("norm", s.hidden)
    root.head("lm_head", s.vocab, s.hidden, tied_to="model.embed_tokens.weight" if s.tied else None)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    s = llama.sizes(facts, kv_heads=4, head_dim=128, tied=True)
    facts.expect("linear_type", "normal", default="normal", why="the runtime has no other")
    facts.expect("rope_scaling", None, default=None, why="the runtime scales no positions")
    window = facts.data.get("sliding_window") or facts.size("window_size", 2048)
    out.update(
        num_key_value_heads=int(s.kv_heads),
        head_dim=int(s.head_dim),
        tie_word_embeddings=s.tied,
        rms_norm_eps=facts.number("rms_norm_eps", 1e-6),
        window_size=window,
        sliding_window_pattern=int(facts.size("sliding_window_pattern", 8)),
        rope_theta=facts.number("rope_theta", 1e6),
        rope_local_theta=facts.number("rope_local_theta", 1e4),
        max_position_embeddings=int(facts.size("max_position_embeddings", 2048)),
    )
    return out


MAP = ArchMap(
    model_type="plamo3",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-lm",),
    parts=("text.llama",),
)
