"""BERT encoders: sentence embedding models, and sequence or token classifiers."""

from __future__ import annotations

from typing import Any

from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import bert

_TENSORFLOW = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    names = facts.data.get("architectures") or ["BertModel"]
    base = root.at(source=layout["encoder"], target="")
    bert.encoder(base, facts)
    hidden = facts.size("hidden_size")
    if "BertForSequenceClassification" in names:
        base.linear("pooler.dense", hidden, hidden, bias=True)
    else:
        bert.drop_pooler(base, facts)
    if _classifies(facts):
        root.linear("classifier", bert.labels(facts), hidden, bias=True)
    _drop_lm_head(root, facts, f"{base.source}.embeddings.word_embeddings.weight".lstrip("."))


def _classifies(facts: Facts) -> bool:
    names = set(facts.data.get("architectures") or ())
    return bool(names & {"BertForSequenceClassification", "BertForTokenClassification"})


def _drop_lm_head(root: Mount, facts: Facts, table: str) -> None:
    hidden, vocab = facts.size("hidden_size"), facts.size("vocab_size")
    head = root / "cls.predictions"
    head.drop("bias", bert.LM, vocab)
    head.drop("decoder.bias", bert.LM, vocab)
    head.drop("decoder.weight", bert.LM, vocab, hidden, same_as=table)
    head.drop("transform.dense.weight", bert.LM, hidden, hidden)
    head.drop("transform.dense.bias", bert.LM, hidden)
    head.drop("transform.LayerNorm.weight", bert.LM, hidden)
    head.drop("transform.LayerNorm.bias", bert.LM, hidden)
    root.drop("cls.seq_relationship.weight", bert.LM, 2, hidden)
    root.drop("cls.seq_relationship.bias", bert.LM, 2)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = bert.spelled_config(config, facts, pad=0)
    if not _classifies(facts):  # its head, if it had one, has been dropped
        out["architectures"] = ["BertModel"]
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
