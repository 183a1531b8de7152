"""Mamba-2 and Codestral Mamba: state spaces alone, a gated norm after each recurrence."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import mamba, mamba2


def _sizes(facts: Facts) -> mamba2.Sizes:
    return mamba2.Sizes(
        hidden=facts.size("hidden_size"),
        heads=facts.size("num_heads", 128),
        head_dim=facts.size("head_dim", 64),
        groups=facts.size("n_groups", 8),
        state=facts.size("state_size", 128),
        kernel=facts.size("conv_kernel", 4),
        conv_bias=facts.flag("use_conv_bias", True),
        proj_bias=facts.flag("use_bias", False),
    )


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    m, vocab = _sizes(facts), facts.size("vocab_size")
    at = root / "backbone"
    at.embedding("embeddings", vocab, m.hidden)
    for _index, layer in at.layers("layers", facts.count("num_hidden_layers")):
        layer.norm("norm", m.hidden)
        mamba2.mixer(layer / "mixer", m)
    at.norm("norm_f", m.hidden)
    tied = facts.flag("tie_word_embeddings", False)
    table = at.input("embeddings.weight", vocab, m.hidden).name
    root.head("lm_head", vocab, m.hidden, tied_to=table if tied else None)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    facts.expect("hidden_act", "silu", default="silu", why="the runtimes compute SiLU")
    why = "the runtimes fix it in code for the layers' norms"
    facts.expect("layer_norm_epsilon", mamba.EPS, default=mamba.EPS, why=why)
    m = _sizes(facts)
    out = spell.start(config)
    limits = out.get("time_step_limit") or [0.0, float("inf")]
    out.update(
        num_heads=int(m.heads),
        head_dim=int(m.head_dim),
        intermediate_size=int(m.heads) * int(m.head_dim),
        state_size=int(m.state),
        ssm_state_size=int(m.state),
        layer_norm_epsilon=mamba.EPS,
        conv_kernel=int(m.kernel),
        n_groups=int(m.groups),
        use_bias=m.proj_bias,
        use_conv_bias=m.conv_bias,
        tie_word_embeddings=facts.flag("tie_word_embeddings", False),
        time_step_limit=[float(limit) for limit in limits],
        time_step_rank=facts.data.get("time_step_rank") or "auto",
        max_position_embeddings=int(facts.size("max_position_embeddings", 2056)),
    )
    return out


MAP = ArchMap(
    model_type="mamba2",
    tensors=_tensors,
    config=_config,
    layouts=(
        Layout("transformers", {}),
        Layout("state-spaces", {}, {"embeddings.weight": "embedding.weight"}),
    ),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.mamba2",),
)
