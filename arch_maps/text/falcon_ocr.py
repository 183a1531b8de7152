"""Falcon's early-fusion decoder: patches and tokens in one stack, norms without weights."""

from __future__ import annotations

from typing import Any, Final

from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount

TOKENS: Final = {
    "img_id": 227,
    "eos_id": 11,
    "image_cls_token_id": 244,
    "image_reg_1_token_id": 245,
    "image_reg_2_token_id": 246,
    "image_reg_3_token_id": 247,
    "image_reg_4_token_id": 248,
    "img_end_id": 230,
}
"""The release's token ids, which the runtime takes when none are stated."""


def stack(root: Mount, facts: Facts) -> None:
    """Embedding, layers, norm and head; ``root`` is the whole release."""
    vocab, hidden = facts.size("vocab_size"), facts.size("dim")
    heads, head = facts.size("n_heads"), facts.size("head_dim")
    wide, keys, inner = heads * head, facts.size("n_kv_heads") * head, facts.size("ffn_dim")
    body = root.at(source="", target="language_model.model")
    # Never packed: the runtime gives its logits the type of this table.
    table = body.input("tok_embeddings.weight", vocab, hidden)
    body.rule("embed_tokens.weight", table, Kind.POSITION)
    for _, layer in body.layers("layers", facts.count("n_layers")):
        attention = layer.at(source="attention", target="self_attn")
        attention.linear("wqkv", wide + 2 * keys, hidden)
        attention.linear("wo", hidden, wide)
        attention.tensor("sinks", heads, kind=Kind.STATE)
        mlp = layer.at(source="feed_forward", target="mlp")
        # Gate and up rows alternate. The runtime parts them, on every load.
        mlp.linear("w13", 2 * inner, hidden)
        mlp.linear("w2", hidden, inner)
    body.norm("norm", hidden)
    body.tensor("freqs_cis_golden", heads, head // 4, 2, kind=Kind.POSITION)
    head_at = root.at(source="", target="language_model")
    head_at.rule("lm_head.weight", head_at.input("output.weight", vocab, hidden), Kind.HEAD)


def spell_config(config: dict[str, Any], facts: Facts) -> None:
    """Write every setting that the runtime reads, in place."""
    for name in ("vocab_size", "dim", "n_heads", "n_kv_heads", "head_dim", "ffn_dim"):
        config[name] = int(facts.size(name))
    config.update(
        n_layers=facts.count("n_layers"),
        norm_eps=facts.number("norm_eps", 1e-5),
        max_seq_len=int(facts.size("max_seq_len", 8192)),
        rope_theta=facts.number("rope_theta", 10000.0),
    )
    for name, value in TOKENS.items():
        config[name] = facts.data.get(name, value)
