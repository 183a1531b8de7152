"""DeepSeek's sparse attention: an indexer that chooses which tokens a query attends to."""

from __future__ import annotations

from typing import Any

from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount
from arch_maps.text import mla


def indexer(layer: Mount, facts: Facts) -> None:
    """The indexer below a layer's attention: queries from the query latent, one key per token."""
    s = mla.sizes(facts)
    heads, size = facts.size("index_n_heads"), facts.size("index_head_dim")
    at = layer / "self_attn.indexer"
    at.linear("wq_b", heads * size, facts.size("q_lora_rank"))
    at.linear("wk", size, s.hidden)
    at.norm("k_norm", size, bias=True)
    at.linear("weights_proj", heads, s.hidden, kind=Kind.GATE)


def spell_config(config: dict[str, Any], facts: Facts, *, interleaved: bool) -> None:
    """Write the indexer's facts, in place; ``interleaved`` is how its rotary pairs lie."""
    why = "the runtimes rotate the indexer's pairs otherwise"
    facts.expect("indexer_rope_interleave", interleaved, None, default=interleaved, why=why)
    config.update(
        index_n_heads=int(facts.size("index_n_heads")),
        index_head_dim=int(facts.size("index_head_dim")),
        index_topk=int(facts.size("index_topk")),
        indexer_rope_interleave=interleaved,
    )
