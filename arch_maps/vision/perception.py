"""The Perception Encoder as Step 3.7 has it: CLIP's names, positions rotated on two axes."""

from __future__ import annotations

from typing import Any

from arch_maps.facts import Dim, Facts
from arch_maps.ops import Permute
from arch_maps.rules import Kind, Mount

_NAMES = {
    "width": ("hidden_size", 1536),
    "layers": ("num_hidden_layers", 47),
    "heads": ("num_attention_heads", 16),
}
"""The release's names beside transformers 5's, with the reference's values."""


def width(facts: Facts) -> Dim:
    """Residual width of the tower."""
    return _named(facts, "width")


def _named(facts: Facts, name: str) -> Dim:
    other, default = _NAMES[name]
    return facts.size(name if name in facts.data else other, default)


def tower(at: Mount, facts: Facts) -> None:
    """Patches, positions, blocks and the two convolutions that join neighbours, below ``at``."""
    hidden = width(facts)
    inner = Dim(int(int(hidden) * facts.number("mlp_ratio", 8960 / 1536)), "width*mlp_ratio")
    patch, side = facts.size("patch_size", 14), facts.size("image_size", 728)
    at.conv("conv1", hidden, facts.size("num_channels", 3), patch, patch)
    positions = (side // patch) * (side // patch)
    at.tensor("positional_embedding", positions, hidden, kind=Kind.POSITION)
    at.norm("ln_pre", hidden, bias=True)
    for index in range(int(_named(facts, "layers"))):
        block = at.at(source=f"transformer.resblocks.{index}", target=f"transformer.{index}")
        attention = block / "attn"
        for leaf, shape, kind in (
            ("weight", (3 * hidden, hidden), Kind.LINEAR),
            ("bias", (3 * hidden,), Kind.BIAS),
        ):
            fused = attention.input(f"in_proj_{leaf}", *shape)
            attention.rule(f"in_proj.{leaf}", fused, kind)
        attention.linear("out_proj", hidden, hidden, bias=True)
        block.linear("mlp.c_fc", inner, hidden, bias=True)
        block.linear("mlp.c_proj", hidden, inner, bias=True)
        for name in ("1", "2"):
            block.norm(f"ln_{name}", hidden, bias=True)
            block.tensor(f"ls_{name}.gamma", hidden, kind=Kind.STATE)
    for name, times in (("vit_downsampler1", 1), ("vit_downsampler2", 2)):
        _join(at / name, 2 * times * hidden, times * hidden)


def _join(at: Mount, out: int, inp: int) -> None:
    weight = at.input("weight", out, inp, 3, 3)
    at.rule("weight", Permute(weight, (0, 2, 3, 1)), Kind.CONV)
    at.tensor("bias", out, kind=Kind.BIAS)


def spell_config(facts: Facts) -> dict[str, Any]:
    """The vision section as the runtime reads it: the release's own spelling."""
    why = "the runtime computes no other activation as the release does"
    facts.expect("hidden_act", "quick_gelu", default="quick_gelu", why=why)
    why = "the reference has the tower one way only"
    for name, value in (
        *(("use_cls_token", False), ("ues_cls_token", False), ("use_ln_pre", True)),
        *(("use_ln_post", False), ("use_abs_posemb", True), ("use_rope2d", True)),
    ):
        facts.expect(name, value, default=value, why=why)
    rope = facts.data.get("rope_parameters") or {}
    scale = facts.data.get("ls_init_value", facts.data.get("layer_scale_init_value", 0.1))
    return {
        **{key: value for key, value in facts.data.items() if key != "rope_parameters"},
        **{name: int(_named(facts, name)) for name in _NAMES},
        "model_type": "perception_encoder",
        "num_channels": int(facts.size("num_channels", 3)),
        "image_size": int(facts.size("image_size", 728)),
        "patch_size": int(facts.size("patch_size", 14)),
        "mlp_ratio": facts.number("mlp_ratio", 8960 / 1536),
        "hidden_act": "quick_gelu",
        "layer_norm_eps": facts.number("layer_norm_eps", 1e-5),
        "use_cls_token": False,
        "ues_cls_token": False,
        "use_ln_pre": True,
        "use_ln_post": False,
        "use_abs_posemb": True,
        "use_rope2d": True,
        "ls_init_value": scale,
        "rope_theta": rope.get("rope_theta", 10000.0),
    }
