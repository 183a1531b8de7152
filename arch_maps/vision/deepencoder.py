"""DeepSeek-OCR's encoder: a SAM tower that compresses pages, and a CLIP tower over its output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from arch_maps.facts import Facts
from arch_maps.ops import Constant
from arch_maps.rules import Kind, Mount
from arch_maps.text.llama import gated_mlp

SAM: Final[dict[str, Any]] = {
    "width": 768,
    "layers": 12,
    "heads": 12,
    "global_attn_indexes": [2, 5, 8, 11],
}
"""What the runtime has in its code, whatever the config says."""
QWEN: Final = {
    "dim": 896,
    "layers": 24,
    "heads": 14,
    "kv_heads": 2,
    "intermediate_size": 4864,
}
"""DeepSeek-OCR-2's encoder, which the runtime has in its code too."""
QUERIES: Final = {1024: 256, 768: 144}
"""Learned queries by the side of the picture."""
_NECK: Final = 256
_WINDOW: Final = 14
_GRID: Final = 64
_PATCH: Final = 16
_INDICES: Final = "position indices follow from the image size"
CLIP: Final = {
    "width": 1024,
    "layers": 24,
    "heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "intermediate_size": 4096,
}
_SAM_SPELLED: Final[dict[str, Any]] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "output_channels": 256,
    "image_size": 1024,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
    "use_abs_pos": True,
    "use_rel_pos": True,
    "window_size": 14,
    "mlp_dim": 3072,
    "hidden_act": "gelu",
}


def sam(
    at: Mount,
    out: int,
    *,
    sizes: Mapping[str, Any] = SAM,
    neck: tuple[str, str, str, str] = ("neck.0", "neck.1", "neck.2", "neck.3"),
) -> None:
    """The SAM tower below ``at``: window attention, a neck, and two halving convolutions.

    ``neck`` is what the runtime calls the four layers of the neck.
    """
    width, head = sizes["width"], sizes["width"] // sizes["heads"]
    at.conv("patch_embed.proj", width, 3, _PATCH, _PATCH, bias=True)
    at.tensor("pos_embed", 1, _GRID, _GRID, width, kind=Kind.POSITION)
    for index, block in at.layers("blocks", sizes["layers"]):
        side = _GRID if index in sizes["global_attn_indexes"] else _WINDOW
        attention = block / "attn"
        attention.linear("qkv", 3 * width, width, bias=True)
        attention.linear("proj", width, width, bias=True)
        for name in ("rel_pos_h", "rel_pos_w"):
            attention.tensor(name, 2 * side - 1, head, kind=Kind.POSITION)
        for name in ("norm1", "norm2"):
            block.norm(name, width, bias=True)
        block.linear("mlp.lin1", 4 * width, width, bias=True)
        block.linear("mlp.lin2", width, 4 * width, bias=True)
    at.conv(neck[0], _NECK, width, 1, 1)
    at.norm(neck[1], _NECK, bias=True)
    at.conv(neck[2], _NECK, _NECK, 3, 3)
    at.norm(neck[3], _NECK, bias=True)
    at.conv("net_2", 512, _NECK, 3, 3)
    at.conv("net_3", out, 512, 3, 3)


def expect_sam(vision: Facts) -> None:
    """Require the SAM tower that the runtime has in its code, whatever its output is said to be."""
    why = "the runtime has this size in its code"
    if "sam_config" in vision.data:  # transformers 5
        given = vision.section("sam_config")
        for name, value in _SAM_SPELLED.items():
            given.expect(name, value, default=value, why=why)
    else:
        given = vision.section("width").section("sam_vit_b")
        for name in ("width", "layers", "heads"):
            given.expect(name, SAM[name], default=SAM[name], why=why)
    windows = given.data.get("global_attn_indexes", SAM["global_attn_indexes"])
    if list(windows) != SAM["global_attn_indexes"]:
        given.problem(f"config.json: {given.path}global_attn_indexes is {windows!r}: {why}")


