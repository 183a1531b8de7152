"""The Qwen4-Exp text stack: Qwen3.5's layers between gated residual streams, and n-gram tables.

Attention chooses blocks of tokens (QSA). Some layers add embeddings of hashed n-grams (PLE), whose
table has a prime number of rows for each of its heads and comes in parts of equal size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from arch_maps.facts import Dim, Facts
from arch_maps.ops import Slice
from arch_maps.rules import Kind, Mount
from arch_maps.text import moe, qwen3_5, qwen3_5_moe

DEFAULTS: Final[Mapping[str, int]] = MappingProxyType(
    {"num_key_value_heads": 2, "num_experts": 512, "num_experts_per_tok": 10}
)
"""What the reference takes, where its Qwen3.5 takes something else."""
MAX_TABLES: Final = 4096
_CHOOSING: Final = ("full_attention", "indexed_attention", "qwen_sparse_attention")
"""The release's, transformers' and the runtime's name of layers that attend to chosen tokens."""
_DRAFTER: Final = (
    "multi-token-prediction layers are a drafter of their own, not part of this checkpoint"
)
_RESIDUALS: Final = ("attn_hyper_connection", "mlp_hyper_connection")


def read(text: Facts) -> Facts:
    """The section as Qwen3.5's parts read it: defaults filled in, kinds of layers by one name."""
    filled = text.filled(DEFAULTS)
    kinds = filled.data.get("layer_types")
    if not isinstance(kinds, list):
        return filled
    named = ["full_attention" if kind in _CHOOSING else kind for kind in kinds]
    unknown = sorted({str(kind) for kind in named} - {"full_attention", "linear_attention"})
    if unknown:
        text.problem(f"config.json: {text.path}layer_types has {', '.join(unknown)}")
    return filled.overruled({"layer_types": named})


def stack(at: Mount, facts: Facts, s: qwen3_5.Sizes, *, fused: bool, whole: bool) -> None:
    """Embedding, decoder layers and the mixer of the streams; there is no final norm.

    ``fused``: experts in one tensor; ``whole``: n-gram tables in one.
    """
    feed_forward = qwen3_5_moe.feed_forward(facts, fused=fused)
    tables = table_layers(facts, s)
    at.embedding("embed_tokens", s.vocab, s.hidden)
    for index, layer in at.layers("layers", len(s.layer_types)):
        if s.layer_types[index] == "full_attention":
            _choosing_attention(layer / "self_attn", facts, s)
        else:
            qwen3_5.gated_delta_net(layer / "linear_attn", s)
        feed_forward(layer, s)
        if index in tables:
            _ngrams(layer / "ple", facts, s, order=tables.index(index), whole=whole)
        for name in _RESIDUALS:
            _gated_residual(layer / name, facts, s)
    _gated_residual(at / "hyper_connection_mixer", facts, s, inject=False)


def drop_mtp(root: Mount, facts: Facts, s: qwen3_5.Sizes, *, fused: bool) -> None:
    """Leave out the drafter's layers.

    Releases that split the experts of the model for their quantization leave the drafter's
    ``fused``, or split them too.
    """
    if not facts.data.get("mtp_num_hidden_layers"):
        return
    layers = facts.count("mtp_num_hidden_layers")
    for held in (True,) if fused else (True, False):
        feed_forward = qwen3_5_moe.feed_forward(facts, fused=held)

        def block(at: Mount, feed_forward: qwen3_5.FeedForward = feed_forward) -> None:
            at.linear("fc_embedding", s.hidden, s.hidden)
            at.linear("fc_hidden", s.hidden, s.hidden)
            at.norm("pre_fc_norm_embedding", s.hidden)
            at.norm("pre_fc_norm_hidden", _streams(facts) * s.hidden)
            for _, layer in at.layers("layers", layers):
                _choosing_attention(layer / "self_attn", facts, s)
                feed_forward(layer, s)
                for name in _RESIDUALS:
                    _gated_residual(layer / name, facts, s)
            _gated_residual(at / "hyper_connection_mixer", facts, s, inject=False)

        moe.drop_block(root, "mtp", block, _DRAFTER)
    root.out.drops[:] = {drop.name: drop for drop in root.out.drops}.values()


