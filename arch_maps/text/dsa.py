"""DeepSeek's sparse attention: an indexer that chooses which tokens a query attends to."""

from __future__ import annotations

from typing import Any, Final

from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount

_KINDS: Final = {"F": "full", "S": "shared"}


def indexer(layer: Mount, facts: Facts) -> None:
    """The indexer below a layer's attention: queries from the query latent, one key per token."""
    hidden = facts.size("hidden_size")
    heads, size = facts.size("index_n_heads"), facts.size("index_head_dim")
    at = layer / "self_attn.indexer"
    at.linear("wq_b", heads * size, facts.size("q_lora_rank"))
    at.linear("wk", size, hidden)
    at.norm("k_norm", size, bias=True)
    at.linear("weights_proj", heads, hidden, kind=Kind.GATE)


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


def pooled_indexer(layer: Mount, facts: Facts) -> None:
    """An indexer that chooses whole pools of tokens, by keys that a gate averages over a pool."""
    indexer(layer, facts)
    size = facts.size("index_head_dim")
    at = layer / "self_attn.indexer"
    at.tensor("index_kpool_compress_ape", facts.size("index_kpool"), size, kind=Kind.STATE)
    gate = (size, facts.size("hidden_size"))
    at.tensor("index_kpool_compress_gate", *gate, kind=Kind.STATE)


def choosers(facts: Facts, *, leading: bool = True) -> list[str]:
    """Which layers choose tokens ("full"), and which take the last choice over ("shared").

    ``leading`` where the first layer must choose.
    """
    layers = facts.count("num_hidden_layers")
    kinds = facts.data.get("indexer_types") or facts.data.get("index_topk_pattern")
    if kinds is None:
        every = int(facts.size("index_topk_freq", 1))
        start = int(facts.size("index_skip_topk_offset", 2))
        places = (max(index - start + 1, 0) % every for index in range(layers))
        return ["shared" if place else "full" for place in places]
    named = [_KINDS.get(kind, kind) for kind in kinds]
    unled = leading and named[:1] != ["full"]
    if len(named) != layers or set(named) - set(_KINDS.values()) or unled:
        facts.problem(
            f"config.json: {facts.path}indexer_types must list {layers} layers as full or shared"
            + (", the first of them full" if leading else "")
        )
        return ["full"] * layers
    return named
