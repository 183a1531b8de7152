"""The InternViT tower, as transformers and as its releases have it: layer scales, no last norm."""

from __future__ import annotations

from typing import Any, Final

from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount

_QUERY_EPS: Final = 1e-6
"""The reference's epsilon of the query and key norms."""
_FLAGS: Final = (
    ("use_mask_token", False, "the runtime has no mask token"),
    ("use_mean_pooling", True, "the runtime has no final norm"),
    ("use_absolute_position_embeddings", True, "the runtime adds a table of positions"),
)


def tower(at: Mount, facts: Facts) -> None:
    """Embeddings and layers, below ``at``."""
    hidden, inner = facts.size("hidden_size", 1024), facts.size("intermediate_size", 4096)
    (height, width), (tall, wide) = _sides(facts)
    embeddings = at / "embeddings"
    embeddings.tensor("cls_token", 1, 1, hidden, kind=Kind.POSITION)
    positions = (height // tall) * (width // wide) + 1
    embeddings.tensor("position_embeddings", 1, positions, hidden, kind=Kind.POSITION)
    channels = facts.size("num_channels", 3)
    embeddings.conv("patch_embeddings.projection", hidden, channels, tall, wide, bias=True)
    bias, centred = facts.flag("attention_bias", False), _centred(facts)
    qk_norm = facts.flag("use_qk_norm", False)
    for _, layer in at.layers("encoder.layer", facts.count("num_hidden_layers", 24)):
        for name in ("q_proj", "k_proj", "v_proj"):
            layer.linear(f"attention.{name}", hidden, hidden, bias=bias)
        layer.linear("attention.projection_layer", hidden, hidden, bias=True)
        if qk_norm:
            layer.norm("attention.q_norm", hidden)
            layer.norm("attention.k_norm", hidden)
        layer.linear("mlp.fc1", inner, hidden, bias=True)
        layer.linear("mlp.fc2", hidden, inner, bias=True)
        layer.norm("layernorm_before", hidden, bias=centred)
        layer.norm("layernorm_after", hidden, bias=centred)
        layer.tensor("lambda_1", hidden, kind=Kind.STATE)
        layer.tensor("lambda_2", hidden, kind=Kind.STATE)


def spell_config(config: dict[str, Any], facts: Facts) -> None:
    """Write the tower's facts as the runtime reads them, in place."""
    facts.expect("hidden_act", "gelu", default="gelu", why="the runtime computes GELU")
    kinds = ("layer_norm", "rms_norm")
    facts.expect("norm_type", *kinds, default="layer_norm", why="the runtime has no other norm")
    eps, qk_norm = facts.number("layer_norm_eps", 1e-6), facts.flag("use_qk_norm", False)
    if qk_norm and eps != _QUERY_EPS:
        facts.problem(
            f"config.json: {facts.path}layer_norm_eps is {eps}; the release normalises queries and "
            f"keys with {_QUERY_EPS}, the runtime with the layers' epsilon"
        )
    for name, flag, why in _FLAGS:
        facts.expect(name, flag, default=flag, why=why)
    image, patch = _sides(facts)
    if image[0] != image[1] or patch[0] != patch[1]:
        facts.problem(f"config.json: {facts.path}image_size: the runtime takes squares only")
    config.update(
        model_type="internvl_vision",
        hidden_size=int(facts.size("hidden_size", 1024)),
        intermediate_size=int(facts.size("intermediate_size", 4096)),
        num_hidden_layers=facts.count("num_hidden_layers", 24),
        num_attention_heads=int(facts.size("num_attention_heads", 16)),
        num_channels=int(facts.size("num_channels", 3)),
        image_size=list(image),
        patch_size=list(patch),
        layer_norm_eps=eps,
        norm_type="layer_norm" if _centred(facts) else "rms_norm",
        attention_bias=facts.flag("attention_bias", False),
        use_qk_norm=qk_norm,
    )


def _centred(facts: Facts) -> bool:
    return bool(facts.data.get("norm_type", "layer_norm") == "layer_norm")


def _sides(facts: Facts) -> tuple[tuple[int, int], tuple[int, int]]:
    return facts.pair("image_size", (448, 448)), facts.pair("patch_size", (14, 14))


def released_tower(at: Mount, facts: Facts) -> None:
    """The tower under the releases' own names, with one projection for q, k and v."""
    hidden, inner = facts.size("hidden_size"), facts.size("intermediate_size")
    side, patch = facts.size("image_size"), facts.size("patch_size")
    embeddings = at / "embeddings"
    embeddings.tensor("class_embedding", 1, 1, hidden, kind=Kind.POSITION)
    positions = (side // patch) * (side // patch) + 1
    embeddings.tensor("position_embedding", 1, positions, hidden, kind=Kind.POSITION)
    embeddings.conv("patch_embedding", hidden, 3, patch, patch, bias=True)
    centred, biased = _centred(facts), facts.flag("qkv_bias", True)
    for _, layer in at.layers("encoder.layers", facts.count("num_hidden_layers")):
        layer.linear("attn.qkv", 3 * hidden, hidden, bias=biased)
        layer.linear("attn.proj", hidden, hidden, bias=True)
        if facts.flag("qk_normalization", False):
            layer.norm("attn.q_norm", hidden)
            layer.norm("attn.k_norm", hidden)
        layer.linear("mlp.fc1", inner, hidden, bias=True)
        layer.linear("mlp.fc2", hidden, inner, bias=True)
        layer.norm("norm1", hidden, bias=centred)
        layer.norm("norm2", hidden, bias=centred)
        layer.tensor("ls1", hidden, kind=Kind.STATE)
        layer.tensor("ls2", hidden, kind=Kind.STATE)


def spell_released(config: dict[str, Any], facts: Facts) -> None:
    """Write the tower's facts as the runtime of the releases' own type reads them, in place."""
    facts.expect("hidden_act", "gelu", default="gelu", why="the runtime computes GELU")
    kinds = ("layer_norm", "rms_norm")
    facts.expect("norm_type", *kinds, default="layer_norm", why="the runtime has no other norm")
    config.update(
        image_size=int(facts.size("image_size")),
        patch_size=int(facts.size("patch_size")),
        num_channels=3,
        layer_norm_eps=facts.number("layer_norm_eps", 1e-6),
        norm_type="layer_norm" if _centred(facts) else "rms_norm",
        qkv_bias=facts.flag("qkv_bias", True),
        qk_normalization=facts.flag("qk_normalization", False),
    )
