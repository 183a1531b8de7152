"""Molmo 2's picture side: a ViT without a class token, attention pooling, a gated projector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from arch_maps.facts import Dim, Facts
from arch_maps.rules import Kind, Mount

_MOST_LAYERS: Final = 25
"""The runtime cuts deeper towers to this many layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Views:
    """The config's two sections, and the tower's depth that the weights have."""

    vit: Facts
    adapter: Facts
    layers: int
    read: tuple[int, ...]
    """Layers whose outputs are pooled, counted from the first."""


def views(root: Facts, *, most: int | None = _MOST_LAYERS) -> Views:
    """Both sections as published (``vit_config``) or as transformers 5 writes them.

    A published tower ends at the deepest layer that is read, whatever its config says.
    """
    published = "vit_config" in root.data
    vit = root.section("vit_config" if published else "vision_config")
    adapter = root.section("adapter_config")
    stated = vit.count("num_hidden_layers", 25)
    found = adapter.data.get("vit_layers", adapter.data.get("vision_feature_layer", [24, 18]))
    if not isinstance(found, list) or not all(
        type(layer) is int and -stated <= layer < stated for layer in found
    ):
        root.problem(f"config.json: adapter_config.vit_layers must list layers, not {found!r}")
        found = [stated - 1]
    read = tuple(layer % stated for layer in found)
    layers = max(read) + 1 if published else stated
    if most is not None and layers > most:
        root.problem(f"config.json: the runtime has at most {most} layers in its tower")
    return Views(vit=vit, adapter=adapter, layers=layers, read=read)


def tower(at: Mount, v: Views, *, blocks: str = "transformer") -> None:
    """Patches as a dense layer, positions, and layers, which the runtime calls ``blocks``."""
    facts = v.vit
    hidden, inner = facts.size("hidden_size", 1152), facts.size("intermediate_size", 4304)
    patch = _patch(facts)
    at.tensor("positional_embedding", _positions(facts), hidden, kind=Kind.POSITION)
    at.linear("patch_embedding", hidden, patch * patch * 3, bias=True)
    for index in range(v.layers):
        layer = at.at(source=f"transformer.resblocks.{index}", target=f"{blocks}.{index}")
        _attention(layer / "attention", facts, hidden, hidden)
        layer.linear("feed_forward.w1", inner, hidden, bias=True)
        layer.linear("feed_forward.w2", hidden, inner, bias=True)
        layer.norm("attention_norm", hidden, bias=True)
        layer.norm("ffn_norm", hidden, bias=True)


def adapter(at: Mount, v: Views, text_hidden: int, *, last: bool = True) -> None:
    """Attention that pools neighbouring patches, and the projector to the text's width.

    ``last``: whether the attention ends in a projection of its own.
    """
    facts = v.adapter
    hidden, inner = facts.size("hidden_size", 1152), facts.size("intermediate_size", 18944)
    pooled = v.vit.size("hidden_size", 1152) * len(v.read)
    _attention(at / "image_pooling_2d", facts, hidden, pooled, last=last)
    at.linear("image_projector.w1", inner, hidden)
    at.linear("image_projector.w2", text_hidden, inner)
    at.linear("image_projector.w3", inner, hidden)


def _attention(at: Mount, facts: Facts, hidden: int, inp: int, *, last: bool = True) -> None:
    head_dim = facts.size("head_dim", 72)
    heads = facts.size("num_attention_heads", 16)
    kv_heads = facts.size("num_key_value_heads", 16)
    at.linear("wq", heads * head_dim, inp, bias=True)
    at.linear("wk", kv_heads * head_dim, inp, bias=True)
    at.linear("wv", kv_heads * head_dim, inp, bias=True)
    if last:
        at.linear("wo", hidden, heads * head_dim, bias=True)


def _patch(facts: Facts) -> Dim:
    return facts.size("image_patch_size" if "image_patch_size" in facts.data else "patch_size", 14)


def _side(facts: Facts) -> tuple[int, int]:
    published = "image_default_input_size" in facts.data
    return facts.pair("image_default_input_size" if published else "image_size", (378, 378))


def _positions(facts: Facts) -> Dim:
    (height, width), patch = _side(facts), int(_patch(facts))
    stated = facts.data.get("image_num_pos") or facts.data.get("num_position_embeddings")
    found = (height // patch) * (width // patch)
    if stated not in (None, found):
        facts.problem(f"config.json: {facts.path}image_num_pos must be {found}, not {stated!r}")
    return Dim(found, "image_num_pos")


def spell_config(v: Views, text_hidden: int, *, masked: bool | None = True) -> dict[str, Any]:
    """Both sections as the runtime reads them; ``masked``: what pooling must be, None for any."""
    for facts in (v.vit, v.adapter):
        facts.expect("attention_bias", True, default=True, why="the runtime has these biases")
    v.vit.expect(
        "hidden_act",
        "gelu_pytorch_tanh",
        default="gelu_pytorch_tanh",
        why="this map is checked with this activation only",
    )
    v.adapter.expect("hidden_act", "silu", default="silu", why="the runtime computes SiLU")
    v.adapter.expect("mlp_bias", False, default=False, why="the runtime has no such biases")
    if masked is not None:
        why = "the reference has no other pooling"
        v.adapter.expect("pooling_attention_mask", masked, default=masked, why=why)
    shared = {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 72}
    vit: dict[str, Any] = {name: int(v.vit.size(name, value)) for name, value in shared.items()}
    vit |= {
        "model_type": "molmo2",
        "hidden_size": int(v.vit.size("hidden_size", 1152)),
        "intermediate_size": int(v.vit.size("intermediate_size", 4304)),
        "num_hidden_layers": v.layers,
        "image_patch_size": int(_patch(v.vit)),
        "image_num_pos": int(_positions(v.vit)),
        "image_default_input_size": list(_side(v.vit)),
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": v.vit.number("layer_norm_eps", 1e-6),
        "float32_attention": True,
    }
    pool: dict[str, Any] = {n: int(v.adapter.size(n, value)) for n, value in shared.items()}
    pool |= {
        "model_type": "molmo2",
        "hidden_size": int(v.adapter.size("hidden_size", 1152)),
        "intermediate_size": int(v.adapter.size("intermediate_size", 18944)),
        "text_hidden_size": text_hidden,
        "hidden_act": "silu",
        "vit_layers": list(v.read),
        "pooling_attention_mask": v.adapter.flag("pooling_attention_mask", bool(masked)),
        "float32_attention": True,
    }
    return {"vit_config": vit, "adapter_config": pool}
