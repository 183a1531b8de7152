"""The DINOv2 tower: a class token, registers, layer scales, and query, key and value fused."""

from __future__ import annotations

from typing import Any, Final

from arch_maps.facts import Dim, Facts
from arch_maps.ops import Concat, Permute
from arch_maps.rules import Kind, Mount

_QKV: Final = ("query", "key", "value")


def tower(at: Mount, facts: Facts, *, registers: int = 0) -> None:
    """Embeddings, blocks and the final norm, below ``at``."""
    hidden = facts.size("hidden_size")
    image, patch = facts.size("image_size"), facts.size("patch_size", 14)
    positions = (image // patch) * (image // patch) + 1
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, hidden),
        "mask_token": (1, hidden),
        "position_embeddings": (1, positions, hidden),
    }
    if registers:
        shapes["register_tokens"] = (1, registers, hidden)
    for name, shape in shapes.items():
        target = "pos_embed" if name == "position_embeddings" else name
        at.rule(target, at.input(f"embeddings.{name}", *shape), Kind.POSITION)
    patches = at.at(source="embeddings.patch_embeddings.projection", target="patch_embed")
    _patches(patches, facts, hidden, patch)
    for index in range(facts.count("num_hidden_layers")):
        _block(at.at(source=f"encoder.layer.{index}", target=f"blocks.{index}"), facts, hidden)
    norm = at.at(source="layernorm", target="norm")
    norm.tensor("weight", hidden, kind=Kind.NORM)
    norm.tensor("bias", hidden, kind=Kind.BIAS)


def _patches(at: Mount, facts: Facts, hidden: int, patch: int) -> None:
    channels = facts.size("num_channels", 3)
    weight = at.input("weight", hidden, channels, patch, patch)
    at.rule("proj.weight", Permute(weight, (0, 2, 3, 1)), Kind.CONV)
    at.rule("proj.bias", at.input("bias", hidden), Kind.BIAS)


def _block(at: Mount, facts: Facts, hidden: Dim) -> None:
    attention = at.at(source="attention", target="attn")
    bias = facts.flag("qkv_bias", True)
    for leaf, shape, kind in (
        ("weight", (hidden, hidden), Kind.LINEAR),
        *((("bias", (hidden,), Kind.BIAS),) if bias else ()),
    ):
        parts = tuple(attention.input(f"attention.{name}.{leaf}", *shape) for name in _QKV)
        attention.rule(f"qkv.{leaf}", Concat(parts, 0), kind)
    _dense(attention.at(source="output.dense", target="proj"), hidden, hidden)
    for index in (1, 2):
        at.norm(f"norm{index}", hidden, bias=True)
        scale = at.input(f"layer_scale{index}.lambda1", hidden)
        at.rule(f"ls{index}.gamma", scale, Kind.STATE)
    _mlp(at / "mlp", facts, hidden)


def _mlp(at: Mount, facts: Facts, hidden: Dim) -> None:
    inner = Dim(int(int(hidden) * facts.number("mlp_ratio", 4)), "hidden_size*mlp_ratio")
    if not facts.flag("use_swiglu_ffn", False):
        at.linear("fc1", inner, hidden, bias=True)
        at.linear("fc2", hidden, inner, bias=True)
        return
    # The reference's own rounding: two thirds, up to a multiple of 8.
    gated = Dim((int(int(inner) * 2 / 3) + 7) // 8 * 8, f"{inner.label}*2/3")
    _dense(at.at(source="weights_in", target="w12"), 2 * gated, hidden)
    _dense(at.at(source="weights_out", target="w3"), hidden, gated)


def _dense(at: Mount, out: int, inp: int) -> None:
    at.tensor("weight", out, inp, kind=Kind.LINEAR)
    at.tensor("bias", out, kind=Kind.BIAS)


def spell_config(config: dict[str, Any], facts: Facts) -> None:
    """Write the tower's facts as the runtime reads them, in place."""
    facts.expect("hidden_act", "gelu", default="gelu", why="the runtime computes exact GELU")
    facts.expect("use_mask_token", True, default=True, why="the runtime has a mask token")
    facts.expect("num_channels", 3, default=3, why="the runtime reads red, green and blue")
    config.update(
        hidden_size=int(facts.size("hidden_size")),
        num_hidden_layers=facts.count("num_hidden_layers"),
        num_attention_heads=int(facts.size("num_attention_heads", 12)),
        mlp_ratio=facts.number("mlp_ratio", 4),
        layer_norm_eps=facts.number("layer_norm_eps", 1e-6),
        image_size=int(facts.size("image_size")),
        patch_size=int(facts.size("patch_size", 14)),
        num_channels=3,
        qkv_bias=facts.flag("qkv_bias", True),
        layerscale_value=facts.number("layerscale_value", 1.0),
        use_swiglu_ffn=facts.flag("use_swiglu_ffn", False),
        interpolate_offset=0.0,
    )
