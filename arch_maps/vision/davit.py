"""The DaViT tower of Florence-2: stages of window attention and of attention between channels."""

from __future__ import annotations

from typing import Any, Final

from arch_maps.facts import Dim, Facts
from arch_maps.rules import Mount

DEFAULTS: Final[dict[str, list[Any]]] = {
    "depths": [1, 1, 9, 1],
    "embed_dim": [128, 256, 512, 1024],
    "num_heads": [4, 8, 16, 32],
    "num_groups": [4, 8, 16, 32],
    "patch_size": [7, 3, 3, 3],
    "patch_stride": [4, 2, 2, 2],
    "patch_padding": [3, 1, 1, 1],
    "patch_prenorm": [False, True, True, True],
}
"""The reference's facts by stage; ``embed_dim`` is ``dim_embed`` in the first release."""

_ATTENTION: Final = {"spatial_block": "window_attn", "channel_block": "channel_attn"}


def _leaves() -> dict[str, str]:
    """The ends of names as transformers has them."""
    found = {"proj.weight": "conv.weight", "proj.bias": "conv.bias"}
    renamed = {
        f"convs.{stage}.{ours}": f"convs.{stage}.{theirs}"
        for stage in range(len(DEFAULTS["depths"]))
        for ours, theirs in found.items()
    }
    for block, attention in _ATTENTION.items():
        ends = {
            "conv1.fn.dw": "conv1",
            "conv2.fn.dw": "conv2",
            f"{attention}.norm": "norm1",
            f"{attention}.fn.qkv": f"{attention}.qkv",
            f"{attention}.fn.proj": f"{attention}.proj",
            "ffn.norm": "norm2",
            "ffn.fn.net.fc1": "ffn.fc1",
            "ffn.fn.net.fc2": "ffn.fc2",
        }
        for ours, theirs in ends.items():
            for leaf in ("weight", "bias"):
                renamed[f"{block}.{ours}.{leaf}"] = f"{block}.{theirs}.{leaf}"
    return renamed


TRANSFORMERS: Final = _leaves()


def facts_of(given: Facts) -> Facts:
    """The tower's facts under the reference's names, whichever the config has."""
    older = given.data.get("dim_embed")
    found = given if older is None else given.overruled({"embed_dim": older})
    return found.filled(DEFAULTS)


def stages(facts: Facts, name: str) -> list[Any]:
    """The list ``name``, one entry for each stage; the reference's where the config's cannot be."""
    found, usual = facts.data[name], DEFAULTS[name]
    kind = type(usual[0])
    fits = isinstance(found, list) and len(found) == len(usual)
    if not fits or any(type(v) is not kind or not 0 <= v < 2**20 for v in found):
        facts.problem(
            f"config.json: {facts.path}{name} must list {len(usual)} values such as {usual[0]!r}"
        )
        return usual
    return list(found)


def tower(at: Mount, facts: Facts) -> None:
    """Every stage's convolution and blocks, below ``at``."""
    ratio, before = facts.number("mlp_ratio", 4.0), 3
    lists = (stages(facts, name) for name in ("embed_dim", "patch_size", "patch_prenorm", "depths"))
    for stage, (width, kernel, first, depth) in enumerate(zip(*lists, strict=True)):
        width = Dim(width, "embed_dim")
        merge = at / f"convs.{stage}"
        merge.conv("proj", width, before, kernel, kernel, bias=True)
        merge.norm("norm", before if first else width, bias=True)
        for index in range(depth):
            for block, attention in _ATTENTION.items():
                _block(
                    at / f"blocks.{stage}.{index}.{block}",
                    attention,
                    width,
                    int(int(width) * ratio),
                )
        before = width


def _block(at: Mount, attention: str, width: int, inner: int) -> None:
    """Two depthwise convolutions for positions, an attention and an MLP, each with its norm."""
    at.conv("conv1.fn.dw", width, 1, 3, 3, bias=True)
    at.norm(f"{attention}.norm", width, bias=True)
    at.linear(f"{attention}.fn.qkv", 3 * width, width, bias=True)
    at.linear(f"{attention}.fn.proj", width, width, bias=True)
    at.conv("conv2.fn.dw", width, 1, 3, 3, bias=True)
    at.norm("ffn.norm", width, bias=True)
    at.linear("ffn.fn.net.fc1", inner, width, bias=True)
    at.linear("ffn.fn.net.fc2", width, inner, bias=True)


def spell_config(config: dict[str, Any], facts: Facts) -> None:
    """Write the tower's facts as the runtime reads them, in place."""
    facts.expect("qkv_bias", True, default=True, why="this map is checked with these biases")
    lists = {name: stages(facts, name) for name in DEFAULTS}
    config.update(
        **lists,
        model_type="davit",
        dim_embed=lists["embed_dim"],
        in_chans=3,
        mlp_ratio=facts.number("mlp_ratio", 4.0),
        window_size=int(facts.size("window_size", 12)),
        qkv_bias=True,
    )