def _choosing_attention(at: Mount, facts: Facts, s: qwen3_5.Sizes) -> None:
    """Gated attention, and the indexer whose keys are one to a block of tokens."""
    qwen3_5.gated_attention(at, s, offset=0.0)  # the runtime adds one when it runs
    index = at / "indexer"
    heads, size = facts.size("indexer_n_heads"), facts.size("indexer_head_dim")
    index.linear("index_qk_proj", (heads + facts.size("indexer_kv_heads")) * size, s.hidden)
    index.norm("q_layernorm", size)
    index.norm("k_layernorm", size)


def _gated_residual(at: Mount, facts: Facts, s: qwen3_5.Sizes, *, inject: bool = True) -> None:
    """How the streams are mixed into a block's input, and how its output is added to each."""
    streams = _streams(facts)
    width, rank = streams * s.hidden, facts.size("hc_lowrank", 320)
    at.norm("hc_norm", width)
    at.linear("input_mix_weight_down", rank, width)
    at.linear("input_mix_weight_up", width, rank)
    if inject:
        at.linear("block_inject_weight", streams, width, kind=Kind.GATE)


def _ngrams(at: Mount, facts: Facts, s: qwen3_5.Sizes, *, order: int, whole: bool) -> None:
    """Embeddings of hashed n-grams, gated by the streams, and a dilated convolution over them.

    ``order`` counts such layers: each has tables of other sizes.
    """
    width, dim = _streams(facts) * s.hidden, facts.size("ple_embed_dim", s.hidden)
    heads, rows, parts = _tables(facts, order)
    at.linear("key_proj", width, dim)
    at.linear("value_proj", s.hidden, dim)
    for name in ("norm_key", "norm_query", "norm_conv"):
        at.norm(name, width)
    at.conv("conv1d", width, 1, facts.size("ple_conv_kernel_size", 4))
    hashed = at / "ple_embedding"
    hashed.tensor("layer_multipliers", facts.size("ngram_size", 3), kind=Kind.HASH)
    hashed.tensor("ngram_heads_vocab_sizes", heads, kind=Kind.HASH)
    hashed.tensor("ngram_heads_offsets", heads, kind=Kind.HASH)
    part, short = rows // parts, dim // heads
    table = hashed.input("ngram_embedding.weight", rows, short) if whole else None
    for index in range(parts):
        if table is not None:
            made = Slice(table, 0, index * int(part), (index + 1) * int(part))
            hashed.rule(f"ngram_embedding.shards.{index}.weight", made, Kind.EMBEDDING)
        else:
            one = hashed.input(f"ngram_embedding.shard_{index}.weight", part, short)
            hashed.rule(f"ngram_embedding.shards.{index}.weight", one, Kind.EMBEDDING)


def table_layers(facts: Facts, s: qwen3_5.Sizes) -> list[int]:
    """The layers that have n-gram tables, in order; the config counts them from one."""
    found = facts.data.get("ple_layer_ids") or []
    layers = len(s.layer_types)
    ok = isinstance(found, list) and all(type(i) is int and 0 < i <= layers for i in found)
    if not ok or any(s.layer_types[i - 1] != "linear_attention" for i in found):
        facts.problem(
            f"config.json: {facts.path}ple_layer_ids must list layers with linear attention, "
            "counted from one"
        )
        return []
    return sorted(i - 1 for i in set(found))


def _streams(facts: Facts) -> Dim:
    return facts.size("hc_count", 4)


