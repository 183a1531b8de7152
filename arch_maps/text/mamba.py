"""The Mamba text stack: a short convolution and a selective state space per layer."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount

EPS = 1e-5
"""Of every norm on the residual stream, which the runtimes fix in code."""


def causal_lm(root: Mount, facts: Facts, *, tied: bool) -> None:
    """Table, layers, final norm and head; ``tied`` is the reference's default."""
    vocab, hidden = facts.size("vocab_size"), facts.size("hidden_size")
    width, state = _width(facts), facts.size("state_size", 16)
    rank, kernel = _rank(facts), facts.size("conv_kernel", 4)
    bias = facts.flag("use_bias", False)
    at = root / "backbone"
    at.embedding("embeddings", vocab, hidden)
    for _, layer in at.layers("layers", facts.count("num_hidden_layers")):
        layer.norm("norm", hidden)
        mixer = layer / "mixer"
        mixer.linear("in_proj", 2 * width, hidden, bias=bias)
        mixer.conv("conv1d", width, 1, kernel, bias=facts.flag("use_conv_bias", True))
        mixer.linear("x_proj", rank + 2 * state, width)
        mixer.linear("dt_proj", width, rank, bias=True)
        mixer.tensor("A_log", width, state, kind=Kind.STATE)
        mixer.tensor("D", width, kind=Kind.STATE)
        mixer.linear("out_proj", hidden, width, bias=bias)
    at.norm("norm_f", hidden)
    shared = facts.flag("tie_word_embeddings", tied)
    table = at.input("embeddings.weight", vocab, hidden).name
    root.head("lm_head", vocab, hidden, tied_to=table if shared else None)


def spell_config(config: dict[str, Any], facts: Facts, *, tied: bool) -> dict[str, Any]:
    """The config under the names both runtimes read."""
    facts.expect("hidden_act", "silu", default="silu", why="the runtimes compute SiLU")
    facts.expect("layer_norm_epsilon", EPS, default=EPS, why="the runtimes fix it in code")
    out = spell.start(config)
    out.update(
        intermediate_size=int(_width(facts)),
        state_size=int(facts.size("state_size", 16)),
        conv_kernel=int(facts.size("conv_kernel", 4)),
        time_step_rank=int(_rank(facts)),
        use_bias=facts.flag("use_bias", False),
        use_conv_bias=facts.flag("use_conv_bias", True),
        tie_word_embeddings=facts.flag("tie_word_embeddings", tied),
        layer_norm_epsilon=EPS,
    )
    return out


def _width(facts: Facts) -> int:
    """Width of the state space: ``expand`` times the hidden size unless stated."""
    expanded = facts.size("expand", 2) * facts.size("hidden_size")
    return facts.size("intermediate_size", int(expanded))


def _rank(facts: Facts) -> int:
    if facts.data.get("time_step_rank", "auto") == "auto":
        return -(-int(facts.size("hidden_size")) // 16)
    return facts.size("time_step_rank")
