"""The MoonViT tower of Kimi K2.5: patches of any grid, a resampled table, rotary positions."""

from __future__ import annotations

from typing import Any, Final

from arch_maps.facts import Dim, Facts
from arch_maps.rules import Kind, Mount

DEFAULTS: Final = {
    "patch_size": 14,
    "pos_emb_height": 64,
    "pos_emb_width": 64,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "hidden_act": "gelu_pytorch_tanh",
    "merge_kernel_size": [2, 2],
}
"""The reference's facts, which are the released tower's."""
_RELEASED: Final = {
    "init_pos_emb_height": "pos_emb_height",
    "init_pos_emb_width": "pos_emb_width",
    "vt_num_attention_heads": "num_attention_heads",
    "vt_num_hidden_layers": "num_hidden_layers",
    "vt_hidden_size": "hidden_size",
    "vt_intermediate_size": "intermediate_size",
}
"""What the release's own code calls them."""


def facts_of(given: Facts) -> Facts:
    """The tower's facts under the reference's names, whichever the config has."""
    renamed = {_RELEASED.get(name, name): value for name, value in given.data.items()}
    return Facts(renamed, path=given.path, parent=given).filled(DEFAULTS)


def tower(at: Mount, given: Facts, *, inner: str, patches: str) -> None:
    """Patches, blocks and the final norm, below ``at``.

    ``inner`` and ``patches`` are where the source has the blocks and the patch kernel below it.
    """
    facts = facts_of(given)
    hidden, patch = facts.size("hidden_size"), facts.size("patch_size")
    kernel = at.at(source=patches, target="")
    kernel.conv("patch_embed.proj", hidden, 3, patch, patch, bias=True)
    tall, wide = facts.size("pos_emb_height"), facts.size("pos_emb_width")
    at.tensor("patch_embed.pos_emb.weight", tall, wide, hidden, kind=Kind.POSITION)
    encoder = at.at(source=inner, target="")
    wider = facts.size("intermediate_size")
    for _, block in encoder.layers("blocks", facts.count("num_hidden_layers")):
        heads = block.at(source="", target="attn")
        heads.linear("wqkv", 3 * hidden, hidden, bias=True)
        heads.linear("wo", hidden, hidden, bias=True)
        block.norm("norm0", hidden, bias=True)
        block.norm("norm1", hidden, bias=True)
        block.linear("mlp.fc0", wider, hidden, bias=True)
        block.linear("mlp.fc1", hidden, wider, bias=True)
    encoder.norm("final_layernorm", hidden, bias=True)


def joined(given: Facts) -> Dim:
    """Width of the patches that are joined to one token."""
    facts = facts_of(given)
    tall, wide = facts.pair("merge_kernel_size", (2, 2))
    return facts.size("hidden_size") * (tall * wide)


def spell_config(config: dict[str, Any], given: Facts) -> None:
    """Write the tower's facts as the runtime reads them, in place."""
    facts = facts_of(given)
    facts.expect(
        "hidden_act",
        "gelu_pytorch_tanh",
        default="gelu_pytorch_tanh",
        why="the release means tanh GELU",
    )
    facts.expect("merge_type", "sd2_tpool", default="sd2_tpool", why="the runtime has no other")
    if facts.data["pos_emb_height"] != facts.data["pos_emb_width"]:
        facts.problem(f"config.json: {facts.path}pos_emb_height: the runtime takes squares only")
    heads, hidden = int(facts.size("num_attention_heads")), int(facts.size("hidden_size"))
    tall, wide = facts.pair("merge_kernel_size", (2, 2))
    config.update(
        model_type="moonvit",
        depth=facts.count("num_hidden_layers"),
        embed_dim=hidden,
        hidden_size=hidden,
        num_heads=heads,
        num_channels=3,
        patch_size=int(facts.size("patch_size")),
        spatial_patch_size=int(facts.size("patch_size")),
        spatial_merge_size=tall,
        merge_kernel_size=[tall, wide],
        intermediate_size=int(facts.size("intermediate_size")),
        init_pos_emb_height=int(facts.size("pos_emb_height")),
        init_pos_emb_width=int(facts.size("pos_emb_width")),
    )
