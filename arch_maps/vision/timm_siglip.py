"""SigLIP as timm writes it, with the attention pool that multimodal releases keep and never run."""

from __future__ import annotations

from typing import Any, Final

from arch_maps.facts import Dim, Facts
from arch_maps.rules import Kind, Mount

_DEFAULTS: Final[dict[str, Any]] = {
    "layers": 27,
    "width": 1152,
    "image_size": 384,
    "patch_size": 16,
    "num_attention_heads": 16,
    "mlp_ratio": 3.7362,
}
"""The reference's."""


def width(given: Facts) -> Dim:
    """The tower's width."""
    return given.filled(_DEFAULTS).size("width")


def tower(at: Mount, given: Facts) -> None:
    """Patches, blocks, norm and pool, below ``at``."""
    facts = given.filled(_DEFAULTS)
    hidden, patch = facts.size("width"), facts.size("patch_size")
    inner = _inner(facts)
    at.conv("patch_embed.proj", hidden, 3, patch, patch, bias=True)
    places = (facts.size("image_size") // patch) ** 2
    at.tensor("pos_embed", 1, places, hidden, kind=Kind.POSITION)
    for _, block in at.layers("blocks", facts.count("layers")):
        block.linear("attn.qkv", 3 * hidden, hidden, bias=True)
        block.linear("attn.proj", hidden, hidden, bias=True)
        _mlp(block, hidden, inner)
        block.norm("norm1", hidden, bias=True)
        block.norm("norm2", hidden, bias=True)
    at.norm("norm", hidden, bias=True)
    pool = at / "attn_pool"
    pool.tensor("latent", 1, 1, hidden, kind=Kind.POSITION)
    pool.linear("q", hidden, hidden, bias=True)
    pool.linear("kv", 2 * hidden, hidden, bias=True)
    pool.linear("proj", hidden, hidden, bias=True)
    _mlp(pool, hidden, inner)
    pool.norm("norm", hidden, bias=True)


def _mlp(at: Mount, hidden: int, inner: int) -> None:
    at.linear("mlp.fc1", inner, hidden, bias=True)
    at.linear("mlp.fc2", hidden, inner, bias=True)


def _inner(facts: Facts) -> int:
    return int(int(facts.size("width")) * facts.number("mlp_ratio"))


def spell_config(config: dict[str, Any], given: Facts) -> None:
    """Write every setting of the tower, in place."""
    facts = given.filled(_DEFAULTS)
    for name in ("layers", "width", "image_size", "patch_size", "num_attention_heads"):
        config[name] = int(facts.size(name))
    config.update(
        model_type="vision",
        mlp_ratio=facts.number("mlp_ratio"),
        intermediate_size=_inner(facts),
        num_channels=3,
        layer_norm_eps=1e-6,
    )
