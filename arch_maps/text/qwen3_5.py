"""The Qwen3.5 text stack: gated delta net layers with full attention every few layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Dim, Facts
from arch_maps.ops import sources
from arch_maps.rules import Kind, Mount, Tensors
from arch_maps.text.llama import gated_mlp

FeedForward = Callable[[Mount, "Sizes"], None]
"""Adds what follows the attention of a layer, below the layer's mount."""
NORM_OFFSET = 1.0
"""The reference multiplies by (1 + weight); the runtimes store the sum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the stack's shapes depend on."""

    vocab: Dim
    hidden: Dim
    intermediate: Dim
    layer_types: tuple[str, ...]
    heads: Dim
    kv_heads: Dim
    head_dim: Dim
    attention_bias: bool
    key_heads: Dim
    value_heads: Dim
    key_dim: Dim
    value_dim: Dim
    kernel: Dim


def sizes(facts: Facts, *, intermediate: str = "intermediate_size") -> Sizes:
    """Read the sizes, with the reference's defaults; ``intermediate`` names the MLP's."""
    layers = facts.count("num_hidden_layers")
    interval = int(facts.size("full_attention_interval", 4))
    by_interval = [
        "linear_attention" if (i + 1) % interval else "full_attention" for i in range(layers)
    ]
    kinds = facts.data.get("layer_types") or by_interval
    if not isinstance(kinds, list) or len(kinds) != layers:
        facts.problem(f"config.json: {facts.path}layer_types must list {layers} layers")
        kinds = by_interval
    return Sizes(
        vocab=facts.size("vocab_size"),
        hidden=facts.size("hidden_size"),
        intermediate=facts.size(intermediate),
        layer_types=tuple(kinds),
        heads=facts.size("num_attention_heads"),
        kv_heads=facts.size("num_key_value_heads", 4),
        head_dim=facts.size("head_dim", 256),
        attention_bias=facts.flag("attention_bias", False),
        key_heads=facts.size("linear_num_key_heads", 16),
        value_heads=facts.size("linear_num_value_heads", 32),
        key_dim=facts.size("linear_key_head_dim", 128),
        value_dim=facts.size("linear_value_head_dim", 128),
        kernel=facts.size("linear_conv_kernel_dim", 4),
    )


def dense(at: Mount, s: Sizes) -> None:
    """The MLP of every layer."""
    gated_mlp(at / "mlp", s.hidden, s.intermediate)


def stack(at: Mount, s: Sizes, feed_forward: FeedForward = dense) -> None:
    """Embedding, decoder layers and final norm, below ``at``."""
    at.embedding("embed_tokens", s.vocab, s.hidden)
    for index, layer in at.layers("layers", len(s.layer_types)):
        if s.layer_types[index] == "full_attention":
            gated_attention(layer / "self_attn", s)
        else:
            gated_delta_net(layer / "linear_attn", s)
        feed_forward(layer, s)
        layer.norm("input_layernorm", s.hidden, offset=NORM_OFFSET)
        layer.norm("post_attention_layernorm", s.hidden, offset=NORM_OFFSET)
    at.norm("norm", s.hidden, offset=NORM_OFFSET)


def gated_attention(at: Mount, s: Sizes, *, offset: float = NORM_OFFSET) -> None:
    """Grouped-query attention whose query projection also makes an output gate per head.

    ``offset`` is what the runtime has added to the weights of its norms.
    """
    bias = s.attention_bias
    at.linear("q_proj", s.heads * (2 * s.head_dim), s.hidden, bias=bias)
    at.linear("k_proj", s.kv_heads * s.head_dim, s.hidden, bias=bias)
    at.linear("v_proj", s.kv_heads * s.head_dim, s.hidden, bias=bias)
    at.linear("o_proj", s.hidden, s.heads * s.head_dim, bias=bias)
    at.norm("q_norm", s.head_dim, offset=offset)
    at.norm("k_norm", s.head_dim, offset=offset)
    at.changed_values("a gate multiplies what attention gives, channel by channel")


def gated_delta_net(at: Mount, s: Sizes) -> None:
    """Linear attention: one depthwise convolution over q, k and v, and a gated recurrence."""
    keys = s.key_heads * s.key_dim
    values = s.value_heads * s.value_dim
    mixed = 2 * keys + values
    at.linear("in_proj_qkv", mixed, s.hidden)
    at.linear("in_proj_z", values, s.hidden)
    at.linear("in_proj_b", s.value_heads, s.hidden, kind=Kind.GATE)
    at.linear("in_proj_a", s.value_heads, s.hidden, kind=Kind.GATE)
    at.conv("conv1d", mixed, 1, s.kernel)
    at.tensor("dt_bias", s.value_heads, kind=Kind.STATE)
    at.tensor("A_log", s.value_heads, kind=Kind.STATE)
    at.norm("norm", s.value_dim)
    at.linear("out_proj", s.hidden, values)


