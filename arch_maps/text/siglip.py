"""The SigLIP text tower: learned positions, pre-norm layers, the last token projected."""

from __future__ import annotations

from typing import Any, Final

from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount
from arch_maps.vision.siglip import encoder_layer

DEFAULTS: Final = {
    **{"vocab_size": 32000, "hidden_size": 768, "intermediate_size": 3072},
    **{"num_hidden_layers": 12, "num_attention_heads": 12},
    **{"max_position_embeddings": 64, "layer_norm_eps": 1e-6},
}
"""The reference's values, for releases that leave them out."""


def tower(at: Mount, facts: Facts) -> None:
    """Embeddings, layers, final norm and projection, below ``at``."""
    hidden, inner = facts.size("hidden_size"), facts.size("intermediate_size")
    at.embedding("embeddings.token_embedding", facts.size("vocab_size"), hidden)
    positions = facts.size("max_position_embeddings")
    at.embedding("embeddings.position_embedding", positions, hidden, kind=Kind.POSITION)
    at.drop("embeddings.position_ids", "position indices follow from the config")
    for _, layer in at.layers("encoder.layers", facts.count("num_hidden_layers")):
        encoder_layer(layer, hidden, inner)
    at.norm("final_layer_norm", hidden, bias=True)
    at.linear("head", facts.size("projection_size", int(hidden)), hidden, bias=True)


def spell_config(facts: Facts) -> dict[str, Any]:
    """The text section as the runtime reads it."""
    tanh = "gelu_pytorch_tanh"
    why = "the runtime computes tanh GELU whatever it says"
    facts.expect("hidden_act", tanh, default=tanh, why=why)
    sizes = {name: int(facts.size(name)) for name in DEFAULTS if name != "layer_norm_eps"}
    return {
        **facts.data,
        **sizes,
        "model_type": "siglip_text_model",
        "layer_norm_eps": facts.number("layer_norm_eps"),
        "projection_size": int(facts.size("projection_size", sizes["hidden_size"])),
    }
