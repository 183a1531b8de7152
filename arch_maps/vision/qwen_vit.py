"""The Qwen vision tower from Qwen3-VL on: 3-D patches, learned positions, fused qkv, one merger."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount

_EXACT = "the runtimes compute tanh GELU whatever it says"


SAME_NAMES: Final[Mapping[str, str]] = MappingProxyType({})
QWEN2_MERGER: Final[Mapping[str, str]] = MappingProxyType(
    {
        "deepstack_merger_list": "merger_list",
        "norm": "ln_q",
        "linear_fc1": "mlp.0",
        "linear_fc2": "mlp.2",
    }
)
"""What releases that kept Qwen2-VL's merger call its modules."""


def tower(at: Mount, facts: Facts, *, names: Mapping[str, str] = SAME_NAMES) -> None:
    """Patch embedding, positions, blocks and the final merger, below ``at``.

    ``names`` says what the source calls the modules of the mergers, where not as the runtime.
    """
    hidden = facts.size("hidden_size")
    inner = facts.size("intermediate_size")
    patch = facts.size("patch_size", 16)
    merged = hidden * facts.size("spatial_merge_size", 2) * facts.size("spatial_merge_size", 2)
    at.conv(
        "patch_embed.proj",
        hidden,
        facts.size("in_channels", 3),
        facts.size("temporal_patch_size", 2),
        patch,
        patch,
        bias=True,
    )
    positions = facts.size("num_position_embeddings", 2304)
    at.embedding("pos_embed", positions, hidden, kind=Kind.POSITION)
    for _, block in at.layers("blocks", facts.count("depth")):
        block.norm("norm1", hidden, bias=True)
        block.norm("norm2", hidden, bias=True)
        block.linear("attn.qkv", 3 * hidden, hidden, bias=True)
        block.linear("attn.proj", hidden, hidden, bias=True)
        block.linear("mlp.linear_fc1", inner, hidden, bias=True)
        block.linear("mlp.linear_fc2", hidden, inner, bias=True)
    out = facts.size("out_hidden_size")
    merger = at.at(source="merger", target="merger", part="projector")
    _merge(merger, hidden, merged, out, names)
    # Deeper mergers, one per listed block, normalise after joining neighbours, not before.
    listed = "deepstack_merger_list"
    deeper = at.at(source=names.get(listed, listed), target=listed, part="projector")
    for index in range(len(_deepstack(facts))):
        _merge(deeper / str(index), merged, merged, out, names)


def _merge(at: Mount, normed: int, merged: int, out: int, names: Mapping[str, str]) -> None:
    norm, first, second = (
        at.at(source=names.get(name, name), target=name)
        for name in ("norm", "linear_fc1", "linear_fc2")
    )
    norm.tensor("weight", normed, kind=Kind.NORM)
    norm.tensor("bias", normed, kind=Kind.BIAS)
    for place, size in ((first, merged), (second, out)):
        place.tensor("weight", size, merged, kind=Kind.LINEAR)
        place.tensor("bias", size, kind=Kind.BIAS)


def _deepstack(facts: Facts) -> list[int]:
    found = facts.data.get("deepstack_visual_indexes") or []
    depth = facts.count("depth")
    if not isinstance(found, list) or not all(type(i) is int and 0 <= i < depth for i in found):
        facts.problem(f"config.json: {facts.path}deepstack_visual_indexes must list blocks")
        return []
    return found


def spell_config(
    config: dict[str, Any], facts: Facts, *, model_type: str, deepstack: bool = False
) -> None:
    """Write the tower's facts as the runtimes read them, in place; ``deepstack`` is allowed."""
    facts.expect("hidden_act", "gelu_pytorch_tanh", default="gelu_pytorch_tanh", why=_EXACT)
    if not deepstack and facts.data.get("deepstack_visual_indexes"):
        facts.problem(
            f"config.json: {facts.path}deepstack_visual_indexes is not empty; this tower has none"
        )
    config.update(
        model_type=model_type,
        patch_size=int(facts.size("patch_size", 16)),
        spatial_patch_size=int(facts.size("patch_size", 16)),
        spatial_merge_size=int(facts.size("spatial_merge_size", 2)),
        temporal_patch_size=int(facts.size("temporal_patch_size", 2)),
        in_channels=int(facts.size("in_channels", 3)),
        num_heads=int(facts.size("num_heads", 16)),
        num_position_embeddings=int(facts.size("num_position_embeddings", 2304)),
        deepstack_visual_indexes=_deepstack(facts),
    )
