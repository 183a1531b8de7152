"""MiniCPM-V 4.6 between tower and text: a window merger inside the tower, a merger after it."""

from __future__ import annotations

from arch_maps.facts import Facts
from arch_maps.rules import Mount
from arch_maps.vision import siglip


def window_merger(at: Mount, vision: Facts) -> None:
    """Attention within a window of patches, then an MLP that makes one patch of it."""
    hidden, inner = vision.size("hidden_size"), vision.size("intermediate_size")
    height, width = vision.pair("window_kernel_size", (2, 2))
    area = height * width
    siglip.attention(at / "self_attn", hidden)
    at.norm("layer_norm1", hidden, bias=True)
    at.norm("pre_norm", hidden * area, bias=True)
    at.linear("linear_1", inner * area, hidden * area, bias=True)
    at.linear("linear_2", hidden, inner * area, bias=True)


def merger(at: Mount, root: Facts, vision: Facts, text_hidden: int) -> None:
    """``merger_times`` rounds of joining neighbours; the last one ends at the text's width."""
    hidden = vision.size("hidden_size")
    height, width = root.pair("merge_kernel_size", (2, 2))
    merged = hidden * (height * width)
    rounds = root.count("merger_times", 1)
    for index, block in at.layers("mlp", rounds):
        block.norm("pre_norm", merged, bias=True)
        block.linear("linear_1", merged, merged, bias=True)
        block.linear("linear_2", text_hidden if index == rounds - 1 else hidden, merged, bias=True)
