"""InternLM 2 and 2.5: Llama with its query, key and value heads interleaved in one tensor.

The checkpoint is written as the Llama it is: mlx-vlm cannot load the head of this type by its own
name and counts its positions in steps of two.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.ops import Reshape, Slice
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama


def _heads(layer: Mount, s: llama.Sizes) -> None:
    """``wqkv`` [kv heads, queries of the group + key + value, head_dim, hidden] cut apart."""
    at = layer.at(source="attention", target="self_attn")
    group = int(s.heads) // int(s.kv_heads)
    fused = (s.kv_heads * (group + 2) * s.head_dim, s.hidden)
    groups = Reshape(
        at.input("wqkv.weight", *fused),
        (int(s.kv_heads), group + 2, int(s.head_dim), int(s.hidden)),
    )
    for name, start, stop in (
        ("q_proj", 0, group),
        ("k_proj", group, group + 1),
        ("v_proj", group + 1, group + 2),
    ):
        rows = int(s.kv_heads) * (stop - start) * int(s.head_dim)
        part = Reshape(Slice(groups, 1, start, stop), (rows, int(s.hidden)))
        at.rule(f"{name}.weight", part, Kind.LINEAR)
    out = at.input("wo.weight", s.hidden, s.heads * s.head_dim)
    at.rule("o_proj.weight", out, Kind.LINEAR)


def _sizes(facts: Facts) -> llama.Sizes:
    found = llama.sizes(facts)
    if int(found.heads) % int(found.kv_heads):
        facts.problem("config.json: num_key_value_heads must divide num_attention_heads")
        return replace(found, kv_heads=found.heads)
    return found


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    facts.expect("bias", False, default=True, why="no release has these biases")
    s = _sizes(facts)
    model = root / "model"
    table = model.input("tok_embeddings.weight", s.vocab, s.hidden)
    model.rule("embed_tokens.weight", table, Kind.EMBEDDING)
    for _index, layer in model.layers("layers", s.layers):
        _heads(layer, s)
        mlp = layer.at(source="feed_forward", target="mlp")
        wide, narrow = (s.intermediate, s.hidden), (s.hidden, s.intermediate)
        for theirs, ours, shape in (
            ("w1", "gate_proj", wide),
            ("w3", "up_proj", wide),
            ("w2", "down_proj", narrow),
        ):
            mlp.rule(f"{ours}.weight", mlp.input(f"{theirs}.weight", *shape), Kind.LINEAR)
        for theirs, ours in (
            ("attention_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"),
        ):
            layer.rule(f"{ours}.weight", layer.input(f"{theirs}.weight", s.hidden), Kind.NORM)
        layer.drop("attention.rope.inv_freq", "position frequencies follow from the config")
    model.norm("norm", s.hidden)
    if s.tied:
        root.head("output", s.vocab, s.hidden, tied_to=table.name)
    else:
        head = root.input("output.weight", s.vocab, s.hidden)
        root.rule("lm_head.weight", head, Kind.HEAD)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out, s = spell.start(config), _sizes(facts)
    types = ("default", "linear", "dynamic")
    llama.spell_config(out, facts, s, max_positions=2048, rope_types=types)
    if out["rope_parameters"]["rope_type"] == "dynamic":
        longest = out["max_position_embeddings"]
        facts.note(
            f"positions past {longest} are not stretched, where the release does so (dynamic NTK)"
        )
        out.update(spell.spell_rope({"rope_type": "default", "rope_theta": out["rope_theta"]}))
    out.update(
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        attention_bias=False,
        mlp_bias=False,
        rope_traditional=False,
        layer_types=["full_attention"] * s.layers,
        sliding_window=None,
    )
    for remote in ("auto_map", "attn_implementation", "bias"):
        out.pop(remote, None)
    return out


MAP = ArchMap(
    model_type="internlm2",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama",),
    remarks=("The checkpoint is written as the Llama that these layers are.",),
)