def _tables(facts: Facts, order: int) -> tuple[Dim, Dim, int]:
    """Heads of the n-gram tables of a layer, their rows together, and parts these come in."""
    size, each = facts.size("ngram_size", 3), facts.size("heads_per_ngram", 8)
    heads = Dim((int(size) - 1) * int(each), "(ngram_size-1)*heads_per_ngram")
    if not 0 < heads * (order + 1) <= MAX_TABLES:
        facts.problem(
            f"config.json: {facts.path}ngram_size and heads_per_ngram make {int(heads)} n-gram "
            "tables for each layer"
        )
        return Dim(1, heads.label), Dim(1, "rows"), 1
    base = int(facts.size("ngram_vocab_size_base", 20_000_000))
    multiple = int(facts.size("make_ngram_vocab_size_divisible_by", 128))
    taken = int(heads) * order
    total = sum(primes_from(base, taken + int(heads))[taken:])
    rows = Dim(-(-total // multiple) * multiple, "n-gram rows")
    parts = facts.count("split_ngram_parts", 512)
    if rows % parts:
        facts.problem(
            f"config.json: {facts.path}split_ngram_parts ({parts}) does not divide {int(rows)} "
            "rows of n-grams; the runtime shares out what is left over otherwise"
        )
        parts = 1
    return heads, rows, parts


@lru_cache(maxsize=16)
def primes_from(low: int, count: int) -> tuple[int, ...]:
    """The first ``count`` primes not below ``low``, by sieving one stretch after another."""
    found: list[int] = []
    start, length = max(low, 2), max(4096, 32 * count)
    while len(found) < count:
        sieve = np.ones(length, dtype=bool)
        for divisor in range(2, math.isqrt(start + length) + 1):
            first = max(divisor * divisor, -(-start // divisor) * divisor)
            sieve[first - start :: divisor] = False
        found += (np.flatnonzero(sieve) + start).tolist()
        start += length
    return tuple(found[:count])


def spell_config(config: dict[str, Any], text: Facts, *, tied: bool) -> None:
    """Write the stack's facts as mlx-vlm reads them, in place.

    Layers that choose tokens keep the release's name, which transformers reads as well.
    """
    facts = read(text)
    s = qwen3_5_moe.sizes(facts)
    tables = table_layers(facts, s)
    facts.expect(
        "hidden_act", "silu", default="silu", why="the runtime computes SiLU whatever it says"
    )
    facts.expect(
        "indexer_kv_heads", 1, default=None, why="the indexer has one key for a block of tokens"
    )
    gate = facts.data.get("output_gate_type") or "silu"
    if gate not in ("sigmoid", "silu"):
        facts.problem(
            f"config.json: {facts.path}output_gate_type is {gate!r}; only sigmoid and silu are "
            "computed"
        )
    budget, ratio = facts.size("indexer_budget"), facts.size("indexer_compress_ratio")
    if budget % ratio:
        facts.problem(
            f"config.json: {facts.path}indexer_budget must be a multiple of indexer_compress_ratio"
        )
    if s.value_heads % s.key_heads:
        facts.problem(
            f"config.json: {facts.path}linear_num_value_heads ({int(s.value_heads)}) must be a "
            f"multiple of linear_num_key_heads ({int(s.key_heads)})"
        )
    if tables and facts.data.get("eos_token_id") in (None, []):
        facts.problem(
            f"config.json does not state {facts.path}eos_token_id, at which n-grams begin anew"
        )
    qwen3_5.spell_rope(config, facts, rotary=1.0)
    count = moe.expert_count(facts)
    moe.spell_expert_count(config, count)
    config.update(
        model_type="qwen4_exp_text",
        layer_types=list(s.layer_types),
        **qwen3_5.attention_sizes(s),
        hidden_act="silu",
        output_gate_type=gate,
        tie_word_embeddings=tied,
        rms_norm_eps=facts.number("rms_norm_eps", 1e-6),
        max_position_embeddings=int(facts.size("max_position_embeddings", 32768)),
        num_experts_per_tok=int(facts.size("num_experts_per_tok")),
        moe_intermediate_size=int(facts.size("moe_intermediate_size", 512)),
        shared_expert_intermediate_size=int(facts.size("shared_expert_intermediate_size", 512)),
        norm_topk_prob=facts.flag("norm_topk_prob", True),
        hc_count=int(_streams(facts)),
        hc_lowrank=int(facts.size("hc_lowrank", 320)),
        indexer_n_heads=int(facts.size("indexer_n_heads")),
        indexer_kv_heads=1,
        indexer_head_dim=int(facts.size("indexer_head_dim")),
        indexer_budget=int(budget),
        indexer_compress_ratio=int(ratio),
        ple_layer_ids=[index + 1 for index in tables],
        ple_embed_dim=int(facts.size("ple_embed_dim", s.hidden)),
        ple_conv_kernel_size=int(facts.size("ple_conv_kernel_size", 4)),
        ngram_size=int(facts.size("ngram_size", 3)),
        heads_per_ngram=int(facts.size("heads_per_ngram", 8)),
        ngram_vocab_size_base=int(facts.size("ngram_vocab_size_base", 20_000_000)),
        make_ngram_vocab_size_divisible_by=int(
            facts.size("make_ngram_vocab_size_divisible_by", 128)
        ),
        split_ngram_parts=int(facts.size("split_ngram_parts", 512)),
        seed=facts.data.get("seed", 1234),
    )
    config.pop("ple_storage", None)