def spell_config(
    config: dict[str, Any], facts: Facts, *, tied: bool, intermediate: str = "intermediate_size"
) -> None:
    """Write the stack's facts under the names both runtimes read, in place."""
    s = sizes(facts, intermediate=intermediate)
    facts.expect(
        "hidden_act", "silu", default="silu", why="the runtimes compute SiLU whatever it says"
    )
    full = [i for i, kind in enumerate(s.layer_types) if kind == "full_attention"]
    interval = full[0] + 1 if full else len(s.layer_types) + 1
    if full != list(range(interval - 1, len(s.layer_types), interval)):
        facts.problem(
            f"config.json: {facts.path}layer_types has full attention at layers {full}; the "
            "runtimes place it at every n-th layer only"
        )
    if s.value_heads % s.key_heads:
        facts.problem(
            f"config.json: {facts.path}linear_num_value_heads ({int(s.value_heads)}) must be a "
            f"multiple of linear_num_key_heads ({int(s.key_heads)})"
        )
    spell_rope(config, facts)
    config.update(
        full_attention_interval=interval,
        **attention_sizes(s),
        tie_word_embeddings=tied,
        rms_norm_eps=facts.number("rms_norm_eps", 1e-6),
        max_position_embeddings=int(facts.size("max_position_embeddings", 32768)),
    )


def attention_sizes(s: Sizes) -> dict[str, Any]:
    """What both kinds of attention are built by, under the config's names."""
    return dict(
        num_key_value_heads=int(s.kv_heads),
        head_dim=int(s.head_dim),
        attention_bias=s.attention_bias,
        linear_num_key_heads=int(s.key_heads),
        linear_num_value_heads=int(s.value_heads),
        linear_key_head_dim=int(s.key_dim),
        linear_value_head_dim=int(s.value_dim),
        linear_conv_kernel_dim=int(s.kernel),
    )


def media_tokens(facts: Facts) -> dict[str, Any]:
    """Ids of the tokens in the place of pictures and videos, and of those around them."""
    default = {"image": 248056, "video": 248057, "vision_start": 248053, "vision_end": 248054}
    names = {f"{kind}_token_id": token for kind, token in default.items()}
    return {name: facts.data.get(name, token) for name, token in names.items()}


def spell_rope(config: dict[str, Any], facts: Facts, *, rotary: float = 0.25) -> None:
    """Write positions on three axes, in place; ``rotary`` is the reference's default share."""
    settings = spell.rope(facts)
    settings.setdefault("partial_rotary_factor", rotary)
    settings.setdefault("mrope_section", [11, 11, 10])
    if settings["rope_type"] not in ("default", "mrope"):
        facts.problem(
            f"config.json: {facts.path}rope_type is {settings['rope_type']!r}; the runtimes "
            "compute unscaled positions only"
        )
    settings["rope_type"] = "default"
    config.update(spell.spell_rope(settings))
    config["rope_scaling"] = config["rope_parameters"]


def tied(root: Facts) -> bool:
    """Whether the head is tied: the top level decides, and the text section where it is silent."""
    nested = root.data.get("text_config")
    inner = nested.get("tie_word_embeddings") if isinstance(nested, dict) else None
    return root.flag("tie_word_embeddings", inner if isinstance(inner, bool) else False)


def drop_mtp(root: Mount, s: Sizes, layers: int, feed_forward: FeedForward = dense) -> None:
    """The release's multi-token-prediction layers, which the runtimes load as a drafter only."""
    why = "multi-token-prediction layers are a drafter of their own, not part of this checkpoint"
    at = root / "mtp"
    twice = (s.hidden, 2 * s.hidden)
    at.drop("fc.weight", why, *twice)
    names = [("pre_fc_norm_embedding.weight", s.hidden), ("pre_fc_norm_hidden.weight", s.hidden)]
    for name, size in [*names, ("norm.weight", s.hidden)]:
        at.drop(name, why, size)
    block = Mount(Tensors())  # the block's names relative to itself
    gated_attention(block / "self_attn", s)
    feed_forward(block, s)
    block.norm("input_layernorm", s.hidden)
    block.norm("post_attention_layernorm", s.hidden)
    for _, layer in at.layers("layers", layers):
        for leaf in dict.fromkeys(leaf for rule in block.out.rules for leaf in sources(rule.expr)):
            layer.drop(leaf.name, why, *leaf.shape)
