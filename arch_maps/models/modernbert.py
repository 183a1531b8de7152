"""ModernBERT encoders: Nomic and GTE ModernBERT embedding models."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import modernbert
from arch_maps.text.windows import FULL, SLIDING

_LM = "the runtime has no masked-language-model head; it embeds sentences"


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    hidden, vocab = facts.size("hidden_size"), facts.size("vocab_size")
    names = facts.data.get("architectures") or ()
    if any("Classification" in str(name) for name in names):
        facts.problem("config.json: classifiers of this type are not mapped")
    at = root.at(source=layout["encoder"], target="")
    modernbert.encoder(at, facts)
    table = at.input("embeddings.tok_embeddings.weight").name
    root.drop("decoder.weight", _LM, vocab, hidden, same_as=table)
    root.drop("decoder.bias", _LM, vocab)
    root.drop("head.dense.weight", _LM, hidden, hidden)
    root.drop("head.norm.weight", _LM, hidden)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    why = "the runtime computes GELU"
    facts.expect("hidden_activation", "gelu", default="gelu", why=why)
    out = spell.start(config)
    by_kind = facts.data.get("rope_parameters") or {}
    layers = facts.count("num_hidden_layers")
    every = int(facts.size("global_attn_every_n_layers", 3))
    kinds = facts.data.get("layer_types")
    if kinds is None:
        kinds = [SLIDING if index % every else FULL for index in range(layers)]
    full = [index for index, kind in enumerate(kinds) if kind == FULL]
    every = full[1] if len(full) > 1 else layers
    if full != list(range(0, layers, every)):
        facts.problem(
            f"config.json: layer_types has full attention at layers {full}; the runtime places it "
            "at every n-th layer only, from the first on"
        )
    thetas = {}
    for kind, name, default in (
        (FULL, "global_rope_theta", 160000.0),
        (SLIDING, "local_rope_theta", 10000.0),
    ):
        stated = by_kind.get(kind) or {}
        if stated.get("rope_type", "default") != "default":
            facts.problem(f"config.json: {kind} scales positions; the runtime does not")
        thetas[name] = stated.get("rope_theta") or facts.number(name, default)
    out.update(
        **thetas,
        layer_types=list(kinds),
        global_attn_every_n_layers=every,
        local_attention=int(facts.size("local_attention", 128)),
        norm_eps=facts.number("norm_eps", 1e-5),
        norm_bias=facts.flag("norm_bias", False),
        attention_bias=facts.flag("attention_bias", False),
        mlp_bias=facts.flag("mlp_bias", False),
        max_position_embeddings=int(facts.size("max_position_embeddings", 8192)),
        rope_parameters={
            FULL: {"rope_type": "default", "rope_theta": thetas["global_rope_theta"]},
            SLIDING: {"rope_type": "default", "rope_theta": thetas["local_rope_theta"]},
        },
    )
    return out


MAP = ArchMap(
    model_type="modernbert",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("encoder", {"encoder": ""}), Layout("with a head", {"encoder": "model"})),
    runtimes=("mlx-vlm",),
    parts=("text.modernbert",),
    pipeline_tag="sentence-similarity",
    remarks=(
        "The masked-language-model head has no place in the runtime.",
        "mlx-vlm computes GELU's tanh form where the releases mean the exact one.",
    ),
)