def qwen(at: Mount, vision: Facts) -> None:
    """The Qwen2 stack that compresses the SAM tower's output with learned queries, below ``at``."""
    hidden, inner = QWEN["dim"], QWEN["intermediate_size"]
    keys = hidden // QWEN["heads"] * QWEN["kv_heads"]
    given = vision.section("width").nested("qwen2-0-5b")
    given.expect("dim", hidden, default=hidden, why="the runtime has this size in its code")
    inside = at.at(source="model.model", target="")
    for _, layer in inside.layers("layers", QWEN["layers"]):
        attention = layer / "self_attn"
        attention.linear("q_proj", hidden, hidden, bias=True)
        attention.linear("k_proj", keys, hidden, bias=True)
        attention.linear("v_proj", keys, hidden, bias=True)
        attention.linear("o_proj", hidden, hidden)
        gated_mlp(layer / "mlp", hidden, inner)
        layer.norm("input_layernorm", hidden)
        layer.norm("post_attention_layernorm", hidden)
    inside.norm("norm", hidden)
    for side, queries in QUERIES.items():
        table = at.input(f"query_{side}.weight", queries, hidden)
        at.rule(f"query_{side}", table, Kind.POSITION)


def clip_facts(vision: Facts) -> Facts:
    """The CLIP tower's own settings, in the names of the first releases."""
    if "encoder_config" in vision.data:  # transformers 5
        given = vision.section("encoder_config")
        given.expect("hidden_act", "quick_gelu", default="quick_gelu", why="the map's only one")
        given.expect("layer_norm_eps", 1e-5, default=1e-5, why="the runtime's first norm has it")
        names = {"num_hidden_layers": "layers", "num_attention_heads": "heads"}
        named = {names.get(name, name): value for name, value in given.data.items()}
        named["width"] = given.data.get("hidden_size", CLIP["width"])
        return Facts(named, path=given.path, parent=given).filled(CLIP)
    stated = vision.section("width").section("clip-l-14-224")
    inner = vision.data.get("intermediate_size", CLIP["intermediate_size"])
    return stated.filled({**CLIP, "intermediate_size": inner})


def clip(at: Mount, vision: Facts, *, patches: bool = True) -> None:
    """The CLIP tower below ``at``; its patches are the SAM tower's output.

    ``patches``: whether the source keeps the convolution that would make them, and is never run.
    """
    facts = clip_facts(vision)
    hidden, inner = facts.size("width"), facts.size("intermediate_size")
    patch = facts.size("patch_size")
    places = (facts.size("image_size") // patch) ** 2 + 1
    embeddings = at / "embeddings"
    embeddings.tensor("class_embedding", hidden, kind=Kind.POSITION)
    if patches:
        embeddings.conv("patch_embedding", hidden, 3, patch, patch)
    else:
        unread = Constant((hidden, patch, patch, 3), 0.0)
        embeddings.rule("patch_embedding.weight", unread, Kind.CONV)
    embeddings.embedding("position_embedding", places, hidden, kind=Kind.POSITION)
    embeddings.drop("position_ids", _INDICES)
    at.norm("pre_layrnorm", hidden, bias=True)
    for _, layer in at.layers("transformer.layers", facts.count("layers")):
        layer.linear("self_attn.qkv_proj", 3 * hidden, hidden, bias=True)
        layer.linear("self_attn.out_proj", hidden, hidden, bias=True)
        for name in ("layer_norm1", "layer_norm2"):
            layer.norm(name, hidden, bias=True)
        layer.linear("mlp.fc1", inner, hidden, bias=True)
        layer.linear("mlp.fc2", hidden, inner, bias=True)


def spell_clip(config: dict[str, Any], vision: Facts) -> None:
    """Write the CLIP tower's facts where the runtime reads them, in place."""
    facts = clip_facts(vision)
    hidden = facts.size("width")
    if hidden != CLIP["width"]:
        facts.problem(f"config.json: {facts.path}width must be 1024, the SAM tower's output")
    facts.expect("image_size", 224, default=224, why="the runtime has this size in its code")
    config.update(
        model_type="vision",
        layers=facts.count("layers"),
        hidden_size=int(hidden),
        intermediate_size=int(facts.size("intermediate_size")),
        num_attention_heads=int(facts.size("heads")),
        patch_size=int(facts.size("patch_size")),
        num_channels=3,
        layer_norm_eps=1e-5,
    )
