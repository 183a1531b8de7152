"""The PLaMo 2 text stack: Mamba-2-like and attention layers in turns, a norm around each half."""

from __future__ import annotations

from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount


def mamba_layers(facts: Facts) -> list[bool]:
    """Which layers are recurrent: all but one in each ``mamba_step``, or but the last one."""
    layers, step = facts.count("num_hidden_layers"), int(facts.size("mamba_step", 2))
    if not facts.flag("mamba_enabled", True):
        return [False] * layers
    if layers <= step // 2:
        return [index != layers - 1 for index in range(layers)]
    return [index % step != step // 2 for index in range(layers)]


def _mamba(at: Mount, facts: Facts) -> None:
    hidden, state = facts.size("hidden_size"), facts.size("mamba_d_state", 64)
    heads = facts.size("mamba_num_heads", 64)
    inner, rank = heads * facts.size("hidden_size_per_head", 128), max(64, int(hidden) // 16)
    at.linear("in_proj", 2 * inner, hidden)
    at.conv("conv1d", inner, 1, facts.size("mamba_d_conv", 4))
    at.linear("bcdt_proj", rank + 2 * state, inner)
    at.linear("dt_proj", heads, rank)
    for name in ("dt_bias", "A_log", "D"):
        at.tensor(name, heads, kind=Kind.STATE)
    for name, size in (("dt", rank), ("B", state), ("C", state)):
        at.tensor(f"{name}_norm_weight", size, kind=Kind.NORM)
    at.linear("out_proj", hidden, inner)


def _attention(at: Mount, facts: Facts) -> None:
    hidden, head_dim = facts.size("hidden_size"), facts.size("hidden_size_per_head", 128)
    heads, groups = facts.size("num_attention_heads"), facts.size("num_key_value_heads", 4)
    at.linear("qkv_proj", (heads + 2 * groups) * head_dim, hidden)
    at.linear("o_proj", hidden, heads * head_dim)
    at.tensor("q_weight", heads, head_dim, kind=Kind.NORM)
    at.tensor("k_weight", groups, head_dim, kind=Kind.NORM)


def halves(layer: Mount, hidden: int, inner: int) -> None:
    """The MLP of a layer, and the norms before and after both of its halves."""
    layer.linear("mlp.gate_up_proj", 2 * inner, hidden)
    layer.linear("mlp.down_proj", hidden, inner)
    for name in ("pre_mixer_norm", "post_mixer_norm", "pre_mlp_norm", "post_mlp_norm"):
        layer.norm(name, hidden)


def causal_lm(root: Mount, facts: Facts) -> None:
    """Table, layers, final norm and head."""
    hidden, vocab = facts.size("hidden_size"), facts.size("vocab_size")
    inner = facts.size("intermediate_size")
    model = root / "model"
    model.embedding("embed_tokens", vocab, hidden)
    for index, recurrent in enumerate(mamba_layers(facts)):
        layer = model / f"layers.layers.{index}"
        (_mamba if recurrent else _attention)(layer / "mixer", facts)
        halves(layer, hidden, inner)
    model.norm("norm", hidden)
    tied = facts.flag("tie_word_embeddings", True)
    root.head("lm_head", vocab, hidden, tied_to="model.embed_tokens.weight" if tied else None)
