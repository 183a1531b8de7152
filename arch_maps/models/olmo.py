"""OLMo 1: Llama's layers with weightless layer norms, which the runtimes hold as released first."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.ops import Concat
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    s = llama.sizes(facts)
    model = root.at(source="model", target="model.transformer")
    table = model.input("embed_tokens.weight", s.vocab, s.hidden)
    model.rule("wte.weight", table, Kind.EMBEDDING)
    for index in range(s.layers):
        layer = model.at(source=f"layers.{index}", target=f"blocks.{index}")
        square = (s.hidden, s.hidden)
        heads = tuple(layer.input(f"self_attn.{n}_proj.weight", *square) for n in "qkv")
        layer.rule("att_proj.weight", Concat(heads), Kind.LINEAR)
        layer.rule("attn_out.weight", layer.input("self_attn.o_proj.weight", *square), Kind.LINEAR)
        wide = (s.intermediate, s.hidden)
        up_gate = tuple(layer.input(f"mlp.{n}_proj.weight", *wide) for n in ("up", "gate"))
        layer.rule("ff_proj.weight", Concat(up_gate), Kind.LINEAR)
        down = layer.input("mlp.down_proj.weight", s.hidden, s.intermediate)
        layer.rule("ff_out.weight", down, Kind.LINEAR)
        layer.drop("self_attn.rotary_emb.inv_freq", "position frequencies follow from the config")
    if s.tied:
        root.head("lm_head", s.vocab, s.hidden, tied_to=table.name)
    else:
        head = root.input("lm_head.weight", s.vocab, s.hidden)
        model.rule("ff_out.weight", head, Kind.HEAD)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    llama.expect_silu(facts)
    facts.expect("attention_bias", False, default=False, why="the runtimes have no such biases")
    facts.expect("clip_qkv", None, default=None, why="the runtimes clip nothing")
    s = llama.sizes(facts)
    if int(s.kv_heads) != int(s.heads) or int(s.head_dim) * int(s.heads) != int(s.hidden):
        facts.problem("config.json: the runtimes have as many key-value heads as query heads here")
    rope = spell.rope(facts)
    spell.require_rope_type(facts, rope, allowed=("default",))
    out = spell.start(config)
    out.update(
        d_model=int(s.hidden),
        n_layers=s.layers,
        n_heads=int(s.heads),
        mlp_hidden_size=2 * int(s.intermediate),
        embedding_size=int(s.vocab),
        weight_tying=s.tied,
        tie_word_embeddings=s.tied,
        rope_traditional=False,
        max_position_embeddings=int(facts.size("max_position_embeddings", 2048)),
        **spell.spell_rope(rope),
    )
    return out


MAP = ArchMap(
    model_type="olmo",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm",),
    parts=("text.llama",),
    remarks=("mlx-lm has this type too, but runs it only beside the package ai2-olmo.",),
)
