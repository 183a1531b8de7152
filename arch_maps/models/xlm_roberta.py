"""XLM-RoBERTa encoders: BGE-M3, multilingual E5, Arctic Embed 2 and other embedding models."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import bert

_POOLER = "the runtime pools token states itself and has no pooler layer"
_LM = "the runtime has no masked-language-model head; it embeds sentences"


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    hidden, vocab = facts.size("hidden_size"), facts.size("vocab_size")
    base = root.at(source=layout["encoder"], target="")
    bert.encoder(base, facts)
    base.drop("pooler.dense.weight", _POOLER, hidden, hidden)
    base.drop("pooler.dense.bias", _POOLER, hidden)
    if "XLMRobertaForSequenceClassification" in (facts.data.get("architectures") or ()):
        labels = len(facts.data.get("id2label") or ()) or int(facts.size("num_labels", 2))
        root.linear("classifier.dense", hidden, hidden, bias=True)
        root.linear("classifier.out_proj", labels, hidden, bias=True)
    table = base.input("embeddings.word_embeddings.weight").name
    head = root / "lm_head"
    head.drop("bias", _LM, vocab)
    head.drop("decoder.weight", _LM, vocab, hidden, same_as=table)
    head.drop("decoder.bias", _LM, vocab)
    head.drop("dense.weight", _LM, hidden, hidden)
    head.drop("dense.bias", _LM, hidden)
    head.drop("layer_norm.weight", _LM, hidden)
    head.drop("layer_norm.bias", _LM, hidden)


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
        pad_token_id=1 if facts.data.get("pad_token_id") is None else facts.data["pad_token_id"],
        hidden_act="gelu",
    )
    labels = facts.data.get("id2label")
    if isinstance(labels, dict):
        out["num_labels"] = len(labels)
    return out


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
