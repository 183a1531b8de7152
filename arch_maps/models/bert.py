"""BERT encoders: sentence embedding models, and sequence or token classifiers."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import bert

_POOLER = "the runtime pools token states itself and has no pooler layer"
_TENSORFLOW = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
_LM = "the runtime has no masked-language-model head; it embeds sentences"


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    names = facts.data.get("architectures") or ["BertModel"]
    base = root.at(source=layout["encoder"], target="")
    bert.encoder(base, facts)
    hidden = facts.size("hidden_size")
    if "BertForSequenceClassification" in names:
        base.linear("pooler.dense", hidden, hidden, bias=True)
    else:
        base.drop("pooler.dense.weight", _POOLER, hidden, hidden)
        base.drop("pooler.dense.bias", _POOLER, hidden)
    if _classifies(facts):
        labels = len(facts.data.get("id2label") or ()) or int(facts.size("num_labels", 2))
        root.linear("classifier", labels, hidden, bias=True)
    _drop_lm_head(root, facts, f"{base.source}.embeddings.word_embeddings.weight".lstrip("."))


def _classifies(facts: Facts) -> bool:
    names = set(facts.data.get("architectures") or ())
    return bool(names & {"BertForSequenceClassification", "BertForTokenClassification"})


def _drop_lm_head(root: Mount, facts: Facts, table: str) -> None:
    hidden, vocab = facts.size("hidden_size"), facts.size("vocab_size")
    head = root / "cls.predictions"
    head.drop("bias", _LM, vocab)
    head.drop("decoder.bias", _LM, vocab)
    head.drop("decoder.weight", _LM, vocab, hidden, same_as=table)
    head.drop("transform.dense.weight", _LM, hidden, hidden)
    head.drop("transform.dense.bias", _LM, hidden)
    head.drop("transform.LayerNorm.weight", _LM, hidden)
    head.drop("transform.LayerNorm.bias", _LM, hidden)
    root.drop("cls.seq_relationship.weight", _LM, 2, hidden)
    root.drop("cls.seq_relationship.bias", _LM, 2)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    facts.expect("hidden_act", "gelu", default="gelu", why="the runtime computes exact GELU")
    facts.expect(
        "position_embedding_type",
        "absolute",
        default="absolute",
        why="the runtime adds absolute positions",
    )
    facts.expect("is_decoder", False, default=False, why="the runtime attends both ways")
    out = spell.start(config)
    out.update(
        type_vocab_size=int(facts.size("type_vocab_size", 2)),
        layer_norm_eps=facts.number("layer_norm_eps", 1e-12),
        max_position_embeddings=int(facts.size("max_position_embeddings", 512)),
        pad_token_id=facts.data.get("pad_token_id") or 0,
    )
    if not _classifies(facts):  # its head, if it had one, has been dropped
        out["architectures"] = ["BertModel"]
    labels = facts.data.get("id2label")
    if isinstance(labels, dict):
        out["num_labels"] = len(labels)
    return out


MAP = ArchMap(
    model_type="bert",
    tensors=_tensors,
    config=_config,
    layouts=(
        Layout("encoder", {"encoder": ""}),
        Layout("with a head", {"encoder": "bert"}),
        Layout("from TensorFlow", {"encoder": "bert"}, _TENSORFLOW),
    ),
    runtimes=("mlx-vlm",),
    parts=("text.bert",),
    pipeline_tag="sentence-similarity",
    remarks=("The pooler and the masked-language-model head have no place in the runtime.",),
)
