"""nanochat: weightless norms, positions turned the other way round, squared ReLU, capped logits."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    s = llama.sizes(facts)
    model = root.at(source="model", target="transformer")
    table = model.input("embed_tokens.weight", s.vocab, s.hidden)
    model.rule("wte.weight", table, Kind.EMBEDDING)
    wide = {"q": s.heads * s.head_dim, "k": s.kv_heads * s.head_dim, "v": s.kv_heads * s.head_dim}
    for index in range(s.layers):
        layer = model.at(source=f"layers.{index}", target=f"h.{index}")
        for leaf, width in wide.items():
            heads = layer.input(f"self_attn.{leaf}_proj.weight", width, s.hidden)
            layer.rule(f"attn.c_{leaf}.weight", heads, Kind.LINEAR)
        out = layer.input("self_attn.o_proj.weight", s.hidden, s.heads * s.head_dim)
        layer.rule("attn.c_proj.weight", out, Kind.LINEAR)
        rise = layer.input("mlp.fc1.weight", s.intermediate, s.hidden)
        layer.rule("mlp.c_fc.weight", rise, Kind.LINEAR)
        fall = layer.input("mlp.fc2.weight", s.hidden, s.intermediate)
        layer.rule("mlp.c_proj.weight", fall, Kind.LINEAR)
    root.linear("lm_head", s.vocab, s.hidden, kind=Kind.HEAD)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    why = "the runtimes fix it in code"
    facts.expect("hidden_act", "relu2", default="relu2", why=why)
    facts.expect("final_logit_softcapping", 15, default=15, why=why)
    # In unit-size activations the two are the same to float32's precision.
    facts.expect("rms_norm_eps", 1e-5, 1e-6, default=1e-6, why="the runtimes have 1e-5 in code")
    facts.expect("attention_bias", False, default=False, why="the runtimes have no such biases")
    why = "the runtimes have a head of their own"
    facts.expect("tie_word_embeddings", False, default=False, why=why)
    s = llama.sizes(facts)
    if int(s.head_dim) * int(s.heads) != int(s.hidden):
        facts.problem("config.json: head_dim must be hidden_size / num_attention_heads here")
    rope = spell.rope(facts)
    spell.require_rope_type(facts, rope, allowed=("default",))
    out = spell.start(config)
    out.update(
        num_key_value_heads=int(s.kv_heads),
        rms_norm_eps=facts.number("rms_norm_eps", 1e-6),
        final_logit_softcapping=15.0,
        max_position_embeddings=int(facts.size("max_position_embeddings", 2048)),
        tie_word_embeddings=False,
        **spell.spell_rope(rope),
    )
    return out


MAP = ArchMap(
    model_type="nanochat",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama",),
)
