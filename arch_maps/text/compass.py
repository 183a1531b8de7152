"""The Cohere Compass text stack: Cohere's, with positions on three axes in some kinds of layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.text import llama
from arch_maps.text.windows import FULL, SLIDING

_SECTION = (24, 20, 20)
"""The reference's shares of the three axes."""


def sizes(facts: Facts) -> llama.Sizes:
    """Read the sizes, with the reference's defaults."""
    found = llama.sizes(facts)
    return replace(found, norms=("input_layernorm",), mlp_bias=False)


def spell_config(facts: Facts, s: llama.Sizes, *, tied: bool) -> dict[str, Any]:
    """The text section as the runtime reads it."""
    llama.expect_silu(facts)
    facts.expect("pooling", None, default=None, why="the runtime writes text here, it embeds none")
    if int(s.head_dim) * int(s.heads) != int(s.hidden):
        facts.problem(f"config.json: {facts.path}head_dim must be hidden_size / heads here")
    kinds = facts.data.get("layer_types") or [FULL] * s.layers
    if len(kinds) != s.layers or set(kinds) - {FULL, SLIDING}:
        facts.problem(f"config.json: {facts.path}layer_types must list {s.layers} layers")
    return {
        **facts.data,
        "model_type": "cohere_compass_text",
        "head_dim": int(s.head_dim),
        "num_key_value_heads": int(s.kv_heads),
        "hidden_act": "silu",
        "attention_bias": s.attention_bias,
        "mlp_bias": False,
        "layer_norm_eps": facts.number("layer_norm_eps", 1e-5),
        "rms_norm_eps": None,
        "norm_type": "layer_norm",
        "transformer_block_type": "parallel",
        "logit_scale": facts.data.get("logit_scale"),
        "max_position_embeddings": int(facts.size("max_position_embeddings", 8192)),
        "sliding_window": int(facts.size("sliding_window", 4096)),
        "layer_types": kinds,
        "rope_style": "split",
        "rope_on_all_layers": True,
        "rope_parameters": {kind: _rope(facts, kind, s) for kind in sorted(set(kinds))},
        "tie_word_embeddings": tied,
    }


def _rope(facts: Facts, kind: str, s: llama.Sizes) -> dict[str, Any] | None:
    """Position settings of the layers of one kind; None where they have no positions."""
    listed = facts.data.get("rope_parameters") or {}
    by_kind = bool({FULL, SLIDING} & set(listed))
    stated = listed.get(kind) if by_kind else listed
    if by_kind and stated is None:
        return None
    path = f"{facts.path}rope_parameters.{kind}."
    settings = spell.rope(Facts({"rope_parameters": stated}, path=path, parent=facts))
    spell.require_rope_type(facts, settings, allowed=("default",))
    section = settings.setdefault("mrope_section", list(_SECTION))
    if 2 * sum(section) != s.head_dim:
        facts.problem(
            f"config.json: {path}mrope_section must share out {int(s.head_dim) // 2} frequencies, "
            f"not {section!r}"
        )
    return settings
