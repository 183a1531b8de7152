"""Moondream's tower and projector: crops through a ViT, joined with the whole picture's view."""

from __future__ import annotations

from typing import Any, Final

from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount

_SIZES: Final = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "crop_size": 378,
    "max_crops": 12,
    "overlap_margin": 4,
    "in_channels": 3,
    "proj_inner_dim": 8192,
    "proj_out_dim": 2048,
}
"""The released sizes, which published configs leave to the release's code."""
_REGION: Final = "the runtime has no part that points at places or boxes"


def section(root: Facts, name: str) -> Facts:
    """The sub-config ``name``, empty where a release leaves its sizes to its code."""
    if name not in root.data and "config" not in root.data:
        root.problem(f"config.json states neither {name} nor the empty config of a release")
    if root.data.get("config"):
        root.problem("config.json: config overrides sizes in words that no runtime reads")
    return root.section(name) if root.data.get(name) else Facts({}, parent=root)


def sides(root: Mount, facts: Facts, *, text_hidden: int) -> None:
    """Tower and projector of a release below ``model.vision``."""
    given = facts.filled(_SIZES)
    hidden, inner = given.size("hidden_size"), given.size("intermediate_size")
    tower = root.at(source="model.vision", target="vision.encoder", part="vision")
    patch, side = given.size("patch_size"), given.size("crop_size")
    tower.linear("patch_emb", hidden, patch * patch * given.size("in_channels"), bias=True)
    count = (side // patch) * (side // patch)
    tower.tensor("pos_emb", 1, count, hidden, kind=Kind.POSITION)
    for _, block in tower.layers("blocks", given.count("num_hidden_layers")):
        block.norm("ln1", hidden, bias=True)
        block.norm("ln2", hidden, bias=True)
        block.linear("attn.qkv", 3 * hidden, hidden, bias=True)
        block.linear("attn.proj", hidden, hidden, bias=True)
        block.linear("mlp.fc1", inner, hidden, bias=True)
        block.linear("mlp.fc2", hidden, inner, bias=True)
    tower.norm("post_ln", hidden, bias=True)
    projector = root.at(source="model.vision.proj_mlp", target="vision.proj_mlp", part="projector")
    wide, out = given.size("proj_inner_dim"), given.size("proj_out_dim")
    if int(out) != text_hidden:
        facts.problem("config.json: vision_config.proj_out_dim must be the text's hidden_size")
    projector.linear("fc1", wide, 2 * hidden, bias=True)
    projector.linear("fc2", out, wide, bias=True)
    _drop_region(root.at(source="model.region", target=""))


def _drop_region(at: Mount) -> None:
    for word in ("coord", "size"):
        at.drop(f"{word}_features", _REGION)
        for side in ("encoder", "decoder"):
            for layer in ("", ".fc1", ".fc2"):
                for leaf in ("weight", "bias"):
                    at.drop(f"{word}_{side}{layer}.{leaf}", _REGION)
    for leaf in ("weight", "bias"):
        at.drop(f"ln.{leaf}", _REGION)


def spell_config(facts: Facts, *, model_type: str, eps: float) -> dict[str, Any]:
    """The tower's facts as the runtime reads them."""
    facts.expect("attention_bias", True, default=True, why="this map is checked with these biases")
    given = facts.filled(_SIZES)
    return {
        **{name: int(given.size(name)) for name in _SIZES},
        "model_type": model_type,
        "attention_bias": True,
        "layer_norm_eps": facts.number("layer_norm_eps", eps),
    }
