"""XLM-RoBERTa encoders: BGE-M3, multilingual E5, Arctic Embed 2 and other embedding models."""

from __future__ import annotations

from typing import Any

from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import bert


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    hidden, vocab = facts.size("hidden_size"), facts.size("vocab_size")
    base = root.at(source=layout["encoder"], target="")
    bert.encoder(base, facts)
    bert.drop_pooler(base, facts)
    if "XLMRobertaForSequenceClassification" in (facts.data.get("architectures") or ()):
        root.linear("classifier.dense", hidden, hidden, bias=True)
        root.linear("classifier.out_proj", bert.labels(facts), hidden, bias=True)
    table = base.input("embeddings.word_embeddings.weight").name
    head = root / "lm_head"
    head.drop("bias", bert.LM, vocab)
    head.drop("decoder.weight", bert.LM, vocab, hidden, same_as=table)
    head.drop("decoder.bias", bert.LM, vocab)
    head.drop("dense.weight", bert.LM, hidden, hidden)
    head.drop("dense.bias", bert.LM, hidden)
    head.drop("layer_norm.weight", bert.LM, hidden)
    head.drop("layer_norm.bias", bert.LM, hidden)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return bert.spelled_config(config, facts, pad=1) | {"hidden_act": "gelu"}


MAP = ArchMap(
    model_type="xlm-roberta",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("encoder", {"encoder": ""}), Layout("with a head", {"encoder": "roberta"})),
    runtimes=("mlx-vlm",),
    parts=("text.bert",),
    pipeline_tag="sentence-similarity",
    remarks=("The pooler and the masked-language-model head have no place in the runtime.",),
)
