"""The Gemma 4 drafter: a few layers that attend to the keys and values of the model it helps."""

from __future__ import annotations

from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount
from arch_maps.text import gemma4

_PLAIN: Final = "the reference has none of them in a drafter"


def _text(facts: Facts) -> Facts:
    text = facts.section("text_config").filled(gemma4.DEFAULTS)
    # The reference wants a vocabulary of 0 for the embeddings that a drafter has not.
    return text.overruled({"vocab_size_per_layer_input": 1})


def tensors(root: Mount, facts: Facts) -> None:
    """Layers, the projections from and to the model it helps, and its sparse head."""
    s = gemma4.sizes(_text(facts), drafter=True)
    sparse = facts.flag("use_ordered_embeddings", False)
    # The sparse head gathers rows of the table itself, which packed codes would not survive.
    gemma4.stack(root / "model", s, table=Kind.GATE if sparse else Kind.EMBEDDING)
    root.head("lm_head", s.vocab, s.hidden, tied_to="model.embed_tokens.weight")
    backbone = facts.size("backbone_hidden_size", 1536)
    root.linear("pre_projection", s.hidden, 2 * backbone)
    root.linear("post_projection", backbone, s.hidden)
    if sparse:
        head = root / "masked_embedding"
        head.linear("centroids", facts.size("num_centroids", 2048), s.hidden, kind=Kind.GATE)
        head.tensor("token_ordering", s.vocab, kind=Kind.INDEX)


def spell_config(
    config: dict[str, Any], facts: Facts, *, model_type: str, text_type: str
) -> dict[str, Any]:
    """The config as mlx-vlm's drafter reads it."""
    facts.expect("tie_word_embeddings", True, default=True, why="the runtime reuses the embedding")
    text = facts.section("text_config")
    text.expect("hidden_size_per_layer_input", 0, default=None, why=_PLAIN)
    text.expect("enable_moe_block", False, default=False, why=_PLAIN)
    text.expect("use_double_wide_mlp", False, default=False, why=_PLAIN)
    text.expect(
        "final_logit_softcapping", None, default=None, why="the runtime caps no drafted logits"
    )
    out = spell.start(config)
    out.update(
        model_type=model_type,
        text_config=gemma4.spell_config(_text(facts), model_type=text_type, drafter=True),
        backbone_hidden_size=int(facts.size("backbone_hidden_size", 1536)),
        use_ordered_embeddings=facts.flag("use_ordered_embeddings", False),
        num_centroids=int(facts.size("num_centroids", 2048)),
        centroid_intermediate_top_k=int(facts.size("centroid_intermediate_top_k", 32)),
        tie_word_embeddings=True,
    )
    out["text_config"]["vocab_size_per_layer_input"] = 0
    return out
